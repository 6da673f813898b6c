"""The program: a flat list of equations over named values, as the rest of autopar sees a traced step."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Value:
    """One array of the program. Two values are the same only if they are the same object.

    Attributes:
        name: unique and stable, readable: ``params/h_0/attn/query/kernel``, ``h_0/attn/softmax:3``.
        aval: its shape and dtype as JAX sees them (``jax.core.ShapedArray``); typed keys keep their key dtype.
    """

    name: str
    aval: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape; a typed key counts as one element."""
        return self.aval.shape

    @property
    def dtype(self) -> Any:
        """Its dtype, which may be a key dtype."""
        return self.aval.dtype

    @cached_property
    def itemsize(self) -> int:
        """Bytes per element (a threefry key: 8)."""
        return itemsize(self.aval.dtype)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole value."""
        return math.prod(self.aval.shape) * self.itemsize

    def __repr__(self) -> str:
        return f"{self.name}:{self.aval.str_short()}"


@dataclass(frozen=True, eq=False)
class Constant:
    """A scalar literal written into an equation."""

    value: Any
    aval: Any

    def __repr__(self) -> str:
        return f"{np.asarray(self.value)}:{self.aval.str_short()}"


Atom = Value | Constant


@dataclass(frozen=True, eq=False)
class Equation:
    """One primitive applied to atoms.

    Attributes:
        primitive: the JAX primitive; ``primitive.name`` keys the rules.
        inputs: operands in order.
        outputs: results in order.
        params: the primitive's parameters, with global shapes.
        name: unique and stable within the program.
        source: the user's ``file:line`` that made it, empty if unknown.
        backward: whether the traced name stack marks it as part of a backward pass (display only).
        bodies: the nested programs of a region (scan, while, cond); empty for every other equation.
    """

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    params: dict[str, Any]
    name: str
    source: str = ""
    backward: bool = False
    bodies: "tuple[Program, ...]" = ()

    @property
    def operands(self) -> Iterator[Value]:
        """The inputs that are values."""
        return (atom for atom in self.inputs if isinstance(atom, Value))

    def __repr__(self) -> str:
        results = ", ".join(map(repr, self.outputs))
        return f"{results} = {self.primitive.name} {' '.join(map(repr, self.inputs))}"


@dataclass(frozen=True, eq=False)
class Program:
    """A flat program in dependency order.

    Attributes:
        inputs: argument leaves, then hoisted constants.
        outputs: result leaves.
        equations: in execution order.
        constants: arrays closed over by the step, bound to the last inputs.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]
    equations: tuple[Equation, ...]
    constants: tuple[Any, ...] = field(default=())

    @property
    def arguments(self) -> tuple[Value, ...]:
        """The inputs that are not hoisted constants."""
        return self.inputs[: len(self.inputs) - len(self.constants)]

    @property
    def n_equations(self) -> int:
        """Equations, those of nested bodies included."""
        return sum(1 + sum(body.n_equations for body in eqn.bodies) for eqn in self.equations)

    def __str__(self) -> str:
        lines = [f"inputs {' '.join(map(repr, self.inputs))}", *map(repr, self.equations)]
        return "\n".join([*lines, f"outputs {' '.join(map(repr, self.outputs))}"])


def itemsize(dtype: Any) -> int:
    """Bytes per element of a NumPy or key dtype."""
    impl = getattr(dtype, "_impl", None)
    if impl is None:
        return np.dtype(dtype).itemsize
    return 4 * int(np.prod(impl.key_shape))


def check(program: Program) -> None:
    """Asserts that every value is defined once, before its uses, and that names are unique."""
    defined: set[int] = set()
    names: set[str] = set()

    def define(value: Value) -> None:
        assert id(value) not in defined, f"{value} is defined twice"
        assert value.name not in names, f"two values are named {value.name}"
        defined.add(id(value))
        names.add(value.name)

    def use(atom: Atom, where: object) -> None:
        assert isinstance(atom, Constant) or id(atom) in defined, f"{atom} is used before it is made: {where}"

    for value in program.inputs:
        define(value)
    for eqn in program.equations:
        for atom in eqn.inputs:
            use(atom, eqn)
        for value in eqn.outputs:
            define(value)
        for body in eqn.bodies:
            check(body)
    for atom in program.outputs:
        use(atom, "the outputs")
