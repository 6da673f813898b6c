"""Prices and bytes of a graph's units: what every choice computes, and what it keeps in memory."""

from dataclasses import dataclass

import numpy as np

from autopar.cost import CostModel, Work, flops_of, fusible
from autopar.cost.liveness import kept_values, read_by_products
from autopar.cost.measured import HEAVY, MeasuredCost, local_call
from autopar.cost.model import LocalCall
from autopar.ir.program import Equation, Value
from autopar.ir.regions import IN_PLACE, LOOP_STACK
from autopar.planner.graph import Graph, Group, Unit
from autopar.planner.space import Port, Space
from autopar.sharding.reshard import sent_inside
from autopar.sharding.strategies import Strategy


@dataclass(frozen=True, eq=False)
class Residence:
    """A value in memory: ``nbytes`` of the whole value over equations [start, stop), laid out as ``unit`` chooses.

    A ``copy`` (a view, or what one equation gathers for itself) is not needed where the value has its layout already,
    which depends on two choices at once: it counts as far as it is larger than the smallest layout.
    """

    unit: Unit
    port: Port
    start: int
    stop: int
    nbytes: float
    value: Value
    copy: bool = False


class Pricing:
    """Computation seconds of every choice of every unit.

    Fusion: a chain of elementwise equations pays memory traffic only for the values that must exist in memory:
    those that a contraction, reduction or gather makes or reads, and those that live across one.
    """

    def __init__(self, graph: Graph, space: Space, cost: CostModel) -> None:
        self.graph, self.space, self.cost = graph, space, cost
        self._parts: dict[int, np.ndarray] = {}
        self._vectors: dict[tuple[object, ...], np.ndarray] = {}
        self._shards: dict[int, np.ndarray] = {}
        self.materialised = frozenset(value for value in graph.groups if self._materialised(value))

    def shards(self, port: Port) -> np.ndarray:
        """Pieces per choice, float64 (choices,)."""
        found = self._shards.get(id(port))
        if found is None:
            sizes = self.space.sizes
            found = self._shards[id(port)] = np.array([spec.shards(sizes) for spec in port], dtype=float)
        return found

    def _materialised(self, value: Value) -> bool:
        position = self.graph.producer.get(value)
        if position is None or not fusible(self.graph.program.equations[position].primitive.name):
            return True
        groups = self.graph.groups[value]
        if len(groups) > 1 or groups[0].anchor is not None:
            return True
        return any(self._reads_memory(use.position) for use in groups[0].uses)

    def _reads_memory(self, position: int) -> bool:
        equations = self.graph.program.equations
        if position >= len(equations):
            return True
        name = equations[position].primitive.name
        return not fusible(name) and not name.startswith("reduce_")

    def vector(self, unit: Unit) -> np.ndarray:
        """Seconds of each choice in one step; units of one class share the array."""
        if unit.kind in ("cluster", "equation"):
            once = self._cluster(unit) if unit.kind == "cluster" else self._equation(unit)
            times = self.graph.times[unit.position]
            return once if times == 1 else self._vectors.setdefault(("times", times, id(once)), once * times)
        n = self.space.size(unit)
        return self._vectors.setdefault(("zero", n), np.zeros(n))

    def _cluster(self, unit: Unit) -> np.ndarray:
        graph, equations = self.graph, self.graph.program.equations
        members = [equations[i] for i in unit.equations]
        made = {value for eqn in members for value in eqn.outputs}
        read = {atom for eqn in members for atom in eqn.operands if atom.shape == unit.shape and atom not in made}
        touched = [value for value in made | read if value in self.materialised or value not in graph.groups]
        nbytes = sum(value.nbytes for value in touched)
        key = ("cluster", unit.shape, nbytes)
        found = self._vectors.get(key)
        if found is None:
            shards = self.shards(self.space.specs(unit.shape))
            found = self._vectors[key] = self.cost.memory_s(1.0) * nbytes / shards
        return found

    def _split_parts(self, unit: Unit) -> np.ndarray:
        """By how much each strategy divides the work: the axes that split a factor."""
        rule = self.graph.rules[unit.position]
        found = self._parts.get(id(rule))
        if found is None:
            sizes = self.space.sizes
            parts = [
                np.prod([sizes[axis] for axis, split in s.splits if isinstance(split, str)], dtype=float)
                for s in self.space.strategies(rule)
            ]
            found = self._parts[id(rule)] = np.array(parts)
        return found

    def _equation(self, unit: Unit) -> np.ndarray:
        eqn, rule = self.graph.program.equations[unit.position], self.graph.rules[unit.position]
        touched = tuple(self._in_memory(eqn, k) for k in range(len(eqn.inputs) + len(eqn.outputs)))
        key = ("equation", id(rule), eqn.primitive.name, touched)
        found = self._vectors.get(key)
        if found is None:
            found = self._vectors[key] = self._work(unit, eqn, touched)
        return found

    def _in_memory(self, eqn: Equation, k: int) -> bool:
        """Whether the equation moves its k-th operand (or result, after those) through memory.

        Stacked results of a loop are written where they are made; once more the stack is filled with zeros before the
        loop, a slice's bytes for each iteration (seen in libtpu 0.0.52's schedule of a scan over layers).
        """
        atom = (*eqn.inputs, *eqn.outputs)[k]
        moves = k == 0 if eqn.primitive is LOOP_STACK else eqn.primitive not in IN_PLACE
        return moves and isinstance(atom, Value) and atom in self.materialised

    def _work(self, unit: Unit, eqn: Equation, touched: tuple[bool, ...]) -> np.ndarray:
        chosen = self.space.strategies(self.graph.rules[unit.position])
        flops = flops_of(eqn) / self._split_parts(unit)
        nbytes = np.zeros(len(chosen))
        for k, atom in enumerate((*eqn.inputs, *eqn.outputs)):
            if touched[k] and isinstance(atom, Value):
                specs = [(*s.inputs, *s.outputs)[k] for s in chosen]
                nbytes += atom.nbytes / self.shards(self.space.intern(specs))
        dtype = str(eqn.outputs[0].dtype) if eqn.outputs else "float32"
        name = eqn.primitive.name
        calls = self._calls(eqn, chosen)
        works = [Work(name, f, b, dtype, c) for f, b, c in zip(flops, nbytes, calls, strict=True)]
        return np.array([self.cost.compute_s(work) for work in works]) + self._sent_s(eqn, chosen)

    def _sent_s(self, eqn: Equation, chosen: tuple[Strategy, ...]) -> np.ndarray:
        """Seconds of the collectives inside an equation, by strategy."""
        return np.array([sent_inside(eqn, strategy, self.cost).cost_s for strategy in chosen])

    def _calls(self, eqn: Equation, chosen: tuple[Strategy, ...]) -> list[LocalCall | None]:
        """The equation at the shapes of every strategy, for a cost model that times it."""
        grouped = eqn.params.get("feature_group_count", 1) * eqn.params.get("batch_group_count", 1) > 1
        if not isinstance(self.cost, MeasuredCost) or eqn.primitive.name not in HEAVY or grouped:
            return [None] * len(chosen)
        dtypes = [str(atom.aval.dtype) for atom in eqn.inputs]
        found = []
        for strategy in chosen:
            pairs = zip(strategy.inputs, eqn.inputs, strict=True)
            shapes = [spec.complete.local_shape(atom.aval.shape, self.space.sizes) for spec, atom in pairs]
            found.append(local_call(eqn.primitive, eqn.params, shapes, dtypes))
        return found


