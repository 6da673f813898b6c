"""Resharding: the cheapest sequence of collectives that takes a value from one spec to another.

The specs of a value are the nodes of a graph and the moves its edges; a resharding is a shortest path. The
planner's costs and the lowering both read their collectives from here, so they cannot disagree. The graph
depends on the rank and the mesh only; a shape decides which specs divide it and, through its bytes, what the
moves cost.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from autopar.cluster import Mesh
from autopar.errors import SpecError
from autopar.ir.program import Equation
from autopar.sharding.moves import FREE_KINDS, Axes, Step, spec_graph
from autopar.sharding.registry import COLLECTIVES
from autopar.sharding.strategies import Strategy
from autopar.spec import Spec

__all__ = [
    "NOTHING",
    "CommunicationCost",
    "Resharding",
    "Step",
    "follow",
    "plan_reshard",
    "reshard_matrix",
    "sent_inside",
]

MOVE_S = 1e-12
"""Seconds added to every move, so that of equally priced reshardings the one with fewer moves wins."""


class CommunicationCost(Protocol):
    """The part of the cost model that resharding needs; frozen and hashable."""

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        ...

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        """Seconds of a collective whose larger buffer (input or output) has ``nbytes`` on each device."""
        ...

    def memory_s(self, nbytes: float) -> float:
        """Seconds to move ``nbytes`` through device memory."""
        ...


@dataclass(frozen=True, slots=True)
class Resharding:
    """A path between two specs.

    Attributes:
        steps: the moves, in order; empty when nothing moves.
        cost_s: their seconds; infinite, without steps, where there is no path.
        specs: the source, and the spec after each move; axes of size 1 are left out.
        monoid: how the terms of a partial value combine.
    """

    steps: tuple[Step, ...]
    cost_s: float
    specs: tuple[Spec, ...]
    monoid: str

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps)) or ("nothing" if math.isfinite(self.cost_s) else "inadmissible")


NOTHING = Resharding((), 0.0, (), "sum")
"""What sends nothing."""


def sent_inside(eqn: Equation, strategy: Strategy, cost: CommunicationCost) -> Resharding:
    """The collectives in the local rule of an equation, and their seconds."""
    function = COLLECTIVES.get(eqn.primitive.name)
    if function is None:
        return NOTHING
    steps = function(eqn.outputs[0], strategy, cost.mesh.sizes)
    return Resharding(steps, sum(cost.collective_s(step.kind, step.nbytes, step.axes) for step in steps), (), "sum")


def plan_reshard(
    source: Spec,
    target: Spec,
    shape: tuple[int, ...],
    itemsize: int,
    cost: CommunicationCost,
    monoid: str = "sum",
) -> Resharding:
    """The cheapest moves from ``source`` to ``target`` on the mesh of ``cost``; memoised.

    Args:
        source: the spec that the value has.
        target: the spec that it must get.
        shape: the global shape; every spec on the way must divide it.
        itemsize: bytes per element.
        cost: prices the moves.
        monoid: how the terms of a partial value combine: sum, max, min, and, or.

    Returns:
        The resharding. Its cost is infinite when a spec does not divide the shape, or when ``target`` is
        partial over an axis that ``source`` is not and the monoid is no sum.

    Raises:
        SpecError: a spec has another rank than the shape, names an axis twice, or one that the mesh has not.
    """
    problem = _problem(tuple(shape), itemsize, cost.mesh, monoid)
    return _path(problem, _node(source, problem, cost.mesh), _node(target, problem, cost.mesh), cost)


def follow(
    specs: Sequence[Spec], shape: tuple[int, ...], itemsize: int, cost: CommunicationCost, monoid: str
) -> Resharding:
    """The moves along ``specs``, each one move from the one before; the other arguments as for ``plan_reshard``.

    Raises:
        SpecError: no single move leads from one of the specs to the next.
    """
    problem = _problem(tuple(shape), itemsize, cost.mesh, monoid)
    graph = spec_graph(problem.rank, problem.axes, monoid)
    nodes = [_node(spec, problem, cost.mesh) for spec in specs]
    steps, cost_s = [], 0.0
    for source, target in ((a, b) for a, b in pairwise(nodes) if a != b):
        edge = graph.edge[source, target]
        if edge < 0:
            what = f"no single move leads from {graph.specs[source]} to {graph.specs[target]}"
            where = f"a value of shape {shape}, mesh {cost.mesh}"
            raise SpecError(what, where=where, fix="plan this program again")
        steps.append(graph.move(source, target, problem.nbytes))
        cost_s += _price_s(*graph.prices[graph.price_of[edge]], problem.nbytes, cost)
    return Resharding(tuple(steps), cost_s, tuple(graph.specs[node] for node in nodes), monoid)


@functools.lru_cache(maxsize=256)
def reshard_matrix(
    sources: tuple[Spec, ...],
    targets: tuple[Spec, ...],
    shape: tuple[int, ...],
    itemsize: int,
    cost: CommunicationCost,
    monoid: str = "sum",
) -> np.ndarray:
    """The seconds of the cheapest resharding of every source to every target; memoised, read-only.

    Arguments and errors as for ``plan_reshard``.

    Returns:
        Seconds, (sources, targets), infinite where inadmissible.
    """
    problem = _problem(shape, itemsize, cost.mesh, monoid)
    rows, columns = ([_node(spec, problem, cost.mesh) for spec in specs] for specs in (sources, targets))
    distances = _distances(problem, cost)
    matrix = distances.total_s[np.ix_(distances.place[rows], distances.place[columns])]
    matrix.flags.writeable = False
    return matrix


@dataclass(frozen=True, slots=True)
class _Problem:
    """All that resharding costs depend on: many shapes share one problem.

    Attributes:
        rank, axes, monoid: the spec graph.
        fits: which of its nodes divide the shape, as the bytes of a boolean array.
        nbytes: the size of the whole value.
    """

    rank: int
    axes: Axes
    monoid: str
    fits: bytes
    nbytes: int


@dataclass(frozen=True, eq=False, slots=True)
class _Distances:
    """Costs between the nodes that divide the shape; the last row and column stand for all others.

    Attributes:
        nodes: the graph's nodes that divide the shape.
        place: the row of each node of the graph.
        price_s: seconds of each of the graph's prices, and at the end infinity for no move.
        total_s: seconds of the cheapest path.
    """

    nodes: np.ndarray
    place: np.ndarray
    price_s: np.ndarray
    total_s: np.ndarray


@functools.lru_cache(maxsize=1 << 14)
def _problem(shape: tuple[int, ...], itemsize: int, mesh: Mesh, monoid: str) -> _Problem:
    axes = tuple((name, size) for name, size in mesh.axes if size > 1)
    graph = spec_graph(len(shape), axes, monoid)
    fits = (np.array(shape, np.int64) % graph.parts == 0).all(axis=1)
    return _Problem(len(shape), axes, monoid, fits.tobytes(), itemsize * math.prod(shape))


@functools.lru_cache(maxsize=1 << 16)
def _node(spec: Spec, problem: _Problem, mesh: Mesh) -> int:
    """The graph's node of a spec; axes of size 1 do nothing, so they are left out."""
    names = dict(problem.axes)
    used, known = (*spec.axes, *spec.partial), set(mesh.names)
    if len(spec.dims) != problem.rank or len(set(used)) < len(used) or not known.issuperset(used):
        raise SpecError(
            f"spec {spec} does not lay out a value of {problem.rank} dimensions",
            where=f"mesh {mesh}",
            fix="give each dimension its axes, and name each axis of the mesh at most once",
        )
    dims = tuple(tuple(axis for axis in dim if axis in names) for dim in spec.dims)
    graph = spec_graph(problem.rank, problem.axes, problem.monoid)
    return graph.index[Spec(dims, spec.partial & set(names))]


