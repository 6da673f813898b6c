"""Message passing where exact tables would be too wide: a bound, a choice, and what to drop.

Sequential tree-reweighted message passing (TRW-S, Kolmogorov 2006): every sweep moves cost between edges and
nodes without changing any choice's total, such that the sum of all minima, a lower bound, never falls. What
a strategy or a pair costs above these minima is a lower bound on what choosing it adds.
"""

from __future__ import annotations

import numpy as np

from autopar.solver.problem import Problem
from autopar.solver.relaxation import edges_of
from autopar.solver.tables import Tables

BOUND_ROUNDING = 1e-10


class Sweeps:
    """Messages of one problem, kept warm between calls.

    ``toward[e][0]`` and ``[1]`` are the costs moved from edge ``e`` to its first and second node.
    """

    exact = False

    def __init__(self, problem: Problem, tables: Tables) -> None:
        self._tables = tables
        self._edges = edges_of(problem, tables)
        self._sizes = [len(costs) for costs in problem.nodes]
        self._matrices = [tables[table] for _, _, table in self._edges]
        self._toward = [[np.zeros(self._sizes[u]), np.zeros(self._sizes[v])] for u, v, _ in self._edges]
        self._lower: list[list[int]] = [[] for _ in self._sizes]
        self._upper: list[list[int]] = [[] for _ in self._sizes]
        for index, (u, v, _) in enumerate(self._edges):
            self._upper[u].append(index)
            self._lower[v].append(index)
        self.per_call = 1

    def minimise(self, costs: list[int]) -> tuple[list[int], float]:
        """``(a choice, a lower bound)`` after a few more sweeps at these node costs."""
        bound = -np.inf
        for _ in range(self.per_call):
            bound = self.sweep(costs)
        return self.decode(costs), bound

    def sweep(self, costs: list[int]) -> float:
        """Once forward and once backward through the nodes; the bound after it."""
        for node in range(len(self._sizes)):
            self._visit(node, costs[node], self._upper[node])
        bound = 0.0
        for node in reversed(range(len(self._sizes))):
            # Every edge's minimum is zero after this pass, so the nodes' own minima are the bound.
            bound += self._visit(node, costs[node], self._lower[node])
        return bound - BOUND_ROUNDING * abs(bound)

    def _visit(self, node: int, costs: int, onward: list[int]) -> float:
        """Pull all that edges can give to a node, then share it among the edges still to come."""
        toward, matrices = self._toward, self._matrices
        total = self._tables[costs]
        for edge in self._upper[node]:
            pulled = toward[edge][0] = (matrices[edge] - toward[edge][1]).min(axis=1)
            total = total + pulled
        for edge in self._lower[node]:
            pulled = toward[edge][1] = (matrices[edge] - toward[edge][0][:, None]).min(axis=0)
            total = total + pulled
        if onward:
            side = 0 if onward is self._upper[node] else 1
            share = total / max(len(self._upper[node]), len(self._lower[node]))
            for edge in onward:
                toward[edge][side] = toward[edge][side] - share
            total = total - len(onward) * share
        return float(total.min())

    def decode(self, costs: list[int]) -> list[int]:
        """Choose node by node, given the choices before and what messages tell of those after."""
        chosen: list[int] = []
        for node in range(len(self._sizes)):
            total = self._tables[costs[node]]
            for edge in self._lower[node]:
                total = total + self._matrices[edge][chosen[self._edges[edge][0]]]
            for edge in self._upper[node]:
                total = total + (self._matrices[edge] - self._toward[edge][1]).min(axis=1)
            chosen.append(int(total.argmin()))
        return chosen

    def prune(self, costs: list[int], room: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What can be part of a choice that costs at most ``room`` more than the bound of the last sweep.

        Returns:
            The strategies to keep of each node, and each edge's matrix with impossible pairs forbidden.
        """
        above = []
        for node, table in enumerate(costs):
            total = self._tables[table]
            total = sum((self._toward[edge][0] for edge in self._upper[node]), total)
            total = sum((self._toward[edge][1] for edge in self._lower[node]), total)
            above.append(total - total.min())
        matrices = []
        dearer = list(above)
        for index, (u, v, _) in enumerate(self._edges):
            first, second = self._toward[index]
            rest = np.maximum(self._matrices[index] - first[:, None] - second, 0.0)
            dearer[u] = dearer[u] + rest.min(axis=1)
            dearer[v] = dearer[v] + rest.min(axis=0)
            possible = rest + above[u][:, None] + above[v] <= room
            matrices.append(np.where(possible, self._matrices[index], np.inf))
        return [np.flatnonzero(extra <= room) for extra in dearer], matrices

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The two nodes of each edge, in the order of ``prune``'s matrices."""
        return [(u, v) for u, v, _ in self._edges]