def residences(graph: Graph, space: Space, materialised: frozenset[Value], rounds_products: bool) -> list[Residence]:
    """Where every value that needs memory lives, and for how long; state lives throughout.

    Args:
        graph: the units.
        space: their ports.
        materialised: the values that need a buffer.
        rounds_products: whether what only matrix products read is kept as bfloat16.
    """
    equations = graph.program.equations
    end = len(equations)
    steps = [(eqn.primitive.name, tuple(eqn.operands), eqn.outputs) for eqn in equations]
    rounded = read_by_products(steps, (a for a in graph.program.outputs if isinstance(a, Value)))

    def nbytes(value: Value) -> float:
        narrow = rounds_products and value in rounded and value.itemsize == 4 and value not in given
        return value.nbytes / (2 if narrow else 1)

    given = set(graph.program.inputs)
    kept = kept_values(((fusible(name), inputs, outputs) for name, inputs, outputs in steps), nbytes)
    until: dict[Value, int] = {}
    for value, groups in graph.groups.items():
        last = max(_needed(group) for group in groups)
        for root in kept.get(value, (value,)):
            until[root] = max(until.get(root, 0), last)
    state_outputs = {graph.program.outputs[o] for _, o in graph.state}
    found = []
    for value in graph.groups:
        unit = graph.unit(value)
        if unit is None or value not in materialised:
            continue
        if value in until and value not in state_outputs:
            born, last = (0, end) if value in given else (graph.producer[value], until[value])
            found.append(Residence(unit, space.output(unit, value), born, last + 1, nbytes(value), value))
    return [*found, *_views(graph, space, materialised)]


def _views(graph: Graph, space: Space, materialised: frozenset[Value]) -> list[Residence]:
    return [
        Residence(
            unit=group.anchor,
            port=space.specs(value.shape),
            start=group.uses[0].position,
            stop=group.uses[-1].position + 1,
            nbytes=value.nbytes,
            value=value,
            copy=True,
        )
        for value, groups in graph.groups.items()
        for group in groups
        if value in materialised and group.anchor is not None and group.anchor.kind == "view"
    ]


def _needed(group: Group) -> int:
    """Until when the group needs the value itself rather than its own copy."""
    return group.uses[-1].position if group.anchor is None else group.uses[0].position


def copies(graph: Graph, space: Space) -> list[Residence]:
    """What equations gather for themselves: operands in the layout that they need, while they run."""
    found = []
    for value, groups in graph.groups.items():
        for use in (use for group in groups for use in group.uses):
            reader = graph.reader(use)
            if reader is not None and reader.kind == "equation" and reader is not graph.unit(value):
                port = space.input(reader, use)
                found.append(Residence(reader, port, use.position, use.position + 1, value.nbytes, value, copy=True))
    return found
