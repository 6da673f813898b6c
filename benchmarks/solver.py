"""Solve every instance of a folder of IOPDDL files, and score each choice again from the file in Python integers.

    python -m benchmarks.solver FOLDER [--seconds 10 60] [--only A B] [--known FILE] [--cpu]
                                [--peers highs cpsat scip] [--peers-only] [--memory-gb 8]

Time counts from after loading. Each solve has a process of its own, so that its peak memory is its own; kernels are
compiled and loaded before. ``--known`` is a file of lines ``NAME COST``, to which costs are compared;
``--peers`` also gives the plain model, without presolve or prices, to other solvers: their time counts from when the
model is built, and who holds more memory than ``--memory-gb``, builds for more than two minutes or overruns its time by
more than half a minute is stopped, so that the whole takes at most as long as these add up to; ``--cpu`` counts CPU
seconds of all threads instead of wall time, for a machine that does other work.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autopar.solver import NoChoiceError, Problem, Start, exact_score, read_iopddl, solve
from autopar.solver.wide import compile_kernels
from benchmarks.apart import Outcome, Tell, run_apart
from benchmarks.plain_model import PEERS, build_plain, size_of

# What a peer may take to read and build its model, and to come back after its time is up.
BUILD_S, GRACE_S = 120.0, 30.0
HEADER = "| instance | solver | limit | cost | bound | gap | of best known | wall | CPU | memory |\n|" + "---|" * 10


@dataclass(frozen=True)
class Run:
    """One solve: of what, by whom, for how long, against which known cost."""

    path: Path
    solver: str
    seconds: float
    known: float | None
    cpu: bool
    memory_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--only", nargs="+", default=None, help="names that must end the file name")
    parser.add_argument("--known", type=Path, default=None, help="file of lines NAME COST")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=[])
    parser.add_argument("--peers-only", action="store_true", help="leave out autopar itself")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="what a peer may hold")
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
            for solver in [*([] if options.peers_only else ["autopar"]), *options.peers]:
                run = Run(path, solver, seconds, best, options.cpu, options.memory_gb * 1e9)
                print(f"| {name} | {solver} | {_apart(run)} |", flush=True)


def _known(path: Path) -> dict[str, float]:
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    return {name: float(cost.replace(",", "")) for name, cost in lines}


def _apart(run: Run) -> str:
    """The cells of one row of the table; the run has a process of its own."""
    mine = run.solver == "autopar"
    outcome = run_apart(measure, run, BUILD_S, math.inf if mine else run.memory_bytes)
    head = f"{run.seconds:.0f} s"
    return f"{head} | {outcome.value or _stopped(run, outcome)}"


def _stopped(run: Run, outcome: Outcome) -> str:
    """The cells of a run that did not return."""
    size = size_of(read_iopddl(run.path))
    return f"{outcome.stopped} ({size}) | | | | {outcome.seconds:.1f} s | | {outcome.peak_bytes / 1e9:.2f} GB"


def measure(run: Run, tell: Tell) -> str:
    """The cells of one row of the table from the cost on."""
    tell("reading", BUILD_S)
    problem = read_iopddl(run.path)
    strategies, bound, proven, spent = (_ours if run.solver == "autopar" else _theirs)(run, problem, tell)
    memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB"
    if strategies is None:
        return f"no choice found | {bound:,.0f} | | | {spent} | {memory}"
    cost, _, feasible = exact_score(run.path, strategies)
    gap = "proven" if proven else f"{max(0.0, 1 - bound / cost):.3%}"
    ratio = "" if run.known is None else f"{cost / run.known:.5f}"
    shown = f"{cost:,}" if feasible else "infeasible"
    return f"{shown} | {bound:,.0f} | {gap} | {ratio} | {spent} | {memory}"


Solved = tuple[Sequence[int] | None, float, bool, str]
"""Strategies (None: no choice was found), bound, whether that proves them optimal, cells of wall and CPU seconds."""


def _ours(run: Run, problem: Problem, tell: Tell) -> Solved:
    compile_kernels()
    tell("solving", run.seconds + GRACE_S if not run.cpu else math.inf)
    spent = _stopwatch()
    try:
        choice = solve(problem, seconds=run.seconds, start=Start(cpu=run.cpu))
    except NoChoiceError:
        return None, -math.inf, False, spent()
    return choice.strategies, choice.lower_bound, choice.proven, spent()


def _theirs(run: Run, problem: Problem, tell: Tell) -> Solved:
    tell("building", BUILD_S)
    plain = build_plain(problem)
    tell("solving", run.seconds + GRACE_S)
    spent = _stopwatch()
    return *plain.solve(run.solver, run.seconds), spent()


def _stopwatch() -> Callable[[], str]:
    """Tells the wall and CPU seconds since now."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    return lambda: f"{time.perf_counter() - wall_s:.1f} s | {time.process_time() - cpu_s:.1f} s"


if __name__ == "__main__":
    main()
