"""The Python surface: the decorator, plan, compile, and what a plan is good for afterwards."""

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import autopar
from autopar import api
from autopar.cluster import Mesh
from autopar.cost.alpa import AlpaCost
from autopar.errors import MeshError, PlanError
from autopar.lowering.predict import collectives
from autopar.planner import search
from autopar.spec import Spec

MESH = "data=2,tensor=4"
BATCH, WIDTH = 16, 8


def train_step(params: Any, x: Any, y: Any) -> Any:
    """One gradient step of a linear model."""

    def loss(p: Any) -> jax.Array:
        return jnp.mean((x @ p["w"] + p["b"] - y) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


def transposing(x: Any) -> jax.Array:
    """Sums along both dimensions: whichever is split first, the value moves."""
    return jnp.cumsum(jnp.cumsum(x, 1), 0)


def arrays(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def arguments() -> tuple[Any, Any, Any]:
    """Fresh NumPy arrays."""
    return {"w": arrays(WIDTH, WIDTH), "b": np.zeros(WIDTH, np.float32)}, arrays(BATCH, WIDTH), arrays(BATCH, WIDTH)


def assert_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), actual, expected)


@pytest.fixture(scope="module")
def sharded() -> autopar.Plan:
    """A plan with both axes at work."""
    pins = (("^w$", "data,tensor"), ("^arg1$", "data,"))
    return autopar.plan(train_step, *arguments(), mesh=MESH, hardware="v5e", pins=pins)


# -- the decorator


def test_the_decorator_needs_no_options():
    @autopar.parallelize
    def step(params: Any, x: Any, y: Any) -> Any:
        """Documented."""
        return train_step(params, x, y)

    assert (step.__name__, step.__doc__) == ("step", "Documented.")
    assert_close(step(*arguments()), jax.jit(train_step)(*arguments()))


def test_the_decorator_takes_options_and_the_state_runs_through_many_steps():
    @autopar.parallelize(mesh=MESH, hardware="v5e", preset="zero3")
    def step(params: Any, x: Any, y: Any) -> Any:
        return train_step(params, x, y)

    params, x, y = arguments()
    expected, state = params, params
    for _ in range(3):
        expected, expected_loss = jax.jit(train_step)(expected, x, y)
        state, loss = step(state, x, y)
    assert_close((state, loss), (expected, expected_loss))
    assert state["w"].sharding.shard_shape((WIDTH, WIDTH)) != (WIDTH, WIDTH)
    assert str(step.plan(params, x, y).mesh) == MESH


def test_the_decorated_step_takes_keyword_static_and_partial_arguments():
    def step(params: Any, scale: float, power: int, *, x: Any, rate: Any) -> Any:
        if power == 2:
            return params - rate * scale * jnp.sum((x * params) ** power)
        return params

    x = arrays(BATCH)
    expected = step(x, 2.0, 2, x=x, rate=0.5)
    partial = autopar.parallelize(functools.partial(step, power=2), mesh=MESH)
    assert_close(partial(x, scale=2.0, x=x, rate=0.5), expected)
    static = autopar.parallelize(step, mesh=MESH, static_argnums=(1, -1))
    assert_close(static(x, 2.0, 2, x=x, rate=0.5), expected)
    assert_close(static(x, 2.0, 3, x=x, rate=0.5), x)


def test_a_step_already_under_jit_is_planned_like_the_plain_one():
    plain = autopar.plan(train_step, *arguments(), mesh=MESH)
    jitted = autopar.plan(jax.jit(train_step, donate_argnums=0), *arguments(), mesh=MESH)
    assert {a.name: a.spec for a in jitted.arguments} == {a.name: a.spec for a in plain.arguments}
    assert jitted.prediction == plain.prediction


def test_planning_stays_a_function_after_the_module_of_the_plan_is_imported():
    import autopar.plan.data

    assert callable(autopar.plan)


def test_a_plan_for_more_devices_than_there_are_can_be_made_but_not_run():
    step = autopar.parallelize(train_step, mesh="data=16", hardware="v5e")
    params, x, y = arguments()
    plan = step.plan(params, x, y)
    assert plan.mesh.n_devices == 16
    with pytest.raises(MeshError, match="needs 16 devices, there are 8"):
        step(params, x, y)
    with pytest.raises(MeshError, match="needs 16 devices, there are 8"):
        _ = plan.shardings


