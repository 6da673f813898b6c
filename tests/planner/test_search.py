"""The graph, the formulation and the search on programs small enough to see through."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from arbitrary import v5e
from jax.extend.core import Primitive
from tiny_steps import STEPS

import autopar
from autopar.cluster import Mesh
from autopar.cost import Work, fusible
from autopar.cost.alpa import AlpaCost
from autopar.errors import InfeasibleError, PinError, PresetError, UnknownPrimitiveError
from autopar.ir.trace import trace
from autopar.planner.graph import Graph, build_graph
from autopar.planner.presets import PRESETS
from autopar.planner.search import Limits, prepare, search
from autopar.sharding.lookup import RuleBook
from autopar.sharding.rules.elementwise import LINEAR, NONLINEAR
from autopar.solver import solve


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def graph_of(step: Any, *args: Any) -> Graph:
    traced = trace(step, *args)
    return build_graph(traced.program, traced.state)


def kinds(graph: Graph) -> list[str]:
    """One word for each unit that is no input: a cluster's primitives, an equation's, or what it is."""
    eqns = graph.program.equations
    names = {"cluster": "+", "equation": ""}
    return [
        names[unit.kind].join(eqns[i].primitive.name for i in unit.equations) if unit.kind in names else unit.kind
        for unit in graph.units
        if unit.kind != "input"
    ]


# -- the graph


def test_a_rematerialised_block_reads_in_a_layout_of_its_own_what_stands_next_to_it():
    def step(w: Any) -> Any:
        return w.astype(jnp.bfloat16), jax.lax.optimization_barrier(w) * 2

    graph = graph_of(step, f32(8, 8))
    primitives = [eqn.primitive.name for eqn in graph.program.equations]
    groups = [[primitives[use.position] for use in group.uses] for group in graph.groups[graph.program.inputs[0]]]
    assert groups == [["convert_element_type"], ["optimization_barrier"]]


def test_elementwise_equations_that_feed_each_other_are_one_cluster():
    assert kinds(graph_of(lambda x: jnp.tanh(jnp.sin(x) * 2) + x, f32(8, 8))) == ["sin+mul+tanh+add", "output"]


def test_every_elementwise_primitive_joins_a_cluster():
    """Special functions are long loops on their own; threefry has two results; placement never gets so far."""
    apart = {"bessel_i0e", "bessel_i1e", "device_put", "igamma", "igamma_grad_a", "igammac", "name", "polygamma"}
    apart |= {"regularized_incomplete_beta", "threefry2x32", "zeta"}
    assert {name for name in (*NONLINEAR, *LINEAR) if not fusible(name)} == apart


def test_a_contraction_cuts_a_run_of_elementwise_equations():
    found = kinds(graph_of(lambda x, w: jnp.tanh(jnp.sin(x) @ w) * 2, f32(8, 8), f32(8, 8)))
    assert found == ["sin", "dot_general", "tanh+mul", "output"]


def test_a_value_kept_across_a_contraction_may_be_laid_out_anew():
    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        h = jnp.sin(x)
        return jnp.tanh(h @ w @ w) + h

    graph = graph_of(step, f32(8, 8), f32(8, 8))
    (h,) = (value for value in graph.groups if value.name == "sin")
    assert len(graph.groups[h]) == 2
    assert kinds(graph) == ["sin", "dot_general", "dot_general", "tanh+add", "view", "output"]


def test_several_contractions_read_one_view():
    graph = graph_of(lambda x, a, b: ((x @ a), (x @ b)), f32(8, 8), f32(8, 4), f32(8, 4))
    assert kinds(graph).count("view") == 1
    (group,) = next(groups for value, groups in graph.groups.items() if value.name == "arg0")
    assert group.anchor is not None and group.anchor.kind == "view"
    assert len(group.uses) == 2


def test_what_depends_on_no_argument_is_free():
    def step(x: jax.Array) -> jax.Array:
        mask = jnp.arange(8)[:, None] >= jnp.arange(8)[None, :]
        return jnp.where(mask, x, 0.0)

    graph = graph_of(step, f32(8, 8))
    assert kinds(graph) == ["select_n", "output"]
    assert sum(graph.free) == len(graph.program.equations) - 1


def test_state_returns_in_the_layout_in_which_it_came():
    step, args = STEPS["mlp"]
    plan = autopar.plan(step, *args, mesh="data=2,tensor=4", hardware="v5e", preset="zero3")
    specs = [argument.spec for argument in plan.arguments]
    traced = trace(step, *args)
    assert all(plan.outputs[o] == specs[i] for i, o in traced.state)
    assert any(spec.axes for spec in specs)


def test_programs_that_share_rules_are_planned_as_each_alone():
    book = RuleBook()
    for (step, args), mesh in itertools.product(STEPS.values(), ("data=2,tensor=2", "data=4,tensor=2")):
        traced, cost = trace(step, *args), v5e(mesh)
        shared, alone = (search(prepare(traced, cost, rules=rules), Limits())[0] for rules in (book, None))
        assert (shared.values, shared.equations, shared.views) == (alone.values, alone.equations, alone.views)
        assert shared.solution.objective_s == alone.solution.objective_s


# -- the search against every choice there is

TINY = {
    "matmul": (lambda x, w: jnp.sin(x @ w), (f32(64, 32), f32(32, 16))),
    "update": (lambda w, x: (w - 0.1 * (x.T @ x), jnp.sum(x)), (f32(32, 32), f32(64, 32))),
    "softmax": (lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), -1, keepdims=True), (f32(64, 16),)),
    "two readers": (lambda x, a: (x @ a) @ a.T, (f32(64, 32), f32(32, 16))),
    "transpose": (lambda x: (x.T * 2).reshape(-1) + 1, (f32(8, 16),)),
}


SQUARE = ("softmax", "transpose")  # the others have millions of choices on a mesh of two axes


@pytest.mark.parametrize("limit", [None, 0.6])
@pytest.mark.parametrize(("name", "mesh"), [*((n, "x=2") for n in TINY), *((n, "x=2,y=2") for n in SQUARE)])
def test_no_choice_of_the_formulation_is_cheaper_than_the_solvers(name, mesh, limit):
    step, args = TINY[name]
    formulator = prepare(trace(step, *args), v5e(mesh)).formulator
    problem = formulator.formulate(1e12).problem
    sizes = [len(costs) for costs in problem.nodes]
    assert math.prod(sizes) <= 60_000
    choices = list(itertools.product(*map(range, sizes)))
    if limit is not None:
        peaks = [problem.peak(choice) for choice in choices]
        problem = formulator.formulate(min(peaks) + limit * (max(peaks) - min(peaks))).problem
    best = min(problem.cost(choice) for choice in choices if problem.feasible(choice))
    found = solve(problem)
    assert found.proven
    assert found.objective == pytest.approx(best, rel=1e-9)


# -- memory


def test_too_little_memory_names_the_least_that_was_reached_and_the_values_that_make_it():
    step, args = STEPS["mlp"]
    text = r"fits 500 B a device: the smallest needs [\d.]+ kB.*\n.*largest at its peak: \S+ \d+ B, .*\n.*to 1.*e-06"
    with pytest.raises(InfeasibleError, match=text) as error:
        autopar.plan(step, *args, mesh="data=2,tensor=4", hardware="cpu", memory_gb=5e-7)
    needed_bytes = error.value.least_bytes
    plan = autopar.plan(step, *args, mesh="data=2,tensor=4", hardware="cpu", memory_gb=needed_bytes / 1e9)
    assert 500 < plan.prediction.peak_bytes <= needed_bytes


def test_an_error_names_the_limit_of_the_user_and_not_one_that_the_search_tightened():
    """One product that gathers what it reads: the solver's rows see that only when a plan has failed."""
    step = lambda w, x: (w * 0.9, x @ w)  # noqa: E731
    limit_gb = 1.2e-5
    with pytest.raises(InfeasibleError, match=r"fits 12 kB a device: the smallest needs \d+"):
        autopar.plan(step, f32(64, 64), f32(64, 64), mesh="x=2", hardware="cpu", memory_gb=limit_gb)


