"""Stages on submeshes of any shapes, one per device of the pipeline: dynamic programming from the last stage.

The least fill of the layers from i on, with s stages on at most d devices, the first of them on submesh c:

    F[i, c](s, d) = min over ends j of  g(i, j, c) + H[j, c](s - 1, d - n_c)
    H[j, c](s, d) = min over c' of      2 x(j, c, c') + F[j, c'](s, d)          (no transfer after the last layer)

as in Alpa (Zheng et al. 2022, equation 4), with the transfer x, and s because early stages hold more activations.
Under a bound on the bottleneck, a stage may only send to the submeshes c' to which it waits little enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autopar.solver.slicing.bottleneck import Bounds, Found, least_total
from autopar.solver.slicing.options import Options, options
from autopar.solver.slicing.terms import Terms


@dataclass(frozen=True)
class Cut:
    """One chosen stage: layers ``first <= layer < end``, index of the submesh and of the policy."""

    first: int
    end: int
    c: int
    r: int


Cuts = tuple[Cut, ...]


def best_mixed(terms: Terms, n_devices: int, memory_bytes: float, cutoff_s: float) -> Found[Cuts] | None:
    """The best pipeline of ``terms.least.p`` to ``terms.most.p`` stages that takes less than ``cutoff_s``."""
    possible = options(terms, memory_bytes)
    if not len(possible.first):
        return None
    lowest = Bounds(_lowest(possible, possible.work_s, n_devices), _lowest(possible, possible.once_s, n_devices))
    if not lowest.sum_s < cutoff_s:
        return None

    def solve(most: Bounds, too_much_s: float) -> Found[Cuts] | None:
        allowed = (possible.work_s <= most.bottleneck_s) & (possible.once_s <= most.once_s)
        within = possible.where(allowed).affordable(n_devices, too_much_s)
        if not len(within.first):
            return None
        found = _Recursion(terms, within, n_devices, most.bottleneck_s).best()
        return found if found is not None and found.fill_s < too_much_s else None

    highest = Bounds(_highest_bottleneck_s(terms, possible), float(possible.once_s.max()))
    return least_total(solve, lowest, highest, cutoff_s)


def _lowest(possible: Options, values_s: np.ndarray, n_devices: int) -> float:
    """The least bound on a value under which stages for all layers fit the devices, transfers and positions aside."""
    levels = np.unique(values_s)
    lo, hi = 0, len(levels)
    while lo < hi:
        middle = (lo + hi) // 2
        within = possible.where(values_s <= levels[middle])
        if within.least_after(within.n.astype(float))[0] <= n_devices:
            hi = middle
        else:
            lo = middle + 1
    return float(levels[lo]) if lo < len(levels) else math.inf


def _highest_bottleneck_s(terms: Terms, possible: Options) -> float:
    slowest_s = float(terms.tables.transfer_s.max(initial=0.0))
    wait_s = float(terms.wait_s(slowest_s, 0.0))
    return max(float(possible.work_s.max()) + wait_s, float(terms.link_s(slowest_s)))


class _Recursion:
    """The tables of one dynamic program. Devices are counted in the largest unit that all submeshes share."""

    def __init__(self, terms: Terms, options: Options, n_devices: int, most_s: float) -> None:
        self.terms, self.options, self.most_s = terms, options, most_s
        self.n_layers = options.n_layers
        self.unit = math.gcd(*(int(n) for n in np.unique(options.n)))
        self.n = options.n // self.unit
        self.n_devices = n_devices // self.unit
        needed = self.n.astype(float)
        # Tables span what their layers need at least to what those before them leave at most.
        self.least_d = _whole(options.least_after(needed))
        self.most_d = self.n_devices - _whole(options.least_before(needed))
        self.values: dict[tuple[int, int], np.ndarray] = {}
        self.joined: dict[tuple[int, int, int], np.ndarray] = {}
        self.receivers: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.stages = np.zeros(self.n_layers + 1, dtype=np.int64)
        self.allowed = np.zeros(len(options.first), dtype=np.int64)

    def best(self) -> Found[Cuts] | None:
        for first in range(self.n_layers - 1, -1, -1):
            if self.options.groups[first].start < self.options.groups[first].stop:
                self._fill(first)
                self._allow(first)
        least, where = math.inf, (0, 0)
        for (first, c), table in self.values.items():
            if first == 0 and len(table) > self.terms.least.p:
                column = table[self.terms.least.p :, -1]
                s = int(column.argmin())
                if column[s] < least:
                    least, where = float(column[s]), (c, s + self.terms.least.p)
        return None if math.isinf(least) else self._trace(least, *where)

    def _fill(self, first: int) -> None:
        """``F[first, c]`` for all c. Rows: stages from 0; columns: devices from ``least_d`` to ``most_d``."""
        o, group = self.options, self.options.groups[first]
        lo, hi = self.least_d[first], self.most_d[first]
        deepest = np.minimum(self.stages[o.end[group]] + 1, o.most_s[group])
        self.stages[first] = min(int(deepest.max()), self.terms.most.p)
        if hi < lo:
            return
        scratch = np.empty((self.stages[first] + 1, hi - lo + 1))
        for index in range(group.start, group.stop):
            source = self._source(index, hi)
            if source is None:
                continue
            c, end = int(o.c[index]), int(o.end[index])
            table = self.values.get((first, c))
            if table is None:
                table = self.values[first, c] = np.full(scratch.shape, np.inf)
            rows = min(len(source), int(o.most_s[index]), int(self.stages[first]))
            left = self.least_d[end] + self.n[index] - lo
            target = table[1 : rows + 1, left : left + source.shape[1]]
            total = scratch[:rows, : source.shape[1]]
            np.add(source[:rows], o.fill_s[index], out=total)
            np.minimum(target, total, out=target)

    def _source(self, index: int, hi: int) -> np.ndarray | None:
        """``H`` after this option for the devices that it leaves; None if nothing may follow it."""
        end, c = int(self.options.end[index]), int(self.options.c[index])
        width = hi - self.n[index] - self.least_d[end] + 1
        if width < 1:
            return None
        if end == self.n_layers:
            return np.zeros((1, width))
        allowed = int(self.allowed[index])
        return self._joined(end, c, allowed)[:, :width] if allowed else None

    def _allow(self, end: int) -> None:
        """For all options up to a layer, to how many of the submeshes after it they may send."""
        if end:
            order, groups = self.options.by_end
            ending = order[groups[end - 1]]
            for c in np.unique(self.options.c[ending]):
                mine = ending[self.options.c[ending] == c]
                bottleneck_s = self._bottleneck_s(mine, self._receivers(end, int(c))[1])
                self.allowed[mine] = (bottleneck_s <= self.most_s).sum(axis=1)

    def _bottleneck_s(self, indices: np.ndarray, transfer_s: np.ndarray) -> np.ndarray:
        """Of each of some options, for each transfer: of the device, or the link if that is busier."""
        wait_s = self.terms.wait_s(transfer_s, self.options.weight_s[indices, None])
        return np.maximum(self.options.work_s[indices, None] + wait_s, self.terms.link_s(transfer_s))

    def _receivers(self, end: int, c: int) -> tuple[np.ndarray, np.ndarray]:
        """The submeshes of the next stage, the nearest first, and the transfer times to them."""
        if (end, c) not in self.receivers:
            following = np.array([d for d in range(len(self.terms.tables.sizes)) if (end, d) in self.values], dtype=int)
            transfer_s = self.terms.tables.transfer_s[end - 1, c, following]
            order = np.argsort(transfer_s, kind="stable")
            self.receivers[end, c] = following[order], transfer_s[order]
        return self.receivers[end, c]

    def _joined(self, end: int, c: int, allowed: int) -> np.ndarray:
        """``H[end, c]`` with the nearest ``allowed`` submeshes to choose from."""
        if (end, c, allowed) not in self.joined:
            receivers, transfer_s = self._receivers(end, c)
            travel_s = np.asarray(self.terms.travel_s(transfer_s))
            result = self.values[end, int(receivers[0])] + travel_s[0]
            for other, seconds in zip(receivers[1:allowed], travel_s[1:allowed], strict=True):
                np.minimum(result, self.values[end, int(other)] + seconds, out=result)
            self.joined[end, c, allowed] = result
        return self.joined[end, c, allowed]

    def _trace(self, fill_s: float, c: int, s: int) -> Found[Cuts]:
        """Walks the tables again; sums are made in the same order, so that equal means equal."""
        o = self.options
        first, d, value, cuts = 0, self.n_devices, fill_s, list[Cut]()
        bottleneck_s = once_s = 0.0
        while first < self.n_layers:
            index, value = self._chosen(first, c, (s, d), value)
            end, d, s = int(o.end[index]), d - int(self.n[index]), s - 1
            cuts.append(Cut(first, end, c, int(o.r[index])))
            bottleneck_s = max(bottleneck_s, float(o.work_s[index]))
            once_s = max(once_s, float(o.once_s[index]))
            if end < self.n_layers:
                receivers, transfer_s = self._receivers(end, c)
                column = d - self.least_d[end]
                for other, seconds in zip(receivers, transfer_s, strict=True):
                    after = self.values[end, int(other)][s, column]
                    if after + self.terms.travel_s(seconds) == value:
                        bottleneck_s = max(bottleneck_s, self._bottleneck_s(np.array([index]), seconds).item())
                        c, value = int(other), float(after)
                        break
            first = end
        return Found(fill_s, bottleneck_s, once_s, tuple(cuts))

    def _chosen(self, first: int, c: int, at: tuple[int, int], value: float) -> tuple[int, float]:
        """The option with that value, and the value after it."""
        o, (s, d) = self.options, at
        for index in range(self.options.groups[first].start, self.options.groups[first].stop):
            source = self._source(index, self.most_d[first]) if o.c[index] == c and s <= o.most_s[index] else None
            column = d - self.n[index] - self.least_d[int(o.end[index])]
            if source is None or s > len(source) or not 0 <= column < source.shape[1]:
                continue
            if source[s - 1, column] + o.fill_s[index] == value:
                return index, float(source[s - 1, column])
        raise AssertionError("the tables of a dynamic program contradict each other")


def _whole(counts: np.ndarray) -> np.ndarray:
    """Integers, with a number larger than any count of devices for infinity."""
    return np.where(np.isfinite(counts), counts, np.iinfo(np.int32).max).astype(np.int64)
