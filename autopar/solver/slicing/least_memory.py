"""What to say when nothing fits: the least memory that would do, and the stage that needs it."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from autopar.errors import InfeasibleError
from autopar.solver.schedule import Family, Pipeline, family
from autopar.solver.slicing.alike import Alike, pipelines_alike
from autopar.solver.slicing.data import SlicingProblem
from autopar.solver.slicing.mixed import Cut, Cuts
from autopar.solver.slicing.options import options
from autopar.solver.slicing.tables import Tables, tabulate
from autopar.solver.slicing.terms import Terms

# Bisection goes on to this relative width; from there each step is to the next lower peak of all.
NARROW = 1e-3


@dataclass(frozen=True)
class _Least:
    """A pipeline that needs the least memory."""

    peak_bytes: float
    terms: Terms
    cuts: Cuts

    def peaks_bytes(self) -> list[float]:
        """Of each stage."""
        places = self.terms.family.traits.placements(self.terms.least)[0]
        return [
            float(self.terms.peak_bytes(self.terms.in_flight_on(place))[cut.r, cut.c, cut.first, cut.end - 1])
            for place, cut in zip(places, self.cuts, strict=True)
        ]


def raise_infeasible(problem: SlicingProblem) -> NoReturn:
    """Raises ``InfeasibleError`` with the least memory over all schedules and microbatches."""
    least: _Least | None = None
    for m in problem.microbatches:
        tables = tabulate(problem, m)
        for name in problem.schedules:
            for one in _candidates(problem, tables, family(name), m):
                if least is None or one.peak_bytes < least.peak_bytes:
                    least = one
    if least is None:
        raise InfeasibleError(
            f"no slicing of {problem.n_layers} layers for {problem.n_devices} devices, whatever their memory",
            where=f"schedules {', '.join(problem.schedules)}; microbatches {problem.microbatches}",
            fix="allow other submeshes, microbatches or schedules, or costs that are finite",
        )
    peaks = least.peaks_bytes()
    k = int(np.argmax(peaks))
    cut, s, tables = least.cuts[k], least.terms.least, least.terms.tables
    more = "more devices or more microbatches" if len(problem.remats) > 1 else "more devices or rematerialisation"
    raise InfeasibleError(
        f"no slicing fits {problem.memory_bytes:.6g} bytes per device: the least that one needs is "
        f"{peaks[k]:.6g} bytes",
        where=f"stage {k} of {len(least.cuts)} (layers {cut.first} to {cut.end - 1} on {tables.submeshes[cut.c].name}, "
        f"remat {problem.remats[cut.r]}) under {least.terms.family.name} with {s.m} microbatches",
        fix=f"allow memory_bytes of at least {peaks[k]:.6g}, {more}",
    )


def _candidates(problem: SlicingProblem, tables: Tables, found: Family, m: int) -> list[_Least]:
    if not found.traits.uniform:
        one = _least_mixed(problem, tables, found, m)
        return [] if one is None else [one]
    result = []
    for s, c in pipelines_alike(problem, tables, found, m):
        peak_bytes, cuts = Alike(Terms(found, s, s, tables.only(c)), math.inf).least_peak_bytes()
        if cuts:
            result.append(_Least(peak_bytes, Terms(found, s, s, tables), tuple(replace(cut, c=c) for cut in cuts)))
    return result


def _least_mixed(problem: SlicingProblem, tables: Tables, found: Family, m: int) -> _Least | None:
    """Splits the range of pipeline lengths until the activations that the best one holds are exact."""
    best: _Least | None = None
    longest = min(problem.n_layers, problem.n_devices // min(tables.sizes, default=problem.n_devices + 1))
    ranges = [(0.0, 1, longest)] if longest else []
    while ranges:
        bound_bytes, shortest, longest = heapq.heappop(ranges)
        limit_bytes = math.inf if best is None else math.nextafter(best.peak_bytes, 0.0)
        if bound_bytes > limit_bytes:
            continue
        terms = Terms(found, Pipeline(shortest, m), Pipeline(longest, m), tables)
        cuts = _least_of_range(terms, problem.n_devices, limit_bytes)
        if cuts is None:
            continue
        p = len(cuts)
        exact = _Least(0.0, replace(terms, least=Pipeline(p, m), most=Pipeline(p, m)), cuts)
        bound_bytes, peak_bytes = _peak_bytes(terms, cuts), max(exact.peaks_bytes())
        if best is None or peak_bytes < best.peak_bytes:
            best = replace(exact, peak_bytes=peak_bytes)
        if peak_bytes > bound_bytes:
            for lo, hi in ((shortest, p - 1), (p, p), (p + 1, longest)):
                if lo <= hi and (lo, hi) != (shortest, longest):
                    heapq.heappush(ranges, (bound_bytes, lo, hi))
    return best


def _peak_bytes(terms: Terms, cuts: Cuts) -> float:
    return max(
        float(terms.peak_bytes(terms.in_flight(len(cuts) - k))[cut.r, cut.c, cut.first, cut.end - 1])
        for k, cut in enumerate(cuts)
    )


def _least_of_range(terms: Terms, n_devices: int, limit_bytes: float) -> Cuts | None:
    best = _fewest_devices(terms, n_devices, limit_bytes)
    if best is None:
        return None
    lo, hi = 0.0, _peak_bytes(terms, best)
    while lo < hi:
        middle = lo + (hi - lo) / 2 if hi - lo > NARROW * hi else math.nextafter(hi, 0.0)
        cuts = _fewest_devices(terms, n_devices, middle)
        if cuts is None:
            lo = middle if middle < math.nextafter(hi, 0.0) else hi
        else:
            best, hi = cuts, _peak_bytes(terms, cuts)
    return best


def _fewest_devices(terms: Terms, n_devices: int, memory_bytes: float) -> Cuts | None:
    """A pipeline of the range within the memory, if the devices suffice; by the number of stages left."""
    o = options(terms, memory_bytes)
    least = np.full((o.n_layers + 1, terms.most.p + 1), np.inf)
    least[-1, 0] = 0.0
    chosen = np.zeros(least.shape, dtype=np.int64)
    stages = np.arange(1, terms.most.p + 1)
    for first in range(o.n_layers - 1, -1, -1):
        group = o.groups[first]
        if group.start < group.stop:
            needed = o.n[group, None] + least[o.end[group], :-1]
            needed = np.where(stages <= o.most_s[group, None], needed, np.inf)
            chosen[first, 1:] = group.start + needed.argmin(axis=0)
            least[first, 1:] = needed.min(axis=0)
    s = terms.least.p + int(least[0, terms.least.p :].argmin())
    if not least[0, s] <= n_devices:
        return None
    first, cuts = 0, []
    while first < o.n_layers:
        index = int(chosen[first, s])
        cuts.append(Cut(first, int(o.end[index]), int(o.c[index]), int(o.r[index])))
        first, s = int(o.end[index]), s - 1
    return tuple(cuts)
