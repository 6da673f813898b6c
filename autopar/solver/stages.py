"""The stages of a solve. Each tightens incumbent or bound; ``search`` says in which order they run."""

from __future__ import annotations

import contextlib
import math

import numpy as np

from autopar.solver.branch import integer_program
from autopar.solver.lagrange import Column, Dual, Priced, maximise
from autopar.solver.messages import Sweeps
from autopar.solver.milp import entries_of, highest_cost
from autopar.solver.narrow import MOST_SWEEPS, STALLED_SHARE, SWEEPS_PER_LOOK, Settled, narrowed, pruned
from autopar.solver.part import Part
from autopar.solver.presolve import restrict
from autopar.solver.primal import feasible_by_prices, line_layout
from autopar.solver.problem import NoChoiceError
from autopar.solver.relaxation import ExactRelaxation, Pricing, order_of
from autopar.solver.tables import TooManyEntries

WINDOW_NODES, WINDOW_S = 60, 3.0
# Numbers held in tables (8 bytes each) at which elimination with wide tables gives up, and how wide these
# may be.
MOST_ENTRIES = 200_000_000
# Prices are found by exact elimination if there is time for this many.
FEW_ELIMINATIONS = 8
# Messages end when they leave this share of the edge entries.
LITTLE_SHARE = 0.25
# Guesses of the gap, as shares of what is known of it.
GUESSES = (0.02, 0.05, 0.12, 0.3)
# Memory at this price times the cost, over all rows, outweighs costs.
EARLY_PRICE = 100.0
WIDENING = 10


def eliminate_whole(part: Part, widening: int = 1, ceiling: float = math.inf) -> bool:
    """Exact elimination without memory rows, where no table is too wide; whether that solved the problem.

    Args:
        part: what to solve.
        widening: how many times larger than usual a table may be.
        ceiling: choices that are not in the part may cost this much, in quanta.

    Raises:
        NoChoiceError: everything is forbidden.
    """
    search, tables = part.search, part.search.tables
    order = order_of(part.problem, search.wide_entries * widening)
    if order.left:
        return False

    search.begin("elimination")
    start, mark = search.now(), tables.mark()
    relaxation = ExactRelaxation(part.problem, tables, order)
    try:
        with tables.at_most(MOST_ENTRIES):
            strategies, least = relaxation.minimise([tables.intern(costs) for costs in part.problem.nodes])
    except TooManyEntries:
        return False
    finally:
        if not search.keeps_tables:
            tables.forget(mark)
    search.stats["widest_entries"] = order.widest_entries
    search.stats["elimination_s"] = search.now() - start
    if math.isinf(least):
        raise NoChoiceError("forbidden costs exclude every choice", math.inf, (), fix="allow more strategies")
    part.raise_bound(min(least, ceiling))
    part.offer(strategies)
    # Without memory rows nothing is left in the part, however its incumbent rounds.
    return part.rows is None or search.done()


def offer_early(part: Part) -> None:
    """To return if the caller stops soon: one sweep of messages, and one with dear bytes where that is too large."""
    search, rows = part.search, part.rows
    search.begin("first choice")
    bound = part.messages.sweep()
    part.raise_bound(bound)
    part.offer(part.messages.decode())
    if rows is not None and search.strategies is None:
        dear = EARLY_PRICE * max(abs(bound), 1.0) / max(rows.limit, 1.0) / max(len(rows.times), 1)
        sweeps = Sweeps(part.problem, search.tables)
        costs = Pricing(part.problem, search.tables, rows).costs(np.full(len(rows.times), dear))
        sweeps.sweep(costs)
        part.offer(sweeps.decode(costs))


def bound_and_prune(part: Part, stalled_share: float = STALLED_SHARE) -> Part | None:
    """Message passing until little is left or it stalls, then drop what cannot be part of a better choice.

    Args:
        part: without memory rows.
        stalled_share: a few sweeps that gain less than this share of the gap are the last.

    Returns:
        The smaller part, or None when nothing better than the incumbent is left.
    """
    search, messages = part.search, part.messages
    search.begin("message passing")

    bound, before, little = -math.inf, -math.inf, LITTLE_SHARE * entries_of(part.problem)
    for count in range(1, MOST_SWEEPS + 1):
        search.poll()
        bound = messages.sweep()
        if count % SWEEPS_PER_LOOK == 0:
            part.raise_bound(bound)
            part.offer(messages.decode())
            gap = search.objective / part.quantum - bound
            if (
                search.done()
                or messages.left(part.room(bound)) <= little
                or bound - before <= stalled_share * min(gap, abs(bound))
            ):
                break
            before = bound
    return pruned(part, Settled(messages.prune, messages.ends, bound), part.room(bound))


