"""Solve every instance of a folder of IOPDDL files, and score each choice again from the file in Python integers.

    python -m benchmarks.solver FOLDER [--seconds 10 60] [--only A B] [--known FILE] [--peers highs cpsat scip] [--cpu]

Time counts from after loading. Each solve has a process of its own, so that its peak memory is its own; kernels are
compiled and loaded before. ``--known`` is a file of lines ``NAME COST``, to which costs are compared;
``--peers`` also gives the plain model, without presolve or prices, to other solvers; ``--cpu`` counts CPU seconds of
all threads instead of wall time, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from autopar.errors import InfeasibleError
from autopar.solver import Start, exact_score, read_iopddl, solve
from autopar.solver.wide import compile_kernels
from benchmarks.plain_model import PEERS, solve_plain

HEADER = "| instance | solver | limit | cost | bound | gap | of best known | wall | CPU | memory |\n|" + "---|" * 10


@dataclass(frozen=True)
class Run:
    """One solve: of what, by whom, for how long, against which known cost."""

    path: Path
    solver: str
    seconds: float
    known: float | None
    cpu: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--only", nargs="+", default=None, help="names that must end the file name")
    parser.add_argument("--known", type=Path, default=None, help="file of lines NAME COST")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[])
    parser.add_argument("--cpu", action="store_true", help="count CPU seconds")
    options = parser.parse_args()
    compile_kernels()
    known = {} if options.known is None else _known(options.known)
    print(HEADER)
    for path in sorted([*options.folder.glob("*.json"), *options.folder.glob("*.json.gz")]):
        name = path.name.split(".")[0]
        if options.only is not None and not any(name.endswith(word) for word in options.only):
            continue
        best = next((cost for word, cost in known.items() if name.endswith(word)), None)
        for seconds in options.seconds:
            for solver in ["autopar", *options.peers]:
                print(f"| {name} | {solver} | {_apart(Run(path, solver, seconds, best, options.cpu))} |", flush=True)


def _known(path: Path) -> dict[str, float]:
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {name: float(cost.replace(",", "")) for name, cost in lines}


def _apart(run: Run) -> str:
    """The run in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (run,))


def measure(run: Run) -> str:
    """The cells of one row of the table."""
    problem = read_iopddl(run.path)
    compile_kernels()
    start, start_cpu = time.perf_counter(), time.process_time()
    head = f"{run.seconds:.0f} s"
    try:
        if run.solver == "autopar":
            choice = solve(problem, seconds=run.seconds, start=Start(cpu=run.cpu))
            strategies, bound, proven = choice.strategies, choice.lower_bound, choice.proven
        else:
            strategies, bound, proven = solve_plain(problem, run.solver, run.seconds)
    except InfeasibleError as error:
        return f"{head} | {error.what} | | | | | |"
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    memory_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    cost, _, feasible = exact_score(run.path, strategies)
    gap = "proven" if proven else f"{max(0.0, 1 - bound / cost):.3%}"
    ratio = "" if run.known is None else f"{cost / run.known:.5f}"
    shown = f"{cost:,}" if feasible else "infeasible"
    return f"{head} | {shown} | {bound:,.0f} | {gap} | {ratio} | {wall_s:.1f} s | {cpu_s:.1f} s | {memory_gb:.2f} GB"


if __name__ == "__main__":
    main()
