"""Solve a problem as an integer program: reduce, relax, branch; memory rows join as they are violated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from autopar.solver.clock import Budget
from autopar.solver.milp import ROUNDING, Polytope, polytope, solve_polytope, violated_rows
from autopar.solver.presolve import simplify
from autopar.solver.problem import NoChoiceError, Problem
from autopar.solver.rows import Rows, rows_of
from autopar.solver.tables import Tables

# A share this close to 0 or 1 is whole.
WHOLE = 1e-6
# HiGHS lets a row be violated by 1e-6 of its scale; a choice that makes use of it meets this tighter limit
# instead.
TIGHTER = 4e-9
ROUNDS = 60


@dataclass(frozen=True, eq=False)
class Outcome:
    """What the integer program gave.

    Args:
        strategies: a feasible choice of the problem, or None.
        bound: no choice costs less.
    """

    strategies: list[int] | None
    bound: float


@dataclass
class _Program:
    """A polytope with its growing list of memory rows, and when to stop."""

    poly: Polytope
    rows: Rows | None
    listed: list[int]
    budget: Budget
    gap: float


def integer_program(
    problem: Problem,
    tables: Tables,
    budget: Budget,
    *,
    cutoff: float = math.inf,
    gap: float = 0.0,
) -> Outcome:
    """Solve a problem, or bound it in the time there is.

    Args:
        problem: costs in whole quanta.
        tables: the store.
        budget: the time there is.
        cutoff: stop when the bound reaches this cost.
        gap: stop at this relative gap.
    """
    try:
        reduced, lift = simplify(problem, tables)
    except NoChoiceError:
        return Outcome(None, math.inf)
    rows = rows_of(reduced) if reduced.limit is not None else None
    program = _Program(polytope(reduced), rows, [], budget, gap)
    shares, bound = _relax(program, cutoff)
    if bound >= cutoff or shares is None:
        return Outcome(None, bound)
    chosen = _whole(program, shares)
    if chosen is None:
        chosen, bound = _branch(program, bound)
    return Outcome(None if chosen is None else lift(chosen), bound)


def _relax(program: _Program, cutoff: float) -> tuple[np.ndarray | None, float]:
    """The linear relaxation over all rows: ``(shares, bound)``."""
    bound = -math.inf
    for _ in range(ROUNDS):
        if program.budget.remaining() <= 0.0:
            return None, bound
        answer = solve_polytope(program.poly, _memory(program), program.budget, integral=False)
        bound = max(bound, answer.bound)
        if answer.values is None or not answer.finished or bound >= cutoff:
            return None, bound
        if program.rows is None:
            return answer.values, bound
        usage = program.rows.expected(answer.values, program.poly.first)
        more = violated_rows(usage, program.rows.limit, program.listed, 1e-7)
        if not more:
            return answer.values, bound
        program.listed += more
    return None, bound


def _branch(program: _Program, bound: float) -> tuple[list[int] | None, float]:
    """The integer program over all rows: ``(choice, bound)``."""
    tighten = 0.0
    for _ in range(ROUNDS):
        if program.budget.remaining() <= 0.0:
            return None, bound
        memory = _memory(program, tighten)
        answer = solve_polytope(program.poly, memory, program.budget, integral=True, gap=program.gap)
        if not tighten:
            bound = max(bound, answer.bound)
        if answer.values is None:
            return None, bound
        chosen = _rounded(program, answer.values)
        if program.rows is None:
            return chosen, bound
        usage = program.rows.usage(chosen)
        if usage.max(initial=0.0) <= program.rows.limit * (1 + ROUNDING):
            return chosen, bound
        more = violated_rows(usage, program.rows.limit, program.listed, ROUNDING)
        if not more and tighten:
            return None, bound
        tighten = tighten if more else TIGHTER
        program.listed += more
    return None, bound


def _memory(program: _Program, tighten: float = 0.0) -> tuple[Rows, list[int], float] | None:
    return None if program.rows is None else (program.rows, program.listed, tighten)


def _rounded(program: _Program, shares: np.ndarray) -> list[int]:
    """The strategy with the largest share of each node."""
    ends = np.append(program.poly.first[1:], program.poly.n_choice)
    pairs = zip(program.poly.first, ends, strict=True)
    return [int(np.argmax(shares[start:end])) for start, end in pairs]


def _whole(program: _Program, shares: np.ndarray) -> list[int] | None:
    """The choice of an integral relaxation, None if it is fractional or breaks a row."""
    if (np.minimum(shares, 1.0 - shares) > WHOLE).any():
        return None
    chosen = _rounded(program, shares)
    rows = program.rows
    if rows is not None and rows.usage(chosen).max(initial=0.0) > rows.limit * (1 + ROUNDING):
        return None
    return chosen
