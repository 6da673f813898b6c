"""Prices on memory rows: each gives a valid lower bound, and choices from which a feasible one is built.

The dual is maximised by cutting planes (Kelley 1960, Dantzig and Wolfe 1960) on the few rows that bind: the
master is the linear program that mixes the choices seen so far, its duals are the next prices, and a row
joins when the mixture violates it. Steps are damped towards the best prices known (in-out, Ben-Ameur and
Neto 2007).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from ortools.math_opt.python import mathopt

from autopar.solver.milp import violated_rows
from autopar.solver.relaxation import Pricing, Relaxation
from autopar.solver.rows import Rows

DAMPING = 0.5
TOLERANCE = 1e-6
PENALTY_GROWTH, MOST_GROWTH = 8.0, 1e9
MOST_ITERATIONS = 200
# The master mixes this many of the latest choices; older ones go unless they are part of the mixture.
MOST_COLUMNS = 60


@dataclass(frozen=True, eq=False)
class Column:
    """One choice seen: its cost and its usage by row."""

    strategies: list[int]
    cost: float
    usage: np.ndarray


@dataclass
class Dual:
    """Where the dual stands.

    Args:
        bound: best lower bound so far.
        prices: the prices of that bound, ``(rows,)``.
        columns: choices seen, the newest last.
        mixture: share of each column in the last master.
        active: rows that have a price.
        iterations: relaxed problems solved.
    """

    bound: float
    prices: np.ndarray
    columns: list[Column] = field(default_factory=list)
    mixture: list[float] = field(default_factory=list)
    active: list[int] = field(default_factory=list)
    iterations: int = 0


@dataclass(frozen=True, eq=False)
class Priced:
    """A relaxed solver under prices.

    Args:
        relaxation: the solver.
        pricing: node costs at prices.
        rows: the memory rows.
        cost: cost of strategies without prices.
    """

    relaxation: Relaxation
    pricing: Pricing
    rows: Rows
    cost: Callable[[list[int]], float]

    def solve(self, prices: np.ndarray) -> tuple[Column, float]:
        """The relaxed choice at prices (rounded already), and the lower bound they give."""
        strategies, value = self.relaxation.minimise(self.pricing.costs(prices))
        if math.isinf(value):
            return Column([], math.inf, np.zeros_like(prices)), math.inf
        column = Column(strategies, self.cost(strategies), self.rows.usage(strategies))
        return column, value - float(prices.sum()) * self.rows.limit

    def at(self, prices: np.ndarray, factors: np.ndarray) -> Column:
        """The relaxed choice when each node's prices are multiplied by its own factor."""
        strategies, _ = self.relaxation.minimise(self.pricing.costs(prices, factors))
        return Column(strategies, self.cost(strategies), self.rows.usage(strategies))


def maximise(
    priced: Priced,
    *,
    on_step: Callable[[Dual, Column], bool],
    ceiling: float = math.inf,
    penalty: float | None = None,
) -> Dual:
    """Maximise the dual by cutting planes; the relaxation must be exact.

    Args:
        priced: the relaxed solver.
        on_step: told of each new column; True stops.
        ceiling: no choice costs more: a dual bound above it proves that none is feasible.
        penalty: price of each byte over the limit; by default it grows until nothing is over.
    """
    rows = priced.rows
    column, bound = priced.solve(np.zeros(len(rows.times)))
    dual = Dual(bound, np.zeros(len(rows.times)), [column], [1.0], iterations=1)
    if math.isinf(bound) or on_step(dual, column) or column.usage.max(initial=0.0) <= rows.limit:
        return dual
    grows = penalty is None
    penalty = max(abs(column.cost), 1.0) / max(rows.limit, 1.0) if penalty is None else penalty
    last = penalty * MOST_GROWTH
    while dual.iterations < MOST_ITERATIONS and dual.bound <= ceiling and penalty <= last:
        mixed = _mix(dual, rows, penalty)
        if mixed is None:
            break
        value, prices, missing = mixed
        tolerance = TOLERANCE * max(abs(value), abs(dual.bound), 1.0)
        if value - dual.bound > tolerance:
            if _ascend(priced, dual, prices, tolerance, on_step):
                break
        elif missing <= 1e-9 * rows.limit or not grows:
            break
        else:
            penalty *= PENALTY_GROWTH
    return dual


