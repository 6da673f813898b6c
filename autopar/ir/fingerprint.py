"""A short hash of a program: equal for equal computations, whatever the process, so that a plan knows its program."""

import hashlib
import re

import numpy as np

from autopar.ir.program import Atom, Constant, Program, Value

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def fingerprint(program: Program) -> str:
    """Sixteen hexadecimal digits that change with any equation, shape, name or parameter."""
    digest = hashlib.sha256()
    shown: dict[int, str] = {}

    def text(value: object) -> str:
        key = id(value)
        if key not in shown:
            shown[key] = _ADDRESS.sub("", repr(value))
        return shown[key]

    def atom(a: Atom) -> str:
        return a.name if isinstance(a, Value) else f"{_constant(a)}"

    def add(part: Program) -> None:
        for value in part.inputs:
            digest.update(repr(value).encode())
        for eqn in part.equations:
            params = ",".join(f"{key}={text(value)}" for key, value in eqn.params.items())
            names = " ".join(map(atom, eqn.inputs))
            results = " ".join(map(repr, eqn.outputs))
            digest.update(f"{results}={eqn.primitive.name}[{params}]{names}\n".encode())
            for body in eqn.bodies:
                add(body)
        digest.update(" ".join(map(atom, part.outputs)).encode())

    add(program)
    return digest.hexdigest()[:16]


def _constant(constant: Constant) -> str:
    return f"{np.asarray(constant.value).item()!r}:{constant.aval}"
