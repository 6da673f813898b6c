"""Limited problems too wide for exact elimination: prices by compiled messages, then programs or neighbourhoods."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from autopar.solver.flat import Flat, price_by_weights
from autopar.solver.lineages import improve
from autopar.solver.milp import entries_of, highest_cost
from autopar.solver.narrow import MILP_ENTRIES, Settled, branch_within, close_settled, settle
from autopar.solver.part import Part, Search
from autopar.solver.problem import Problem, Usage

# Shares of the time left, in the order of the stages, and the time for one recombination.
PRICE_SHARE, SMALL_SHARE, FIRST_SHARE, MERGE_S = 0.3, 0.25, 0.6, 4.0
# At this gap even of a large problem so little may be left that an integer program can close it.
SMALL_GAP = 2e-3
# Lineages at least and at most, and the seconds that there should be for each.
LINEAGES, MOST_LINEAGES, RACE_S = 2, 6, 7.0


def close_wide(part: Part) -> bool:
    """Bound and solve a limited part; whether it proved that nothing better than the incumbent is left."""
    search = part.search
    search.begin("prices")
    flat = Flat(part, search.seed)
    found = price_by_weights(flat, PRICE_SHARE * search.remaining())
    if flat.bound > highest_cost(part.problem):
        return True
    small = entries_of(part.problem) <= MILP_ENTRIES
    if flat.best is not None and not search.done():
        search.begin("neighbourhoods")
        seconds = (SMALL_SHARE if small else FIRST_SHARE) * search.remaining()
        found += improve(flat, _starts(flat, found, seconds), seconds, search.seed)
    if (small or search.gap() <= SMALL_GAP) and not search.done():
        search.begin("message passing at prices")
        bound = settle(part, lambda: flat.sweep(flat.prices))
        settled = Settled(flat.prune, flat.ends, bound)
        if close_settled(part, settled, [choice.tolist() for choice in found]):
            return True
    _explore(flat, found)
    return False


def _explore(flat: Flat, found: Sequence[np.ndarray]) -> None:
    """Neighbourhoods until lineages stall, then the best recombination of what they became, until time is up."""
    part, search = flat.part, flat.part.search
    seed = search.seed
    while not search.done() and (part.best is not None or flat.best is not None):
        if part.best is not None:
            flat.offer(np.array(part.best, np.int64))
        assert flat.best is not None
        search.begin("neighbourhoods")
        seed += MOST_LINEAGES
        starts = _starts(flat, found, search.remaining())
        ended = improve(flat, starts, search.remaining(), seed)
        search.begin("recombination")
        none = [np.zeros(0, np.int64)] * len(part.problem.nodes)
        branch_within(part, [choice.tolist() for choice in ended], none, search.now() + MERGE_S)


def _starts(flat: Flat, found: Sequence[np.ndarray], seconds: float) -> list[np.ndarray]:
    """Half of them the best choice, the others choices met earlier, the latest first; more where there is time."""
    assert flat.best is not None
    half = int(min(max(seconds / RACE_S, LINEAGES), MOST_LINEAGES)) // 2
    return [*[flat.best[1]] * half, *itertools.islice(itertools.cycle(found[::-1] or [flat.best[1]]), half)]


def compile_kernels() -> None:
    """Compile all kernels, or load them if this machine did so before: some ten seconds, and nothing after that."""
    sizes = (np.array([4.0, 1.0]), np.array([4.0, 2.0]))
    usages = tuple(Usage(node, 0, 1, size) for node, size in enumerate(sizes))
    problem = Problem((np.array([0.0, 1.0]),) * 2, ((0, 1, np.eye(2)),), usages, 6.0)
    flat = Flat(Part(Search(problem, 3600.0, 0.0), problem, list, 1.0), 0)
    chosen = price_by_weights(flat, 3600.0)[0]
    improve(flat, [chosen], 3600.0, 0)