@functools.lru_cache(maxsize=64)
def _distances(problem: _Problem, cost: CommunicationCost) -> _Distances:
    """Cheapest paths between all nodes by Floyd and Warshall's recursion: https://doi.org/10.1145/367766.368168."""
    graph = spec_graph(problem.rank, problem.axes, problem.monoid)
    nodes = np.flatnonzero(np.frombuffer(problem.fits, bool))
    count = len(nodes)
    place = np.full(len(graph.specs), count)
    place[nodes] = np.arange(count)
    price_s = np.array([*(_price_s(*price, problem.nbytes, cost) for price in graph.prices), np.inf])
    source, target = place[graph.ends].T
    inside = (source < count) & (target < count)
    total_s = np.full((count + 1, count + 1), np.inf)
    total_s[source[inside], target[inside]] = price_s[graph.price_of[:-1][inside]]
    through = np.empty_like(total_s)
    total_s[range(count), range(count)] = 0.0
    for node in range(count):
        np.add(total_s[:, node, None], total_s[node], out=through)
        np.minimum(total_s, through, out=total_s)
    return _Distances(nodes, place, price_s, total_s)


def _price_s(kind: str, axes: tuple[str, ...], shards: int, nbytes: int, cost: CommunicationCost) -> float:
    local = nbytes / shards
    return MOVE_S + (cost.memory_s(local) if kind in FREE_KINDS else cost.collective_s(kind, local, axes))


@functools.lru_cache(maxsize=1 << 16)
def _path(problem: _Problem, source: int, target: int, cost: CommunicationCost) -> Resharding:
    graph, distances = spec_graph(problem.rank, problem.axes, problem.monoid), _distances(problem, cost)
    rest_s = distances.total_s[:, distances.place[target]]
    cost_s = float(rest_s[distances.place[source]])
    steps, here, passed = [], source, [graph.specs[source]]
    while math.isfinite(cost_s) and here != target:
        move_s = distances.price_s[graph.price_of[graph.edge[here, distances.nodes]]]
        after = int(distances.nodes[np.argmin(move_s + rest_s[:-1])])
        steps.append(graph.move(here, after, problem.nbytes))
        here = after
        passed.append(graph.specs[here])
    return Resharding(tuple(steps), cost_s, tuple(passed), problem.monoid)
