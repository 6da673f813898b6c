"""One copy of a run for all: where each of its operands comes from, by dataflow.

literal   the same number in every copy
shared    the same value in every copy: a constant of the loop
inner     made by this copy
carried   made by the copy before; the first copy has it from outside
scanned   another value or number for each copy
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.ir.program import Atom, Constant, Equation, Value

Place = tuple[int, int]
"""A result of a unit: position of the equation, position among its results."""


@dataclass(frozen=True)
class Run:
    """Copies of a unit, one behind the other: ``count`` times ``period`` equations from ``start`` on."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """Position behind its last equation."""
        return self.start + self.period * self.count

    def part(self, first: int, count: int) -> "Run":
        """The run of ``count`` copies from copy ``first`` on."""
        return Run(self.start + first * self.period, self.period, count)


@dataclass(frozen=True)
class Inner:
    """An operand that its own copy makes."""

    at: Place


@dataclass(frozen=True)
class Carried:
    """An operand that the copy before makes: the carry of that number."""

    number: int


@dataclass(frozen=True)
class Scanned:
    """An operand of which every copy has its own: the scanned operand of that number."""

    number: int


Source = Constant | Value | Inner | Carried | Scanned


@dataclass(frozen=True)
class Carry:
    """What passes from copy to copy: the first one has it from outside, the others from the copy before."""

    start: Atom
    at: Place


@dataclass(frozen=True, eq=False)
class Unit:
    """What the copies of a run have in common.

    Attributes:
        copies: the equations of each copy, in the order in which they run.
        operands: for each equation of a copy, the source of each operand.
        carries: what passes from copy to copy.
        scans: for each scanned operand, the atom of each copy.
        invariant: equations whose results are the same in all copies.
    """

    copies: tuple[tuple[Equation, ...], ...]
    operands: tuple[tuple[Source, ...], ...]
    carries: tuple[Carry, ...]
    scans: tuple[tuple[Atom, ...], ...]
    invariant: frozenset[int]

    @property
    def count(self) -> int:
        """Copies."""
        return len(self.copies)

    def made(self, at: Place) -> tuple[Value, ...]:
        """A result, of each copy."""
        return tuple(copy[at[0]].outputs[at[1]] for copy in self.copies)

    def entering(self, number: int) -> tuple[Atom, ...]:
        """What each copy has as a carry."""
        carry = self.carries[number]
        return (carry.start, *self.made(carry.at)[:-1])


def longest_chain(equations: Sequence[Equation], run: Run) -> Run | None:
    """The longest part of a run whose copies are wired alike and pass something on; None if there is none of two."""
    wires = _wires(equations, run)
    best: Run | None = None
    for first in range(run.count - 1):
        if best is not None and run.count - first <= best.count:
            break
        count = _alike(wires[first:])
        if count > 1 and (best is None or count > best.count) and (wires[first + 1][:, 0] == 1).any():
            best = run.part(first, count)
    return best


def _wires(equations: Sequence[Equation], run: Run) -> list[np.ndarray]:
    """For each copy and operand: how many copies before it was made and where; -1 for one from outside."""
    maker: dict[Value, tuple[int, int]] = {}
    found = []
    for copy in range(run.count):
        at = run.start + copy * run.period
        rows: list[tuple[int, int]] = []
        for i, eqn in enumerate(equations[at : at + run.period]):
            for atom in eqn.inputs:
                made = maker.get(atom) if isinstance(atom, Value) else None
                rows.append((copy - made[0], made[1]) if made else (-1, -1))
            maker.update({value: (copy, i << 32 | o) for o, value in enumerate(eqn.outputs)})
        found.append(np.array(rows, dtype=np.int64).reshape(-1, 2))
    return found


def _alike(wires: Sequence[np.ndarray]) -> int:
    """How many copies from the first one on are wired alike."""
    pattern: np.ndarray | None = None
    for copy, wire in enumerate(wires):
        wire = np.where((wire[:, :1] > copy), -1, wire)
        if copy == 0:
            first = wire
        elif pattern is None:
            inner = wire[:, 0] == 0
            if not (first[inner] == wire[inner]).all() or (first[~inner] != -1).any():
                return 1
            pattern = wire
        elif not (wire == pattern).all():
            return copy
    return len(wires)


def unit_of(equations: Sequence[Equation], run: Run, same: Mapping[Value, Value]) -> Unit:
    """The unit of a run that ``longest_chain`` found.

    Args:
        equations: of the whole program.
        run: which of them are copies.
        same: values of earlier runs that are the same in all copies, and the one that stands for them.
    """
    copies = tuple(tuple(equations[at : at + run.period]) for at in range(run.start, run.stop, run.period))
    return _Reading(copies, same).unit()


class _Reading:
    """Reads off the sources of one copy after another operand."""

    def __init__(self, copies: tuple[tuple[Equation, ...], ...], same: Mapping[Value, Value]) -> None:
        self.copies, self.same = copies, same
        self.places: list[dict[Value, Place]] = [
            {value: (i, o) for i, eqn in enumerate(copy) for o, value in enumerate(eqn.outputs)} for copy in copies
        ]
        self.carries: dict[tuple[object, Place], tuple[int, Carry]] = {}
        self.scans: dict[tuple[object, ...], int] = {}
        self.scanned: list[tuple[Atom, ...]] = []
        self.invariant: set[int] = set()

    def unit(self) -> Unit:
        """The unit."""
        operands = []
        for i, together in enumerate(zip(*self.copies, strict=True)):
            slots = zip(*(eqn.inputs for eqn in together), strict=True)
            sources = tuple(self.source(slot) for slot in slots)
            operands.append(sources)
            if self._never_changes(together[0], sources):
                self.invariant.add(i)
        carries = tuple(carry for _, carry in self.carries.values())
        return Unit(self.copies, tuple(operands), carries, tuple(self.scanned), frozenset(self.invariant))

    def source(self, slot: tuple[Atom, ...]) -> Source:
        """The source of the operands that the copies have in one place."""
        first, second = slot[:2]
        if isinstance(first, Value) and first in self.places[0]:
            return Inner(self.places[0][first])
        if isinstance(second, Value) and second in self.places[0]:
            carry = Carry(self._canonical(first), self.places[0][second])
            return Carried(self.carries.setdefault((atom_key(carry.start), carry.at), (len(self.carries), carry))[0])
        atoms = tuple(map(self._canonical, slot))
        keys = tuple(map(atom_key, atoms))
        if len(set(keys)) == 1:
            return atoms[0]
        if keys not in self.scans:
            self.scans[keys] = len(self.scans)
            self.scanned.append(atoms)
        return Scanned(self.scans[keys])

    def _canonical(self, atom: Atom) -> Atom:
        return self.same.get(atom, atom) if isinstance(atom, Value) else atom

    def _never_changes(self, eqn: Equation, sources: Sequence[Source]) -> bool:
        """Whether all copies make the same; a region or a barrier is left where it is."""
        if eqn.bodies or eqn.primitive.name == "optimization_barrier":
            return False
        return all(
            source.at[0] in self.invariant if isinstance(source, Inner) else isinstance(source, Value | Constant)
            for source in sources
        )


def atom_key(atom: Atom) -> object:
    """What tells atoms apart: the value itself, or the bits of a literal."""
    if isinstance(atom, Value):
        return atom
    number = np.asarray(atom.value)
    return number.dtype.str, atom.aval.str_short(), number.tobytes()