def _ascend(
    priced: Priced, dual: Dual, prices: np.ndarray, tolerance: float, on_step: Callable[[Dual, Column], bool]
) -> bool:
    """One step towards the master's prices; whether ``on_step`` said stop.

    A damped step that gains nothing shows it at once, and the next one is taken in full.
    """
    for damping in (DAMPING, 0.0) if len(dual.active) > 1 else (0.0,):
        trial = priced.pricing.round(prices + damping * (dual.prices - prices))
        column, bound = priced.solve(trial)
        dual.iterations += 1
        dual.columns.append(column)
        improved = bound > dual.bound + tolerance
        if improved:
            dual.bound, dual.prices = bound, trial
        if on_step(dual, column):
            return True
        if improved or not dual.prices.any():
            break
    _forget(dual)
    return False


def _forget(dual: Dual) -> None:
    """Drop the oldest columns outside the mixture."""
    if len(dual.columns) > MOST_COLUMNS:
        shares = dual.mixture + [1.0] * (len(dual.columns) - len(dual.mixture))
        spare = [at for at, share in enumerate(shares) if share <= 0.0][: len(dual.columns) - MOST_COLUMNS]
        dual.columns = [column for at, column in enumerate(dual.columns) if at not in set(spare)]


def _mix(dual: Dual, rows: Rows, penalty: float) -> tuple[float, np.ndarray, float] | None:
    """Solve the master over the active rows, adding rows until the mixture violates no other.

    Returns:
        Its value, the prices of all rows, and the bytes over the limit that it had to allow; None if the
        linear program is numerically out of reach.
    """
    if not dual.active:
        dual.active = violated_rows(dual.columns[0].usage, rows.limit, [])
    while True:
        master = _master(dual, rows.limit, penalty)
        if master is None:
            return None
        value, prices, dual.mixture, missing = master
        usage = np.tensordot(np.array(dual.mixture), np.stack([column.usage for column in dual.columns]), 1)
        more = violated_rows(usage, rows.limit + missing, dual.active)
        if not more:
            full = np.zeros(len(rows.times))
            full[dual.active] = prices
            return value, full, missing
        dual.active = dual.active + more


def _master(dual: Dual, limit: float, penalty: float) -> tuple[float, np.ndarray, list[float], float] | None:
    """``min sum w_k cost_k + penalty * over`` with ``sum w_k usage_k <= limit + over``, ``sum w_k = 1``.

    Costs are scaled to the spread of the columns, usage to the limit: the solver's tolerances are absolute.
    """
    columns = dual.columns
    base = min(column.cost for column in columns)
    unit = max(limit, float(columns[0].usage.max()), 1e-300)
    spread = max(max(column.cost for column in columns) - base, penalty * unit * 1e-3, 1e-300)
    model = mathopt.Model()
    shares = [model.add_variable(lb=0.0) for _ in columns]
    over = model.add_variable(lb=0.0)
    model.add_linear_constraint(mathopt.fast_sum(shares) == 1.0)
    listed = []
    for row in dual.active:
        used = [column.usage[row] / unit * share for column, share in zip(columns, shares, strict=True)]
        listed.append(model.add_linear_constraint(mathopt.fast_sum([*used, -over]) <= limit / unit))
    paid = [(column.cost - base) / spread * share for column, share in zip(columns, shares, strict=True)]
    model.minimize(mathopt.fast_sum([*paid, penalty * unit / spread * over]))
    result = mathopt.solve(model, mathopt.SolverType.GLOP)
    if result.termination.reason != mathopt.TerminationReason.OPTIMAL:
        return None
    prices = np.maximum(-np.array(result.dual_values(listed)), 0.0) * spread / unit
    mixture = [max(share, 0.0) for share in result.variable_values(shares)]
    total, value = sum(mixture), base + result.objective_value() * spread
    return value, prices, [share / total for share in mixture], result.variable_values(over) * unit
