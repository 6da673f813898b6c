"""Any plan at all: choices picked by dice instead of by the solver. What holds for these holds for every plan."""

from dataclasses import replace
from typing import Any

import numpy as np

from autopar.api import equation_seconds, prediction
from autopar.cluster import Mesh
from autopar.cost import CostModel, RooflineCost, hardware
from autopar.ir.trace import trace
from autopar.lowering.local_program import build_local_program
from autopar.plan import Plan
from autopar.planner.search import Limits, prepare, search
from autopar.solver import Problem, solve


def v5e(mesh: str) -> RooflineCost:
    """Prices on a mesh of TPU v5e."""
    return RooflineCost(hardware("v5e"), Mesh.parse(mesh))


def dice_plan(step: Any, args: tuple[Any, ...], cost: CostModel, seed: int) -> tuple[Plan, float]:
    """A plan of arbitrary choices with its prediction, and the cost that the solver's problem gives it."""
    prepared = prepare(trace(step, *args), cost)
    rng = np.random.default_rng(seed)
    formulation = prepared.formulator.formulate()
    nodes = formulation.problem.nodes
    # The dice outweigh every real cost; only what is impossible stays so.
    diced = Problem(tuple(c + 1e3 * rng.random(len(c)) for c in nodes), formulation.problem.edges)
    strategies = solve(diced, relative_gap=0.5).strategies
    masks = {
        unit: np.arange(len(costs)) == chosen
        for unit, costs, chosen in zip(formulation.units, nodes, strategies, strict=True)
    }
    plan, formulation, choice = search(prepared, Limits(), masks)
    assert choice.strategies == strategies
    local = build_local_program(prepared.traced.program, plan, cost)
    seconds = equation_seconds(formulation, choice)
    return replace(plan, prediction=prediction(local, seconds, cost)), formulation.problem.cost(strategies)
