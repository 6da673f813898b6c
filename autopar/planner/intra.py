"""Intra-operator planning: graph and cost model -> solver problem -> choice -> decision for every equation."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autopar.cost import CostModel, rounds_products
from autopar.ir.program import Value
from autopar.planner.graph import Graph, Unit, Use
from autopar.planner.pricing import Pricing, copies, residences
from autopar.planner.space import Port, Space
from autopar.sharding.reshard import reshard_matrix
from autopar.solver import Problem, Usage


@dataclass(frozen=True, eq=False)
class Link:
    """A value on its way between two units, ``times`` a step: what an edge of the solver's problem stands for.

    Where the reader's layout is that of one of the ``others``, in which the same equation reads the value too, it comes
    with that one.
    """

    source: Unit
    target: Unit
    source_port: Port
    target_port: Port
    value: Value
    times: int
    others: tuple[Port, ...] = ()


@dataclass(frozen=True, eq=False)
class Formulation:
    """The solver's problem of a graph, and what its nodes and edges mean.

    Attributes:
        problem: nodes, edges and memory rows.
        units: the unit of each node.
        index: node number by unit.
        links: what every resharding stands for.
        space: choices and ports.
        pricing: computation seconds.
    """

    problem: Problem
    units: tuple[Unit, ...]
    index: Mapping[Unit, int]
    links: tuple[Link, ...]
    space: Space
    pricing: Pricing


def links_of(graph: Graph, space: Space) -> list[Link]:
    """Every way that a value takes between units: producer to anchor, anchor to reader, result to state."""
    found: list[Link] = []
    for value, groups in graph.groups.items():
        unit = graph.unit(value)
        if unit is None:
            continue
        made = space.output(unit, value)
        for group in groups:
            source, port = unit, made
            if group.anchor is not None:
                source, port = group.anchor, space.specs(value.shape)
                found.append(Link(unit, source, made, port, value, _times(graph, group.uses[0])))
            seen: set[tuple[int, int]] = set()
            read: dict[int, tuple[Port, ...]] = {}
            for use in group.uses:
                reader = graph.reader(use)
                if reader is None:
                    continue
                wanted = space.input(reader, use)
                key = (id(reader), id(wanted))
                if key in seen:
                    continue
                seen.add(key)
                others = read.get(use.position, ())
                read[use.position] = (*others, wanted)
                if not (reader is source and wanted is port):
                    found.append(Link(source, reader, port, wanted, value, _times(graph, use), others))
    return found


def _times(graph: Graph, use: Use) -> int:
    return graph.times[use.position] if use.position < len(graph.times) else 1


class Formulator:
    """Turns a graph into a problem, building every matrix once per class of edges."""

    def __init__(self, graph: Graph, cost: CostModel) -> None:
        self.graph, self.cost = graph, cost
        self.space = Space(graph, cost.mesh)
        self.pricing = Pricing(graph, self.space, cost)
        self._matrices: dict[tuple[object, ...], np.ndarray] = {}
        self._sums: dict[tuple[int, ...], np.ndarray] = {}

    def matrix(self, link: Link) -> np.ndarray:
        """Seconds of resharding, (choices of source, choices of target)."""
        value = link.value
        monoid = self.graph.monoid(value)
        ports = map(id, (link.source_port, link.target_port, *link.others))
        key = (*ports, value.shape, value.itemsize, monoid, link.times)
        found = self._matrices.get(key)
        if found is None:
            rows, row_of = _unique(link.source_port)
            columns, column_of = _unique(link.target_port)
            small = reshard_matrix(rows, columns, value.shape, value.itemsize, self.cost, monoid)
            if monoid != "sum":  # only a partial sum may enter a linear equation
                small = np.where([bool(spec.partial) for spec in columns], np.inf, small)
            found = np.ascontiguousarray(small[np.ix_(row_of, column_of)]) * link.times
            for other in link.others:
                found[:, [a == b for a, b in zip(other, link.target_port, strict=True)]] = 0.0
            self._matrices[key] = found
        return found

    def tie(self, a: Unit, b: Unit) -> np.ndarray:
        """Zero where two units choose the same layout, infinite elsewhere."""
        ports = [self.space.output(unit, self.graph.program.equations[unit.position].outputs[0]) for unit in (a, b)]
        key = ("tie", *map(id, ports))
        if key not in self._matrices:
            same = np.array([[one == other for other in ports[1]] for one in ports[0]])
            self._matrices[key] = np.where(same, 0.0, np.inf)
        return self._matrices[key]

    def formulate(
        self,
        limit_bytes: float | None = None,
        allowed: Mapping[Unit, np.ndarray] | None = None,
    ) -> Formulation:
        """The problem, with memory rows under ``limit_bytes`` and only the ``allowed`` choices (bool masks)."""
        units = self.graph.units
        index = {unit: i for i, unit in enumerate(units)}
        links = links_of(self.graph, self.space)
        costs = [self.pricing.vector(unit) for unit in units]
        edges, own = [], {}
        for link in links:
            matrix = self.matrix(link)
            if link.source is link.target:
                own.setdefault(index[link.source], []).append(matrix)
            else:
                edges.append((index[link.source], index[link.target], matrix))
        edges += [(index[a], index[b], self.tie(a, b)) for a, b in self.graph.ties]
        for i, matrices in own.items():
            key = (id(costs[i]), *map(id, matrices))
            if key not in self._sums:
                self._sums[key] = costs[i] + sum(np.diagonal(m) for m in matrices)
            costs[i] = self._sums[key]
        for unit, mask in (allowed or {}).items():
            costs[index[unit]] = np.where(mask, costs[index[unit]], np.inf)
        usages = self._usages(index) if limit_bytes is not None else ()
        problem = Problem(tuple(costs), tuple(edges), usages, limit_bytes)
        return Formulation(problem, units, index, tuple(links), self.space, self.pricing)

    def _usages(self, index: Mapping[Unit, int]) -> tuple[Usage, ...]:
        """Memory rows: residences of one unit over the same equations are one usage."""
        kept = residences(self.graph, self.space, self.pricing.materialised, rounds_products(self.cost))
        kept += copies(self.graph, self.space)
        summed: dict[tuple[int, int, int], np.ndarray] = {}
        for r in kept:
            key = (index[r.unit], r.start, r.stop)
            nbytes = r.nbytes / self.pricing.shards(r.port)
            if r.copy:
                nbytes = nbytes - nbytes.min()
            summed[key] = summed[key] + nbytes if key in summed else nbytes
        return tuple(Usage(node, start, stop, nbytes) for (node, start, stop), nbytes in summed.items())


def _unique(port: Port) -> tuple[Port, np.ndarray]:
    positions: dict[object, int] = {}
    where = np.array([positions.setdefault(spec, len(positions)) for spec in port])
    return tuple(positions), where  # type: ignore[return-value]
