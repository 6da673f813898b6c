"""``solve``: exact elimination first, prices where memory binds, the integer program for what is left."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.solver.clock import Clock
from autopar.solver.draft import Draft
from autopar.solver.eliminate import elimination_order
from autopar.solver.mend import mend
from autopar.solver.milp import entries_of, highest_cost
from autopar.solver.narrow import MILP_ENTRIES, branch_whole, choices_met, close_settled, settle_priced
from autopar.solver.part import Part, Search, Stopped, Warm, whole_part
from autopar.solver.presolve import drop_fixed, reduce_all
from autopar.solver.primal import hubs_of, in_line
from autopar.solver.problem import Choice, Problem, Progress
from autopar.solver.room import least_sum_exceeds, no_room
from autopar.solver.stages import (
    WIDENING,
    bound_and_prune,
    eliminate_whole,
    guess_and_eliminate,
    improve_windows,
    mix_layers,
    offer_early,
    price_memory,
)

# Beyond so many joined entries elimination takes long enough for the caller to want a choice in hand first.
QUICK_ENTRIES = 2_000_000_000
# Shares of the time left that stages may take which others are to follow.
PRICE_SHARE, IMPROVE_SHARE = 0.4, 0.4
# For what is near a forbidden choice of the hint: seconds, and the gap at which it is good enough.
MEND_S, MEND_GAP = 1.0, 1e-3
# Pruning goes on while it leaves less than this share of the edge entries.
STUCK_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a solve starts from, and how it counts its time.

    Args:
        hint: strategies to start from; ignored where infeasible.
        warm: what an earlier solve of nearly the same problem left; this solve adds to it.
        seed: of random choices.
        deterministic: count work instead of wall time, so that every run takes the same steps and returns the
            same choice; ``seconds`` then are those that the work takes on one core of about 3 GHz.
        cpu: count CPU seconds of all threads instead of wall time, on a machine that does other work.
    """

    hint: Sequence[int] | None = None
    warm: Warm | None = None
    seed: int = 0
    deterministic: bool = False
    cpu: bool = False

    def clock(self) -> Clock:
        """What counts the seconds."""
        return Clock(self.deterministic, time.process_time if self.cpu else time.perf_counter)


def solve(
    problem: Problem,
    *,
    seconds: float = 60.0,
    relative_gap: float = 0.0,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    start: Start | None = None,
) -> Choice:
    """The cheapest feasible choice, or the best one found in time, always with a lower bound.

    Args:
        problem: what to solve; costs below 2**-46 of their sum are lost: forbid by ``inf``, not a large cost.
        seconds: wall time after which the incumbent is returned.
        relative_gap: stop at this gap; a binding limit on a deep program is closed to 0.001 in seconds.
        on_progress: called at each stage and with each better incumbent.
        should_stop: polled; True returns the incumbent, as Ctrl-C does.
        start: hint, seed, what an earlier solve left, and whether to count work instead of time.

    Raises:
        NoChoiceError: an ``InfeasibleError``: no choice is feasible, or none was found in time.

    >>> import numpy as np
    >>> costs, matrix = np.array([0.0, 3.0]), np.array([[5.0, 4.0], [0.0, 9.0]])
    >>> solve(Problem((costs, np.ones(2)), ((0, 1, matrix),))).strategies
    (1, 0)
    """
    start = start or Start()
    search = Search(problem, seconds, relative_gap, start.clock(), start.warm)
    search.on_progress, search.should_stop, search.seed = on_progress, should_stop, start.seed
    try:
        run(search, start.hint)
    except (Stopped, KeyboardInterrupt) as stop:
        if search.strategies is None and isinstance(stop, KeyboardInterrupt):
            raise
    finally:
        search.leave()
    return search.finish()


def _offer_hint(search: Search, hint: Sequence[int]) -> None:
    """A hint, mended where it is forbidden: of the nodes near by the best choice is found."""

    def near(problem: Problem) -> Choice:
        small = Search(problem, min(MEND_S, search.remaining()), MEND_GAP, search.clock)
        small.should_stop = search.should_stop
        with contextlib.suppress(Stopped):
            run(small)
        return small.choice()

    mended = mend(search.problem, hint, near)
    if mended is not None:
        search.offer(mended)
    search.poll()


