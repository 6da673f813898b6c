"""The dataflow of a program, cut into the units that get a decision each. Knows no mesh.

*Clusters.* Elementwise equations of one shape that feed each other with no contraction in between share one
spec: nothing is gained by moving a value inside such a run. A value that stays live across a contraction (the
residual stream, an activation kept for the backward pass) may be laid out anew at each later group of uses.

*Groups.* The uses of a value are grouped by where in the program they stand. The uses of a group share one
layout, the group's *anchor*: the producer itself, a cluster, or a *view* of its own (the copy that the query, key and
value projections all read is gathered once).

*Free equations* depend on no argument (masks of iotas, broadcasts of constants): every consumer makes the
piece that it needs.
"""

import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import numpy as np

from autopar.cost import fusible
from autopar.ir.program import Constant, Equation, Program, Value
from autopar.ir.regions import AS_MADE, LOOP_CARRY, LOOP_EXIT, LOOP_STACK, FlatProgram, flatten_regions
from autopar.planner.linear import useful_linear_groups
from autopar.sharding.factors import ShardingRule, letters
from autopar.sharding.lookup import RuleBook

HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "while"})
SIBLING_GAP = 4
"""Contractions that may stand between two uses that share a view (a backward pass alternates two gradients)."""


@dataclass(eq=False)
class Unit:
    """What gets one decision: an equation of its own, a cluster, an argument, or a view.

    Attributes:
        kind: "equation", "cluster", "input", "view" or "output".
        position: where in the program it stands (first equation of a cluster); inputs stand at -1.
        equations: its members, in program order.
        value: the value of an input, view or output.
        shape: the shape whose specs a cluster, input, view or output chooses from.
    """

    kind: str
    position: int
    shape: tuple[int, ...]
    equations: list[int] = field(default_factory=list)
    value: Value | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """One operand of one equation; the results of the program are the operands of one more, at the end."""

    position: int
    operand: int


@dataclass(eq=False)
class Group:
    """Uses of one value that read it in one layout.

    Attributes:
        uses: the operands that read it, in program order.
        anchor: the unit whose layout they read; None for that of the producer, or of the only reader.
    """

    uses: list[Use]
    anchor: Unit | None = None


@dataclass(frozen=True, eq=False)
class Graph:
    """The units of a program and how values run between them.

    Attributes:
        program: the program.
        book: where its rules are from.
        rules: the rule of every equation (one that replicates where there is none).
        unit_of: the unit of every equation, by position; None for free equations.
        units: all units in program order, inputs first, views last.
        inputs: the unit of every program input.
        outputs: the unit of every result: that of its argument for state, else one of its own.
        state: pairs (argument, result) that share a layout, so that the next step takes what this one returns.
        groups: for each used value, its groups in program order.
        producer: position of the equation that makes a value (absent for inputs).
        free: whether an equation is free, by position.
        unruled: the equations whose primitive has no rule.
        times: how often each equation runs in a step.
        ties: pairs of units that must share a layout (the two ends of a loop's carry).
    """

    program: Program
    book: RuleBook
    rules: tuple[ShardingRule, ...]
    unit_of: tuple[Unit | None, ...]
    units: tuple[Unit, ...]
    inputs: dict[Value, Unit]
    outputs: tuple[Unit | None, ...]
    state: tuple[tuple[int, int], ...]
    groups: dict[Value, list[Group]]
    producer: dict[Value, int]
    free: tuple[bool, ...]
    unruled: tuple[Equation, ...]
    times: tuple[int, ...]
    ties: tuple[tuple[Unit, Unit], ...]

    def unit(self, value: Value) -> Unit | None:
        """The unit that makes a value; None if it is free."""
        position = self.producer.get(value)
        return self.inputs[value] if position is None else self.unit_of[position]

    def reader(self, use: Use) -> Unit | None:
        """The unit that reads an operand; None if it is free."""
        if use.position == len(self.unit_of):
            return self.outputs[use.operand]
        return self.unit_of[use.position]

    def monoid(self, value: Value) -> str:
        """How the terms of the value combine where it is partial."""
        position = self.producer.get(value)
        return "sum" if position is None else self.rules[position].monoid


