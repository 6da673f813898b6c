"""What costs at most so much more than the bound: pruned by messages, solved as an integer program."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autopar.solver.branch import integer_program
from autopar.solver.lagrange import Dual, Priced
from autopar.solver.messages import Sweeps
from autopar.solver.milp import entries_of
from autopar.solver.part import Part
from autopar.solver.presolve import restrict, simplify
from autopar.solver.problem import NoChoiceError, Problem

# Sweeps end when the bound gains less than this share of the gap in a few of them.
STALLED_SHARE = 0.01
MOST_SWEEPS = 200
SWEEPS_PER_LOOK = 5
# A program this small is solved in seconds; one this large is worth a try.
EASY_ENTRIES, NEAR_ENTRIES = 20_000, 100_000
# Strategies that add at most this share of the bound are near the optimum at prices.
NEAR_SHARE = 1e-5
# The first guess of the optimum as a share of the gap, the factor between guesses, the time for each.
FIRST_GUESS, NEXT_GUESS, GUESS_S = 1 / 32, 2.0, 6.0


@dataclass(frozen=True, eq=False)
class Settled:
    """Messages that can hardly raise the bound any more.

    Args:
        sweeps: the messages.
        costs: table id of each node's costs at the prices.
        bound: in quanta.
    """

    sweeps: Sweeps
    costs: list[int]
    bound: float


def settle(part: Part, priced: Priced, dual: Dual) -> Settled:
    """Message passing at the best prices known until it stalls."""
    search = part.search
    search.begin("message passing at prices")
    warm = priced.relaxation
    sweeps = warm if isinstance(warm, Sweeps) else Sweeps(part.problem, search.tables)
    costs = priced.pricing.costs(dual.prices)
    paid, bound, before = float(dual.prices.sum()) * priced.rows.limit, -math.inf, -math.inf
    for _ in range(MOST_SWEEPS // SWEEPS_PER_LOOK):
        for _ in range(SWEEPS_PER_LOOK):
            search.poll()
            bound = sweeps.sweep(costs) - paid
        part.raise_bound(bound)
        if bound - before <= STALLED_SHARE * min(search.objective / part.quantum - bound, abs(bound)):
            break
        before = bound
    return Settled(sweeps, costs, bound)


def prune_by_gap(part: Part, settled: Settled) -> Part | None:
    """What can be part of a better choice than the incumbent; None when nothing is left."""
    return pruned(part, settled.sweeps, settled.costs, part.room(settled.bound))


def pruned(part: Part, sweeps: Sweeps, costs: list[int], room: float) -> Part | None:
    """The part without what costs more than ``room`` quanta above the bound of the last sweep; None if all does."""
    if math.isinf(room):
        return part
    search, problem = part.search, part.problem
    kept, matrices = sweeps.prune(costs, room)
    if any(len(labels) == 0 for labels in kept):
        return None
    edges = tuple((u, v, search.tables.shared(m)) for (u, v), m in zip(sweeps.ends, matrices, strict=True))
    search.poll()
    try:
        fewer, back = restrict(Problem(problem.nodes, edges, problem.usages, problem.limit), search.tables, kept)
        reduced, lift = simplify(fewer, search.tables)
    except NoChoiceError:
        return None
    return part.smaller(reduced, lambda strategies: back(lift(strategies)))


def guess_the_gap(part: Part, settled: Settled, seconds: float) -> None:
    """Suppose that the optimum is close to the bound: little is left to choose, and an integer program sees to that.

    Whatever a guess excludes costs more than it supposes, so each program bounds the whole part, and what it finds
    below that is optimal. Each guess is wider than the one before.
    """
    search, bound = part.search, settled.bound
    search.begin("guessing the gap")
    end = time.perf_counter() + seconds
    room = max(min(part.room(bound), abs(bound)) * FIRST_GUESS, search.target_gap * abs(bound), 1.0)
    while not search.done() and room < part.room(bound) and time.perf_counter() < end:
        smaller = pruned(part, settled.sweeps, settled.costs, room)
        if smaller is None:
            part.raise_bound(bound + room)
        elif entries_of(smaller.problem) > EASY_ENTRIES:
            return
        else:
            branch_whole(smaller, min(GUESS_S, end - time.perf_counter()), bound + room)
        room *= NEXT_GUESS


def branch_near(part: Part, settled: Settled, dual: Dual, seconds: float) -> None:
    """Integer programs over the strategies of choices met, then over those near the optimum at prices."""
    search = part.search
    search.begin("integer program near the optimum")
    end = time.perf_counter() + seconds
    met = [column for column, share in zip(dual.columns, dual.mixture, strict=False) if share > 0.0]
    # Weights give no mixture: there the latest choices stand for it.
    choices = [column.strategies for column in (met if len(met) > 1 else dual.columns)]
    near, _ = settled.sweeps.prune(settled.costs, NEAR_SHARE * abs(settled.bound))
    _branch_within(part, choices, [np.zeros(0, np.int64)] * len(near), end)
    if not search.done():
        _branch_within(part, [], near, end)


def _branch_within(part: Part, choices: list[list[int]], more: list[np.ndarray], end: float) -> None:
    """The integer program over the strategies of some choices, of the incumbent, and some more of each node."""
    choices = [*choices, part.best] if part.best is not None else choices
    some = np.array(choices, np.int64).reshape(len(choices), len(more)).T
    kept = [np.unique(np.concatenate(pair)) for pair in zip(some, more, strict=True)]
    tables, poll, gap = part.search.tables, part.search.poll, part.search.target_gap / 4
    small, back = restrict(part.problem, tables, kept)
    try:
        reduced, lift = simplify(small, tables)
    except NoChoiceError:
        return
    if entries_of(reduced) <= NEAR_ENTRIES:
        outcome = integer_program(reduced, tables, remaining=until(end), poll=poll, gap=gap)
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
    end = time.perf_counter() + min(seconds, 0.95 * search.remaining() - 0.2)
    outcome = integer_program(
        part.problem,
        search.tables,
        remaining=until(end),
        poll=search.poll,
        cutoff=search.objective / part.quantum,
        gap=search.target_gap,
    )
    part.raise_bound(min(outcome.bound, ceiling))
    if outcome.strategies is not None:
        part.offer(outcome.strategies)
    return math.isinf(outcome.bound)


def until(end: float) -> Callable[[], float]:
    """Seconds left until a time."""
    return lambda: end - time.perf_counter()
