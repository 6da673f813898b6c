"""Writes the program whose runs of alike layers are scans.

    what came before
    stack of each layer's parameter, for all that the layers have of their own
    scan over the layers:  what the backward layers read is stacked
    head and loss
    reverse scan over the layers:  scans what was stacked, stacks the gradients
    slices of the stacked gradients
    what comes after, layer by layer as before

What is outside keeps its names; a value inside is called ``trunk/`` and its name in the first layer, a stack
``trunk/stack/`` and that name.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autopar import compat
from autopar.ir.body import free_values
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.lowering.rolling.needs import Trunk, names_made
from autopar.lowering.rolling.saved import Residual
from autopar.lowering.rolling.trunk import Link
from autopar.lowering.rolling.unit import Carried, Inner, Place, Scanned, Source, Unit, atom_key
from autopar.lowering.time.iteration import Writer, named

NAME = "trunk"


def write_rolled(program: Program, links: Sequence[Link]) -> Program:
    """The program with each of the linked runs as one scan."""
    return _Roller(program, links).program()


class _Roller:
    """The whole program: equations outside, and a scan for each run."""

    def __init__(self, program: Program, links: Sequence[Link]) -> None:
        self.old, self.trunk = program, Trunk(program, links)
        self.free = free_values(program.equations)
        self.maker = {value: eqn for eqn in program.equations for value in eqn.outputs}
        names = [value.name for value in program.inputs]
        names += [name for eqn in self.trunk.outside(program) for name in names_made(eqn)]
        self.writer = Writer(dict.fromkeys(names, 1))
        self.env: dict[Value, Atom] = {}
        self.stacks = _Stacks(self)
        self.constants: list[tuple[Value, Any]] = []

    def program(self) -> Program:
        """The rolled program."""
        at = 0
        for start, unit in self.trunk.loops.items():
            self._outside(at, start)
            _Loop(self, unit).write()
            at = self.trunk.stops[start]
        self._outside(at, len(self.old.equations))
        outputs = tuple(self.read(atom) for atom in self.old.outputs)
        inputs = (*self.old.inputs, *(value for value, _ in self.constants))
        arrays = (*self.old.constants, *(array for _, array in self.constants))
        return Program(inputs, outputs, tuple(self.writer.equations), arrays)

    def _outside(self, start: int, stop: int) -> None:
        for eqn in self.old.equations[start:stop]:
            inputs = tuple(self.read(atom) for atom in eqn.inputs)
            self.writer.equations.append(eqn if inputs == eqn.inputs else replace(eqn, inputs=inputs))

    def read(self, atom: Atom) -> Atom:
        """A value outside the loops."""
        if isinstance(atom, Constant):
            return atom
        value = self.trunk.same.get(atom, atom)
        if value not in self.env:
            if value in self.trunk.unchanging:
                eqn = self.trunk.unchanging[value]
                made = self.writer.keep(eqn, [self.read(a) for a in eqn.inputs], [v.shape for v in eqn.outputs])
                self.env.update(zip(eqn.outputs, made, strict=True))
            elif value in self.trunk.made:
                self.env[value] = self.stacks.part(value)
            else:
                return value
        return self.env[value]


class _Stacks:
    """The values of all layers as one value, the layers its first dimension."""

    def __init__(self, roller: _Roller) -> None:
        self.roller = roller
        self.known: dict[tuple[object, ...], Value] = {}
        self.places: dict[object, list[tuple[Value, int]]] = {}

    def add(self, atoms: Sequence[Atom], stack: Value) -> None:
        """Notes a stack of atoms, that of the first layer first."""
        keys = tuple(map(atom_key, atoms))
        self.known[keys] = stack
        for layer, key in enumerate(keys):
            self.places.setdefault(key, []).append((stack, layer))

    def of(self, atoms: Sequence[Atom]) -> Value:
        """The stack of atoms, made of other stacks and single values if it is not there yet."""
        keys = tuple(map(atom_key, atoms))
        if keys not in self.known:
            self.add(atoms, self._stacked(atoms, keys))
        return self.known[keys]

    def part(self, value: Value) -> Atom:
        """The value of one layer."""
        stack, layer = self.places[value][0]
        like = named(value.name, value.aval, self.roller.maker.get(value))
        return self._write(lambda x: lax.index_in_dim(x, layer, keepdims=False), [stack], like)

    def _write(self, function: Callable[..., Any], operands: Sequence[Atom], like: Equation) -> Any:
        (made,) = self.roller.writer.write(function, operands, like)
        return made

    def _stacked(self, atoms: Sequence[Atom], keys: Sequence[object]) -> Value:
        literals = [atom.value for atom in atoms if isinstance(atom, Constant)]
        return self._literals(literals, atoms[0].aval) if len(literals) == len(atoms) else self._joined(atoms, keys)

    def _literals(self, numbers: Sequence[Any], aval: Any) -> Value:
        value = self.roller.writer.value(f"{NAME}/stack/literals", aval, (len(numbers),))
        self.roller.constants.append((value, np.array([np.asarray(number) for number in numbers], aval.dtype)))
        return value

    def _joined(self, atoms: Sequence[Atom], keys: Sequence[object]) -> Value:
        pieces: list[tuple[Atom, slice | None]] = []
        done = 0
        while done < len(atoms):
            stack, first, count = self._longest(keys[done:])
            if stack is None:
                pieces.append((self.roller.read(atoms[done]), None))
            else:
                pieces.append((stack, slice(first, first + count)))
            done += count

        def join(*arrays: Any) -> Any:
            parts = [part for _, part in pieces]
            return jnp.concatenate([x[None] if k is None else x[k] for x, k in zip(arrays, parts, strict=True)])

        like = named(f"{NAME}/stack/{_name(atoms[0])}", atoms[0].aval)
        return self._write(join, [atom for atom, _ in pieces], like)

    def _longest(self, keys: Sequence[object]) -> tuple[Value | None, int, int]:
        """The stack that has most of the first keys in a row, from which layer on, and how many there."""
        best: tuple[Value | None, int, int] = (None, 0, 1)
        for stack, layer in self.places.get(keys[0], ()):
            count = 1
            while count < len(keys) and (stack, layer + count) in self.places.get(keys[count], ()):
                count += 1
            if best[0] is None or count > best[2]:
                best = stack, layer, count
        return best


class _Loop:
    """One scan over the layers."""

    def __init__(self, roller: _Roller, unit: Unit) -> None:
        self.roller, self.trunk, self.unit = roller, roller.trunk, unit
        self.writer = Writer(roller.writer.names)
        saved = self.trunk.saved[unit]
        self.results, self.entered = sorted(saved.results), sorted(saved.entering)
        self.constants: dict[Atom, Value] = {}
        self.scanned: dict[Value, Value] = {}
        self.own: dict[Value, Atom] = {}
        self.again: dict[tuple[Unit, Residual], Atom] = {}
        self.made: dict[Place, Atom] = {}

    def write(self) -> None:
        """Adds the scan, what its operands need, and notes what it makes."""
        outer, unit, reverse = self.roller.writer, self.unit, self.trunk.reverse[self.unit]
        starts = [self.roller.read(carry.start) for carry in unit.carries]
        body = self._body()
        carries = [self._last(carry.at) for carry in unit.carries]
        kept = [*(unit.made(at) for at in self.results), *(unit.entering(number) for number in self.entered)]
        stacks = [self._all(self.trunk.layers(unit, atoms)) for atoms in kept]
        params = {"num_consts": len(self.constants), "num_carry": len(carries), "length": unit.count}
        params |= {"reverse": reverse, "unroll": 1}
        name = outer.unique(f"{NAME}/{'backward' if reverse else 'forward'}")
        inputs, source = (*self.constants, *starts, *self.scanned), unit.copies[0][0].source
        outputs = (*carries, *(stack for _, stack in stacks))
        scan = Equation(compat.scan_primitive(), inputs, outputs, params, name, source, reverse, (body,))
        outer.equations.append(scan)
        for atoms, stack in stacks:
            self.roller.stacks.add(atoms, stack)

    def _last(self, at: Place) -> Value:
        """What leaves the loop as a carry."""
        value = self.unit.made(at)[-1]
        result = self.roller.writer.value(value.name, value.aval)
        self.roller.env.setdefault(value, result)
        return result

    def _all(self, atoms: tuple[Atom, ...]) -> tuple[tuple[Atom, ...], Value]:
        """The atoms of all layers, and the value that stacks them."""
        shape = (len(atoms), *atoms[0].aval.shape)
        return atoms, self.roller.writer.value(f"{NAME}/stack/{_name(atoms[0])}", atoms[0].aval, shape)

    def _body(self) -> Program:
        """What runs for each layer."""
        unit, live = self.unit, self._live()
        first = self.trunk.layers(unit, unit.copies)[0]
        names = [first[carry.at[0]].outputs[carry.at[1]].name for carry in unit.carries]
        carries = [
            self.writer.value(f"{NAME}/carry/{name}", carry.start.aval)
            for name, carry in zip(names, unit.carries, strict=True)
        ]

        def operand(source: Source) -> Atom:
            if isinstance(source, Inner):
                return self.made[source.at]
            if isinstance(source, Carried):
                return carries[source.number]
            return self._each(unit, source.number) if isinstance(source, Scanned) else self._shared(source)

        for i, (eqn, sources) in enumerate(zip(first, unit.operands, strict=True)):
            if i in live:
                outputs = self._keep(eqn, [operand(source) for source in sources])
                self.made.update({(i, o): value for o, value in enumerate(outputs)})
        leaving = [self.made[carry.at] for carry in unit.carries]
        outputs = (*leaving, *(self.made[at] for at in self.results), *(carries[number] for number in self.entered))
        inputs = (*self.constants.values(), *carries, *self.scanned.values())
        return Program(inputs, outputs, tuple(self.writer.equations))

    def _live(self) -> set[int]:
        """The equations of a copy that a carry or a kept result needs."""
        waiting = [at[0] for at in (*self.results, *(carry.at for carry in self.unit.carries))]
        live: set[int] = set()
        while waiting:
            i = waiting.pop()
            if i not in live:
                live.add(i)
                waiting += [source.at[0] for source in self.unit.operands[i] if isinstance(source, Inner)]
        return live

    def _keep(self, eqn: Equation, inputs: Sequence[Atom]) -> tuple[Value, ...]:
        outputs = tuple(self.writer.value(f"{NAME}/{value.name}", value.aval) for value in eqn.outputs)
        self.writer.equations.append(replace(eqn, inputs=tuple(inputs), outputs=outputs, name=outputs[0].name))
        return outputs

    def _shared(self, atom: Atom) -> Atom:
        """A value that all layers share: a constant of the loop, or made in it if it depends on nothing."""
        if isinstance(atom, Constant):
            return atom
        if atom not in self.own:
            if atom in self.roller.free:
                eqn = self.roller.maker[atom]
                outputs = self._keep(eqn, [self._shared(a) for a in eqn.inputs])
                self.own.update(zip(eqn.outputs, outputs, strict=True))
            else:
                outside = self.roller.read(atom)
                inside = self.constants.get(outside) or self.writer.value(f"{NAME}/{_name(outside)}", outside.aval)
                self.own[atom] = self.constants[outside] = inside
        return self.own[atom]

    def _each(self, unit: Unit, number: int) -> Atom:
        """A scanned operand of a unit: this layer's."""
        origin = self.trunk.origin.get((unit, number))
        return self._part_of(unit, unit.scans[number]) if origin is None else self._residual(*origin)

    def _part_of(self, unit: Unit, copies: Sequence[Atom]) -> Value:
        """This layer's of the atoms that the copies of a unit have."""
        atoms = self.trunk.layers(unit, copies)
        stack = self.roller.stacks.of(atoms)
        if stack not in self.scanned:
            self.scanned[stack] = self.writer.value(f"{NAME}/{_name(atoms[0])}", atoms[0].aval)
        return self.scanned[stack]

    def _residual(self, unit: Unit, residual: Residual) -> Atom:
        """What an earlier loop had in this layer: kept, or computed again from what is kept."""
        if (unit, residual) not in self.again:
            self.again[unit, residual] = self._kept(unit, residual)
        return self.again[unit, residual]

    def _kept(self, unit: Unit, residual: Residual) -> Atom:
        if isinstance(residual, int):
            return self._part_of(unit, unit.entering(residual))
        if residual in self.trunk.saved[unit].results:
            return self._part_of(unit, unit.made(residual))
        i, o = residual

        def operand(source: Source) -> Atom:
            if isinstance(source, Inner):
                alike = source.at[0] in unit.invariant
                return self._shared(unit.made(source.at)[0]) if alike else self._residual(unit, source.at)
            if isinstance(source, Carried):
                return self._residual(unit, source.number)
            return self._each(unit, source.number) if isinstance(source, Scanned) else self._shared(source)

        eqn = self.trunk.layers(unit, unit.copies)[0][i]
        return self._keep(eqn, [operand(source) for source in unit.operands[i]])[o]


def _name(atom: Atom) -> str:
    return atom.name if isinstance(atom, Value) else "literal"