def build_graph(program: Program, state: tuple[tuple[int, int], ...], book: RuleBook | None = None) -> Graph:
    """Lays regions flat and finds rules, free equations, clusters, groups and views.

    Args:
        program: a program.
        state: pairs (argument, result) that must share a layout.
        book: the rules that were looked up before.
    """
    return _Builder(flatten_regions(program), book or RuleBook()).build(state)


class _Builder:
    """The steps of ``build_graph``, which share the tables below."""

    def __init__(self, flat: FlatProgram, book: RuleBook) -> None:
        self.flat, self.program, self.book = flat, flat.program, book
        program = flat.program
        self.eqns = program.equations
        self.rules = tuple(map(book.rule, self.eqns))
        self.unruled = tuple(eqn for eqn in self.eqns if book.find(eqn) is None)
        self.producer = {value: i for i, eqn in enumerate(self.eqns) for value in eqn.outputs}
        self.uses: dict[Value, list[Use]] = {}
        for i, eqn in enumerate(self.eqns):
            for k, atom in enumerate(eqn.inputs):
                if isinstance(atom, Value):
                    self.uses.setdefault(atom, []).append(Use(i, k))
        self.heavy = [i for i, eqn in enumerate(self.eqns) if eqn.primitive.name in HEAVY]
        self.free = self._free()
        self.totals = self._totals()
        self.rules = useful_linear_groups(program, self.rules, self.totals, book)
        self.carrier = self._carriers()
        self.parent = list(range(len(self.eqns)))

    def build(self, state: tuple[tuple[int, int], ...]) -> Graph:
        groups = {value: self._groups(value, uses) for value, uses in self.uses.items() if not self._is_free(value)}
        for value, value_groups in groups.items():
            for group in value_groups:
                self._merge(value, group)
        unit_of, units = self._units()
        inputs = {value: Unit("input", -1, value.shape, value=value) for value in self.program.inputs}
        views: list[Unit] = []
        for value, value_groups in groups.items():
            made_by = inputs[value] if value in inputs else unit_of[self.producer[value]]
            for group in value_groups:
                group.anchor = self._anchor(value, group, unit_of, made_by)
                if group.anchor is not None and group.anchor.kind == "view":
                    views.append(group.anchor)
        outputs = self._outputs(groups, inputs, {o: self.program.inputs[i] for i, o in state})
        results = [unit for unit in outputs if unit is not None and unit.kind == "output"]
        return Graph(
            program=self.program,
            book=self.book,
            rules=self.rules,
            unit_of=tuple(unit_of),
            units=(*inputs.values(), *units, *views, *results),
            inputs=inputs,
            outputs=outputs,
            state=state,
            groups=groups,
            producer=self.producer,
            free=self.free,
            unruled=self.unruled,
            times=self.flat.times,
            ties=tuple((_unit(unit_of, a), _unit(unit_of, b)) for a, b in self.flat.ties),
        )

    def _outputs(
        self, groups: dict[Value, list[Group]], inputs: dict[Value, Unit], argument_of: dict[int, Value]
    ) -> tuple[Unit | None, ...]:
        """The unit of every result; adds the use of the value that it is."""
        end = len(self.eqns)
        units: list[Unit | None] = []
        for k, atom in enumerate(self.program.outputs):
            if not isinstance(atom, Value) or self._is_free(atom):
                units.append(None)
                continue
            groups.setdefault(atom, []).append(Group([Use(end, k)]))
            fixed = argument_of.get(k)
            units.append(inputs[fixed] if fixed is not None else Unit("output", end, atom.shape, value=atom))
        return tuple(units)

    # -- classification

    def _is_free(self, value: Value) -> bool:
        position = self.producer.get(value)
        return position is not None and self.free[position]

    def _free(self) -> tuple[bool, ...]:
        free: list[bool] = []
        for eqn in self.eqns:
            cheap = fusible(eqn.primitive.name) and len(eqn.outputs) == 1 and not eqn.bodies
            ready = all(v in self.producer and free[self.producer[v]] for v in eqn.operands)
            free.append(cheap and ready)
        return tuple(free)

    def _elementwise(self, position: int) -> bool:
        """One result; every operand is of its shape or broadcast to it dimension by dimension."""
        eqn, rule = self.eqns[position], self.rules[position]
        if len(eqn.outputs) != 1 or rule.reduce or not fusible(eqn.primitive.name):
            return False
        result = rule.results[0]
        if result != letters(eqn.outputs[0].shape) or not result:
            return False
        return all(
            not layout
            or (len(layout) == len(result) and all(a in ((), b) for a, b in zip(layout, result, strict=True)))
            for layout in rule.operands
        ) and any(layout == result for layout in rule.operands)

    def _totals(self) -> dict[Value, Value]:
        """Carries of loops to which every iteration adds once: the carry inside, and what it becomes."""
        found: dict[Value, Value] = {}
        for repeat, carry in self.flat.ties:
            (before,), (after,) = self.eqns[carry].outputs, self.eqns[repeat].inputs
            readers = self._readers(before)
            if len(readers) == 1 and readers[0].primitive.name in ("add", "add_any") and after in readers[0].outputs:
                found[before] = readers[0].outputs[0]
        return found

    def _readers(self, value: Value) -> list[Equation]:
        """The equations that read a value, but for the exit of the loop that carries it."""
        readers = [self.eqns[use.position] for use in self.uses.get(value, ())]
        return [eqn for eqn in readers if eqn.primitive is not LOOP_EXIT]

    def _carriers(self) -> tuple[bool, ...]:
        """Elementwise equations through which a partial sum may travel from a reduction towards its uses."""
        capable: list[bool] = []
        carrier: list[bool] = []
        for position, eqn in enumerate(self.eqns):
            rule = self.rules[position]
            size = math.prod(eqn.outputs[0].shape) if eqn.outputs else 1  # a transpose carries too
            full = self._masked_term(eqn) or {
                k: atom
                for k, atom in enumerate(eqn.inputs)
                if isinstance(atom, Value) and (math.prod(atom.shape) == size or eqn.primitive is LOOP_STACK)
            }
            carries = any(set(full) == set(group) for group in rule.linear if group)
            carries = carries and all(
                self._is_zero(value)
                or (len(self._readers(value)) == 1 and value in self.producer and capable[self.producer[value]])
                for value in full.values()
            )
            carries = carries or (eqn.primitive is LOOP_CARRY and any(rule.linear))
            carrier.append(carries)
            capable.append(carries or (rule.monoid == "sum" and bool(rule.reduce)))
        return tuple(carrier)

    def _masked_term(self, eqn: Equation) -> dict[int, Value]:
        """What is chosen from by a flag (and what is repeated for it), if a loop then adds it to its total."""
        name = eqn.primitive.name
        readers = self._readers(eqn.outputs[0]) if name in ("select_n", "broadcast_in_dim") else []
        if len(readers) != 1:
            return {}
        if name == "broadcast_in_dim":
            return dict(enumerate(eqn.operands)) if self._masked_term(readers[0]) else {}
        added = readers[0].outputs[0] in self.totals.values()
        return {k: atom for k, atom in enumerate(eqn.inputs) if k and added and isinstance(atom, Value)}

    def _is_zero(self, value: Value) -> bool:
        """Whether a value is known to be made of zeros."""
        if not self._is_free(value) or (eqn := self.eqns[self.producer[value]]).primitive.name != "broadcast_in_dim":
            return False
        return isinstance(eqn.inputs[0], Constant) and not np.any(eqn.inputs[0].value)

    # -- groups

    def _heavy_between(self, start: int, stop: int, value: Value) -> int:
        """Contractions strictly between two positions that do not read ``value``."""
        span = self.heavy[bisect_right(self.heavy, start) : bisect_left(self.heavy, stop)]
        return sum(all(atom is not value for atom in self.eqns[i].inputs) for i in span)

    def _groups(self, value: Value, uses: list[Use]) -> list[Group]:
        """Cuts the uses at the edges of regions and where contractions stand between (which tolerate a small gap).

        A rematerialised block, which starts with a barrier, is a region: it runs long after what it may stand next to.
        """
        born = self.producer.get(value, -1)
        groups: dict[bool, list[Group]] = {True: [], False: []}
        alone: list[Group] = []
        for use in uses:
            primitive = self.eqns[use.position].primitive
            if primitive in AS_MADE or primitive.name == "optimization_barrier":
                alone.append(Group([use]))
                continue
            heavy = primitive.name in HEAVY
            row = groups[heavy]
            since = row[-1].uses[-1].position if row else born
            gap = SIBLING_GAP if heavy else 0
            if row and self._heavy_between(since, use.position, value) <= gap:
                row[-1].uses.append(use)
            else:
                row.append(Group([use]))
        return sorted([*groups[True], *groups[False], *alone], key=lambda group: group.uses[0].position)

    def near(self, value: Value, group: Group) -> bool:
        """Whether the group follows the producer with no contraction in between."""
        born = self.producer.get(value)
        return born is not None and not self._heavy_between(born, group.uses[0].position, value)

    # -- clusters

    def _find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def _clustered(self, position: int) -> bool:
        return self._elementwise(position) and not self.carrier[position] and not self.free[position]

    def _members(self, value: Value, group: Group) -> list[int]:
        """Elementwise readers that read the value at full shape."""
        return [
            use.position
            for use in group.uses
            if self.eqns[use.position].outputs[0].shape == value.shape
            and self.rules[use.position].operands[use.operand] == self.rules[use.position].results[0]
            and self._clustered(use.position)
        ]

    def _merge(self, value: Value, group: Group) -> None:
        """Unites elementwise readers with each other, and with the producer if it is one of them and near."""
        members = self._members(value, group)
        born = self.producer.get(value)
        if members and born is not None and self._clustered(born) and self.near(value, group):
            members.append(born)
        for position in members[1:]:
            a, b = self._find(members[0]), self._find(position)
            self.parent[max(a, b)] = min(a, b)

    def _units(self) -> tuple[list[Unit | None], list[Unit]]:
        unit_of: list[Unit | None] = []
        clusters: dict[int, Unit] = {}
        units: list[Unit] = []
        for position, eqn in enumerate(self.eqns):
            shape = eqn.outputs[0].shape if eqn.outputs else ()
            if self.free[position]:
                unit_of.append(None)
                continue
            root = self._find(position)
            if self._clustered(position):
                unit = clusters.get(root)
                if unit is None:
                    unit = clusters[root] = Unit("cluster", position, shape)
                    units.append(unit)
            else:
                unit = Unit("equation", position, shape)
                units.append(unit)
            unit.equations.append(position)
            unit_of.append(unit)
        return unit_of, units

    def _anchor(self, value: Value, group: Group, unit_of: list[Unit | None], made_by: Unit | None) -> Unit | None:
        readers = {id(unit): unit for use in group.uses if (unit := unit_of[use.position]) is not None}
        members = self._members(value, group)
        cluster = unit_of[members[0]] if members else None
        if cluster is not None:
            return None if cluster is made_by else cluster
        if (
            len(readers) < 2
            or not value.shape
            or (made_by is not None and made_by.kind == "cluster" and self._elementwise_only(group))
        ):
            return None
        return Unit("view", group.uses[0].position, value.shape, value=value)

    def _elementwise_only(self, group: Group) -> bool:
        return all(fusible(self.eqns[use.position].primitive.name) for use in group.uses)


def _unit(unit_of: list[Unit | None], position: int) -> Unit:
    unit = unit_of[position]
    assert unit is not None
    return unit