def guess_and_eliminate(part: Part) -> Part | None:
    """Suppose that the optimum is close to the bound: of the little that is left then, the best is found exactly.

    Whatever a guess excludes costs more than it supposes, which bounds the whole part. Each guess is wider than the
    one before, until one finds a better choice or its tables are too wide.

    Returns:
        What better choices than the incumbent are part of, or None when nothing better is left.
    """
    part.search.begin("guessing the gap")
    messages = part.messages
    settled = Settled(messages.prune, messages.ends, messages.sweep())
    most = part.room(settled.bound)
    for share in GUESSES:
        if not _eliminate_guess(part, settled, share * most):
            break
    return pruned(part, settled, part.room(settled.bound))


def _eliminate_guess(part: Part, settled: Settled, room: float) -> bool:
    """The best choice that costs at most ``room`` more than the bound; whether a wider guess is worth it."""
    within, ceiling = narrowed(part, settled, room), settled.bound + room
    if within is None:
        part.raise_bound(ceiling)
        return not part.search.done()
    problem, lift = within
    small = part.smaller(problem, lift)
    try:
        narrow = eliminate_whole(small, ceiling=ceiling)
    except NoChoiceError:
        part.raise_bound(ceiling)
        return not part.search.done()
    better = small.best is not None and part.offer(lift(small.best))
    return narrow and not better and not part.search.done()


def price_memory(part: Part, seconds: float) -> tuple[Priced, Dual] | None:
    """Maximise the dual over memory prices by exact elimination; None where that would take too long."""
    search, rows = part.search, part.rows
    assert rows is not None
    order = order_of(part.problem, search.wide_entries)
    if order.left or search.stats.get("elimination_s", 0.0) * FEW_ELIMINATIONS > seconds:
        return None
    search.begin("prices")
    end = search.now() + seconds

    def on_step(dual: Dual, column: Column) -> bool:
        search.poll()
        part.raise_bound(dual.bound)
        if part.fits(column.usage):
            part.offer(column.strategies)
        return search.done() or search.now() > end

    relaxation = ExactRelaxation(part.problem, search.tables, order)
    priced = Priced(relaxation, Pricing(part.problem, search.tables, rows), rows, part.problem.cost)
    try:
        with search.tables.at_most(MOST_ENTRIES):
            dual = maximise(priced, on_step=on_step, ceiling=highest_cost(part.problem))
    except TooManyEntries:
        return None
    search.stats["prices_solved"] = dual.iterations
    return priced, dual


def mix_layers(part: Part, priced: Priced, dual: Dual) -> None:
    """Feasible choices around the best prices, by bisection over layers."""
    part.search.begin("mixing layers")

    def on_column(column: Column) -> bool:
        part.search.poll()
        if part.fits(column.usage):
            part.offer(column.strategies)
        return part.search.done()

    with contextlib.suppress(TooManyEntries), part.search.tables.at_most(MOST_ENTRIES):
        feasible_by_prices(priced, dual, line_layout(part.problem), on_column)


def improve_windows(part: Part, seconds: float) -> None:
    """Free a stretch of the line layout, hold the rest at the incumbent, solve exactly; again and again."""
    search, problem = part.search, part.problem
    if part.best is None or search.done():
        return
    search.begin("windows")
    end = search.now() + seconds
    layout, random = line_layout(problem), np.random.default_rng(0)
    while search.now() < end and not search.done():
        search.poll()
        stop = min(end, search.now() + WINDOW_S)
        free = np.abs(layout - random.integers(len(layout))) * 2 < WINDOW_NODES
        held = zip(problem.nodes, part.best, free, strict=True)
        kept = [np.arange(len(costs)) if is_free else np.array([chosen]) for costs, chosen, is_free in held]
        small, lift = restrict(problem, search.tables, kept)
        outcome = integer_program(small, search.tables, search.budget(stop))
        if outcome.strategies is not None:
            part.offer(lift(outcome.strategies))
