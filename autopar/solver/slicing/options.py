"""The stages that a pipeline may have, as flat arrays, and bounds by dropping the limit on devices."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from autopar.solver.slicing.terms import Terms

PRICE_STEPS = 12


@dataclass(frozen=True, eq=False)
class Options:
    """Possible stages, by first layer. Arrays of one length; a stage covers layers ``first <= layer < end``.

    Args:
        n_layers: layers of the model.
        first: the first layer, ascending.
        end: the layer after the last one.
        c: index of the submesh.
        r: index of the rematerialisation policy.
        n: devices of the submesh.
        work_s: see ``Terms.work_s``.
        fill_s: see ``Terms.fill_s``.
        once_s: see ``Terms.once_s``.
        weight_s: the weight part of one microbatch.
        most_s: how many stages there may be from this one to the end, by memory.
    """

    n_layers: int
    first: np.ndarray
    end: np.ndarray
    c: np.ndarray
    r: np.ndarray
    n: np.ndarray
    work_s: np.ndarray
    fill_s: np.ndarray
    once_s: np.ndarray
    weight_s: np.ndarray
    most_s: np.ndarray

    def where(self, keep: np.ndarray) -> Options:
        """Only those of a mask."""
        columns = (getattr(self, field.name)[keep] for field in fields(self)[1:])
        return Options(self.n_layers, *columns)

    @cached_property
    def groups(self) -> tuple[slice, ...]:
        """For each first layer, its options."""
        bounds = np.searchsorted(self.first, np.arange(self.n_layers + 1))
        return tuple(slice(lo, hi) for lo, hi in itertools.pairwise(bounds))

    @cached_property
    def by_end(self) -> tuple[np.ndarray, tuple[slice, ...]]:
        """An order by the layer after the last one; and for each last layer, where its options are in that order."""
        order = np.argsort(self.end, kind="stable")
        bounds = np.searchsorted(self.end[order], np.arange(1, self.n_layers + 2))
        return order, tuple(slice(lo, hi) for lo, hi in itertools.pairwise(bounds))

    def least_after(self, costs: np.ndarray) -> np.ndarray:
        """For each layer, the least sum of costs over stages from it to the end; ``inf`` if there are none."""
        least = np.full(self.n_layers + 1, np.inf)
        least[-1] = 0.0
        for first in range(self.n_layers - 1, -1, -1):
            group = self.groups[first]
            if group.start < group.stop:
                least[first] = (costs[group] + least[self.end[group]]).min()
        return least

    def least_before(self, costs: np.ndarray) -> np.ndarray:
        """For each layer, the least sum of costs over stages from the start to before it."""
        order, groups = self.by_end
        costs, first = costs[order], self.first[order]
        least = np.full(self.n_layers + 1, np.inf)
        least[0] = 0.0
        for end in range(1, self.n_layers + 1):
            group = groups[end - 1]
            if group.start < group.stop:
                least[end] = (costs[group] + least[first[group]]).min()
        return least

    def least_through(self, costs: np.ndarray) -> np.ndarray:
        """For each option, the least sum of costs of all pipelines that have it."""
        return self.least_before(costs)[self.first] + costs + self.least_after(costs)[self.end]

    def affordable(self, n_devices: int, too_much_s: float) -> Options:
        """Those that a pipeline of at most so many devices and less fill than ``too_much_s`` may have.

        Devices are given a price (a Lagrange multiplier): the best pipeline without a limit, at that price, less
        the price of all devices, is a bound. Options whose bound is too much are dropped, exactly.
        """
        left = self.where(self.least_through(self.n.astype(float)) <= n_devices)
        if not len(left.first):
            return left
        price, best = 0.0, left.least_after(left.fill_s)[0]
        step = best / n_devices
        # The bound is concave in the price: climb while it rises, then turn round in smaller steps.
        for _ in range(PRICE_STEPS):
            other = max(price + step, 0.0)
            bound = left.least_after(left.fill_s + other * left.n)[0] - other * n_devices
            if bound > best:
                best, price, step = bound, other, step * 2
            else:
                step = -step / 4
        reduced = left.least_through(left.fill_s + price * left.n) - price * n_devices
        return left.where(reduced < too_much_s * (1 + 1e-9))


def options(terms: Terms, memory_bytes: float) -> Options:
    """All stages that fit memory as the last one at least, but for policies that are no better than an earlier one."""
    work_s, fill_s, once_s = terms.work_s(), terms.fill_s(), terms.once_s()
    weight_s = terms.tables.stage["weight_s"]
    most = np.zeros(work_s.shape, dtype=np.int64)
    n_layers = terms.tables.n_layers
    counts: dict[int, int] = {}
    for from_end in range(1, min(terms.most.p, n_layers) + 1):
        held = terms.in_flight(from_end)
        counts[held] = counts.get(held, 0) + 1
    fits = np.ones(work_s.shape, dtype=bool)
    for held in sorted(counts):
        fits &= terms.peak_bytes(held) <= memory_bytes
        most += fits * counts[held]
    useful = np.isfinite(work_s) & (most > 0) & _undominated((work_s, fill_s, once_s, -weight_s, -most))
    r, c, first, last = np.nonzero(useful)
    order = np.argsort(first, kind="stable")
    r, c, first, last = r[order], c[order], first[order], last[order]
    at = (r, c, first, last)
    n = np.array(terms.tables.sizes, dtype=np.int64)[c]
    return Options(n_layers, first, last + 1, c, r, n, work_s[at], fill_s[at], once_s[at], weight_s[at], most[at])


def _undominated(values: Sequence[np.ndarray]) -> np.ndarray:
    """Where no earlier policy, the first index, has no value that is larger."""
    keep = np.ones(values[0].shape, dtype=bool)
    for r in range(1, len(keep)):
        for other in range(r):
            keep[r] &= ~np.logical_and.reduce([value[other] <= value[r] for value in values])
    return keep
