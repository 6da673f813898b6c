"""solve: an instance of the IOPDDL contest."""

import time
from typing import Any

from rich.table import Table

from autopar.cli.console import progress, show, show_json
from autopar.cli.options import Solving
from autopar.errors import ProblemError
from autopar.plan.terminal import table
from autopar.solver import Progress, Start, read_iopddl
from autopar.solver import solve as solve_problem
from autopar.solver.iopddl import exact_score
from autopar.solver.problem import relative_gap
from autopar.solver.wide import compile_kernels


def solve(request: Solving) -> None:
    """Solves an instance and shows cost, bound and peak usage."""
    begin = time.perf_counter()
    if not request.problem.is_file():
        raise ProblemError(f"there is no file {request.problem}", fix="pass a .json or .json.gz instance")
    with progress(f"reading {request.problem}") as update:
        problem = read_iopddl(request.problem)
        update("loading the solver's kernels, which takes half a minute the first time on a machine")
        compile_kernels()

        def tell(at: Progress) -> None:
            gap = relative_gap(at.incumbent, at.bound)
            update(f"{at.seconds:.0f} s, {at.stage}: best {at.incumbent:.8g}, at least {at.bound:.8g}, gap {gap:.2%}")

        # Reading a large instance takes seconds, which are not the solver's; nor are those of loading kernels.
        start = Start(seed=request.seed, deterministic=request.deterministic)
        choice = solve_problem(problem, seconds=request.seconds, on_progress=tell, start=start)
        cost, peak, feasible = exact_score(request.problem, choice.strategies)
    found: dict[str, Any] = {
        "cost": cost,
        "lower_bound": choice.lower_bound,
        "gap": choice.gap,
        "feasible": feasible,
        "seconds": time.perf_counter() - begin,
        "strategies": list(choice.strategies),
    }
    if request.json:
        show_json(found)
    else:
        show(_summary(str(request.problem), found, peak, problem.limit))


def _summary(name: str, found: dict[str, Any], peak: int, limit: float | None) -> Table:
    shown = table(name, "|")
    for key in ("cost", "lower_bound", "gap", "feasible", "seconds"):
        shown.add_row(key, f"{found[key]:.6g}" if isinstance(found[key], float) else str(found[key]))
    shown.add_row("peak usage", str(peak) if limit is None else f"{peak} of {limit:.0f}")
    return shown
