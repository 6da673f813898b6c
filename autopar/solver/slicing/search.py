"""The search over schedules, microbatches and lengths of pipelines: dynamic programs, bounded by the best so far."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

from autopar.solver.schedule import Family, Pipeline, family
from autopar.solver.slicing.alike import best_alike
from autopar.solver.slicing.bottleneck import SAME
from autopar.solver.slicing.data import Slicing, SlicingProblem, StagePlan
from autopar.solver.slicing.least_memory import raise_infeasible
from autopar.solver.slicing.mixed import Cuts, best_mixed
from autopar.solver.slicing.tables import Tables, tabulate
from autopar.solver.slicing.terms import TIMES, Terms


def slice_stages(problem: SlicingProblem, n_runner_ups: int = 3) -> Slicing:
    """The slicing of least predicted step, proven by dynamic programming; see ``Terms`` for what is predicted.

    Args:
        problem: layers, costs, devices and what to choose from.
        n_runner_ups: how many of the next best to give, each with another schedule or number of microbatches.

    Raises:
        InfeasibleError: nothing fits; names the least memory that would, and the stage that needs it.

    >>> from autopar.solver.slicing import Layer, LayerCosts, SlicingProblem, Submesh
    >>> layer = Layer(forward_s=1.0, state_bytes=8.0, gradient_bytes=2.0, activation_bytes=4.0, boundary_bytes=1.0)
    >>> costs = LayerCosts((layer,) * 6, {"1x1": 1.0}, bandwidth_Bps=1e9)
    >>> found = slice_stages(SlicingProblem(costs, 6, 3, (Submesh("1x1", 1),), microbatches=(4, 8)))
    >>> [(stage.first_layer, stage.last_layer) for stage in found.stages], found.microbatches
    ([(0, 1), (2, 3), (4, 5)], 8)
    """
    best: dict[tuple[str, int], Slicing] = {}
    # The more microbatches, the smaller the bubbles: good slicings come early, and bound the search for others.
    for m in sorted(set(problem.microbatches), reverse=True):
        tables = tabulate(problem, m)
        for name in problem.schedules:
            ranked = sorted(slicing.total_s for slicing in best.values())
            cutoff_s = ranked[n_runner_ups] if len(ranked) > n_runner_ups else math.inf
            found = _best_of(problem, tables, family(name), m, cutoff_s)
            if found is not None:
                best[name, m] = found
    if not best:
        raise_infeasible(problem)
    first, *rest = sorted(best.values(), key=lambda slicing: slicing.total_s)
    return replace(first, runner_ups=tuple(rest[:n_runner_ups]))


def _best_of(problem: SlicingProblem, tables: Tables, found: Family, m: int, cutoff_s: float) -> Slicing | None:
    if not found.traits.uniform:
        return _best_length(problem, tables, found, m, cutoff_s)
    chosen = best_alike(problem, tables, found, m, cutoff_s)
    return None if chosen is None else plan(problem, *chosen)


def _best_length(problem: SlicingProblem, tables: Tables, found: Family, m: int, cutoff_s: float) -> Slicing | None:
    """Splits the range of pipeline lengths until the terms of the best one are exact: most often at once."""
    best: Slicing | None = None
    longest = min(problem.n_layers, problem.n_devices // min(tables.sizes, default=problem.n_devices + 1))
    ranges = [(0.0, 1, longest)] if longest else []
    while ranges:
        bound_s, shortest, longest = heapq.heappop(ranges)
        if bound_s >= cutoff_s * (1 - SAME):
            continue
        terms = Terms(found, Pipeline(shortest, m), Pipeline(longest, m), tables)
        bounded = best_mixed(terms, problem.n_devices, problem.memory_bytes, cutoff_s)
        if bounded is None:
            continue
        p = len(bounded.payload)
        exact = replace(terms, least=Pipeline(p, m), most=Pipeline(p, m))
        made = plan(problem, exact, bounded.payload)
        fits = max(stage.peak_bytes for stage in made.stages) <= problem.memory_bytes
        if fits and made.total_s < cutoff_s:
            best, cutoff_s = made, made.total_s
        if not fits or made.total_s > bounded.total_s * (1 + SAME):
            parts = ((shortest, p - 1), (p, p), (p + 1, longest))
            for lo, hi in parts:
                if lo <= hi and (lo, hi) != (shortest, longest):
                    heapq.heappush(ranges, (bounded.total_s, lo, hi))
    return best


def plan(problem: SlicingProblem, terms: Terms, cuts: Cuts) -> Slicing:
    """What is predicted of chosen stages."""
    places = terms.family.traits.placements(terms.least)[0]
    work_s, fill_s, once_s, tables = terms.work_s(), terms.fill_s(), terms.once_s(), terms.tables
    bottleneck, fill, once = 0.0, 0.0, 0.0
    for k, cut in enumerate(cuts):
        at = (cut.r, cut.c, cut.first, cut.end - 1)
        stays = k + 1 == len(cuts) or places[k] == places[k + 1]
        transfer_s = 0.0 if stays else float(tables.transfer_s[cut.end - 1, cut.c, cuts[k + 1].c])
        busy_s = float(work_s[at] + terms.wait_s(transfer_s, tables.stage["weight_s"][at]))
        bottleneck = max(bottleneck, busy_s, float(terms.link_s(transfer_s)))
        fill += float(fill_s[at] + terms.travel_s(transfer_s))
        once = max(once, float(once_s[at]))
    stages = tuple(_stage_plan(problem, terms, cuts, k, bottleneck + fill + once) for k in range(len(cuts)))
    return Slicing(stages, terms.least.m, terms.family.name, terms.least.v, bottleneck, fill, once)


def _stage_plan(problem: SlicingProblem, terms: Terms, cuts: Cuts, k: int, total_s: float) -> StagePlan:
    cut, stage = cuts[k], terms.tables.stage
    at = (cut.r, cut.c, cut.first, cut.end - 1)
    place = terms.family.traits.placements(terms.least)[0][k]
    busy_s = terms.least.m * sum(float(stage[name][at]) for name in TIMES)
    once_s = float(terms.once_s()[at]) / terms.least.v
    return StagePlan(
        cut.first,
        cut.end - 1,
        terms.tables.submeshes[cut.c],
        problem.remats[cut.r],
        place,
        busy_s,
        total_s / terms.least.v - busy_s - once_s,
        float(terms.peak_bytes(terms.in_flight_on(place))[at]),
        0.0 if k + 1 == len(cuts) else terms.least.m * float(stage["sent_bytes"][at]),
    )
