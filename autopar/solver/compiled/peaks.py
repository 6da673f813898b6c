"""A segment tree over memory rows: add to a range, ask for the largest row, in time logarithmic in rows.

``most[p]`` is the largest of what lies under ``p`` with all that was added at ``p`` or below; ``added[p]`` is
what was added to the whole of ``p`` at once. Leaves are the upper half.
"""

from __future__ import annotations

import numpy as np

from autopar.solver.compiled.kernel import kernel

NOTHING = -1e300


def tree_of(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """An empty tree for so many rows: ``(most, added)``."""
    leaves = 1 << max(rows - 1, 0).bit_length()
    return np.full(2 * leaves, NOTHING), np.zeros(2 * leaves)


@kernel()
def fill(most, added, values):
    """Start from these values."""
    leaves = len(most) // 2
    for row in range(len(values)):
        most[leaves + row] = values[row]
    for at in range(leaves - 1, 0, -1):
        added[at] = 0.0
        most[at] = max(most[2 * at], most[2 * at + 1])


@kernel()
def add(most, added, lo, hi, amount):
    """Add an amount to the rows ``[lo, hi)``."""
    leaves = len(most) // 2
    left, right = lo + leaves, hi + leaves
    first, last = left, right - 1
    while left < right:
        if left & 1:
            most[left] += amount
            added[left] += amount
            left += 1
        if right & 1:
            right -= 1
            most[right] += amount
            added[right] += amount
        left >>= 1
        right >>= 1
    first >>= 1
    last >>= 1
    while first != last:
        most[first] = max(most[2 * first], most[2 * first + 1]) + added[first]
        most[last] = max(most[2 * last], most[2 * last + 1]) + added[last]
        first >>= 1
        last >>= 1
    while first:
        most[first] = max(most[2 * first], most[2 * first + 1]) + added[first]
        first >>= 1


@kernel()
def worst_row(most):
    """The row with the largest value."""
    leaves = len(most) // 2
    at = 1
    while at < leaves:
        at = 2 * at if most[2 * at] >= most[2 * at + 1] else 2 * at + 1
    return at - leaves
