"""Minimise ``bottleneck + once + fill`` when a solver only minimises the fill under bounds on the other two.

Alpa (Zheng et al. 2022, section 5.2) tries every bound t_max on the bottleneck. The least fill falls as the bounds
grow, so a box of bounds can be left out as a whole once its lower corner plus the least fill under its upper
corner is no better than what is known: the same exact minimum from a few solves.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Payload = TypeVar("Payload")
# The first bottleneck that is tried, and by how much the next is larger, relative to the least that may be possible.
FIRST, GROWTH = 1.05, 1.5
# Totals closer than this are the same: sums of floats in another order.
SAME = 1e-12


@dataclass(frozen=True)
class Found(Generic[Payload]):
    """A solution, with its own maxima, which may be less than the bounds under which it was found."""

    fill_s: float
    bottleneck_s: float
    once_s: float
    payload: Payload

    @property
    def total_s(self) -> float:
        """What is minimised."""
        return self.bottleneck_s + self.once_s + self.fill_s


@dataclass(frozen=True)
class Bounds:
    """Of the busiest stage's part of the step, and of what is done once after it."""

    bottleneck_s: float
    once_s: float

    @property
    def sum_s(self) -> float:
        """Both together."""
        return self.bottleneck_s + self.once_s


# (most allowed, fill_s that is too much) -> the solution of least fill, or None if all need too much.
Solve = Callable[[Bounds, float], "Found[Payload] | None"]


def least_total(solve: Solve[Payload], lowest: Bounds, highest: Bounds, cutoff_s: float) -> Found[Payload] | None:
    """The solution of least total below ``cutoff_s``, or None.

    Args:
        solve: minimises the fill.
        lowest: no solution is below either of these.
        highest: no solution is above either of these.
        cutoff_s: totals from here on are of no use.
    """
    best: Found[Payload] | None = None
    total_s = cutoff_s
    start_s = lowest.bottleneck_s
    tried_s = min(start_s * FIRST, highest.bottleneck_s) if start_s > 0 else highest.bottleneck_s
    # (lower bound of the total, lower corner, upper corner) of boxes, as plain tuples that compare
    pending = [(lowest.sum_s, start_s, lowest.once_s, tried_s, highest.once_s)]
    while True:
        if not pending:
            if tried_s >= min(highest.bottleneck_s, total_s):
                return best
            above_s, tried_s = tried_s, min(tried_s * GROWTH, highest.bottleneck_s, total_s)
            pending.append((above_s + lowest.once_s, above_s, lowest.once_s, tried_s, highest.once_s))
        bound_s, *corners = heapq.heappop(pending)
        if bound_s >= total_s * (1 - SAME):
            continue
        low, high = Bounds(*corners[:2]), Bounds(*corners[2:])
        found = solve(high, total_s - low.sum_s)
        if found is None:
            continue
        if found.total_s < total_s:
            best, total_s = found, found.total_s
        for part in _rest(low, high, found, total_s - found.fill_s):
            bound_s = part[0] + part[1] + found.fill_s
            if bound_s < total_s * (1 - SAME):
                heapq.heappush(pending, (bound_s, *part))


def _rest(low: Bounds, high: Bounds, found: Found, most_s: float) -> Iterator[tuple[float, float, float, float]]:
    """The parts of a box with better solutions: one maximum is less than that found, their sum below ``most_s``."""
    t, e = (math.nextafter(value, -math.inf) for value in (found.bottleneck_s, found.once_s))
    for lo, hi in _halves(low.bottleneck_s, min(t, most_s - low.once_s)):
        yield lo, low.once_s, hi, min(high.once_s, most_s - lo)
    lower_t = max(low.bottleneck_s, found.bottleneck_s)
    for lo, hi in _halves(low.once_s, min(e, most_s - lower_t)):
        yield lower_t, lo, min(high.bottleneck_s, most_s - lo), hi


def _halves(lo: float, hi: float) -> Iterator[tuple[float, float]]:
    middle = lo + (hi - lo) / 2
    if lo < middle < hi:
        yield lo, middle
        yield middle, hi
    elif lo <= hi:
        yield lo, hi
