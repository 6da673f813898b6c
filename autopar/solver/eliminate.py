"""Exact elimination: min-sum dynamic programming over any graph of small width.

Eliminating a node replaces every table that mentions it by one table over its neighbours, the minimum over
its strategies (Bertele and Brioschi, *Nonserial Dynamic Programming*, 1972; Dechter, *Bucket elimination*,
1999). Cost is exponential in the width of the order only, so a train step, thin and long, is solved exactly
in time linear in depth.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from autopar.solver.tables import Tables

WIDE_ENTRIES = 4_000_000
JOIN_ENTRIES = 1 << 16
# NumPy's arrays have at most 64 axes, one of which is the eliminated node's.
MOST_AXES = 60


@dataclass(frozen=True)
class Order:
    """An elimination order with what it will take.

    Args:
        steps: ``(node, neighbours in ascending order)``.
        widest_entries: size of the largest table it makes.
        joined_entries: sum over steps of the size of the joined table, as if nothing repeated.
        left: the nodes not eliminated because every next table would be too wide.
    """

    steps: tuple[tuple[int, tuple[int, ...]], ...]
    widest_entries: int
    joined_entries: int
    left: tuple[int, ...]


def elimination_order(sizes: list[int], pairs: list[tuple[int, int]], wide_entries: int = WIDE_ENTRIES) -> Order:
    """Smallest resulting table first, ties by position, so that repeated layers eliminate alike.

    Args:
        sizes: strategies of each node.
        pairs: the edges.
        wide_entries: no step makes a table larger than this; what is left is listed in the order.
    """
    near: list[set[int]] = [set() for _ in sizes]
    for u, v in pairs:
        near[u].add(v)
        near[v].add(u)
    results = [_product(sizes, others, wide_entries) for others in near]
    heap = [(entries, node) for node, entries in enumerate(results)]
    heapq.heapify(heap)
    steps: list[tuple[int, tuple[int, ...]]] = []
    widest = joined = 0
    while heap:
        entries, node = heapq.heappop(heap)
        if entries != results[node]:
            continue
        if entries > wide_entries:
            break
        widest, joined = max(widest, entries), joined + entries * sizes[node]
        neighbours = near[node]
        steps.append((node, tuple(sorted(neighbours))))
        results[node] = -1
        for other in neighbours:
            mine = near[other]
            mine |= neighbours
            mine.discard(other)
            mine.discard(node)
            after = _product(sizes, mine, wide_entries)
            if after != results[other]:
                results[other] = after
                heapq.heappush(heap, (after, other))
    left = tuple(node for node, entries in enumerate(results) if entries >= 0)
    return Order(tuple(steps), widest, joined, left)


def _product(sizes: list[int], nodes: set[int], wide_entries: int) -> int:
    """Size of a table over nodes; beyond wide, or with more axes than arrays have, all are alike."""
    if len(nodes) > MOST_AXES:
        return wide_entries + 1
    entries = 1
    for node in nodes:
        entries *= sizes[node]
        if entries > wide_entries:
            return wide_entries + 1
    return entries


@dataclass(frozen=True)
class Step:
    """One eliminated node: ``best[values of neighbours]`` is its strategy."""

    node: int
    neighbours: tuple[int, ...]
    best: np.ndarray


@dataclass(frozen=True, eq=False)
class _Front:
    """What is left during elimination: node costs, and the factors (scope, table id) by node."""

    costs: list[int]
    scopes: list[tuple[int, ...]]
    factors: list[int]
    mentions: list[dict[int, None]]

    def take_out(self, node: int, scope: tuple[int, ...]) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Remove a node and its factors: ``(table id, axes within the scope)`` of each, sorted."""
        place = {name: axis for axis, name in enumerate(scope)}
        parts: list[tuple[int, tuple[int, ...]]] = [(self.costs[node], (place[node],))]
        for index in self.mentions[node]:
            parts.append((self.factors[index], tuple([place[name] for name in self.scopes[index]])))
            for name in self.scopes[index]:
                if name != node:
                    del self.mentions[name][index]
        parts.sort()
        return tuple(parts)

    def put_back(self, scope: tuple[int, ...], table: int) -> None:
        """Add a factor over two or more nodes."""
        for name in scope:
            self.mentions[name][len(self.scopes)] = None
        self.scopes.append(scope)
        self.factors.append(table)


def eliminate(
    tables: Tables, nodes: list[int], edges: list[tuple[int, int, int]], order: Order
) -> tuple[float, list[Step]]:
    """Eliminate every node of a complete order.

    Args:
        tables: the store; its ``poll`` may raise to stop.
        nodes: table id of each node's costs.
        edges: ``(u, v, table id)`` with ``u < v``.
        order: a complete order of this graph.

    Returns:
        The minimum (``inf`` when everything is forbidden), and the steps that decode it.
    """
    front = _Front(list(nodes), [], [], [{} for _ in nodes])
    for u, v, table in edges:
        front.put_back((u, v), table)
    total = 0.0
    steps: list[Step] = []
    for node, neighbours in order.steps:
        scope = _insert(neighbours, node)
        parts = front.take_out(node, scope)
        result, least, best = tables.memo(_eliminate_one, scope.index(node), parts)
        total += least
        if total == np.inf:
            return total, []
        steps.append(Step(node, neighbours, best))
        if len(neighbours) == 1:
            front.costs[neighbours[0]] = tables.add(front.costs[neighbours[0]], result)
        elif neighbours:
            front.put_back(neighbours, result)
    return total, steps


def decode(steps: list[Step], count: int) -> list[int]:
    """The strategies that attain the minimum, one per node of ``count``."""
    chosen = [0] * count
    for step in reversed(steps):
        chosen[step.node] = int(step.best[tuple([chosen[name] for name in step.neighbours])])
    return chosen


def _insert(neighbours: tuple[int, ...], node: int) -> tuple[int, ...]:
    at = 0
    while at < len(neighbours) and neighbours[at] < node:
        at += 1
    return (*neighbours[:at], node, *neighbours[at:])


def _eliminate_one(
    tables: Tables, axis: int, parts: tuple[tuple[int, tuple[int, ...]], ...]
) -> tuple[int, float, np.ndarray]:
    """Join tables over their named axes and minimise one axis away: ``(result id, least, argmin)``."""
    ndim = 1 + max(max(axes) for _, axes in parts)
    arrays = []
    for table, axes in parts:
        array = tables[table]
        shape = [1] * ndim
        for at, size in zip(axes, array.shape, strict=True):
            shape[at] = size
        arrays.append(np.moveaxis(array.reshape(shape), axis, 0))
    arrays.sort(key=lambda array: array.size)
    low, best = minimum_of_sum(arrays)
    least = float(low.min())
    if np.isfinite(least):
        low = low - least
    return tables.intern(low), least, best


def minimum_of_sum(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``(min, argmin)`` over axis 0 of a broadcast sum, never holding a large sum whole."""
    shape = np.broadcast_shapes(*[array.shape for array in arrays])
    small = np.uint8 if shape[0] <= 256 else np.uint32
    if np.prod(shape) <= JOIN_ENTRIES:
        total = sum(arrays[1:], arrays[0])
        total = np.broadcast_to(total, shape)
        return total.min(axis=0), total.argmin(axis=0).astype(small)
    low = np.full(shape[1:], np.inf)
    best = np.zeros(shape[1:], small)
    for strategy in range(shape[0]):
        total = sum([array[strategy] for array in arrays[1:]], arrays[0][strategy])
        better = total < low
        np.copyto(low, total, where=better)
        np.copyto(best, small(strategy), where=better)
    return low, best
