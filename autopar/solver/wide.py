"""Limited problems too wide for exact elimination: prices by compiled messages, then programs or neighbourhoods."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from autopar.solver.flat import Flat, Unlimited, price_by_weights
from autopar.solver.lineages import beside, improve
from autopar.solver.milp import entries_of, highest_cost
from autopar.solver.narrow import (
    MILP_ENTRIES,
    NEAR_TIME,
    Settled,
    branch_near,
    branch_within,
    close_gap,
    guess_the_gap,
    pruned,
    settle,
)
from autopar.solver.part import Part, Search
from autopar.solver.problem import Problem, Usage
from autopar.solver.stages import bound_and_prune

# Shares of the time left, in the order of the stages, and the time for one recombination.
PRICE_SHARE, GUESS_SHARE, SMALL_SHARE, FIRST_SHARE, MERGE_S = 0.3, 0.7, 0.25, 0.6, 4.0
# Messages end when they gain less than this share of the gap in a few sweeps.
FINE_SHARE = 1e-3
# At this gap even of a large problem so little may be left that an integer program can close it.
SMALL_GAP = 2e-3
# Lineages at least and at most, and the seconds that there should be for each.
LINEAGES, MOST_LINEAGES, RACE_S = 2, 6, 7.0


def close_wide(part: Part) -> bool:
    """Bound and solve a limited part; whether it proved that nothing better than the incumbent is left."""
    part.search.begin("prices")
    flat = Flat(part, part.search.seed)
    try:
        return _solve_flat(flat)
    finally:
        # Time may have run out before the part heard of the best choice.
        flat.flush()


def _solve_flat(flat: Flat) -> bool:
    part, search = flat.part, flat.part.search
    found = price_by_weights(flat, PRICE_SHARE * search.remaining())
    if flat.bound > highest_cost(part.problem):
        return True
    small = entries_of(part.problem) <= MILP_ENTRIES
    if small and not search.done() and _guess(flat, GUESS_SHARE * search.remaining()) and not search.done():
        # Whoever comes so close to the bound is not beaten by neighbourhoods.
        if close_gap(part, _settled(flat), 1.0):
            return True
    elif flat.best is not None and not search.done():
        search.begin("neighbourhoods")
        seconds = (SMALL_SHARE if small else FIRST_SHARE) * search.remaining()
        found += improve(flat, _starts(flat, found, seconds), seconds, search.seed)
    if (small or search.gap() <= SMALL_GAP) and not search.done() and _close(flat, found):
        return True
    _explore(flat, found)
    return False


def _guess(flat: Flat, seconds: float) -> bool:
    """Integer programs of what is close to the bound, with neighbourhoods beside; whether the former found more."""
    settled = _settled(flat)
    with beside(flat, flat.part.search.seed):
        found = guess_the_gap(flat.part, settled, seconds)
        better = found and (flat.best is None or flat.part.least < flat.best[0])
    flat.take()
    return better


def _close(flat: Flat, found: Sequence[np.ndarray]) -> bool:
    """Integer programs around the choices met, then of all that the gap leaves; whether nothing better is left."""
    part, search = flat.part, flat.part.search
    settled = _settled(flat)
    branch_near(part, settled, [choice.tolist() for choice in found], NEAR_TIME * search.remaining())
    return not search.done() and close_gap(part, settled)


def _settled(flat: Flat) -> Settled:
    """Message passing at the best prices."""
    flat.part.search.begin("message passing at prices")
    bound = settle(flat.part, lambda: flat.sweep(flat.prices))
    return Settled(flat.prune, flat.ends, bound)


def sweep_finely(part: Part) -> Part | None:
    """``bound_and_prune`` with compiled messages, for as long as they gain at all."""
    part.messages = Unlimited.of(part)
    return bound_and_prune(part, FINE_SHARE)


def improve_free(part: Part, seconds: float) -> Part | None:
    """Neighbourhoods around the best choice of a part without memory rows, then ``bound_and_prune``'s pruning."""
    search, messages = part.search, Unlimited.of(part)
    flat, end = messages.flat, search.now() + seconds
    search.begin("neighbourhoods")
    if part.best is not None:
        flat.offer(np.array(part.best, np.int64))
    found, seed, before = [], search.seed, math.inf
    try:
        while flat.best is not None and flat.best[0] < before and search.now() < end and not search.done():
            before, left = flat.best[0], end - search.now()
            found = improve(flat, _starts(flat, found, left), left, seed)
            seed += MOST_LINEAGES
    finally:
        flat.flush()
    if flat.best is not None:
        part.offer(flat.best[1].tolist())
    bound = messages.sweep()
    return pruned(part, Settled(messages.prune, messages.ends, bound), part.room(bound))


def _explore(flat: Flat, found: Sequence[np.ndarray]) -> None:
    """Neighbourhoods until lineages stall, then the best recombination of what they became, until time is up."""
    part, search = flat.part, flat.part.search
    seed = search.seed
    while not search.done() and (part.best is not None or flat.best is not None):
        flat.take()
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
