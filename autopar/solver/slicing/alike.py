"""Stages on equal submeshes, several per device or in both directions: one dimension of dynamic programming.

A device of such a pipeline holds stages that lie apart in the model, so all its submeshes are alike. Stage k of
``p v`` is priced as if its device held nothing but such stages: the busiest stage bounds the busiest device, and
the memory of each is a bound for the memory of all.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np

from autopar.solver.schedule import Family, Pipeline
from autopar.solver.slicing.bottleneck import SAME, Bounds, Found, least_total
from autopar.solver.slicing.data import SlicingProblem
from autopar.solver.slicing.mixed import Cut, Cuts
from autopar.solver.slicing.tables import Tables
from autopar.solver.slicing.terms import Terms


def best_alike(
    problem: SlicingProblem, tables: Tables, found: Family, m: int, cutoff_s: float
) -> tuple[Terms, Cuts] | None:
    """The best pipeline of any length on any submesh that takes less than ``cutoff_s``, and its terms."""
    best: tuple[Terms, Cuts] | None = None
    tables_of = cache(tables.only)
    candidates = [
        (bound_s, index, s, c)
        for index, (bound_s, s, c) in enumerate(_bounds(problem, tables_of, found, m))
        if bound_s < cutoff_s
    ]
    heapq.heapify(candidates)
    while candidates:
        bound_s, _, s, c = heapq.heappop(candidates)
        if bound_s >= cutoff_s * (1 - SAME):
            break
        alike = Alike(Terms(found, s, s, tables_of(c)), problem.memory_bytes)
        cuts = least_total(alike.solve, alike.lowest(), alike.highest(), cutoff_s)
        if cuts is not None:
            cutoff_s = cuts.total_s
            best = Terms(found, s, s, tables), tuple(Cut(cut.first, cut.end, c, cut.r) for cut in cuts.payload)
    return best


def pipelines_alike(problem: SlicingProblem, tables: Tables, found: Family, m: int) -> Iterator[tuple[Pipeline, int]]:
    """Every pipeline of equal submeshes that the schedule takes, with the index of its submesh."""
    for c, size in enumerate(tables.sizes):
        for v in problem.chunks if found.traits.any_chunks else (found.traits.chunks,):
            for p in range(1, min(problem.n_devices // size, problem.n_layers // v) + 1):
                s = Pipeline(p, m, v)
                if not found.complaint(s):
                    yield s, c


def _bounds(
    problem: SlicingProblem, tables_of: Callable[[int | None], Tables], found: Family, m: int
) -> Iterator[tuple[float, Pipeline, int]]:
    """A step that no pipeline of these sizes is shorter than; all lengths on one submesh are bounded at once."""
    lengths: dict[tuple[int, int], list[Pipeline]] = {}
    for s, c in pipelines_alike(problem, tables_of(None), found, m):
        lengths.setdefault((c, s.v), []).append(s)
    for (c, _), pipelines in lengths.items():
        terms = Terms(found, pipelines[0], pipelines[-1], tables_of(c))
        work_s, most = terms.work_s()[:, 0], pipelines[-1].n_stages
        joined = [
            least_chains(np.where(np.isfinite(work_s), costs[:, 0], np.inf).min(axis=0), join, most)
            for costs, join in ((terms.work_s(), np.maximum), (terms.once_s(), np.maximum), (terms.fill_s(), np.add))
        ]
        for s in pipelines:
            yield sum(max(chain[s.n_stages], 0.0) for chain in joined), s, c


def least_chains(costs: np.ndarray, join: np.ufunc, n_stages: int) -> list[float]:
    """For each number of stages up to ``n_stages``, the least joined cost of that many that cover all layers.

    Args:
        costs: shape ``(layers, layers)``, ``[first, last]``; ``inf`` where there is no such stage.
        join: how the costs of stages are joined: the sum, or the largest.
        n_stages: the most stages.
    """
    after = np.full(len(costs) + 1, np.inf)
    after[-1] = 0.0 if join is np.add else -np.inf
    result = [math.inf]
    for _ in range(n_stages):
        after = np.append(join(costs, after[1:]).min(axis=1), np.inf)
        result.append(float(after[0]))
    return result


class Alike:
    """The prices of one pipeline on one submesh. Arrays of stages have shape ``(r, first, last)``."""

    def __init__(self, terms: Terms, memory_bytes: float) -> None:
        self.terms, self.memory_bytes = terms, memory_bytes
        self.work_s, self.fill_s, self.once_s = (x[:, 0] for x in (terms.work_s(), terms.fill_s(), terms.once_s()))
        self.weight_s = terms.tables.stage["weight_s"][:, 0]
        self.transfer_s = np.append(terms.tables.transfer_s[:, 0, 0], 0.0)
        self.n_layers, self.n_stages = len(self.transfer_s), terms.least.n_stages
        places = terms.family.traits.placements(terms.least)[0]
        # After the last stage nothing is sent, nor where the next stage is on the same device.
        self.places = [
            (terms.in_flight_on(one), one != other)
            for one, other in zip(places, (*places[1:], places[-1]), strict=True)
        ]
        self.peak_bytes = cache(lambda held: terms.peak_bytes(held)[:, 0])

    def lowest(self) -> Bounds:
        """No pipeline is below these: transfers and memory aside."""
        once_s = np.where(np.isfinite(self.work_s), self.once_s, np.inf)
        each = (least_chains(costs.min(axis=0), np.maximum, self.n_stages)[-1] for costs in (self.work_s, once_s))
        return Bounds(*(max(least, 0.0) for least in each))

    def highest(self) -> Bounds:
        """No pipeline is above these."""
        slowest_s = float(self.transfer_s.max())
        work_s = float(self.work_s.max(where=np.isfinite(self.work_s), initial=0.0))
        wait_s, link_s = float(self.terms.wait_s(slowest_s, 0.0)), float(self.terms.link_s(slowest_s))
        return Bounds(max(work_s + wait_s, link_s), float(self.once_s.max()))

    def solve(self, most: Bounds, too_much_s: float) -> Found[Cuts] | None:
        """The least fill under bounds on the rest."""

        def costs(held: int, sends: bool) -> np.ndarray:
            allowed = (self.bottleneck_s(sends) <= most.bottleneck_s) & (self.once_s <= most.once_s)
            allowed &= self.peak_bytes(held) <= self.memory_bytes
            return np.where(allowed, self.fill_s + self.terms.travel_s(self.transfer_s * sends), np.inf)

        fill_s, cuts = self.chain(costs, np.add)
        if not fill_s < too_much_s:
            return None
        ends = zip(cuts, self.places, strict=True)
        bottleneck_s = max(float(self.bottleneck_s(sends)[c.r, c.first, c.end - 1]) for c, (_, sends) in ends)
        once_s = max(float(self.once_s[cut.r, cut.first, cut.end - 1]) for cut in cuts)
        return Found(fill_s, bottleneck_s, once_s, cuts)

    def bottleneck_s(self, sends: bool) -> np.ndarray:
        """Of each stage and the link that it sends by."""
        transfer_s = self.transfer_s * sends
        return np.maximum(self.work_s + self.terms.wait_s(transfer_s, self.weight_s), self.terms.link_s(transfer_s))

    def least_peak_bytes(self) -> tuple[float, Cuts]:
        """The least memory that any cut into these stages needs, and the cut; ``inf`` if there is none."""
        possible = np.isfinite(self.work_s)
        return self.chain(lambda held, _: np.where(possible, self.peak_bytes(held), np.inf), np.maximum)

    def chain(self, costs: Callable[[int, bool], np.ndarray], join: np.ufunc) -> tuple[float, Cuts]:
        """The least joined cost of all stages in order, where ``costs(held, sends)`` gives those of one place."""
        policies = cache(lambda held, sends: _least_policy(costs(held, sends)))
        after = np.full(self.n_layers + 1, np.inf)
        after[-1] = 0.0
        lasts: list[np.ndarray] = []
        for place in reversed(self.places):
            joined = join(policies(*place)[0], after[1:])
            lasts.append(joined.argmin(axis=1))
            after = np.append(joined.min(axis=1), np.inf)
        if math.isinf(after[0]):
            return math.inf, ()
        first, cuts = 0, []
        for place, last_of in zip(self.places, reversed(lasts), strict=True):
            last = int(last_of[first])
            cuts.append(Cut(first, last + 1, 0, int(policies(*place)[1][first, last])))
            first = last + 1
        return float(after[0]), tuple(cuts)


def _least_policy(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least over rematerialisation policies, and which one it is."""
    return costs.min(axis=0), costs.argmin(axis=0)