def test_of_several_meshes_the_error_names_the_one_that_needs_least():
    step, args = STEPS["mlp"]
    needed = []
    for mesh in ("data=2,tensor=4", "data=1,tensor=8", None):
        with pytest.raises(InfeasibleError) as error:
            autopar.plan(step, *args, mesh=mesh, devices=8, hardware="cpu", memory_gb=1e-7)
        needed.append(error.value.least_bytes)
    assert needed[2] <= min(needed[:2])


def test_a_tighter_limit_never_makes_a_plan_cheaper():
    step, args = STEPS["mlp"]
    prepared = prepare(trace(step, *args), v5e("x=8"))
    loose, formulation, choice = search(prepared, Limits(1e9))
    peak = formulation.problem.peak(choice.strategies)
    costs = [search(prepared, Limits(peak * share))[0].solution.objective_s for share in (0.95, 0.8)]
    assert loose.solution.objective_s <= costs[0] * (1 + 1e-9) <= costs[1] * (1 + 1e-6)


# -- pins


MLP, MLP_ARGS = STEPS["mlp"]
OPTIONS: dict[str, Any] = {"mesh": "data=2,tensor=4", "hardware": "v5e"}


def test_a_pin_holds_in_the_plan_and_the_rest_adapts():
    plan = autopar.plan(MLP, *MLP_ARGS, **OPTIONS, pins=(("^w1$", ",tensor"), ("^b2$", "data")))
    assert plan.params["w1"] == ((), ("tensor",))
    assert plan.params["b2"] == (("data",),)
    assert plan.pins == (("^w1$", ",tensor"), ("^b2$", "data"))
    free = autopar.plan(MLP, *MLP_ARGS, **OPTIONS)
    assert plan.solution.objective_s >= free.solution.objective_s


