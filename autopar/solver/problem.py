"""The solver's problem: a graph whose nodes each pick one strategy, with a limit on what is live.

The format is that of Google's contest on intra-operator parallelism (IOPDDL, ASPLOS / EuroSys 2025): node
costs, a cost matrix on each edge, and for each node the bytes its strategy keeps live during half-open
intervals of time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import InfeasibleError, ProblemError


@dataclass(frozen=True, eq=False)
class Usage:
    """Bytes that each strategy of one node keeps live during ``[lo, hi)``.

    Args:
        node: index of the node.
        lo: first time point.
        hi: the time point after the last one; ``hi <= lo`` means never live.
        bytes: shape ``(k,)``, not negative, finite.
    """

    node: int
    lo: int
    hi: int
    bytes: np.ndarray


@dataclass(frozen=True, eq=False)
class Problem:
    """Nodes pick strategies; minimise node plus edge costs while every time's usage stays within the limit.

    Pass *the same array object* wherever structure repeats (every layer's copy of a matrix): the solver
    shares all its work among equal tables, and recognises the same object without looking at its content.

    Args:
        nodes: cost of each strategy, one float64 array of shape ``(k_i,)`` per node; ``math.inf`` forbids.
        edges: ``(u, v, matrix)`` with ``u != v`` and a float64 matrix of shape ``(k_u, k_v)``; parallel
            edges add.
        usages: what is live when; a node may have several, or none.
        limit: most bytes live at any time; None for no limit.

    Raises:
        ProblemError: a shape, an index or a number that makes no sense.
    """

    nodes: tuple[np.ndarray, ...]
    edges: tuple[tuple[int, int, np.ndarray], ...] = ()
    usages: tuple[Usage, ...] = ()
    limit: float | None = None

    def __post_init__(self) -> None:
        # One look at each distinct array: a train step passes thousands of references to a few.
        checked: set[int] = set()
        for index, costs in enumerate(self.nodes):
            if id(costs) not in checked:
                _check_table(costs, 1, f"node {index}")
                checked.add(id(costs))
        for index, (u, v, matrix) in enumerate(self.edges):
            if id(matrix) not in checked:
                _check_table(matrix, 2, f"edge {index} ({u}, {v})")
                checked.add(id(matrix))
            self._check_edge(index, u, v, matrix.shape)
        sizes: set[int] = set()
        for index, usage in enumerate(self.usages):
            self._check_usage(index, usage, sizes)
        if self.limit is not None and not self.limit >= 0:
            raise ProblemError(f"limit {self.limit} is not a number of bytes", fix="pass limit >= 0, or None")

    def _check_edge(self, index: int, u: int, v: int, shape: tuple[int, ...]) -> None:
        nodes = self.nodes
        n = len(nodes)
        if u == v or not (0 <= u < n and 0 <= v < n):
            what = f"an edge joins two different nodes below {n}"
            raise ProblemError(what, where=f"edge {index} ({u}, {v})", fix="fix its ends")
        expected = (len(nodes[u]), len(nodes[v]))
        if shape != expected:
            what = f"matrix is {shape}, strategies are {expected}"
            raise ProblemError(what, where=f"edge {index} ({u}, {v})", fix="reshape it")

    def _check_usage(self, index: int, usage: Usage, checked: set[int]) -> None:
        if not 0 <= usage.node < len(self.nodes):
            where = f"usage {index} of node {usage.node}"
            raise ProblemError(f"there are {len(self.nodes)} nodes", where=where, fix="fix its node")
        sizes, expected = usage.bytes, self.nodes[usage.node].shape
        if sizes.shape != expected:
            where = f"usage {index} of node {usage.node}"
            what = f"bytes are {sizes.shape}, strategies are {expected}"
            raise ProblemError(what, where=where, fix="give one number per strategy")
        if id(sizes) in checked:
            return
        checked.add(id(sizes))
        # What is live whatever is chosen comes in thousands of arrays of one number.
        least, most = (sizes[0], sizes[0]) if len(sizes) == 1 else (sizes.min(), sizes.max())
        if not 0.0 <= least <= most < math.inf:
            where = f"usage {index} of node {usage.node}"
            raise ProblemError("bytes must be finite and not negative", where=where, fix="forbid by cost instead")

    def allow(self, allowed: Mapping[int, Collection[int]]) -> Problem:
        """The problem with only these strategies of these nodes left; strategies keep their indices.

        Args:
            allowed: by node, the strategies that are not forbidden: one is a fixed choice.

        Raises:
            ProblemError: a node or a strategy that there is none of, or a node without any.
        """
        nodes = list(self.nodes)
        for node, strategies in allowed.items():
            where = f"node {node}"
            if not 0 <= node < len(nodes):
                raise ProblemError(f"there are {len(nodes)} nodes", where=where, fix="fix the node")
            count = len(nodes[node])
            if not strategies or not all(0 <= s < count for s in strategies):
                what = f"allowed strategies {sorted(strategies)} of {count}"
                raise ProblemError(what, where=where, fix=f"allow at least one, each below {count}")
            kept = np.zeros(count, bool)
            kept[list(strategies)] = True
            nodes[node] = np.where(kept, nodes[node], math.inf)
        return replace(self, nodes=tuple(nodes))

    def cost(self, strategies: Sequence[int]) -> float:
        """Sum of node and edge costs of one strategy per node; ``inf`` if one is forbidden."""
        terms = [float(costs[s]) for costs, s in zip(self.nodes, strategies, strict=True)]
        terms += [float(matrix[strategies[u], strategies[v]]) for u, v, matrix in self.edges]
        return math.inf if math.inf in terms else math.fsum(terms)

    def peak(self, strategies: Sequence[int]) -> float:
        """Most bytes live at any time; 0 when nothing is ever live."""
        change: dict[int, list[float]] = {}
        for usage in self.usages:
            if usage.lo < usage.hi:
                live = float(usage.bytes[strategies[usage.node]])
                change.setdefault(usage.lo, []).append(live)
                change.setdefault(usage.hi, []).append(-live)
        return float(max(np.cumsum([math.fsum(change[time]) for time in sorted(change)]), default=0.0))

    def feasible(self, strategies: Sequence[int]) -> bool:
        """Whether the cost is finite and the peak within the limit (and float64 rounding of it, 1e-13)."""
        within = self.limit is None or self.peak(strategies) <= self.limit * (1 + 1e-13)
        return within and math.isfinite(self.cost(strategies))


@dataclass(frozen=True)
class Progress:
    """Where a running solve stands.

    Args:
        seconds: since the start.
        incumbent: cost of the best feasible choice so far; ``inf`` without one.
        bound: no choice costs less.
        stage: what is being done, in a few words.
    """

    seconds: float
    incumbent: float
    bound: float
    stage: str


@dataclass(frozen=True)
class Choice:
    """One strategy per node, with its certificate.

    Args:
        strategies: index into each node's costs.
        objective: the problem's cost of these strategies, recomputed from the problem as it was given.
        lower_bound: no feasible choice costs less (within rounding).
        proven: whether the gap is zero within rounding, 1e-9 relative of float64, and at most 1e-8 where very many
            costs were rounded to whole quanta: the choice is optimal.
        seconds: wall time of the solve.
        stats: what the solver did, for tables and logs.
    """

    strategies: tuple[int, ...]
    objective: float
    lower_bound: float
    proven: bool
    seconds: float
    stats: dict[str, float]

    @property
    def gap(self) -> float:
        """``(objective - lower_bound) / |objective|``; 0 is proven optimal."""
        return relative_gap(self.objective, self.lower_bound)


def relative_gap(objective: float, bound: float) -> float:
    """Distance of a bound from an objective, relative to the larger magnitude of the two."""
    if not math.isfinite(objective - bound):
        return math.inf
    return max(0.0, objective - bound) / max(abs(objective), abs(bound), 1e-300)


def restricts(problem: Problem, other: Problem) -> bool:
    """Whether every choice of a problem is one of the other, at no less cost: more is forbidden, or the limit lower."""
    if len(problem.nodes) != len(other.nodes) or len(problem.edges) != len(other.edges):
        return False
    if other.limit is not None:
        if problem.limit is None or problem.limit > other.limit or len(problem.usages) != len(other.usages):
            return False
        if not all(map(_same_usage, problem.usages, other.usages)):
            return False
    nodes = zip(problem.nodes, other.nodes, strict=True)
    edges = zip(problem.edges, other.edges, strict=True)
    return all(a is b or (a.shape == b.shape and bool((a >= b).all())) for a, b in nodes) and all(
        a is b or (a[:2] == b[:2] and _same(a[2], b[2])) for a, b in edges
    )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or np.array_equal(one, other)


def _same_usage(one: Usage, other: Usage) -> bool:
    same_span = (one.node, one.lo, one.hi) == (other.node, other.lo, other.hi)
    return one is other or (same_span and _same(one.bytes, other.bytes))


class NoChoiceError(InfeasibleError):
    """No choice is feasible, or none was found.

    Attributes:
        least_bytes: no choice has a lower peak than this; ``inf`` when forbidden costs alone exclude every
            choice.
        nodes: indices of the nodes that make that peak, the largest first.
    """

    def __init__(
        self, what: str, least_bytes: float, nodes: tuple[int, ...], *, where: str = "", fix: str = ""
    ) -> None:
        super().__init__(what, where=where, fix=fix, least_bytes=least_bytes)
        self.nodes = nodes


def _check_table(table: np.ndarray, ndim: int, where: str) -> None:
    if not isinstance(table, np.ndarray) or table.ndim != ndim or table.dtype != np.float64:
        raise ProblemError(f"costs must be a float64 array with {ndim} dimensions", where=where, fix="convert them")
    if table.size == 0:
        raise ProblemError("a node needs at least one strategy", where=where, fix="drop the node")
    if not table.min() > -math.inf:  # of a NaN neither is true
        raise ProblemError("a cost is NaN or -inf", where=where, fix="use math.inf to forbid a strategy")
