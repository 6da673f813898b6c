"""Solve every instance of a folder: ``python benchmarks/solver.py FOLDER [--seconds 10 60] [--only A B]``.

Instances are IOPDDL files (``.json``, ``.json.gz``). One line per instance and time limit: cost, bound, gap,
seconds; every choice is scored again from the file in Python integers.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from autopar.errors import InfeasibleError
from autopar.solver import exact_score, read_iopddl, solve

HEADER = f"{'instance':32} {'nodes':>7} {'limit_s':>7} {'cost':>18} {'bound':>18}" + "       gap  wall_s   cpu_s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0])
    parser.add_argument("--only", nargs="+", default=None, help="names that must occur in the file name")
    arguments = parser.parse_args()
    print(HEADER)
    for path in sorted([*arguments.folder.glob("*.json"), *arguments.folder.glob("*.json.gz")]):
        name = path.name.split(".")[0]
        if arguments.only is None or any(name.endswith(word) for word in arguments.only):
            for seconds in arguments.seconds:
                print(f"{name:32} {_line(path, seconds)}", flush=True)


def _line(path: Path, seconds: float) -> str:
    problem = read_iopddl(path)
    start, start_cpu = time.perf_counter(), time.process_time()
    head = f"{len(problem.nodes):7d} {seconds:7.0f}"
    try:
        choice = solve(problem, seconds=seconds)
    except InfeasibleError as error:
        return f"{head} {error.what}"
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - start_cpu
    cost, _, feasible = exact_score(path, choice.strategies)
    mark = "" if feasible else "  INFEASIBLE"
    return (
        f"{head} {cost:18d} {choice.lower_bound:18.6g} {choice.gap:9.3%} {wall_s:7.1f} {cpu_s:7.1f}"
        f"{'  proven' if choice.proven else ''}{mark}"
    )


if __name__ == "__main__":
    main()
