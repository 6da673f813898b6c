"""Explanations against planning again with the layout pinned, which shares none of their code."""

import jax
import jax.numpy as jnp
import pytest

import autopar
from autopar.api import Options, plan_prepared, traced_in_time
from autopar.errors import PinError, PlanError
from autopar.ir.arguments import adapt
from autopar.planner.explain import alternatives, find_value, specs_of
from autopar.planner.pins import restrict
from autopar.planner.search import prepare


def step(params, batch):
    def loss_fn(params):
        return jnp.mean((jnp.tanh(batch @ params["up"]) @ params["down"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


PARAMS = {
    "up": jax.ShapeDtypeStruct((64, 256), jnp.float32),
    "down": jax.ShapeDtypeStruct((256, 64), jnp.float32),
}
BATCH = jax.ShapeDtypeStruct((128, 64), jnp.float32)
OPTIONS = Options(mesh="x=2,y=2", hardware="v5e")


def explained(name: str, options: Options = OPTIONS):
    """The plan under some options and the alternatives of a value."""
    traced, _ = traced_in_time(adapt(step, (PARAMS, BATCH)))
    cost = options.cost_model(options.meshes()[0])
    prepared = prepare(traced, cost)
    plan = plan_prepared(prepared, cost, options)
    masks = restrict(prepared.graph, prepared.formulator, options.preset, options.pins)
    again = lambda narrowed: plan_prepared(prepared, cost, options, narrowed)  # noqa: E731
    return prepared, plan, list(alternatives(prepared, plan, name, masks, again))


def pin_of(spec) -> str:
    return ",".join("+".join(dim) for dim in spec.dims)


@pytest.mark.parametrize("name", ["up", "down"])
def test_an_alternative_costs_what_planning_with_that_pin_costs(name):
    prepared, plan, found = explained(name)
    assert [one.spec for one in found if one.chosen] == [plan.values[name]]
    assert {one.spec for one in found} == set(specs_of(prepared, find_value(prepared.graph, name)))
    for one in found:
        pins = ((f"^{name}$", pin_of(one.spec)),)
        pinned = autopar.plan(step, PARAMS, BATCH, mesh="x=2,y=2", hardware="v5e", pins=pins)
        extra_s = pinned.solution.objective_s - plan.solution.objective_s
        assert one.objective_s == pytest.approx(extra_s, abs=1e-12)
        assert one.objective_s == pytest.approx(one.compute_s + one.communication_s, abs=1e-12)


def test_no_alternative_of_an_optimal_plan_is_cheaper():
    _, plan, found = explained("down")
    assert plan.solution.proven_optimal
    assert min(one.objective_s for one in found) >= -1e-12


def test_an_explanation_prints_what_each_layout_adds():
    plan = autopar.plan(step, PARAMS, BATCH, mesh="x=2,y=2", hardware="v5e")
    found = autopar.explain(plan, "up")
    assert found.alternatives == tuple(sorted(explained("up")[2], key=lambda one: one.objective_s))
    lines = str(found).splitlines()
    assert lines[0] == f"up of shape (64, 256) lies as {plan.values['up']} on mesh x=2,y=2"
    assert sum("chosen" in line for line in lines) == 1
    assert sum(line.startswith("[") for line in lines) == len(found.alternatives)


def test_a_plan_from_a_file_cannot_explain_itself():
    plan = autopar.plan(step, PARAMS, BATCH, mesh="x=2,y=2", hardware="v5e")
    with pytest.raises(PlanError, match=r"a plan read from a file.* does not know its step"):
        autopar.explain(autopar.Plan.from_json(plan.to_json()), "up")


def test_a_pinned_value_has_no_alternatives():
    _, _, found = explained("up", Options(mesh="x=2,y=2", hardware="v5e", pins=(("^up$", "x,y"),)))
    assert [str(one.spec) for one in found if one.chosen] == ["[x, y]"]
    assert all(one.refused == "the preset or a pin excludes it" for one in found if not one.chosen)


def test_a_name_that_nothing_has_is_answered_with_close_ones():
    prepared, _, _ = explained("up")
    with pytest.raises(PinError, match="no value is called 'dwon'\n  where: close to it: down"):
        find_value(prepared.graph, "dwon")
