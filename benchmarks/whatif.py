"""CPU seconds of asking again after one node of a solved plan is denied its strategy, warm and cold.

python -m benchmarks.whatif [--row llama-32] [--mesh data=8,tensor=8] [--memory-gb G] [--questions 8] [--seed 0]

Gaps are those of planning: 1e-6 without a memory limit, 0.005 with one. Of a limit in parts of what the unlimited plan
needs, ``--memory-share 0.9`` makes it bind.
"""

from __future__ import annotations

import argparse
import importlib
import time
from dataclasses import replace

import numpy as np

from autopar.api.planning import MEMORY_GAP
from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.ir.arguments import adapt
from autopar.planner.search import prepare
from autopar.solver import Choice, Problem, Start, Warm, solve
from autopar.solver.wide import compile_kernels
from benchmarks.planning import ROWS


def problem_of(row: str, mesh: str, limit_bytes: float | None) -> Problem:
    """The problem that planning a row of ``benchmarks.planning`` solves."""
    from autopar.api import traced_in_time

    model, settings = ROWS[row]
    step, state, batch = importlib.import_module(f"models.{model}").make(abstract=True, **settings)
    traced, _ = traced_in_time(adapt(step, (state, batch)))
    prepared = prepare(traced, RooflineCost(hardware("v5p"), Mesh.parse(mesh)))
    return prepared.formulator.formulate(limit_bytes).problem


def timed(problem: Problem, start: Start | None = None) -> tuple[Choice, float]:
    """The choice, and the CPU seconds it took."""
    begin = time.process_time()
    choice = solve(problem, relative_gap=1e-6 if problem.limit is None else MEMORY_GAP, start=start)
    return choice, time.process_time() - begin


def main() -> None:
    """Prints a line per question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS), default="llama-32")
    parser.add_argument("--mesh", default="data=8,tensor=8")
    parser.add_argument("--memory-gb", type=float, default=None)
    parser.add_argument("--memory-share", type=float, default=None, help="of the peak without a limit")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    compile_kernels()
    share = options.memory_share
    limit_bytes = 1e18 if share is not None else None if options.memory_gb is None else options.memory_gb * 1e9
    problem = problem_of(options.row, options.mesh, limit_bytes)
    if share is not None:
        peak = problem.peak(timed(replace(problem, limit=None))[0].strategies)
        problem = replace(problem, limit=share * peak)
    ask(problem, options.questions, options.seed)


def ask(problem: Problem, questions: int, seed: int) -> None:
    """What if some nodes, one after the other, may not keep their strategies?"""
    warm = Warm()
    first, first_s = timed(problem, Start(warm=warm))
    limit = "no limit" if problem.limit is None else f"{problem.limit / 1e9:.1f} GB"
    print(f"{len(problem.nodes)} nodes, {limit}, solved in {first_s:.2f} CPU s, gap {first.gap:.1e}")
    random = np.random.default_rng(seed)
    several = [node for node, costs in enumerate(problem.nodes) if np.isfinite(costs).sum() > 1]
    spent: list[float] = []
    for node in random.choice(several, questions, replace=False).tolist():
        others = set(np.flatnonzero(np.isfinite(problem.nodes[node])).tolist()) - {first.strategies[node]}
        asked = problem.allow({node: others})
        again, warm_s = timed(asked, Start(warm=warm, hint=first.strategies))
        cold, cold_s = timed(asked)
        spent.append(warm_s)
        more = again.objective / cold.objective - 1
        print(f"node {node:5d}: warm {warm_s:.2f} s, cold {cold_s:.2f} s, costs {more:+.1e}, gap {again.gap:.1e}")
    print(f"warm: median {np.median(spent):.2f} s, at most {max(spent):.2f} s")


if __name__ == "__main__":
    main()