# -- state


def state_step(state: TrainState, batch: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.mean((state.apply_fn({"params": params}, batch["x"]) - batch["y"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


def test_the_state_is_born_as_the_plan_wants_it():
    transform = optax.adam(1e-2)
    model = nn.Dense(WIDTH)

    def init(key: jax.Array) -> TrainState:
        params = model.init(key, jnp.zeros((1, WIDTH)))["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=transform)

    step = autopar.parallelize(state_step, mesh="data=8", preset="zero3")
    batch = {"x": arrays(BATCH, WIDTH), "y": arrays(BATCH, WIDTH)}
    state = step.init(init, jax.random.key(0), batch=batch)
    plan = step.plan(state, batch)
    assert jax.tree.leaves(jax.tree.map(lambda x: x.sharding, state)) == jax.tree.leaves(plan.shardings[0])
    kernel = state.params["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) in ((WIDTH // 8, WIDTH), (WIDTH, WIDTH // 8))
    assert_close(state.params, init(jax.random.key(0)).params)
    expected, expected_loss = jax.jit(state_step)(init(jax.random.key(0)), batch)
    state, loss = step(state, batch)
    assert_close((state.params, loss), (expected.params, expected_loss))


def test_state_that_shares_its_buffers_is_donated_safely():
    def step(state: Any, x: Any) -> Any:
        params = state["params"] - 0.1 * jnp.mean(x, 0)
        return {"params": params, "ema": 0.9 * state["ema"] + 0.1 * params}, jnp.sum(params)

    parallel = autopar.parallelize(step, mesh=MESH)
    params = jnp.ones(WIDTH)
    state, x = {"params": params, "ema": params}, arrays(BATCH, WIDTH)
    expected = jax.jit(step)(state, x)
    result = parallel(state, x)
    assert_close(result, expected)
    assert_close(parallel(result[0], x), jax.jit(step)(expected[0], x))
    placed = jax.device_put(np.ones(WIDTH, np.float32), parallel.plan(state, x).shardings[0]["params"])
    assert_close(parallel({"params": placed, "ema": placed}, x), expected)


def test_what_the_caller_still_holds_is_not_donated_away():
    step = autopar.parallelize(train_step, mesh=MESH)
    params, x, y = jax.tree.map(jnp.asarray, arguments())
    first = step(params, x, y)
    assert_close(step(params, x, y), first)


# -- plans


def test_a_plan_read_from_json_is_the_plan(sharded, tmp_path):
    sharded.save(tmp_path / "plan.json")
    loaded = autopar.Plan.load(tmp_path / "plan.json")
    assert loaded == sharded
    assert loaded.to_json() == sharded.to_json()
    assert_close(autopar.compile(train_step, loaded)(*arguments()), jax.jit(train_step)(*arguments()))


def test_a_plan_edited_by_hand_computes_the_same(sharded):
    data = json.loads(sharded.to_json())
    for argument in (*data["arguments"], {"name": "w", **data["values"]["w"]}):
        if argument["name"] == "w":
            argument["dims"] = [["tensor"], ["data"]]
    data["values"]["w"]["dims"] = [["tensor"], ["data"]]
    edited = autopar.Plan.from_json(json.dumps(data))
    step = autopar.compile(train_step, edited)
    params, _ = step(*arguments())
    assert params["w"].shape == (WIDTH, WIDTH)
    assert_close(step(*arguments()), jax.jit(train_step)(*arguments()))


def test_a_plan_for_another_program_is_refused_by_name(sharded):
    params, _, _ = arguments()
    with pytest.raises(PlanError, match=r"arguments that differ: arg1, arg2"):
        autopar.compile(train_step, sharded)(params, arrays(32, WIDTH), arrays(32, WIDTH))
    other = lambda params, x, y: train_step(params, x, y + 1)  # noqa: E731
    with pytest.raises(PlanError, match="the arguments agree, the equations do not"):
        autopar.compile(other, sharded)(*arguments())


def test_the_second_process_reads_the_plan_instead_of_solving(tmp_path, monkeypatch):
    solved = []
    solve = search.solve
    monkeypatch.setattr(search, "solve", lambda *args, **kwargs: solved.append(1) or solve(*args, **kwargs))
    options: dict[str, Any] = {"mesh": MESH, "hardware": "v5e", "cache_dir": tmp_path / "plans"}
    first = autopar.parallelize(train_step, **options, on_progress=lambda _: None).plan(*arguments())
    assert len(solved) == 1
    second = autopar.parallelize(train_step, **options, on_progress=lambda _: None).plan(*arguments())
    assert len(solved) == 1
    assert second == first
    autopar.parallelize(train_step, **options | {"mesh": "data=8"}).plan(*arguments())
    assert len(solved) == 2


def test_a_plan_is_made_with_the_prices_of_a_cost_model():
    cost = AlpaCost(Mesh.parse("data=4,tensor=2"), (1.0, 1.0), (1.0, 1.0))
    plan = autopar.plan(train_step, *arguments(), cost=cost)
    assert plan.mesh == cost.mesh
    assert plan.prediction.serial_s == pytest.approx(plan.solution.objective_s)
    assert_close(autopar.compile(train_step, plan)(*arguments()), jax.jit(train_step)(*arguments()))


@dataclass(frozen=True)
class Reluctant(AlpaCost):
    """Prices that no hardware has: only all_gather and slicing are cheap."""

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        return nbytes * len(axes) * (1.0 if kind == "all_gather" else 1e6)


@pytest.mark.parametrize("saved", [False, True])
def test_a_step_moves_values_as_its_plan_was_priced_and_not_as_the_hardware_would_like_it(saved):
    mesh = Mesh.parse("data=4,tensor=2")
    pins = (("^arg0$", "data,"), ("^cumsum$", "data,"), ("^cumsum:2$", ",data"))
    kinds = {}
    for name, options in {
        "reluctant": {"cost": Reluctant(mesh, (), ())},
        "v5e": {"hardware": "v5e", "mesh": mesh},
    }.items():
        plan = autopar.plan(transposing, arrays(64, 64), pins=pins, **options)
        plan = autopar.Plan.from_json(plan.to_json()) if saved else plan
        compiled = autopar.compile(transposing, plan).compiled(arrays(64, 64))
        assert collectives(compiled.local) == plan.prediction.collectives
        kinds[name] = {collective.kind for collective in plan.prediction.collectives}
        assert_close(compiled.function(arrays(64, 64)), [jax.jit(transposing)(arrays(64, 64))])
    assert kinds == {"reluctant": {"all_gather"}, "v5e": {"all_to_all"}}


# -- shardings


def test_shardings_have_the_structure_of_the_arguments(sharded):
    params, x, y = sharded.shardings
    assert jax.tree.structure((params, x, y)) == jax.tree.structure(arguments())
    assert params["w"].spec == jax.sharding.PartitionSpec("data", "tensor")
    assert x.shard_shape((BATCH, WIDTH)) == (BATCH // 2, WIDTH)
    assert y.is_fully_addressable
    placed = jax.device_put(arguments(), sharded.shardings)
    assert_close(autopar.compile(train_step, sharded)(*placed), jax.jit(train_step)(*arguments()))


def test_shardings_follow_an_edit_of_the_plan(sharded):
    changed = tuple(replace(a, spec=Spec(((), ()))) if a.name == "w" else a for a in sharded.arguments)
    assert replace(sharded, arguments=changed).shardings[0]["w"].is_fully_replicated


def test_a_plan_from_a_file_gets_its_shardings_from_the_step(sharded):
    loaded = autopar.Plan.from_json(sharded.to_json())
    with pytest.raises(PlanError, match="does not know the pytrees"):
        _ = loaded.shardings
    assert autopar.compile(train_step, loaded).plan(*arguments()).shardings == sharded.shardings


def test_orbax_restores_a_checkpoint_into_the_plans_shardings(sharded, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params, x, y = arguments()
    state, _ = autopar.compile(train_step, sharded)(params, x, y)
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
    target = jax.tree.map(
        lambda array, place: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=place),
        params,
        sharded.shardings[0],
    )
    with checkpoint.StandardCheckpointer() as reader:
        restored = reader.restore(tmp_path / "state", target)
    assert_close(restored, state)
    assert jax.tree.map(lambda a: a.sharding, restored) == sharded.shardings[0]


def test_settings_and_options_are_told_apart():
    with pytest.raises(TypeError, match="nonsense"):
        autopar.parallelize(train_step, nonsense=1)
    assert isinstance(api.parallelize(mesh=MESH), functools.partial)
