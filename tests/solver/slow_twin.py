"""Brute force, and a Hypothesis strategy that draws small problems. It imports only the data types."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import strategies as st

from autopar.solver import Problem, Usage


def brute_force(problem: Problem) -> tuple[float, tuple[int, ...] | None]:
    """The cheapest feasible choice by trying all, or ``(inf, None)``."""
    best, found = math.inf, None
    for strategies in itertools.product(*[range(len(costs)) for costs in problem.nodes]):
        cost = sum(costs[s] for costs, s in zip(problem.nodes, strategies, strict=True))
        cost += sum(matrix[strategies[u], strategies[v]] for u, v, matrix in problem.edges)
        if cost < best and within(problem, strategies):
            best, found = float(cost), strategies
    return best, found


def least_peak(problem: Problem) -> float:
    """The lowest peak of any choice of finite cost, by trying all."""
    peaks = []
    for strategies in itertools.product(*[range(len(costs)) for costs in problem.nodes]):
        cost = sum(costs[s] for costs, s in zip(problem.nodes, strategies, strict=True))
        cost += sum(matrix[strategies[u], strategies[v]] for u, v, matrix in problem.edges)
        if math.isfinite(cost):
            peaks.append(peak(problem, strategies))
    return min(peaks, default=math.inf)


def peak(problem: Problem, strategies: tuple[int, ...]) -> float:
    """Largest sum of live bytes over the times at which something starts."""
    times = {usage.lo for usage in problem.usages}
    live = [
        sum(usage.bytes[strategies[usage.node]] for usage in problem.usages if usage.lo <= time < usage.hi)
        for time in times
    ]
    return float(max(live, default=0.0))


def within(problem: Problem, strategies: tuple[int, ...]) -> bool:
    """Whether the peak respects the limit."""
    return problem.limit is None or peak(problem, strategies) <= problem.limit


@st.composite
def problems(draw, limited: bool = True) -> Problem:
    """Forbidden entries, parallel edges, empty intervals, several usages per node, shared tables."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    forbidden = draw(st.sampled_from([0.0, 0.1, 0.5]))
    whole = draw(st.booleans())

    def table(*shape: int) -> np.ndarray:
        return _table(random, shape, forbidden, whole)

    nodes = [table(size) for size in sizes]
    edges, shared = [], {}
    for _ in range(draw(st.integers(0, 9)) if len(sizes) > 1 else 0):
        u, v = (int(node) for node in random.choice(len(sizes), 2, replace=False))
        shape = (sizes[u], sizes[v])
        matrix = shared.setdefault(shape, table(*shape)) if random.random() < 0.3 else table(*shape)
        if sizes[u] == sizes[v] and random.random() < 0.2:
            matrix = np.where(np.eye(sizes[u], dtype=bool), matrix, np.inf)
        edges.append((u, v, matrix))
    usages = []
    for _ in range(draw(st.integers(0, 8))):
        node, lo, span = int(random.integers(len(sizes))), int(random.integers(8)), int(random.integers(5))
        usages.append(Usage(node, lo, lo + span, random.integers(0, 10, sizes[node]).astype(np.float64)))
    limit = float(draw(st.integers(0, 30))) if limited else None
    return Problem(tuple(nodes), tuple(edges), tuple(usages), limit)


def _table(random: np.random.Generator, shape: tuple[int, ...], forbidden: float, whole: bool) -> np.ndarray:
    values = random.integers(0, 12, shape).astype(np.float64) if whole else random.normal(size=shape)
    return np.where(random.random(shape) < forbidden, np.inf, values)