REFUSED_PINS = {
    "no such value": ((("nothing", ","),), "matches no value of 2 dimensions"),
    "wrong rank": ((("^w1$", ",,"),), "matches no value of 3 dimensions"),
    "no such axis": ((("^w1$", "model,"),), "names axis 'model'"),
    "axis twice": ((("^w1$", "data,data"),), "names an axis twice"),
    "indivisible": ((("^arg1$", "data+tensor+nope,"),), "names axis 'nope'"),
    "contradiction": ((("^w1$", ",tensor"), ("^w1$", "tensor,")), "w1 cannot be"),
}


@pytest.mark.parametrize("name", REFUSED_PINS)
def test_a_pin_that_cannot_hold_is_refused_by_name(name):
    pins, text = REFUSED_PINS[name]
    with pytest.raises(PinError, match=text):
        autopar.plan(MLP, *MLP_ARGS, **OPTIONS, pins=pins)


def test_a_pin_that_does_not_divide_the_shape_is_refused_by_name():
    with pytest.raises(PinError, match=r"arg0 of shape \(6, 4\) cannot be laid out as \[tensor, -\]"):
        autopar.plan(lambda x: x + 1, f32(6, 4), **OPTIONS, pins=(("arg0", "tensor,"),))


def test_shapes_that_no_axis_divides_are_planned_around():
    plan = autopar.plan(lambda w, x: w - x.T @ x, f32(7, 7), f32(9, 7), **OPTIONS)
    assert not any(argument.spec.axes for argument in plan.arguments)


def test_the_contradiction_of_a_pin_with_a_preset_is_refused():
    with pytest.raises(PinError, match="another pin, the preset"):
        autopar.plan(MLP, *MLP_ARGS, **OPTIONS, preset="dp", pins=(("^w1$", ",tensor"),))


# -- presets


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(PresetError, match="unknown preset 'zero9'") as error:
        autopar.plan(MLP, *MLP_ARGS, **OPTIONS, preset="zero9")
    assert "megatron" in str(error.value)


@pytest.mark.parametrize("mesh", ["data=8", "data=2,tensor=4"])
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"gshard", "tp2d"}))
def test_no_preset_is_cheaper_than_the_unrestricted_plan(preset, mesh):
    best = autopar.plan(MLP, *MLP_ARGS, mesh=mesh, hardware="v5e")
    plan = autopar.plan(MLP, *MLP_ARGS, mesh=mesh, hardware="v5e", preset=preset)
    assert best.solution.objective_s <= plan.solution.objective_s * (1 + 1e-9)
    assert plan.prediction.serial_s == pytest.approx(plan.solution.objective_s, rel=1e-9)


