"""Copies at the ends of a run that lack an equation, completed so that they are copies like the others.

The gradient of a weight that all layers share is a sum over the layers. The layer that comes first in the backward
pass has nothing to add its share to, so that it lacks an equation that the others have: it gets zero plus its share.
What a layer makes for the next one alone (the next key) the last layer does not make: it does so in vain.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp

from autopar.ir.program import Atom, Equation, Program, Value
from autopar.lowering.rolling.needs import names_in
from autopar.lowering.rolling.repeats import signatures
from autopar.lowering.rolling.unit import Carried, Inner, Place, Run, Scanned, Source, Unit, longest_chain, unit_of
from autopar.lowering.time.iteration import Writer, named

_SUMS = ("add_any", "add")


def completed(program: Program, run: Run) -> Program | None:
    """The program in which the equations before or behind a run are one more copy; None if more is missing there."""
    unit = unit_of(program.equations, run, {})
    before, after = _copy_before(program.equations, run, unit), _copy_after(program.equations, run, unit)
    if before is not None:
        written = _Completion(program, run, unit, before).program()
        start = run.start + len(written.equations) - len(program.equations) - run.period
    elif after is not None:
        written, start = _with_last(program, run, unit, after), run.start
    else:
        return None
    longer = Run(start, run.period, run.count + 1)
    return written if longest_chain(written.equations, longer) == longer else None


def _copy_before(equations: Sequence[Equation], run: Run, unit: Unit) -> list[Equation | None] | None:
    """The equations before a run, one for each of its unit, None where a sum starts; None if they are no copy."""
    start = max(run.start - run.period, 0)
    signs = signatures(equations[start : run.start + run.period])
    wanted, at = signs[run.start - start :], run.start - start - 1
    found: list[Equation | None] = []
    for i in reversed(range(run.period)):
        if at >= 0 and signs[at] == wanted[i]:
            found.append(equations[start + at])
            at -= 1
        elif _starts(unit, i):
            found.append(None)
        else:
            return None
    return found[::-1] if None in found else None


def _starts(unit: Unit, i: int) -> bool:
    """Whether an equation adds a copy's own share to what it has from the copy before."""
    kinds = {type(source) for source in unit.operands[i]}
    return unit.copies[0][i].primitive.name in _SUMS and kinds == {Carried, Inner}


def _copy_after(equations: Sequence[Equation], run: Run, unit: Unit) -> list[Equation | None] | None:
    """The equations behind a run, one for each of its unit, None where only a next copy would read the result."""
    start = run.stop - run.period
    signs = signatures(equations[start : run.stop + run.period])
    for_next, at = _for_next(unit), run.period
    found: list[Equation | None] = []
    for i in range(run.period):
        if at < len(signs) and signs[at] == signs[i]:
            found.append(equations[start + at])
            at += 1
        elif i in for_next:
            found.append(None)
        else:
            return None
    return found if None in found else None


def _for_next(unit: Unit) -> frozenset[int]:
    """The equations that a copy runs for the next one alone."""
    found = set(range(len(unit.operands)))
    for i in reversed(range(len(unit.operands))):
        if not any(carry.at[0] == i for carry in unit.carries) and not _readers(unit, i):
            found.discard(i)
        if _readers(unit, i) - found or any(isinstance(source, Scanned) for source in unit.operands[i]):
            found.discard(i)
    return frozenset(found)


def _readers(unit: Unit, i: int) -> set[int]:
    """The equations of a copy that read a result of its i-th."""
    return {
        j
        for j, sources in enumerate(unit.operands)
        if any(isinstance(source, Inner) and source.at[0] == i for source in sources)
    }


def _with_last(program: Program, run: Run, unit: Unit, after: Sequence[Equation | None]) -> Program:
    """The program with the equations that the last copy lacks; nothing reads their results."""
    writer = Writer(dict.fromkeys(names_in(program), 1))
    own: list[Equation] = []

    def operand(source: Source) -> Atom:
        if isinstance(source, Inner):
            return own[source.at[0]].outputs[source.at[1]]
        if isinstance(source, Carried):
            i, o = unit.carries[source.number].at
            return unit.copies[-1][i].outputs[o]
        assert not isinstance(source, Scanned), "an equation for the next copy alone has no operands of its own"
        return source

    for eqn, like, sources in zip(after, unit.copies[-1], unit.operands, strict=True):
        if eqn is None:
            writer.keep(like, [operand(source) for source in sources], [value.shape for value in like.outputs])
        else:
            writer.equations.append(eqn)
        own.append(writer.equations[-1])
    stop = run.stop + sum(eqn is not None for eqn in after)
    equations = (*program.equations[: run.stop], *own, *program.equations[stop:])
    return replace(program, equations=equations)


class _Completion:
    """The copy before a run, written with its missing sums."""

    def __init__(self, program: Program, run: Run, unit: Unit, before: Sequence[Equation | None]) -> None:
        self.old, self.run, self.unit, self.before = program, run, unit, before
        self.writer = Writer(dict.fromkeys(names_in(program), 1))
        self.zeros = Writer(self.writer.names)
        self.sums: dict[int, Value] = {}

    def program(self) -> Program:
        """The program, longer by a zero and a sum for each missing equation."""
        for i, eqn in enumerate(self.before):
            self.writer.equations.append(self._sum(i) if eqn is None else self._reading(i, eqn, Inner))
        for i, eqn in enumerate(self.unit.copies[0]):
            self.writer.equations.append(self._reading(i, eqn, Carried))
        start = self.run.start - sum(eqn is not None for eqn in self.before)
        earlier, later = self.old.equations[:start], self.old.equations[self.run.start + self.run.period :]
        return replace(self.old, equations=(*earlier, *self.zeros.equations, *self.writer.equations, *later))

    def _sum(self, i: int) -> Equation:
        """Zero plus the share of the copy."""
        like, sources = self.unit.copies[0][i], self.unit.operands[i]
        (own,) = (source.at for source in sources if isinstance(source, Inner))
        share = self._made(own)
        start = lambda: jnp.zeros(share.shape, share.dtype)  # noqa: E731
        (zero,) = self.zeros.write(start, [], named(f"{share.name}/zero", share.aval, like))
        total = self.writer.value(f"{share.name}/sum", share.aval)
        self.sums[i] = total
        inputs = tuple(zero if isinstance(source, Carried) else share for source in sources)
        return replace(like, inputs=inputs, outputs=(total,), name=total.name)

    def _made(self, at: Place) -> Value:
        eqn = self.before[at[0]]
        return self.sums[at[0]] if eqn is None else eqn.outputs[at[1]]

    def _reading(self, i: int, eqn: Equation, kind: type[Inner] | type[Carried]) -> Equation:
        """An equation that reads the sums, not the shares, where the unit reads them from its own copy or the last."""

        def operand(atom: Atom, source: Source) -> Atom:
            if not isinstance(source, kind):
                return atom
            at = source.at if isinstance(source, Inner) else self.unit.carries[source.number].at
            return self.sums.get(at[0], atom)

        return replace(eqn, inputs=tuple(map(operand, eqn.inputs, self.unit.operands[i])))
