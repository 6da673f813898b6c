"""The integer program on the local polytope, by HiGHS through OR-Tools' MathOpt.

Node variables are binary, edge variables continuous, tied by both marginals (Schlesinger 1976; Wainwright
and Jordan 2008, section 4). Its linear relaxation is usually integral on sharding problems; of thousands of
rows a few ever bind.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ortools.math_opt import model_pb2
from ortools.math_opt.python import mathopt
from ortools.math_opt.python.errors import InternalMathOptError

from autopar.solver.clock import ENTRY_S, Budget
from autopar.solver.problem import Problem
from autopar.solver.rows import Rows

POLL_S = 0.05
LEAST_GAP, LEAST_TOLERANCE = 1e-9, 1e-9
# The objective is scaled to this magnitude: HiGHS's tolerances are absolute, about 1e-6.
OBJECTIVE_SCALE = 1e4
LIMIT_SCALE = 1e3
ROWS_PER_ROUND = 8
# A node of the branching takes about so many iterations.
NODE_STEPS = 50
ROUNDING = 1e-13


@dataclass(frozen=True, eq=False)
class Polytope:
    """The local polytope as arrays; variables are the nodes' strategies, then the edges' finite entries.

    Args:
        first: ``(nodes,)`` the variable of each node's first strategy.
        costs: ``(variables,)``.
        n_choice: number of node variables.
        row, column, value: the constraint matrix in triplets.
        right: ``(constraints,)`` right-hand sides; all are equalities.
    """

    first: np.ndarray
    costs: np.ndarray
    n_choice: int
    row: np.ndarray
    column: np.ndarray
    value: np.ndarray
    right: np.ndarray


@dataclass(frozen=True, eq=False)
class Imposed:
    """What a program knows of memory.

    Args:
        rows: all rows.
        listed: those that are imposed.
        covers: ``(variables, most)``: no more than so many of these node variables are chosen together.
    """

    rows: Rows
    listed: list[int]
    covers: list[tuple[np.ndarray, int]]


@dataclass(frozen=True, eq=False)
class Answer:
    """What HiGHS found.

    Args:
        values: ``(node variables,)`` shares of strategies, or None without a solution.
        objective: cost of the values.
        bound: no solution costs less; ``inf`` when proven infeasible.
        finished: solved to optimality or proven infeasible.
    """

    values: np.ndarray | None
    objective: float
    bound: float
    finished: bool


def polytope(problem: Problem) -> Polytope:
    """Build the local polytope of a problem in bulk; its edges must not be parallel."""
    sizes = np.array([len(costs) for costs in problem.nodes], np.int64)
    first = np.cumsum(sizes) - sizes
    n_choice = int(sizes.sum())
    finite: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    costs, rows, columns, values = [np.concatenate(problem.nodes)], [], [], []
    rows.append(np.repeat(np.arange(len(sizes)), sizes))
    columns.append(np.arange(n_choice))
    values.append(np.ones(n_choice))
    row, column = len(sizes), n_choice
    for u, v, matrix in problem.edges:
        if id(matrix) not in finite:
            a, b = np.nonzero(np.isfinite(matrix))
            finite[id(matrix)] = (a, b, matrix[a, b])
        a, b, entries = finite[id(matrix)]
        pair = column + np.arange(len(entries))
        rows += [row + a, row + sizes[u] + b, row + np.arange(sizes[u] + sizes[v])]
        columns += [pair, pair, first[u] + np.arange(sizes[u]), first[v] + np.arange(sizes[v])]
        values += [np.ones(2 * len(entries)), -np.ones(sizes[u] + sizes[v])]
        costs.append(entries)
        row, column = row + int(sizes[u] + sizes[v]), column + len(entries)
    right = np.zeros(row)
    right[: len(sizes)] = 1.0
    join = np.concatenate
    return Polytope(first, join(costs), n_choice, join(rows), join(columns), join(values), right)


def entries_of(problem: Problem) -> int:
    """Number of edge variables the polytope would have: its size, before it is built."""
    seen = {id(matrix): int(np.isfinite(matrix).sum()) for _, _, matrix in problem.edges}
    return sum(seen[id(matrix)] for _, _, matrix in problem.edges)


def highest_cost(problem: Problem) -> float:
    """An upper bound on the cost of every choice of finite cost."""
    tables = [*problem.nodes, *(matrix for _, _, matrix in problem.edges)]
    largest = {id(table): float(table.max(where=np.isfinite(table), initial=-math.inf)) for table in tables}
    return sum(largest[id(table)] for table in tables) + 1.0


def solve_polytope(
    poly: Polytope,
    memory: Imposed | None,
    budget: Budget,
    *,
    integral: bool,
    gap: float = 0.0,
) -> Answer:
    """Solve the integer program or its relaxation.

    Args:
        poly: the polytope.
        memory: the memory rows to impose.
        budget: the time there is; its ``poll`` may raise to leave (HiGHS itself then ends at its time limit).
        integral: whether choices must be whole.
        gap: stop at this relative gap.
    """
    finite = np.isfinite(poly.costs)
    scale = OBJECTIVE_SCALE / max(np.abs(poly.costs[finite]).max(initial=0.0), 1e-300)
    model = mathopt.Model.from_model_proto(proto_of(poly, memory, integral, np.where(finite, poly.costs * scale, 0.0)))
    choice = [model.get_variable(index) for index in range(poly.n_choice)]
    extra = mathopt.ModelSolveParameters(
        variable_values_filter=mathopt.VariableFilter(filtered_items=choice),
        dual_values_filter=mathopt.LinearConstraintFilter(filtered_items=[]),
    )
    limits = _limits(budget, len(poly.value), integral)
    limits.relative_gap_tolerance, limits.absolute_gap_tolerance = max(gap, LEAST_GAP), 0.0
    result = _run_highs(model, limits, extra, budget.poll)
    if result is None:
        # It may contradict itself where a program is infeasible by less than its tolerance.
        limits.highs.double_options["primal_feasibility_tolerance"] = LEAST_TOLERANCE
        result = _run_highs(model, limits, extra, budget.poll)
    if result is None:
        return Answer(None, math.inf, -math.inf, False)
    steps = result.solve_stats.simplex_iterations + result.solve_stats.node_count
    budget.clock.work((1 + steps) * len(poly.value))
    return _answer(result, choice, scale)


def _limits(budget: Budget, nonzeros: int, integral: bool) -> mathopt.SolveParameters:
    """Time, or where work is counted the steps that it stands for."""
    seconds, limits = max(budget.remaining(), 0.1), mathopt.SolveParameters()
    # HiGHS takes 32-bit numbers.
    steps = min(1 + int(seconds / (ENTRY_S * max(nonzeros, 1))), 2**31 - 1)
    if not budget.clock.counts_work:
        limits.time_limit = datetime.timedelta(seconds=seconds)
    elif integral:
        # Where choices are whole it refuses to count iterations.
        limits.node_limit = 1 + steps // NODE_STEPS
    else:
        limits.iteration_limit = steps
    return limits


def proto_of(poly: Polytope, memory: Imposed | None, integral: bool, costs: np.ndarray) -> model_pb2.ModelProto:
    """MathOpt's model of a polytope with some memory rows, built in bulk; ``costs`` are finite ones in its place."""
    proto, n = model_pb2.ModelProto(), len(poly.costs)
    whole = np.zeros(n, bool)
    whole[: poly.n_choice] = integral
    proto.variables.ids.extend(range(n))
    proto.variables.lower_bounds.extend([0.0] * n)
    proto.variables.upper_bounds.extend(np.isfinite(poly.costs).astype(np.float64).tolist())
    proto.variables.integers.extend(whole.tolist())
    proto.objective.linear_coefficients.ids.extend(range(n))
    proto.objective.linear_coefficients.values.extend(costs.tolist())
    row, column, value = poly.row, poly.column, poly.value
    low, high = poly.right, poly.right
    if memory is not None:
        extra = _memory_triplets(poly, memory)
        row, column, value = (np.concatenate(pair) for pair in zip((row, column, value), extra, strict=True))
        top = memory.rows.limit * _memory_scale(memory.rows)
        high = np.concatenate([high, np.full(len(memory.listed), top), [most for _, most in memory.covers]])
        low = np.concatenate([low, np.full(len(high) - len(low), -math.inf)])
    proto.linear_constraints.ids.extend(range(len(low)))
    proto.linear_constraints.lower_bounds.extend(low.tolist())
    proto.linear_constraints.upper_bounds.extend(high.tolist())
    # MathOpt wants triplets by row, then column, each pair once.
    place = row * n + column
    unique, inverse = np.unique(place, return_inverse=True)
    proto.linear_constraint_matrix.row_ids.extend((unique // n).tolist())
    proto.linear_constraint_matrix.column_ids.extend((unique % n).tolist())
    proto.linear_constraint_matrix.coefficients.extend(np.bincount(inverse, value, len(unique)).tolist())
    return proto


def _memory_scale(rows: Rows) -> float:
    return LIMIT_SCALE / max(rows.limit, float(rows.flat.max(initial=0.0)), 1e-300)


def _memory_triplets(poly: Polytope, memory: Imposed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, first = memory.rows, len(poly.right)
    counts = np.diff(np.append(rows.offset, len(rows.flat)))
    owner = np.repeat(np.arange(len(rows.node)), counts)
    column = poly.first[rows.node[owner]] + np.arange(len(rows.flat)) - rows.offset[owner]
    value = rows.flat * _memory_scale(rows)
    terms: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0))]
    for row in memory.listed:
        live = ((rows.lo <= row) & (row < rows.hi))[owner] & (value != 0.0)
        terms.append((column[live], value[live]))
    terms += [(variables, np.ones(len(variables))) for variables, _ in memory.covers]
    columns, values = (np.concatenate(part) for part in zip(*terms, strict=True))
    return np.repeat(np.arange(len(terms)) + first - 1, [len(part) for part, _ in terms]), columns, values


