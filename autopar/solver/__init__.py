"""The solver: ``Problem -> Choice``, always with a certificate. It knows nothing of JAX."""

from autopar.solver.iopddl import exact_score, read_iopddl
from autopar.solver.part import Warm
from autopar.solver.problem import Choice, NoChoiceError, Problem, Progress, Usage
from autopar.solver.questions import Alternative, Point, alternatives, frontier
from autopar.solver.search import Start, solve

__all__ = [
    "Alternative",
    "Choice",
    "NoChoiceError",
    "Point",
    "Problem",
    "Progress",
    "Start",
    "Usage",
    "Warm",
    "alternatives",
    "exact_score",
    "frontier",
    "read_iopddl",
    "solve",
]
