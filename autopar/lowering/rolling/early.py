"""Slices that stand where a layer reads them, moved to where what they slice is made.

``keys[k]`` in layer k is another equation in every layer: it says which part it takes. Before the layers, it makes one
value for each layer, and the layers are alike.
"""

from collections.abc import Iterator
from dataclasses import replace

from autopar.ir.program import Equation, Program, Value
from autopar.lowering.rolling.repeats import contracts

_SLICES = ("slice", "squeeze")


def with_early_slices(program: Program) -> Program:
    """The program with every slice of an input, or of what no contraction led to, right behind what it slices."""
    maker: dict[Value, Equation | None] = dict.fromkeys(program.inputs)
    behind: dict[Equation | None, list[Equation]] = {}
    late: set[Value] = set()
    kept: list[Equation] = []
    for eqn in program.equations:
        operands = set(eqn.operands)
        if contracts(eqn) or eqn.primitive.name == "optimization_barrier" or not late.isdisjoint(operands):
            late.update(eqn.outputs)
        if eqn.primitive.name in _SLICES and len(operands) == 1 and late.isdisjoint(operands):
            behind.setdefault(maker[operands.pop()], []).append(eqn)
        else:
            kept.append(eqn)
        maker.update(dict.fromkeys(eqn.outputs, eqn))

    def following(eqn: Equation | None) -> Iterator[Equation]:
        for each in behind.get(eqn, ()):
            yield each
            yield from following(each)

    equations = [*following(None)]
    for eqn in kept:
        equations += [eqn, *following(eqn)]
    return replace(program, equations=tuple(equations))
