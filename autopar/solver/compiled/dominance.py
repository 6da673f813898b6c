"""Which strategies of a node another one can always replace, compiled for the many nodes of which no two are alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.solver.compiled.kernel import kernel


class Surroundings(NamedTuple):
    """What decides which strategies of a node are dominated.

    Args:
        costs: ``(k,)``.
        entries: the matrices of all edges, this node's strategies as rows; no row is forbidden throughout.
        starts, widths: ``(edges,)`` where each matrix starts, and its number of columns.
        usage: bytes by interval, ``k`` numbers each.
    """

    costs: np.ndarray
    entries: np.ndarray
    starts: np.ndarray
    widths: np.ndarray
    usage: np.ndarray


def undominated(costs: np.ndarray, matrices: list[np.ndarray], usage: list[np.ndarray]) -> np.ndarray:
    """``(k,)`` whether each strategy is to stay."""
    sizes = np.array([matrix.size for matrix in matrices], np.int64)
    entries = np.concatenate([*(matrix.ravel() for matrix in matrices), np.zeros(0)])
    used = np.concatenate([*usage, np.zeros(0)])
    return ~_dominated(Surroundings(costs, entries, np.cumsum(sizes) - sizes, sizes // len(costs), used))


@kernel()
def _dominated(around):
    """Of strategies as good as each other the first stays."""
    k = len(around.costs)
    least = _least_columns(around)
    replaced = np.zeros((k, k), np.bool_)
    for a in range(k):
        for b in range(k):
            replaced[a, b] = a != b and _may_replace(around, least, a, b) and _replaces(around, a, b)
    dominated = np.zeros(k, np.bool_)
    for a in range(k):
        for b in range(k):
            if replaced[a, b] and (not replaced[b, a] or b < a):
                dominated[a] = True
    return dominated


@kernel()
def _least_columns(around):
    """``(edges, k)`` the entry that is least in each row."""
    k = len(around.costs)
    least = np.empty((len(around.starts), k), np.int64)
    for matrix in range(len(around.starts)):
        for a in range(k):
            row = around.starts[matrix] + a * around.widths[matrix]
            best = row
            for at in range(row, row + around.widths[matrix]):
                if around.entries[at] < around.entries[best]:
                    best = at
            least[matrix, a] = best
    return least


@kernel()
def _may_replace(around, least, a, b):
    """Whether ``b`` never uses more than ``a``, and does not cost more where each edge of ``a`` is least."""
    k = len(around.costs)
    for first in range(0, len(around.usage), k):
        if around.usage[first + a] < around.usage[first + b]:
            return False
    margin = around.costs[a] - around.costs[b]
    for matrix in range(len(around.starts)):
        at = least[matrix, a]
        margin += around.entries[at] - around.entries[at + (b - a) * around.widths[matrix]]
    return margin >= 0.0


@kernel()
def _replaces(around, a, b):
    """Whether ``b`` in place of ``a`` never costs more, whatever the neighbours do."""
    margin = around.costs[a] - around.costs[b]
    for matrix in range(len(around.starts)):
        width = around.widths[matrix]
        row, other = around.starts[matrix] + a * width, around.starts[matrix] + b * width
        least = np.inf
        for column in range(width):
            # Columns forbidden to ``a`` do not count.
            if around.entries[row + column] != np.inf:
                least = min(least, around.entries[row + column] - around.entries[other + column])
        if least == -np.inf:
            return False
        margin += least
    return margin >= 0.0
