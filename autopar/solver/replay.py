"""What a choice costs, and its peak, from arrays made once: ``Problem.cost`` and ``Problem.peak`` for many choices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from autopar.solver.problem import Problem


class Replay:
    """A problem's tables side by side, each distinct array once."""

    def __init__(self, problem: Problem) -> None:
        self._limit = problem.limit
        self._nodes, self._node_at = _flatten(list(problem.nodes))
        self._edges, self._edge_at = _flatten([matrix for _, _, matrix in problem.edges])
        ends = np.array([(u, v) for u, v, _ in problem.edges], np.int64).reshape(-1, 2)
        self._from, self._to = ends.T
        self._width = np.array([matrix.shape[1] for _, _, matrix in problem.edges], np.int64)
        live = [usage for usage in problem.usages if usage.lo < usage.hi]
        self._bytes, self._bytes_at = _flatten([usage.bytes for usage in live])
        self._live = np.array([usage.node for usage in live], np.int64)
        spans = np.array([(usage.lo, usage.hi) for usage in live], np.int64).reshape(-1, 2)
        times, place = np.unique(spans, return_inverse=True)
        self._times, self._span = len(times), place.reshape(-1, 2).T

    def cost(self, strategies: Sequence[int]) -> float:
        """Sum of node and edge costs of one strategy per node, rounded once; ``inf`` if one is forbidden."""
        chosen = np.asarray(strategies, np.int64)
        at = self._edge_at + chosen[self._from] * self._width + chosen[self._to]
        terms = np.concatenate([self._nodes[self._node_at + chosen], self._edges[at]])
        return math.inf if np.isinf(terms).any() else math.fsum(terms.tolist())

    def peak(self, strategies: Sequence[int]) -> float:
        """Most bytes live at any time; 0 when nothing is ever live."""
        sizes = self._bytes[self._bytes_at + np.asarray(strategies, np.int64)[self._live]]
        change = np.bincount(self._span[0], sizes, self._times) - np.bincount(self._span[1], sizes, self._times)
        return float(np.cumsum(change).max(initial=0.0))

    def fits(self, strategies: Sequence[int]) -> bool:
        """Whether the peak is within the limit."""
        return self._limit is None or self.peak(strategies) <= self._limit * (1 + 1e-13)


def _flatten(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """``(all distinct arrays, where that of each entry starts)``."""
    distinct = {id(array): array for array in arrays}
    sizes = np.array([array.size for array in distinct.values()], np.int64)
    starts = dict(zip(distinct, (np.cumsum(sizes) - sizes).tolist(), strict=True))
    flat = np.concatenate([*(array.ravel() for array in distinct.values()), np.zeros(0)])
    return flat, np.array([starts[id(array)] for array in arrays], np.int64)
