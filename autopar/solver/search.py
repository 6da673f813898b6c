"""``solve``: exact elimination first, prices where memory binds, the integer program for what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autopar.solver.milp import entries_of
from autopar.solver.narrow import EASY_ENTRIES, branch_near, branch_whole, guess_the_gap, prune_by_gap, settle
from autopar.solver.part import Part, Search, Stopped, whole_part
from autopar.solver.presolve import drop_fixed, reduce_once, simplify
from autopar.solver.problem import Choice, Problem, Progress
from autopar.solver.room import least_sum_exceeds, no_room
from autopar.solver.stages import (
    MILP_ENTRIES,
    WIDENING,
    bound_and_prune,
    eliminate_whole,
    highest_cost,
    improve_by_cutsets,
    improve_windows,
    mix_layers,
    offer_early,
    price_memory,
)

# An easy program may take this share of the time left before anything else is tried.
EASY_SHARE = 0.3
# Beyond so many joined entries elimination takes long enough for the caller to want a choice in hand first.
QUICK_ENTRIES = 2_000_000_000
# Shares of the time left, and the most time, that stages may take which others are to follow.
PRICE_SHARE, CUTSETS_SHARE, GUESS_SHARE, NEAR_SHARE = 0.4, 0.2, 0.3, 0.2
# Pruning goes on while it leaves less than this share of the edge entries.
STUCK_SHARE = 0.9


def solve(
    problem: Problem,
    *,
    seconds: float = 60.0,
    relative_gap: float = 0.0,
    hint: Sequence[int] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Choice:
    """The cheapest feasible choice, or the best one found in time, always with a lower bound.

    Args:
        problem: what to solve; costs below 2**-46 of their sum are lost: forbid by ``inf``, not a large cost.
        seconds: wall time after which the incumbent is returned.
        relative_gap: stop at this gap; a binding limit on a deep program is closed to 0.001 in seconds.
        hint: strategies to start from; ignored where infeasible.
        on_progress: called at each stage and with each better incumbent.
        should_stop: polled; True returns the incumbent, as Ctrl-C does.

    Raises:
        NoChoiceError: an ``InfeasibleError``: no choice is feasible, or none was found in time.

    >>> import numpy as np
    >>> costs, matrix = np.array([0.0, 3.0]), np.array([[5.0, 4.0], [0.0, 9.0]])
    >>> solve(Problem((costs, np.ones(2)), ((0, 1, matrix),))).strategies
    (1, 0)
    """
    search = Search(problem, seconds, relative_gap)
    search.on_progress, search.should_stop = on_progress, should_stop
    try:
        if hint is not None:
            search.offer(hint)
        run(search)
    except Stopped:
        pass
    except KeyboardInterrupt:
        if search.strategies is None:
            raise
    return search.finish()


def run(search: Search) -> None:
    """Run the stages until one of them ends the search; incumbent and bound are left in it."""
    if least_sum_exceeds(search.problem):
        raise no_room(search.problem, search.poll)
    part = whole_part(search)
    if any(len(costs) == 1 for costs in part.problem.nodes):
        # A fixed node may have hundreds of neighbours: no table can have an axis for each.
        part = part.smaller(*reduce_once(drop_fixed, part.problem, search.tables))
    if eliminate_whole(part, most_joined=QUICK_ENTRIES):
        return
    search.begin("presolve")
    part = part.smaller(*simplify(part.problem, search.tables))
    search.stats["reduced_nodes"] = len(part.problem.nodes)
    search.stats["reduced_edge_entries"] = entries_of(part.problem)
    offer_early(part)
    if part.rows is None:
        _close_free(part)
    else:
        _close_limited(part)


def _close_free(part: Part) -> None:
    """Without memory rows: bound, prune, improve, prune again, until tables are narrow; else branch."""
    search, improved = part.search, False
    while not eliminate_whole(part) and not search.done():
        smaller = bound_and_prune(part)
        if smaller is None:
            _exhausted(search)
            return
        if entries_of(smaller.problem) < STUCK_SHARE * entries_of(part.problem):
            part = smaller
        elif not improved:
            improve_by_cutsets(part, CUTSETS_SHARE * search.remaining())
            improved = True
        else:
            if not eliminate_whole(smaller, WIDENING) and branch_whole(smaller, search.remaining()):
                _exhausted(search)
            return


def _close_limited(part: Part) -> None:
    """With memory rows: price them, build feasible choices, prune by the gap, branch on what is left."""
    search = part.search
    if "elimination_s" not in search.stats and eliminate_whole(part):
        return
    priced, dual = price_memory(part, PRICE_SHARE * search.remaining())
    if dual.bound > highest_cost(part.problem):
        _exhausted(search)
    if not search.done() and (priced.relaxation.exact or part.best is None):
        mix_layers(part, priced, dual)
    if search.done():
        return
    settled = settle(part, priced, dual)
    branch_near(part, settled, dual, NEAR_SHARE * search.remaining())
    if not search.done():
        guess_the_gap(part, settled, GUESS_SHARE * search.remaining())
    for last in (False, True):
        if search.done():
            return
        smaller = prune_by_gap(part, settled)
        if smaller is None:
            _exhausted(search)
            return
        entries = search.stats["pruned_edge_entries"] = entries_of(smaller.problem)
        most, share = (MILP_ENTRIES, 1.0) if last else (EASY_ENTRIES, EASY_SHARE)
        if entries <= most and branch_whole(smaller, share * search.remaining()):
            _exhausted(search)
    improve_windows(part, search.remaining())


def _exhausted(search: Search) -> None:
    """Nothing better than the incumbent is left; without one there is nothing at all."""
    if search.strategies is None:
        raise no_room(search.problem)
    search.raise_bound(search.objective)
