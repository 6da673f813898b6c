"""The index of a maximum or minimum, written so that it can be found in parts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax

from autopar.ir.program import Atom, Equation, Program
from autopar.lowering.time.iteration import Writer


def findable_in_parts(program: Program) -> Program:
    """The program with the first index of the extreme value in place of ``argmax`` and ``argmin``.

    Neither is a total that parts can be added to; but the extreme value is, and so is the least index of a value that
    equals it. What is not a number counts as extreme, as it does in JAX.
    """
    if not any(eqn.primitive.name in EXTREMES for eqn in program.equations):
        return program
    names = dict.fromkeys((v.name for eqn in program.equations for v in (*program.inputs, *eqn.outputs)), 1)
    writer, env = Writer(names), {}
    for eqn in program.equations:
        inputs = [env.get(atom, atom) for atom in eqn.inputs]
        if eqn.primitive.name in EXTREMES:
            env[eqn.outputs[0]] = _first_index(writer, eqn, inputs)
        else:
            writer.equations.append(replace(eqn, inputs=tuple(inputs)))
    outputs = tuple(env.get(atom, atom) for atom in program.outputs)
    return replace(program, equations=tuple(writer.equations), outputs=outputs)


EXTREMES: dict[str, Callable[..., Any]] = {"argmax": jnp.max, "argmin": jnp.min}


def _first_index(writer: Writer, eqn: Equation, inputs: list[Atom]) -> Atom:
    (axis,), dtype = eqn.params["axes"], eqn.params["index_dtype"]

    def find(x: Any) -> Any:
        extreme = EXTREMES[eqn.primitive.name](x, axis=axis, keepdims=True)
        here = (x == extreme) | (x != x)
        index = lax.broadcasted_iota(dtype, x.shape, axis)
        return jnp.min(jnp.where(here, index, jnp.iinfo(dtype).max), axis=axis)

    (found,) = writer.write(find, inputs, eqn)
    return found
