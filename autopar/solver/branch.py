"""Solve a problem as an integer program: reduce, relax, branch; memory rows join as they are violated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.solver.clock import Budget
from autopar.solver.milp import ROUNDING, Imposed, Polytope, polytope, solve_polytope, violated_rows
from autopar.solver.presolve import simplify
from autopar.solver.problem import NoChoiceError, Problem
from autopar.solver.rows import Rows, rows_of
from autopar.solver.tables import Tables

# A share this close to 0 or 1 is whole.
WHOLE = 1e-6
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


@dataclass(frozen=True, eq=False)
class Program:
    """A polytope with its memory rows, of which those found violated are imposed; None for none."""

    poly: Polytope
    memory: Imposed | None


@dataclass(frozen=True, eq=False)
class _Task:
    """A program to solve, and when to stop."""

    program: Program
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
    program = Program(polytope(reduced), None if reduced.limit is None else Imposed(rows_of(reduced), [], []))
    outcome = solve_program(program, budget, cutoff=cutoff, gap=gap)
    return outcome if outcome.strategies is None else Outcome(lift(outcome.strategies), outcome.bound)


def solve_program(program: Program, budget: Budget, *, cutoff: float = math.inf, gap: float = 0.0) -> Outcome:
    """``integer_program`` without any reduction."""
    task = _Task(program, budget, gap)
    shares, bound = _relax(task, cutoff)
    if bound >= cutoff or shares is None:
        return Outcome(None, bound)
    chosen = _whole(program, shares)
    if chosen is None:
        chosen, bound = _branch(task, bound)
    return Outcome(chosen, bound)


def _relax(task: _Task, cutoff: float) -> tuple[np.ndarray | None, float]:
    """The linear relaxation over all rows: ``(shares, bound)``."""
    poly, memory, bound = task.program.poly, task.program.memory, -math.inf
    for _ in range(ROUNDS):
        if task.budget.remaining() <= 0.0:
            return None, bound
        answer = solve_polytope(poly, memory, task.budget, integral=False)
        bound = max(bound, answer.bound)
        if answer.values is None or not answer.finished or bound >= cutoff:
            return None, bound
        if memory is None:
            return answer.values, bound
        usage = memory.rows.expected(answer.values, poly.first)
        more = violated_rows(usage, memory.rows.limit, memory.listed, 1e-7)
        if not more:
            return answer.values, bound
        memory.listed.extend(more)
    return None, bound


def _branch(task: _Task, bound: float) -> tuple[list[int] | None, float]:
    """The integer program over all rows: ``(choice, bound)``."""
    poly, memory = task.program.poly, task.program.memory
    for _ in range(ROUNDS):
        if task.budget.remaining() <= 0.0:
            return None, bound
        answer = solve_polytope(poly, memory, task.budget, integral=True, gap=task.gap)
        bound = max(bound, answer.bound)
        if answer.values is None:
            return None, bound
        chosen = _rounded(poly, answer.values)
        if memory is None:
            return chosen, bound
        usage = memory.rows.usage(chosen)
        if usage.max(initial=0.0) <= memory.rows.limit * (1 + ROUNDING):
            return chosen, bound
        more = violated_rows(usage, memory.rows.limit, memory.listed, ROUNDING)
        memory.listed.extend(more)
        if not more:
            # HiGHS lets a row be violated by 1e-6 of its scale.
            memory.covers.append(cover(poly, memory.rows, chosen, int(usage.argmax())))
    return None, bound


def cover(poly: Polytope, rows: Rows, chosen: Sequence[int], row: int) -> tuple[np.ndarray, int]:
    """Why a choice passes a row: ``(variables, most)``, of which too many are chosen.

    If every node that is not at its least there takes as much or more, the row is passed whatever the others take
    (an extended cover, Balas 1975).
    """
    counts = np.diff(np.append(rows.offset, len(rows.flat)))
    live: dict[int, np.ndarray] = {}
    for entry in np.flatnonzero((rows.lo <= row) & (row < rows.hi)).tolist():
        start, node = rows.offset[entry], int(rows.node[entry])
        live[node] = live.get(node, 0.0) + rows.flat[start : start + counts[entry]]
    above = {node: sizes for node, sizes in live.items() if sizes[chosen[node]] > sizes.min()}
    variables = [poly.first[node] + np.flatnonzero(sizes >= sizes[chosen[node]]) for node, sizes in above.items()]
    return np.concatenate([np.zeros(0, np.int64), *variables]), len(above) - 1


def _rounded(poly: Polytope, shares: np.ndarray) -> list[int]:
    """The strategy with the largest share of each node."""
    ends = np.append(poly.first[1:], poly.n_choice)
    return [int(np.argmax(shares[start:end])) for start, end in zip(poly.first, ends, strict=True)]


def _whole(program: Program, shares: np.ndarray) -> list[int] | None:
    """The choice of an integral relaxation, None if it is fractional or breaks a row."""
    if (np.minimum(shares, 1.0 - shares) > WHOLE).any():
        return None
    chosen, memory = _rounded(program.poly, shares), program.memory
    if memory is not None and memory.rows.usage(chosen).max(initial=0.0) > memory.rows.limit * (1 + ROUNDING):
        return None
    return chosen
