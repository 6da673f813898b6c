"""solve: an instance of the IOPDDL contest."""

import time
from typing import Any

from autopar.cli.console import progress, show, show_json
from autopar.cli.options import Solving
from autopar.errors import ProblemError
from autopar.plan.terminal import table
from autopar.solver import Progress, read_iopddl
from autopar.solver import solve as solve_problem
from autopar.solver.iopddl import exact_score


def solve(request: Solving) -> None:
    """Solves an instance and shows cost, bound and peak usage."""
    start = time.perf_counter()
    if not request.problem.is_file():
        raise ProblemError(f"there is no file {request.problem}", fix="pass a .json or .json.gz instance")
    with progress(f"reading {request.problem}") as update:
        problem = read_iopddl(request.problem)

        def tell(at: Progress) -> None:
            update(f"{at.stage}: best {at.incumbent:.6g}, at least {at.bound:.6g}")

        seconds = max(request.seconds - (time.perf_counter() - start), 0.0)
        choice = solve_problem(problem, seconds=seconds, on_progress=tell)
        cost, peak, feasible = exact_score(request.problem, choice.strategies)
    found: dict[str, Any] = {
        "cost": cost,
        "lower_bound": choice.lower_bound,
        "gap": choice.gap,
        "feasible": feasible,
        "seconds": time.perf_counter() - start,
        "strategies": list(choice.strategies),
    }
    if request.json:
        return show_json(found)
    shown = table(str(request.problem), "|", "")
    for name in ("cost", "lower_bound", "gap", "feasible", "seconds"):
        shown.add_row(name, f"{found[name]:.6g}" if isinstance(found[name], float) else str(found[name]))
    shown.add_row("peak usage", f"{peak} of {problem.limit:.0f}" if problem.limit is not None else str(peak))
    show(shown)
