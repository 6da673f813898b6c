"""Memory rows: usage at the times that matter, for every choice at once.

Of all times only those whose live set is inclusion-maximal can be the peak: for intervals these are the
latest starts before some end. A row is such a time; every usage covers a contiguous range of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.problem import Problem


@dataclass(frozen=True, eq=False)
class Rows:
    """Usage of a problem by row.

    Args:
        limit: bytes.
        times: ``(rows,)`` the time of each row.
        node: ``(entries,)`` whose usage each entry is.
        lo, hi: ``(entries,)`` half-open range of rows of each entry.
        offset: ``(entries,)`` where the entry's bytes start in ``flat``.
        flat: bytes of all entries, one number per strategy.
    """

    limit: float
    times: np.ndarray
    node: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    offset: np.ndarray
    flat: np.ndarray

    def usage(self, strategies: Sequence[int] | np.ndarray) -> np.ndarray:
        """``(rows,)`` bytes live at each row."""
        return self._spread(self.flat[self.offset + np.asarray(strategies, np.int64)[self.node]])

    def expected(self, values: np.ndarray, first: np.ndarray) -> np.ndarray:
        """``(rows,)`` usage of mixtures: ``values[first[i] + s]`` is the share of ``s`` at node ``i``."""
        counts = np.diff(np.append(self.offset, len(self.flat)))
        owner = np.repeat(np.arange(len(self.node)), counts)
        within = np.arange(len(self.flat)) - self.offset[owner]
        shares = values[first[self.node[owner]] + within]
        return self._spread(np.bincount(owner, shares * self.flat, len(self.node)))

    def least(self) -> np.ndarray:
        """``(rows,)`` usage when every entry takes its least, whatever the others do: no choice uses less."""
        if not len(self.node):
            return np.zeros(len(self.times))
        return self._spread(np.minimum.reduceat(self.flat, self.offset))

    def keep(self, kept: Sequence[np.ndarray]) -> Rows:
        """The rows when only these strategies of each node are left."""
        sizes = np.array([len(strategies) for strategies in kept], np.int64)
        counts = sizes[self.node]
        offset = np.cumsum(counts) - counts
        owner = np.repeat(np.arange(len(self.node)), counts)
        within = np.arange(len(owner)) - offset[owner]
        first = np.cumsum(sizes) - sizes
        strategy = np.concatenate([*kept, np.zeros(0, np.int64)])[first[self.node[owner]] + within]
        flat = self.flat[self.offset[owner] + strategy]
        return Rows(self.limit, self.times, self.node, self.lo, self.hi, offset, flat)

    def weights(self, prices: np.ndarray) -> np.ndarray:
        """``(entries,)`` price per byte of each entry: the sum of its rows' prices."""
        before = np.concatenate([[0.0], np.cumsum(prices)])
        return before[self.hi] - before[self.lo]

    def _spread(self, sizes: np.ndarray) -> np.ndarray:
        count = len(self.times) + 1
        change = np.bincount(self.lo, sizes, count) - np.bincount(self.hi, sizes, count)
        return np.cumsum(change[:-1])


def rows_of(problem: Problem) -> Rows:
    """The rows of a problem with a limit; usage that is never part of a maximal live set is left out."""
    assert problem.limit is not None
    distinct = {id(usage.bytes): usage.bytes for usage in problem.usages}
    used = {key for key, sizes in distinct.items() if sizes.any()}
    entries = [usage for usage in problem.usages if usage.lo < usage.hi and id(usage.bytes) in used]
    lo = np.array([usage.lo for usage in entries], np.int64)
    hi = np.array([usage.hi for usage in entries], np.int64)
    starts = np.unique(lo)
    times = np.unique(starts[np.searchsorted(starts, np.unique(hi), side="left") - 1])
    lo, hi = np.searchsorted(times, lo), np.searchsorted(times, hi)
    kept = [index for index in range(len(entries)) if lo[index] < hi[index]]
    node = np.array([entries[index].node for index in kept], np.int64)
    sizes = np.array([len(entries[index].bytes) for index in kept], np.int64)
    flat = np.concatenate([entries[index].bytes for index in kept]) if kept else np.zeros(0)
    return Rows(problem.limit, times, node, lo[kept], hi[kept], np.cumsum(sizes) - sizes, flat)
