"""The solver: ``Problem -> Choice``, always with a certificate. It knows nothing of JAX."""

from autopar.solver.iopddl import exact_score, read_iopddl
from autopar.solver.problem import Choice, NoChoiceError, Problem, Progress, Usage
from autopar.solver.search import solve

__all__ = ["Choice", "NoChoiceError", "Problem", "Progress", "Usage", "exact_score", "read_iopddl", "solve"]
