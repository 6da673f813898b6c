"""Message passing where exact tables would be too wide: a bound, a choice, and what to drop.

Sequential tree-reweighted message passing (TRW-S, Kolmogorov 2006): every sweep moves cost between edges and
nodes without changing any choice's total, such that the sum of all minima, a lower bound, never falls. What
a strategy or a pair costs above these minima is a lower bound on what choosing it adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autopar.solver.problem import Problem
from autopar.solver.relaxation import edges_of
from autopar.solver.tables import Tables

BOUND_ROUNDING = 1e-10


class Messages(Protocol):
    """Messages at costs that stay."""

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The two nodes of each edge, in the order of ``prune``'s matrices."""
        ...

    def sweep(self) -> float:
        """One more sweep; the bound after it."""
        ...

    def decode(self) -> list[int]:
        """A choice."""
        ...

    def left(self, room: float) -> int:
        """How many entries the edges of the strategies have that ``prune`` leaves."""
        ...

    def prune(self, room: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As ``Sweeps.prune``."""
        ...


class Unpriced:
    """``Messages`` at the costs of a problem."""

    def __init__(self, problem: Problem, tables: Tables) -> None:
        self._sweeps = Sweeps(problem, tables)
        self._costs = [tables.intern(array) for array in problem.nodes]

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The edges."""
        return self._sweeps.ends

    def sweep(self) -> float:
        """One more sweep; the bound after it."""
        return self._sweeps.sweep(self._costs)

    def decode(self) -> list[int]:
        """A choice."""
        return self._sweeps.decode(self._costs)

    def left(self, room: float) -> int:
        """How many entries the edges of the strategies have that ``prune`` leaves."""
        kept, _ = self.prune(room)
        return sum(len(kept[u]) * len(kept[v]) for u, v in self.ends)

    def prune(self, room: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What can be part of a choice that costs at most ``room`` more than the bound."""
        return self._sweeps.prune(self._costs, room)


@dataclass(frozen=True, eq=False)
class _Node:
    """One node's edges side by side, those to lower nodes first.

    Args:
        matrices: ``(k, sum of neighbours' k)`` the edges' costs, this node's strategies as rows.
        starts: where each edge's columns start.
        toward: ``(edges, k)`` costs moved from each edge to this node (a view into all messages).
        away: index into all messages of what was moved to the other ends, in the order of the columns.
        lower: how many of the edges lead to lower nodes.
    """

    matrices: np.ndarray
    starts: np.ndarray
    toward: np.ndarray
    away: np.ndarray
    lower: int


class Sweeps:
    """Messages of one problem, kept warm between calls."""

    exact = False

    def __init__(self, problem: Problem, tables: Tables) -> None:
        self._tables = tables
        self.per_call = 1
        self._edges = edges_of(problem, tables)
        self._sizes = [len(costs) for costs in problem.nodes]
        self._near: list[list[tuple[int, int, int]]] = [[] for _ in self._sizes]
        for edge, (u, v, table) in enumerate(self._edges):
            self._near[u].append((v, edge, table))
            self._near[v].append((u, edge, tables.transpose(table)))
        for near in self._near:
            near.sort()
        counts = np.array([len(near) * k for near, k in zip(self._near, self._sizes, strict=True)], np.int64)
        self._first = np.cumsum(counts) - counts
        self._messages = np.zeros(int(counts.sum()))
        self._slot = {
            (edge, node): slot for node, near in enumerate(self._near) for slot, (_, edge, _) in enumerate(near)
        }
        self._nodes = [self._node(node) for node in range(len(self._sizes))]

    def _node(self, node: int) -> _Node:
        near, k = self._near[node], self._sizes[node]
        widths = np.array([self._sizes[other] for other, _, _ in near], np.int64)
        away = [self._span(edge, other) for other, edge, _ in near]
        index = np.concatenate([np.arange(low, high) for low, high in away]) if near else np.zeros(0, np.int64)
        matrices = self._tables.memo(_side_by_side, tuple(table for _, _, table in near)) if near else None
        toward = self._messages[self._first[node] : self._first[node] + len(near) * k].reshape(len(near), k)
        lower = sum(other < node for other, _, _ in near)
        return _Node(
            np.zeros((k, 0)) if matrices is None else matrices,
            np.cumsum(widths) - widths,
            toward,
            index,
            lower,
        )

    def _span(self, edge: int, node: int) -> tuple[int, int]:
        """Where among all messages those from an edge to a node are."""
        low = int(self._first[node]) + self._slot[edge, node] * self._sizes[node]
        return low, low + self._sizes[node]

    def minimise(self, costs: list[int]) -> tuple[list[int], float]:
        """``(a choice, a lower bound)`` after a few more sweeps at these node costs."""
        bound = -np.inf
        for _ in range(self.per_call):
            bound = self.sweep(costs)
        return self.decode(costs), bound

    def sweep(self, costs: list[int]) -> float:
        """Once forward and once backward through the nodes; the bound after it."""
        for node in range(len(self._sizes)):
            self._visit(self._nodes[node], costs[node], upward=True)
        bound = 0.0
        for node in reversed(range(len(self._sizes))):
            # Every edge's minimum is zero after this pass, so the nodes' own minima are the bound.
            bound += self._visit(self._nodes[node], costs[node], upward=False)
        return bound - BOUND_ROUNDING * abs(bound)

    def _visit(self, node: _Node, costs: int, upward: bool) -> float:
        """Pull all that edges can give to a node, then share it among the edges still to come."""
        total = self._tables[costs]
        edges = len(node.starts)
        if not edges:
            return float(total.min())
        pulled = np.minimum.reduceat(node.matrices - self._messages[node.away], node.starts, axis=1).T
        total = total + pulled.sum(axis=0)
        node.toward[:] = pulled
        onward = slice(node.lower, edges) if upward else slice(0, node.lower)
        share = total / max(node.lower, edges - node.lower)
        node.toward[onward] -= share
        return float((total - (onward.stop - onward.start) * share).min())

    def decode(self, costs: list[int]) -> list[int]:
        """Choose node by node, given the choices before and what messages tell of those after."""
        chosen = np.zeros(len(self._sizes), np.int64)
        for index, node in enumerate(self._nodes):
            total = self._tables[costs[index]]
            if node.lower:
                before = [other for other, _, _ in self._near[index][: node.lower]]
                total = total + node.matrices[:, node.starts[: node.lower] + chosen[before]].sum(axis=1)
            if node.lower < len(node.starts):
                start = node.starts[node.lower]
                rest = node.matrices[:, start:] - self._messages[node.away[start:]]
                total = total + np.minimum.reduceat(rest, node.starts[node.lower :] - start, axis=1).sum(axis=1)
            chosen[index] = total.argmin()
        return chosen.tolist()

    def prune(self, costs: list[int], room: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What can be part of a choice that costs at most ``room`` more than the bound of the last sweep.

        Returns:
            The strategies to keep of each node, and each edge's matrix with impossible pairs forbidden.
        """
        above = []
        for node, table in zip(self._nodes, costs, strict=True):
            total = self._tables[table] + node.toward.sum(axis=0)
            above.append(total - total.min())
        matrices = []
        dearer = list(above)
        for edge, (u, v, table) in enumerate(self._edges):
            matrix = self._tables[table]
            first, second = (self._messages[slice(*self._span(edge, end))] for end in (u, v))
            rest = np.maximum(matrix - first[:, None] - second, 0.0)
            dearer[u] = dearer[u] + rest.min(axis=1)
            dearer[v] = dearer[v] + rest.min(axis=0)
            possible = rest + above[u][:, None] + above[v] <= room
            matrices.append(np.where(possible, matrix, np.inf))
        return [np.flatnonzero(extra <= room) for extra in dearer], matrices

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The two nodes of each edge, in the order of ``prune``'s matrices."""
        return [(u, v) for u, v, _ in self._edges]


def _side_by_side(tables: Tables, matrices: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([tables[matrix] for matrix in matrices], axis=1)
