"""The integer program as one would first write it down, for solvers that are not ours.

A binary variable per strategy and per pair of strategies of an edge, both marginals of each edge, and what is live at
each time as the time before plus what starts less what ends. No presolve, no prices.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import numpy as np
from ortools.math_opt.python import mathopt

from autopar.solver import Problem
from autopar.solver.milp import Polytope, entries_of, polytope, proto_of

PEERS = {
    "highs": mathopt.SolverType.HIGHS,
    "cpsat": mathopt.SolverType.CP_SAT,
    "scip": mathopt.SolverType.GSCIP,
}
# Solvers expect coefficients of moderate size.
COST_SCALE, BYTES_SCALE = 1e6, 1e6


@dataclass(frozen=True, eq=False)
class Plain:
    """The program of a problem.

    Args:
        model: for MathOpt.
        poly: the polytope behind it, whose first variables are the strategies.
        scale: its costs are those of the problem times this.
    """

    model: mathopt.Model
    poly: Polytope
    scale: float

    def solve(self, solver: str, seconds: float) -> tuple[list[int] | None, float, bool]:
        """``(strategies, bound, proven)`` of one solver in so many seconds; None where it found no choice."""
        limits = mathopt.SolveParameters(time_limit=datetime.timedelta(seconds=seconds))
        result = mathopt.solve(self.model, PEERS[solver], params=limits)
        bound = result.termination.objective_bounds.dual_bound / self.scale
        if not result.has_primal_feasible_solution():
            return None, bound, False
        values = np.array(result.variable_values(_choice(self.model, self.poly)))
        ends = np.append(self.poly.first[1:], self.poly.n_choice)
        strategies = [int(values[start:end].argmax()) for start, end in zip(self.poly.first, ends, strict=True)]
        return strategies, bound, result.termination.reason == mathopt.TerminationReason.OPTIMAL


def size_of(problem: Problem) -> str:
    """The size of the program in words, before it is built."""
    strategies, pairs = sum(map(len, problem.nodes)), entries_of(problem)
    ends = sum(sum(matrix.shape) for _, _, matrix in problem.edges)
    items = sum(len(usage.bytes) for usage in problem.usages if usage.lo < usage.hi)
    terms = strategies + 2 * pairs + ends + 2 * items
    return f"{(strategies + pairs) / 1e6:.2f} M variables, {terms / 1e6:.2f} M terms"


def build_plain(problem: Problem) -> Plain:
    """The program of a problem."""
    poly = polytope(problem)
    finite = np.isfinite(poly.costs)
    scale = COST_SCALE / max(float(np.abs(poly.costs[finite]).max(initial=0.0)), 1e-300)
    proto = proto_of(poly, None, True, np.where(finite, poly.costs * scale, 0.0))
    del proto.variables.integers[:]
    proto.variables.integers.extend([True] * len(poly.costs))
    model = mathopt.Model.from_model_proto(proto)
    _limit_memory(model, problem, poly, _choice(model, poly))
    return Plain(model, poly, scale)


def _choice(model: mathopt.Model, poly: Polytope) -> list[mathopt.Variable]:
    return [model.get_variable(index) for index in range(poly.n_choice)]


def _limit_memory(model: mathopt.Model, problem: Problem, poly: Polytope, choice: list[mathopt.Variable]) -> None:
    if problem.limit is None:
        return
    unit = max(problem.limit, 1.0) / BYTES_SCALE
    change: dict[int, list[mathopt.LinearTerm]] = {}
    for usage in problem.usages:
        mine = choice[poly.first[usage.node] : poly.first[usage.node] + len(usage.bytes)]
        # Whole units, rounded up: CP-SAT knows no others.
        sizes = np.ceil(usage.bytes / unit).tolist()
        for time, sign in ((usage.lo, 1.0), (usage.hi, -1.0)):
            terms = [sign * size * variable for size, variable in zip(sizes, mine, strict=True)]
            change.setdefault(time, []).extend(terms)
    live = 0.0
    for time in sorted(change):
        after = model.add_integer_variable(lb=0.0, ub=BYTES_SCALE)
        model.add_linear_constraint(mathopt.fast_sum([live, *change[time]]) == after)
        live = after