def run(search: Search, hint: Sequence[int] | None = None) -> None:
    """Run the stages until one of them ends the search; incumbent and bound are left in it."""
    if hint is not None:
        _offer_hint(search, hint)
    if not search.inherits():
        _run_stages(search)


def _run_stages(search: Search) -> None:
    if least_sum_exceeds(search.problem):
        raise no_room(search.problem, search.poll)
    whole = whole_part(search)
    draft = Draft.of(whole.problem, search.tables)
    # A fixed node may have hundreds of neighbours: no table can have an axis for each.
    drop_fixed(draft, list(range(len(whole.problem.nodes))))
    order = elimination_order(draft.sizes(), draft.pairs(), search.wide_entries)
    if not order.left and order.joined_entries <= QUICK_ENTRIES and eliminate_whole(whole.smaller(*draft.finish())):
        return
    search.begin("presolve")
    reduce_all(draft)
    part = whole.smaller(*draft.finish())
    if part.rows is None or not hubs_of(part.problem):
        # Choices made in the order of time, on the other hand, keep to limits: so it stays where there is no line.
        part = part.smaller(*in_line(part.problem, search.tables))
    search.stats["reduced_nodes"] = len(part.problem.nodes)
    search.stats["reduced_edge_entries"] = entries_of(part.problem)
    if part.rows is None or search.stats["reduced_edge_entries"] <= MILP_ENTRIES:
        offer_early(part)
    if part.rows is None:
        _close_free(part)
    else:
        _close_limited(part)


def _close_free(part: Part) -> None:
    """Without memory rows: bound and prune until tables are narrow, each step harder than the last; else branch."""
    search, step = part.search, 0
    steps = (bound_and_prune, guess_and_eliminate, _sweep_finely, guess_and_eliminate, _search_neighbourhoods)
    while not eliminate_whole(part) and not search.done():
        smaller = steps[step](part)
        if smaller is None:
            _exhausted(search)
            return
        shrunk = entries_of(smaller.problem) < STUCK_SHARE * entries_of(part.problem)
        if not shrunk and step == len(steps) - 1:
            small = entries_of(smaller.problem) <= MILP_ENTRIES
            if not eliminate_whole(smaller, WIDENING) and small and branch_whole(smaller, search.remaining()):
                _exhausted(search)
            return
        part, step = (smaller, 0) if shrunk else (part, step + 1)


def _sweep_finely(part: Part) -> Part | None:
    # Compiled kernels take half a second to load, which small problems should not pay.
    from autopar.solver.wide import sweep_finely

    return sweep_finely(part)


def _search_neighbourhoods(part: Part) -> Part | None:
    from autopar.solver.wide import improve_free

    return improve_free(part, IMPROVE_SHARE * part.search.remaining())


def _close_limited(part: Part) -> None:
    """With memory rows: price them, build feasible choices, prune by the gap, branch on what is left."""
    search = part.search
    if "elimination_s" not in search.stats and eliminate_whole(part):
        return
    found = price_memory(part, PRICE_SHARE * search.remaining())
    if found is None:
        # Compiled kernels take half a second to load, which small problems should not pay.
        from autopar.solver.wide import close_wide

        if close_wide(part):
            _exhausted(search)
        return
    priced, dual = found
    if dual.bound > highest_cost(part.problem):
        _exhausted(search)
    if not search.done():
        mix_layers(part, priced, dual)
    if not search.done() and close_settled(part, settle_priced(part, priced, dual), choices_met(dual)):
        _exhausted(search)
    improve_windows(part, search.remaining())


def _exhausted(search: Search) -> None:
    """Nothing better than the incumbent is left; without one there is nothing at all."""
    if search.strategies is None:
        raise no_room(search.problem)
    search.raise_bound(search.objective)
