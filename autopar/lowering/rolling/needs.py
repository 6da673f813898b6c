"""What the program needs of each run of layers that becomes a loop: values that leave it, or that all copies share."""

from collections.abc import Iterable, Sequence
from typing import Any

from autopar.ir.program import Atom, Equation, Program, Value
from autopar.lowering.rolling.saved import Residual, Saved, least_saved
from autopar.lowering.rolling.trunk import Link
from autopar.lowering.rolling.unit import Place, Unit, unit_of


class Trunk:
    """The units of the runs, and what the rest of the program and other units need of each.

    Attributes:
        loops: for each position where a run starts, its unit.
        reverse: whether the copies of a unit run from the last layer down.
        stops: for each of the positions where a run starts, that behind it.
        same: values that all copies of a run make alike, and the one that stands for them.
        unchanging: for each of those that stand for others, the equation that makes it.
        made: for every other value of a run, its unit, copy and place.
        origin: for a scanned operand of a unit (by number) that is a residual of an earlier one, which.
        saved: what the loop of each unit keeps of all layers.
    """

    def __init__(self, program: Program, links: Sequence[Link]) -> None:
        self.same: dict[Value, Value] = {}
        self.unchanging: dict[Value, Equation] = {}
        self.made: dict[Value, tuple[Unit, int, Place]] = {}
        self.loops: dict[int, Unit] = {}
        self.reverse: dict[Unit, bool] = {}
        self.stops = {link.run.start: link.run.stop for link in links}
        for link in links:
            unit = self.loops[link.run.start] = unit_of(program.equations, link.run, self.same)
            self.reverse[unit] = link.direction != links[0].direction
            self._note(unit)
        self.origin = self._origins()
        single = self._needed_alone(program)
        self.saved = {unit: self._saved(unit, single[unit]) for unit in self.reverse}

    def layers(self, unit: Unit, atoms: Sequence[Any]) -> tuple[Any, ...]:
        """From the order in which the copies of a unit run to that of the layers."""
        return tuple(atoms[::-1] if self.reverse[unit] else atoms)

    def outside(self, program: Program) -> Iterable[Equation]:
        """The equations that are in no run."""
        at = 0
        for start, stop in self.stops.items():
            yield from program.equations[at:start]
            at = stop
        yield from program.equations[at:]

    def _note(self, unit: Unit) -> None:
        for i, eqn in enumerate(unit.copies[0]):
            for o, value in enumerate(eqn.outputs):
                copies = unit.made((i, o))
                if i in unit.invariant:
                    self.same.update(dict.fromkeys(copies, value))
                    self.unchanging[value] = eqn
                else:
                    self.made.update({each: (unit, copy, (i, o)) for copy, each in enumerate(copies)})

    def _origins(self) -> dict[tuple[Unit, int], tuple[Unit, Residual]]:
        found: dict[tuple[Unit, int], tuple[Unit, Residual]] = {}
        known: dict[tuple[Atom, ...], tuple[Unit, Residual]] = {}
        for unit in self.reverse:
            for number, atoms in enumerate(unit.scans):
                origin = known.get(self.layers(unit, atoms))
                if origin is not None:
                    found[unit, number] = origin
            for i, eqn in enumerate(unit.copies[0]):
                for o in range(len(eqn.outputs)) if i not in unit.invariant else ():
                    known[self.layers(unit, unit.made((i, o)))] = unit, (i, o)
            for number in range(len(unit.carries)):
                known[self.layers(unit, unit.entering(number))] = unit, number
        return found

    def _needed_alone(self, program: Program) -> dict[Unit, set[Place]]:
        """The results of which others than loops over the same layers need some copy's."""
        found: dict[Unit, set[Place]] = {unit: set() for unit in self.reverse}

        def need(atoms: Iterable[Any]) -> None:
            for atom in atoms:
                value = self.same.get(atom, atom)
                if value in self.unchanging:
                    need(self.unchanging[value].inputs)
                elif value in self.made and not self._leaves(value):
                    unit, _, at = self.made[value]
                    found[unit].add(at)

        for eqn in self.outside(program):
            need(eqn.inputs)
        need(program.outputs)
        for unit in self.reverse:
            for sources in unit.operands:
                need(source for source in sources if isinstance(source, Value))
            need(carry.start for carry in unit.carries)
            for number, atoms in enumerate(unit.scans):
                need(atoms if (unit, number) not in self.origin else ())
        return found

    def _leaves(self, value: Value) -> bool:
        """Whether it is the last copy's value of a carry, with which it leaves the loop."""
        unit, copy, at = self.made[value]
        return copy == unit.count - 1 and any(carry.at == at for carry in unit.carries)

    def _saved(self, unit: Unit, anyway: set[Place]) -> Saved:
        wanted = {residual for owner, residual in self.origin.values() if owner is unit}
        return least_saved(unit, wanted, anyway, {number for owner, number in self.origin if owner is unit})


def names_made(eqn: Equation) -> list[str]:
    """The names of the values that an equation and its bodies make."""
    inner = [name for body in eqn.bodies for name in names_in(body)]
    return [*(value.name for value in eqn.outputs), *inner]


def names_in(program: Program) -> list[str]:
    """The names of all values of a program."""
    made = [name for eqn in program.equations for name in names_made(eqn)]
    return [*(value.name for value in program.inputs), *made]
