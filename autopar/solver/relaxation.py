"""The relaxed solvers: the problem without memory rows, its node costs changed by prices on usage.

Both return a choice and a bound that holds for every choice at those prices. ``ExactRelaxation`` eliminates,
and its choice attains the bound; ``SweepRelaxation`` (in ``messages``) takes over where tables would be too
wide.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from autopar.solver.eliminate import Order, decode, eliminate, elimination_order
from autopar.solver.problem import Problem
from autopar.solver.rows import Rows
from autopar.solver.tables import Tables

# Numbers (8 bytes each) held in tables beyond which those of earlier prices are dropped.
KEPT_ENTRIES = 60_000_000


class Relaxation(Protocol):
    """Minimise node plus edge costs for other node costs."""

    exact: bool

    def minimise(self, costs: list[int]) -> tuple[list[int], float]:
        """``(strategies, bound)`` for node costs by table id; the bound is ``inf`` when all is forbidden."""
        ...


class ExactRelaxation:
    """Exact elimination; the order is computed once, tables that do not change are never joined again."""

    exact = True

    def __init__(self, problem: Problem, tables: Tables, order: Order) -> None:
        self._tables, self._order = tables, order
        self._edges = edges_of(problem, tables)

    def minimise(self, costs: list[int]) -> tuple[list[int], float]:
        """``(strategies, their cost)``: the minimum."""
        least, steps = eliminate(self._tables, costs, self._edges, self._order)
        return decode(steps, len(costs)), least


def edges_of(problem: Problem, tables: Tables) -> list[tuple[int, int, int]]:
    """``(u, v, table id)`` with ``u < v``, parallel edges added, in order of ``(u, v)``."""
    joined: dict[tuple[int, int], int] = {}
    for u, v, matrix in problem.edges:
        table = tables.intern(matrix)
        if u > v:
            u, v, table = v, u, tables.transpose(table)
        joined[u, v] = tables.add(joined[u, v], table) if (u, v) in joined else table
    return [(u, v, table) for (u, v), table in sorted(joined.items())]


def order_of(problem: Problem, wide_entries: int) -> Order:
    """The elimination order of a problem's graph."""
    sizes = [len(costs) for costs in problem.nodes]
    return elimination_order(sizes, [(u, v) for u, v, _ in problem.edges], wide_entries)


class Pricing:
    """Node costs at given prices, one table per distinct content: equal layers stay equal.

    Prices are rounded to a power of two small enough not to matter, so that sums of prices over equal rows
    are equal whatever comes before them; priced costs are whole quanta, like all costs.
    """

    PRICE_BITS = 40

    def __init__(self, problem: Problem, tables: Tables, rows: Rows) -> None:
        self._tables, self._rows = tables, rows
        self._mark: tuple[int, int] | None = None
        self._costs = [tables.intern(costs) for costs in problem.nodes]
        sizes = np.array([len(costs) for costs in problem.nodes], np.int64)
        self._first = np.cumsum(sizes) - sizes
        self._sizes = sizes
        self._flat = np.concatenate(problem.nodes) if len(sizes) else np.zeros(0)
        counts = np.diff(np.append(rows.offset, len(rows.flat)))
        self._owner = np.repeat(np.arange(len(rows.node)), counts)
        within = np.arange(len(rows.flat)) - rows.offset[self._owner]
        # Which node's strategy each number of the rows' bytes belongs to.
        self._place = self._first[rows.node[self._owner]] + within

    def round(self, prices: np.ndarray) -> np.ndarray:
        """Prices as multiples of one power of two."""
        total = float(prices.sum())
        if total <= 0.0:
            return np.zeros_like(prices)
        grain = 2.0 ** (np.frexp(total)[1] - self.PRICE_BITS)
        return np.floor(prices / grain) * grain

    def costs(self, prices: np.ndarray, factors: np.ndarray | None = None) -> list[int]:
        """Table id of each node's cost plus priced usage, times the node's factor where factors are given.

        The ids hold until the next call.
        """
        if self._mark is None:
            self._mark = self._tables.mark()
        elif self._tables.entries > KEPT_ENTRIES:
            # Tables of other prices fill the memory: only those that depend on no price are kept.
            self._tables.forget(self._mark)
        rows, out = self._rows, list(self._costs)
        weights = rows.weights(prices)
        if factors is not None:
            weights = weights * factors[rows.node]
        priced = weights[self._owner] * rows.flat
        total = self._flat + np.rint(np.bincount(self._place, priced, len(self._flat)))
        for node in np.unique(rows.node[weights != 0.0]).tolist():
            first = self._first[node]
            out[node] = self._tables.intern(total[first : first + self._sizes[node]])
        return out
