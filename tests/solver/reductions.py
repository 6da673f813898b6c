"""One reduction alone."""

from autopar.solver.draft import Draft, Lift
from autopar.solver.presolve import Reduction
from autopar.solver.problem import Problem
from autopar.solver.tables import Tables


def reduce_once(reduction: Reduction, problem: Problem, tables: Tables) -> tuple[Problem, Lift]:
    """Once over all nodes."""
    draft = Draft.of(problem, tables)
    reduction(draft, list(range(len(problem.nodes))))
    return draft.finish()
