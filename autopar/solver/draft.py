"""A problem under reduction: tables by id, adjacency both ways round, and a log that undoes every change."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from autopar.solver.problem import Problem, Usage
from autopar.solver.tables import Tables

Lift = Callable[[Sequence[int]], list[int]]


@dataclass(frozen=True)
class Undo:
    """``strategies[node] = table[strategies[of[0]], ...]``: how one change is undone."""

    node: int
    of: tuple[int, ...]
    table: np.ndarray


@dataclass
class Draft:
    """The mutable state that reductions work on; ``Problem`` in, ``Problem`` and lift out.

    ``near[u][v]`` is the id of the matrix with ``u``'s strategies as rows; ``live[u]`` maps an interval to
    the id of the bytes live in it. ``base`` collects usage that no choice changes
    and ``constant`` such cost; both end on one last node with a single strategy. ``changed`` holds the nodes
    that the next round has to look at again.
    """

    tables: Tables
    costs: list[int]
    near: list[dict[int, int]]
    live: list[dict[tuple[int, int], int]]
    limit: float | None
    alive: list[bool]
    base: list[tuple[int, int, float]] = field(default_factory=list)
    constant: float = 0.0
    log: list[Undo] = field(default_factory=list)
    changed: set[int] = field(default_factory=set)

    @staticmethod
    def of(problem: Problem, tables: Tables) -> Draft:
        """Start from a problem; parallel edges are added, empty usage dropped."""
        n = len(problem.nodes)
        costs = [tables.intern(array) for array in problem.nodes]
        draft = Draft(tables, costs, [{} for _ in range(n)], [{} for _ in range(n)], problem.limit, [True] * n)
        if problem.limit is not None:
            for usage in problem.usages:
                if usage.lo < usage.hi:
                    draft.add_usage(usage.node, (usage.lo, usage.hi), tables.intern(usage.bytes))
        for u, v, matrix in problem.edges:
            draft.add_edge(u, v, tables.intern(matrix))
        draft.changed = set(range(n))
        return draft

    def size(self, node: int) -> int:
        """Number of strategies."""
        return self.tables[self.costs[node]].shape[0]

    def sizes(self) -> list[int]:
        """Number of strategies of each node; 1 where the node is gone."""
        return [self.size(node) if alive else 1 for node, alive in enumerate(self.alive)]

    def pairs(self) -> list[tuple[int, int]]:
        """The edges."""
        return [(u, v) for u, near in enumerate(self.near) for v in near if u < v]

    def add_edge(self, u: int, v: int, table: int) -> None:
        """Add a matrix between two nodes to what is there."""
        if v in self.near[u]:
            table = self.tables.add(self.near[u][v], table)
        self.near[u][v] = table
        self.near[v][u] = self.tables.transpose(table)
        self.changed.update((u, v))

    def drop_edge(self, u: int, v: int) -> None:
        """Remove an edge."""
        del self.near[u][v], self.near[v][u]
        self.changed.update((u, v))

    def add_cost(self, node: int, table: int) -> None:
        """Add a cost vector to a node."""
        self.costs[node] = self.tables.add(self.costs[node], table)
        self.changed.add(node)

    def add_usage(self, node: int, interval: tuple[int, int], table: int) -> None:
        """Add to the bytes that a node keeps live in an interval."""
        mine = self.live[node]
        mine[interval] = self.tables.add(mine[interval], table) if interval in mine else table
        self.changed.add(node)

    def keep(self, node: int, kept: int) -> None:
        """Keep only the strategies listed by an index table."""
        tables = self.tables
        self.log.append(Undo(node, (node,), tables[kept]))
        self.costs[node] = tables.take(self.costs[node], kept)
        self.live[node] = {interval: tables.take(table, kept) for interval, table in self.live[node].items()}
        for other, table in list(self.near[node].items()):
            table = tables.take(table, kept)
            self.near[node][other] = table
            self.near[other][node] = tables.transpose(table)
            self.changed.add(other)
        self.changed.add(node)

    def remove(self, node: int, of: tuple[int, ...], table: np.ndarray) -> None:
        """Take a node out; ``table`` tells its strategy from those of ``of``."""
        self.log.append(Undo(node, of, table))
        self.alive[node] = False
        self.live[node] = {}
        for other in self.near[node]:
            del self.near[other][node]
            self.changed.add(other)
        self.near[node] = {}
        self.changed.discard(node)

    def finish(self) -> tuple[Problem, Lift]:
        """The reduced problem, nodes in their old order, and the map from its strategies to the old ones."""
        tables = self.tables
        kept = [node for node, alive in enumerate(self.alive) if alive]
        number = {node: index for index, node in enumerate(kept)}
        nodes = [tables[self.costs[node]] for node in kept]
        edges = [(number[u], number[v], tables[table]) for u in kept for v, table in self.near[u].items() if u < v]
        usages = [Usage(number[u], lo, hi, tables[t]) for u in kept for (lo, hi), t in sorted(self.live[u].items())]
        if self.constant or self.base or not nodes:
            usages += [Usage(len(nodes), lo, hi, np.array([size])) for lo, hi, size in flatten(self.base)]
            nodes.append(tables.shared(np.array([self.constant])))
        log, count = tuple(self.log), len(self.costs)

        def lift(strategies: Sequence[int]) -> list[int]:
            full = [0] * count
            for node, index in number.items():
                full[node] = int(strategies[index])
            for undo in reversed(log):
                full[undo.node] = int(undo.table[tuple([full[name] for name in undo.of])])
            return full

        return Problem(tuple(nodes), tuple(edges), tuple(usages), self.limit), lift


def flatten(spans: list[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """Overlapping ``(lo, hi, bytes)`` spans as disjoint ones with the sums."""
    change: dict[int, float] = {}
    for lo, hi, size in spans:
        change[lo] = change.get(lo, 0.0) + size
        change[hi] = change.get(hi, 0.0) - size
    times = sorted(change)
    level, out = 0.0, []
    for lo, hi in itertools.pairwise(times):
        level += change[lo]
        if level > 0.0 and change[lo] == 0.0 and out and out[-1][1] == lo:
            out[-1] = (out[-1][0], hi, level)
        elif level > 0.0:
            out.append((lo, hi, level))
    return out