def test_two_dimensional_tensor_parallelism_needs_two_axes():
    with pytest.raises(PresetError, match="needs a mesh of two axes"):
        autopar.plan(MLP, *MLP_ARGS, mesh="x=8", hardware="v5e", preset="tp2d")


def test_experts_need_expert_weights():
    with pytest.raises(PresetError, match="needs expert weights"):
        autopar.plan(MLP, *MLP_ARGS, **OPTIONS, preset="gshard")


PRESET_STATE = {
    "dp": lambda shards: set(shards.values()) == {1},
    "zero3": lambda shards: set(shards.values()) == {8},
    "fsdp": lambda shards: set(shards.values()) == {8},
    "megatron": lambda shards: {shards["w1"], shards["w2"]} == {4},
    "tp2d": lambda shards: {shards["w1"], shards["w2"]} == {8},
}


@pytest.mark.parametrize("preset", PRESET_STATE)
def test_a_preset_shards_the_state_as_its_paper_says(preset):
    plan = autopar.plan(MLP, *MLP_ARGS, **OPTIONS, preset=preset)
    shards = {arg.name: arg.spec.shards(plan.mesh.sizes) for arg in plan.arguments if arg.state}
    assert PRESET_STATE[preset](shards), shards


# -- prices


def test_planning_uses_the_cost_model_that_it_is_given():
    step = lambda p, x: {"w": p["w"] - x.T @ x}  # noqa: E731
    objectives = []
    for alpha in (0.0, 1e6):
        cost = Priced(Mesh.parse("a=2"), (alpha,), (1.0,))
        plan = autopar.plan(step, {"w": f32(32, 32)}, f32(64, 32), cost=cost, pins=(("arg1", "a,"),))
        assert plan.prediction.serial_s == pytest.approx(plan.solution.objective_s)
        assert plan.prediction.collectives
        objectives.append(plan.solution.objective_s)
    assert objectives[1] - objectives[0] >= 1e6


@dataclass(frozen=True)
class Priced(AlpaCost):
    """Alpa's prices, and a unit for each floating-point operation."""

    def compute_s(self, work: Work) -> float:
        return work.flops


WHOLE = {
    "argmax": lambda x: jnp.argmax(x, 1),
    "sort": lambda x: jnp.sort(x, 1),
    "top_k": lambda x: jax.lax.top_k(x, 4)[0],
    "cumsum": lambda x: jnp.cumsum(x, 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_equation_along_a_split_dimension_pays_for_moving_it(name):
    """No rule splits these along the dimension that they work on: another one is, or the value is gathered."""
    prices = []
    for spec in ("x,", ",x"):
        plan = autopar.plan(lambda x: WHOLE[name](x), f32(64, 64), mesh="x=8", hardware="v5e", pins=(("arg0", spec),))
        assert plan.prediction.communication_s == pytest.approx(plan.solution.objective_s - plan.prediction.compute_s)
        assert not plan.solution.replicated_primitives
        prices.append((plan.prediction.communication_s, sum(c.nbytes for c in plan.prediction.collectives)))
    along, across = prices
    assert along == (0.0, 0.0)
    assert across[0] > 0 and across[1] >= 64 * 64 * 4 / 8


# -- primitives without a rule


def test_a_primitive_without_a_rule_is_replicated_and_reported_with_its_line():
    mystery = Primitive("mystery")
    mystery.def_abstract_eval(lambda x: x)

    def step(x: jax.Array) -> Any:
        return jnp.sin(mystery.bind(x))

    plan = autopar.plan(step, f32(8, 8), mesh="x=8", hardware="v5e")
    ((name, line),) = plan.solution.replicated_primitives
    assert name == "mystery"
    assert "test_search.py" in line
    with pytest.raises(UnknownPrimitiveError, match="mystery has no sharding rule"):
        autopar.plan(step, f32(8, 8), mesh="x=8", hardware="v5e", strict=True)
