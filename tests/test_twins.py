"""Stages that are alike: one is planned, and the others have the plans that they would get alone."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import autopar
from autopar.api.planning import Options, traced_in_time
from autopar.api.staging.assemble import Pipelined
from autopar.api.staging.draft import Draft, StagePlanner
from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.ir.arguments import adapt
from autopar.ir.trace import Traced
from autopar.lowering.instructions import Run
from autopar.lowering.pipeline.cut import Layout, cut_for
from autopar.plan import Splitting
from autopar.planner.search import Solved
from autopar.sharding.lookup import RuleBook
from autopar.solver import Warm
from autopar.solver.schedule import make_schedule
from benchmarks.cases import make

M = 4
SMALL, LARGE = "data=2,tensor=1", "data=2,tensor=2"
Layer = Callable[[jax.Array, jax.Array], jax.Array]


def activated(by: Callable[[jax.Array], jax.Array]) -> Layer:
    return lambda x, weight: by(x @ weight)


def scaled(by: float) -> Layer:
    return lambda x, weight: jnp.tanh(x @ weight) * by


def repeated(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.tanh(jax.lax.scan(lambda x, _: (jnp.tanh(x @ weight), None), x, length=2)[0] @ weight)


def stack(*layers: Layer) -> Traced:
    """A step of so many layers."""

    def step(weights: list[jax.Array], x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        def loss(weights: list[jax.Array]) -> jax.Array:
            hidden = x
            for layer, weight in zip(layers, weights, strict=True):
                hidden = layer(hidden, weight)
            return jnp.mean(hidden**2)

        value, gradients = jax.value_and_grad(loss)(weights)
        return [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)], value

    weights = [jax.ShapeDtypeStruct((64, 64), jnp.float32) for _ in layers]
    return traced_in_time(adapt(step, [weights, jax.ShapeDtypeStruct((32, 64), jnp.float32)]))[0]


@functools.cache
def gpt() -> Traced:
    settings: dict[str, Any] = {"layers": 4, "width": 256, "heads": 4, "seq": 64, "batch": 16, "vocab": 128}
    step, *args = make("gpt", **settings, optimizer="sgd", abstract=True)
    return traced_in_time(adapt(step, args))[0]


def pipelined(traced: Traced, meshes: list[str], pins: tuple[tuple[str, str], ...] = ()) -> Pipelined:
    places = tuple(map(Mesh.parse, meshes))
    layout = Layout(make_schedule("1f1b", len(places), M), places, (), Splitting(microbatches=M))
    return Pipelined.of(cut_for(traced, layout), layout, Options(mesh=places[0], hardware="v100", pins=pins))


def twins(pipeline: Pipelined) -> list[int | None]:
    """The number of the stage that is planned for each other one."""
    planners = list(pipeline.planners)
    return [None if planner.twin is None else planners.index(planner.twin) for planner in planners]


TANH = (activated(jnp.tanh),) * 4


@pytest.mark.parametrize(
    ("layers", "meshes", "pins", "expected"),
    [
        (TANH, [SMALL] * 4, (), [None, None, 1, None]),
        (tuple(map(scaled, (1.0, 2.0, 3.0, 4.0))), [SMALL] * 4, (), [None, None, 1, None]),
        (tuple(map(scaled, (1.0, 0.0, 3.0, 4.0))), [SMALL] * 4, (), [None] * 4),
        ((TANH[0], activated(jnp.sin), *TANH[2:]), [SMALL] * 4, (), [None] * 4),
        (TANH, [SMALL, SMALL, LARGE, LARGE], (), [None] * 4),
        (TANH, [SMALL] * 4, (("2", "data,"),), [None] * 4),
        ((repeated,) * 4, [SMALL] * 4, (), [None] * 4),
    ],
    ids=["equal", "other literals", "one of them zero", "other equations", "other meshes", "one is pinned", "loops"],
)
def test_alike_are_stages_of_equal_equations_on_equal_meshes(layers, meshes, pins, expected):
    assert twins(pipelined(stack(*layers), meshes, pins)) == expected


@pytest.mark.parametrize("frugality", [0.0, 64.0])
def test_a_stage_has_the_plan_of_its_twin_as_it_would_get_it_alone(frugality):
    planner = pipelined(gpt(), [LARGE] * 4).planners[2]
    assert planner.twin is not None
    solved = Solved(Warm()), RuleBook()
    alone = StagePlanner(planner.part, planner.cost, M, planner.options, solved).draft(frugality)
    assert shown(planner.draft(frugality)) == shown(alone)


def test_a_plan_from_a_twin_does_not_say_why():
    plan = pipelined(gpt(), [LARGE] * 4).planners[2].draft(0.0).plan
    with pytest.raises(PlanError, match=r"shared by stages that are alike.*\n.*the first of the stages"):
        autopar.explain(plan, next(iter(plan.values)))


def shown(draft: Draft) -> list[Any]:
    """All that is decided, without the seconds that it took."""
    plan = replace(draft.plan, solution=replace(draft.plan.solution, build_s=0.0, solve_s=0.0), runtime=None)
    code = [instruction for piece in draft.prices.parts.pieces for instruction in piece.local.instructions]
    equations = [instruction.equation for instruction in code if isinstance(instruction, Run)]
    scatters = draft.prices.part.stage.scatters
    return [plan, draft.cost, draft.price_s_per_byte, scatters, equations, draft.prices.prediction(0.0)]
