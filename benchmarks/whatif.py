"""CPU seconds of asking again after one node of a solved plan is denied its strategy, warm and cold.

python -m benchmarks.whatif [--row llama-32] [--mesh data=8,tensor=8] [--questions 8] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib
import time

import numpy as np

from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.ir.arguments import adapt
from autopar.planner.search import prepare
from autopar.solver import Choice, Problem, Start, Warm, solve
from benchmarks.planning import ROWS


def problem_of(row: str, mesh: str) -> Problem:
    """The problem that planning a row of ``benchmarks.planning`` without a memory limit solves."""
    from autopar.api import traced_in_time

    model, settings = ROWS[row]
    step, state, batch = importlib.import_module(f"models.{model}").make(abstract=True, **settings)
    traced, _ = traced_in_time(adapt(step, (state, batch)))
    prepared = prepare(traced, RooflineCost(hardware("v5p"), Mesh.parse(mesh)))
    return prepared.formulator.formulate().problem


def timed(problem: Problem, start: Start | None = None) -> tuple[Choice, float]:
    """The choice, and the CPU seconds it took."""
    begin = time.process_time()
    choice = solve(problem, relative_gap=1e-6, start=start)
    return choice, time.process_time() - begin


def main() -> None:
    """Prints a line per question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS), default="llama-32")
    parser.add_argument("--mesh", default="data=8,tensor=8")
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    problem, warm = problem_of(options.row, options.mesh), Warm()
    first, first_s = timed(problem, Start(warm=warm))
    print(f"{len(problem.nodes)} nodes, solved in {first_s:.2f} CPU s, gap {first.gap:.1e}")
    random = np.random.default_rng(options.seed)
    several = [node for node, costs in enumerate(problem.nodes) if np.isfinite(costs).sum() > 1]
    for node in random.choice(several, options.questions, replace=False).tolist():
        others = set(np.flatnonzero(np.isfinite(problem.nodes[node])).tolist()) - {first.strategies[node]}
        asked = problem.allow({node: others})
        warm_choice, warm_s = timed(asked, Start(warm=warm, hint=first.strategies))
        cold_choice, cold_s = timed(asked)
        same = abs(warm_choice.objective - cold_choice.objective) <= 1e-6 * cold_choice.objective
        print(f"node {node:5d}: warm {warm_s:.2f} s, cold {cold_s:.2f} s, {'same cost' if same else 'DIFFERENT COSTS'}")


if __name__ == "__main__":
    main()
