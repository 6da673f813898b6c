"""What runs once per microbatch, and the dataflow questions that its cutting asks."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autopar.ir.program import Atom, Equation, Program, Value


@dataclass(frozen=True, eq=False)
class Body:
    """The equations that run once per microbatch, and what they exchange with the rest of the step.

    Attributes:
        program: the equations; its outputs are what the rest of the step reads.
        batch: inputs that differ between microbatches.
        origin: for values made before the loop, what each was mostly made from (casts, copies for a recomputation).
        gradients: outputs that the new state needs; the others are reported (the loss).
        owners: the parameter that a gradient alone updates, where there is one.
    """

    program: Program
    batch: frozenset[Value]
    origin: Mapping[Value, Value]
    gradients: frozenset[Value]
    owners: Mapping[Value, Value]


def free_values(equations: Sequence[Equation], but: Collection[Atom] = ()) -> frozenset[Value]:
    """Values that depend on nothing, nor on any of ``but``: masks of iotas, broadcasts of constants."""
    free: set[Value] = set()
    others = set(but)
    for eqn in equations:
        if all(value in free for value in eqn.operands) and others.isdisjoint(eqn.outputs):
            free.update(eqn.outputs)
    return frozenset(free)


def ancestors(equations: Sequence[Equation], values: Collection[Value]) -> set[Equation]:
    """The equations that some of ``values`` depend on."""
    needed, found = set(values), set()
    for eqn in reversed(equations):
        if any(value in needed for value in eqn.outputs):
            found.add(eqn)
            needed.update(eqn.operands)
    return found


def line_of(body: Body, value: Value) -> Iterator[Value]:
    """A value and what it was made from, back to an argument of the step."""
    while value in body.origin:
        yield value
        value = body.origin[value]
    yield value