def _run_highs(
    model: mathopt.Model,
    limits: mathopt.SolveParameters,
    extra: mathopt.ModelSolveParameters,
    poll: Callable[[], None],
) -> mathopt.SolveResult | None:
    """HiGHS in a thread: it cannot be interrupted, but the caller must be able to leave. None if it failed."""
    results: list[mathopt.SolveResult] = []

    def run() -> None:
        # MathOpt's own error fails to be made in version 9.15, for lack of an attribute.
        with contextlib.suppress(InternalMathOptError, AttributeError):
            results.append(mathopt.solve(model, mathopt.SolverType.HIGHS, params=limits, model_params=extra))

    work = threading.Thread(target=run, daemon=True)
    work.start()
    while work.is_alive():
        work.join(POLL_S)
        poll()
    return results[0] if results else None


def _answer(result: mathopt.SolveResult, choice: list[mathopt.Variable], scale: float) -> Answer:
    reason = result.termination.reason
    if reason in (mathopt.TerminationReason.INFEASIBLE, mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED):
        return Answer(None, math.inf, math.inf, True)
    bound = result.termination.objective_bounds.dual_bound / scale
    if not result.has_primal_feasible_solution():
        return Answer(None, math.inf, bound, False)
    values = np.array(result.variable_values(choice))
    finished = reason == mathopt.TerminationReason.OPTIMAL
    return Answer(values, result.objective_value() / scale, bound, finished)


def violated_rows(usage: np.ndarray, limit: float, known: list[int], margin: float = 1e-9) -> list[int]:
    """The worst rows over the limit that are local maxima and not yet known, at most a few."""
    left = np.concatenate([[-math.inf], usage[:-1]])
    right = np.concatenate([usage[1:], [-math.inf]])
    over = np.flatnonzero((usage > limit * (1 + margin)) & (usage >= left) & (usage > right))
    order = over[np.argsort(-usage[over], kind="stable")]
    return [int(row) for row in order if row not in set(known)][:ROWS_PER_ROUND]
