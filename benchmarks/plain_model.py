"""The integer program as one would first write it down, for solvers that are not ours.

A binary variable per strategy and per pair of strategies of an edge, both marginals of each edge, and what is live at
each time as the time before plus what starts less what ends. No presolve, no prices.
"""

from __future__ import annotations

import datetime

import numpy as np
from ortools.math_opt.python import mathopt

from autopar.errors import InfeasibleError
from autopar.solver import Problem
from autopar.solver.milp import Polytope, polytope, proto_of

PEERS = {
    "highs": mathopt.SolverType.HIGHS,
    "cpsat": mathopt.SolverType.CP_SAT,
    "scip": mathopt.SolverType.GSCIP,
}
# Solvers expect coefficients of moderate size.
COST_SCALE, BYTES_SCALE = 1e6, 1e6


def solve_plain(problem: Problem, solver: str, seconds: float) -> tuple[list[int], float, bool]:
    """``(strategies, bound, proven)`` of one solver in so many seconds.

    Raises:
        InfeasibleError: it found no choice.
    """
    poly = polytope(problem)
    finite = np.isfinite(poly.costs)
    scale = COST_SCALE / max(float(np.abs(poly.costs[finite]).max(initial=0.0)), 1e-300)
    proto = proto_of(poly, None, True, np.where(finite, poly.costs * scale, 0.0))
    del proto.variables.integers[:]
    proto.variables.integers.extend([True] * len(poly.costs))
    model = mathopt.Model.from_model_proto(proto)
    choice = [model.get_variable(index) for index in range(poly.n_choice)]
    _limit_memory(model, problem, poly, choice)
    limits = mathopt.SolveParameters(time_limit=datetime.timedelta(seconds=seconds))
    result = mathopt.solve(model, PEERS[solver], params=limits)
    if not result.has_primal_feasible_solution():
        raise InfeasibleError(f"no choice found in {seconds:.0f} s", fix="allow more seconds")
    values = np.array(result.variable_values(choice))
    ends = np.append(poly.first[1:], poly.n_choice)
    strategies = [int(values[start:end].argmax()) for start, end in zip(poly.first, ends, strict=True)]
    bound = result.termination.objective_bounds.dual_bound / scale
    return strategies, bound, result.termination.reason == mathopt.TerminationReason.OPTIMAL


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
