"""What costs at most so much more than the bound: pruned by messages, solved as an integer program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.branch import Program, integer_program, solve_program
from autopar.solver.draft import Lift
from autopar.solver.lagrange import Dual, Priced
from autopar.solver.messages import Sweeps
from autopar.solver.milp import Imposed, entries_of, highest_cost, polytope
from autopar.solver.part import Part
from autopar.solver.presolve import restrict, simplify
from autopar.solver.problem import NoChoiceError, Problem

# Sweeps end when the bound gains less than this share of the gap in a few of them.
STALLED_SHARE = 0.01
MOST_SWEEPS = 1000
SWEEPS_PER_LOOK = 5
# A program this small is solved in seconds; one this large is worth a try.
EASY_ENTRIES, NEAR_ENTRIES = 20_000, 100_000
# Strategies that add at most this share of the bound are near the optimum at prices.
NEAR_SHARE = 1e-5
# The first guess of the gap as a share of the bound, and the factor between guesses; smaller programs than the first
# number are passed over, larger ones than the second end it.
FIRST_GUESS, NEXT_GUESS, FEW_ENTRIES, GUESS_ENTRIES = 1e-5, 2.0, 4_000, 40_000
# The integer program closes what is at most this large; beyond, its relaxation alone takes minutes.
MILP_ENTRIES = 400_000
# Shares of the time left: for programs near the optimum, for guesses, for an easy program before any other.
NEAR_TIME, GUESS_TIME, EASY_TIME = 0.2, 0.3, 0.3


@dataclass(frozen=True, eq=False)
class Settled:
    """Messages that can hardly raise the bound any more.

    Args:
        prune: what can be part of a choice that costs at most so much more than the bound: the strategies to
            keep of each node, and the matrix of each edge.
        ends: the two nodes of each edge, in the order of the matrices.
        bound: in quanta.
    """

    prune: Callable[[float], tuple[list[np.ndarray], list[np.ndarray]]]
    ends: list[tuple[int, int]]
    bound: float


def settle(part: Part, sweep: Callable[[], float], stalled_share: float = STALLED_SHARE) -> float:
    """Message passing until it stalls; the bound in quanta after the last sweep."""
    search, bound, before = part.search, -math.inf, -math.inf
    for _ in range(MOST_SWEEPS // SWEEPS_PER_LOOK):
        for _ in range(SWEEPS_PER_LOOK):
            search.poll()
            bound = sweep()
        part.raise_bound(bound)
        if bound - before <= stalled_share * min(search.objective / part.quantum - bound, abs(bound)):
            break
        before = bound
    return bound


def settle_priced(part: Part, priced: Priced, dual: Dual) -> Settled:
    """Message passing at the best prices that elimination found."""
    part.search.begin("message passing at prices")
    sweeps = Sweeps(part.problem, part.search.tables)
    costs, paid = priced.pricing.costs(dual.prices), float(dual.prices.sum()) * priced.rows.limit
    bound = settle(part, lambda: sweeps.sweep(costs) - paid)
    return Settled(lambda room: sweeps.prune(costs, room), sweeps.ends, bound)


def close_settled(part: Part, settled: Settled, choices: Sequence[Sequence[int]]) -> bool:
    """Integer programs, from the choices met to all that the gap leaves; whether nothing better is left."""
    search = part.search
    branch_near(part, settled, choices, NEAR_TIME * search.remaining())
    if not search.done():
        guess_the_gap(part, settled, GUESS_TIME * search.remaining())
    return close_gap(part, settled)


def close_gap(part: Part, settled: Settled, easy_time: float = EASY_TIME) -> bool:
    """Integer programs of all that the gap leaves; whether nothing better is left.

    An easy one gets a share of the time at first: what it finds may make the next one smaller.
    """
    search = part.search
    for last in (False, True):
        if search.done():
            return False
        smaller = prune_by_gap(part, settled)
        if smaller is None:
            return True
        entries = search.stats["pruned_edge_entries"] = entries_of(smaller.problem)
        most, share = (MILP_ENTRIES, 1.0) if last else (EASY_ENTRIES, easy_time)
        if entries <= most and branch_whole(smaller, share * search.remaining()):
            return True
    return False


def prune_by_gap(part: Part, settled: Settled) -> Part | None:
    """What can be part of a better choice than the incumbent; None when nothing is left."""
    return pruned(part, settled, part.room(settled.bound))


def pruned(part: Part, settled: Settled, room: float) -> Part | None:
    """The part without what costs more than ``room`` quanta above the bound of the last sweep; None if all does."""
    if math.isinf(room):
        return part
    within = narrowed(part, settled, room)
    return None if within is None else part.smaller(*within)


def narrowed(part: Part, settled: Settled, room: float) -> tuple[Problem, Lift] | None:
    """As ``pruned``, with the way back to the part."""
    search, problem = part.search, part.problem
    kept, matrices = settled.prune(room)
    if any(len(labels) == 0 for labels in kept):
        return None
    edges = tuple((u, v, search.tables.shared(m)) for (u, v), m in zip(settled.ends, matrices, strict=True))
    search.poll()
    try:
        fewer, back = restrict(Problem(problem.nodes, edges, problem.usages, problem.limit), search.tables, kept)
        reduced, lift = simplify(fewer, search.tables)
    except NoChoiceError:
        return None
    return reduced, lambda strategies: back(lift(strategies))


def guess_the_gap(part: Part, settled: Settled, seconds: float) -> bool:
    """Suppose that the optimum is close to the bound: little is left to choose, and an integer program sees to that.

    Whatever a guess excludes costs more than it supposes, so each program bounds the whole part, and what it finds
    below that is optimal. Each guess is wider than the one before, the last one as wide as the gap.

    Returns:
        Whether it found a better choice.
    """
    search, bound = part.search, settled.bound
    search.begin("guessing the gap")
    budget = search.budget(search.now() + seconds)
    room = max(FIRST_GUESS * abs(bound), search.target_gap * abs(bound), 1.0)
    better, listed, highest = False, [], highest_cost(part.problem)
    while not search.done() and budget.remaining() > 0.0:
        most = min(part.room(bound), highest - bound)
        last, room = room >= most, min(room, most)
        guess = _guessed(part, settled, room, listed)
        entries = 0 if guess is None else len(guess[0].poly.costs)
        if entries > GUESS_ENTRIES:
            break
        if guess is None:
            part.raise_bound(bound + room)
        elif entries >= FEW_ENTRIES or last:
            program, kept = guess
            outcome = solve_program(program, budget, cutoff=search.objective / part.quantum, gap=search.target_gap)
            part.raise_bound(min(outcome.bound, bound + room))
            if outcome.strategies is not None:
                found = [int(labels[s]) for labels, s in zip(kept, outcome.strategies, strict=True)]
                better = part.offer(found) or better
        if last:
            break
        room *= NEXT_GUESS
    return better


def _guessed(part: Part, settled: Settled, room: float, listed: list[int]) -> tuple[Program, list[np.ndarray]] | None:
    """The program of what can cost at most ``room`` quanta above the bound, with the strategies it keeps."""
    kept, matrices = settled.prune(room)
    if any(len(labels) == 0 for labels in kept):
        return None
    edges = [(u, v, matrix[np.ix_(kept[u], kept[v])]) for (u, v), matrix in zip(settled.ends, matrices, strict=True)]
    nodes = [costs[labels] for costs, labels in zip(part.problem.nodes, kept, strict=True)]
    memory = None if part.rows is None else Imposed(part.rows.keep(kept), listed, [])
    return Program(polytope(Problem(tuple(nodes), tuple(edges))), memory), kept


def choices_met(dual: Dual) -> list[list[int]]:
    """The choices that the best prices mix, or the latest where nothing was mixed."""
    met = [column for column, share in zip(dual.columns, dual.mixture, strict=False) if share > 0.0]
    return [column.strategies for column in (met if len(met) > 1 else dual.columns)]


def branch_near(part: Part, settled: Settled, choices: Sequence[Sequence[int]], seconds: float) -> None:
    """Integer programs over the strategies of choices met, then over those near the optimum at prices."""
    search = part.search
    search.begin("integer program near the optimum")
    end = search.now() + seconds
    near, _ = settled.prune(NEAR_SHARE * abs(settled.bound))
    branch_within(part, choices, [np.zeros(0, np.int64)] * len(near), end)
    if not search.done():
        branch_within(part, [], near, end)


def branch_within(part: Part, choices: Sequence[Sequence[int]], more: list[np.ndarray], end: float) -> None:
    """The integer program over the strategies of some choices, of the incumbent, and some more of each node."""
    choices = [*choices, part.best] if part.best is not None else choices
    some = np.array(choices, np.int64).reshape(len(choices), len(more)).T
    kept = [np.unique(np.concatenate(pair)) for pair in zip(some, more, strict=True)]
    if any(len(labels) == 0 for labels in kept):
        return
    tables, gap = part.search.tables, part.search.target_gap / 4
    small, back = restrict(part.problem, tables, kept)
    try:
        reduced, lift = simplify(small, tables)
    except NoChoiceError:
        return
    if entries_of(reduced) <= NEAR_ENTRIES:
        outcome = integer_program(reduced, tables, part.search.budget(end), gap=gap)
        if outcome.strategies is not None:
            part.offer(back(lift(outcome.strategies)))


def branch_whole(part: Part, seconds: float, ceiling: float = math.inf) -> bool:
    """The integer program on the whole part; whether it proved that nothing better is left.

    Args:
        part: what to solve.
        seconds: wall time.
        ceiling: choices that are not in the part may cost this much, in quanta.
    """
    search = part.search
    search.begin("integer program")
    # HiGHS overruns its limit a little, and must return before time is up for its incumbent to count.
    end = search.now() + min(seconds, 0.95 * search.remaining() - 0.2)
    outcome = integer_program(
        part.problem,
        search.tables,
        search.budget(end),
        cutoff=search.objective / part.quantum,
        gap=search.target_gap,
    )
    part.raise_bound(min(outcome.bound, ceiling))
    if outcome.strategies is not None:
        part.offer(outcome.strategies)
    # Without time the bound is -inf, which proves nothing.
    return outcome.bound == math.inf
