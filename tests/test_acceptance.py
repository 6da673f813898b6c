"""Cases with known answers from Alpa's and Meta AutoParallel's own tests.

Alpa (Zheng et al., OSDI 2022), ``tests/shard_parallel/test_mlp.py``: communication only, in Alpa's own unit.
Meta AutoParallel, ``tests/test_optimize_placement.py``: a feed-forward layer on 256 devices.
"""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import autopar
from autopar.api import prediction
from autopar.cluster import Mesh
from autopar.cost.alpa import AlpaCost
from autopar.errors import InfeasibleError
from autopar.ir.trace import trace
from autopar.lowering.audit import audit, compare
from autopar.lowering.instructions import LocalProgram
from autopar.lowering.local_program import build_local_program
from autopar.lowering.spmd import device_mesh, lower
from autopar.plan import Plan
from autopar.planner.pins import narrow, restrict
from autopar.planner.search import Limits, prepare, search

LAYERS = 6
ON_FIRST_AXIS = ("a=4,b=1", (1.0, 1.0), (1.0, 1.0))
SQUARE = ("data=2,tensor=2", (1.0, 1.0), (1.0, 0.1))


class Mlp(nn.Module):
    """Dense layers of one width with a relu between them."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(LAYERS):
            x = nn.Dense(self.width)(x)
            x = nn.relu(x) if layer < LAYERS - 1 else x
        return x


def mlp_step(batch: int, width: int) -> tuple[Any, tuple[Any, ...]]:
    model = Mlp(width)

    def init(key: jax.Array, x: jax.Array) -> TrainState:
        params = model.init(key, x)["params"]
        return TrainState.create(apply_fn=model.apply, params=params, tx=optax.adam(1e-2))

    def step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((state.apply_fn({"params": params}, x) - y) ** 2)

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    return step, (jax.eval_shape(init, jax.random.key(0), x), x, x)


def alpa_plan(batch: int, width: int, costs: Any, preset: str = "") -> tuple[Plan, LocalProgram, AlpaCost]:
    """The cheapest plan in which, as in Alpa's space, every device takes part in every matrix product."""
    mesh, alpha, beta = costs
    cost = AlpaCost(Mesh.parse(mesh), alpha, beta)
    step, args = mlp_step(batch, width)
    prepared = prepare(trace(step, *args), cost)
    space, masks = prepared.formulator.space, restrict(prepared.graph, prepared.formulator, preset, ())
    for unit in prepared.graph.units:
        if unit.kind == "equation" and prepared.graph.program.equations[unit.position].primitive.name == "dot_general":
            chosen = space.strategies(prepared.graph.rules[unit.position])
            busy = [all(isinstance(split, str) for a, split in s.splits if space.sizes[a] > 1) for s in chosen]
            narrow(masks, unit, np.array(busy))
    plan, _, choice = search(prepared, Limits(), masks)
    assert choice.proven
    local = build_local_program(prepared.traced.program, plan, cost)
    return replace(plan, prediction=prediction(local, {}, cost)), local, cost


def all_gradients(cost: AlpaCost, width: int, axes: tuple[str, ...]) -> float:
    """Data parallelism: one all_reduce of every gradient."""
    return LAYERS * sum(cost.collective_s("all_reduce", 4 * size, axes) for size in (width * width, width))


def assert_executed_as_planned(plan: Plan, local: LocalProgram) -> None:
    """The compiled program runs the plan's collectives, byte for byte."""
    mesh = device_mesh(plan.mesh)
    shapes = [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in local.inputs]
    compiled = lower(local, mesh).lower(*shapes).compile()
    assert compare(plan.prediction.collectives, audit(compiled, plan.mesh), plan.mesh) == ()


def test_alpa_mlp_with_a_large_batch_is_data_parallel():
    plan, local, cost = alpa_plan(256, 32, ON_FIRST_AXIS)
    assert plan.solution.objective_s <= all_gradients(cost, 32, ("a",)) * (1 + 1e-9)
    assert plan.prediction.serial_s == pytest.approx(plan.solution.objective_s, rel=1e-9)
    kinds = {(c.kind, c.axes): (c.nbytes, c.count) for c in plan.prediction.collectives}
    assert kinds == {("all_reduce", ("a",)): (LAYERS * (32 * 32 + 32) * 4, 2 * LAYERS)}
    parameters = {name: dims for name, dims in plan.params.items() if name.startswith("params/")}
    assert len(parameters) == 2 * LAYERS
    assert not any(axes for dims in parameters.values() for axes in dims)
    assert_executed_as_planned(plan, local)


def test_alpa_mlp_with_wide_layers_alternates_column_and_row_splits():
    plan, local, cost = alpa_plan(32, 256, ON_FIRST_AXIS)
    activation = 32 * 256 * 4
    expected = (LAYERS - 1) * cost.collective_s("all_reduce", activation, ("a",))
    assert expected == pytest.approx(245_765.05)
    assert plan.solution.objective_s <= expected * (1 + 1e-9)
    kernels = [plan.params[f"params/Dense_{i}/kernel"] for i in range(LAYERS)]
    assert kernels == [((), ("a",)), (("a",), ())] * (LAYERS // 2)
    kinds = {(c.kind, c.axes): (c.nbytes, c.count) for c in plan.prediction.collectives}
    assert kinds == {("all_reduce", ("a",)): ((LAYERS - 1) * activation, LAYERS - 1)}
    assert_executed_as_planned(plan, local)


def test_alpa_mlp_on_a_square_mesh_costs_no_more_than_data_and_tensor_parallelism():
    plan, _, cost = alpa_plan(256, 32, SQUARE)
    gradients = LAYERS * sum(cost.collective_s("all_reduce", nbytes, ("data",)) for nbytes in (32 * 32 * 4 / 2, 32 * 4))
    activations = (LAYERS - 1) * cost.collective_s("all_reduce", 256 * 32 * 4 / 2, ("tensor",))
    assert gradients + activations == pytest.approx(21_265.17)
    assert plan.solution.objective_s <= gradients + activations
    assert plan.prediction.serial_s == pytest.approx(plan.solution.objective_s, rel=1e-9)


def test_alpa_mlp_as_megatron_costs_no_more_than_alpas_own_plan():
    plan, local, _ = alpa_plan(256, 32, SQUARE, preset="megatron")
    assert plan.solution.objective_s <= 21_265.17 + 1e-3
    assert_executed_as_planned(plan, local)


WIDE, HIDDEN, BATCH_PER_DEVICE = 1024, 4096, 2048
TIGHT_GB = 0.105  # activations of 0.084 GB, and one parameter of 0.017 GB at a time


def feed_forward(params: Any, x: jax.Array, y: jax.Array) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.mean((jax.nn.relu(x @ params["w1"]) @ params["w2"] - y) ** 2)

    return jax.tree.map(lambda p, g: p - 1e-3 * g, params, jax.grad(loss)(params))


def feed_forward_plan(mesh: str, **options: Any) -> Plan:
    batch = jax.ShapeDtypeStruct((256 * BATCH_PER_DEVICE, WIDE), jnp.float32)
    shapes = {"w1": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE)}
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    return autopar.plan(feed_forward, params, batch, batch, mesh=mesh, hardware="a100", **options)


def batch_factors(plan: Plan) -> list[tuple[tuple[str, str | int], ...]]:
    """What the axes split in the five matrix products: forward and input gradient rows, weight gradient sums."""
    return [splits for name, splits in plan.equations.items() if "dot_general" in name]


@pytest.mark.parametrize("mesh", ["x=256", "x=32,y=8"])
def test_meta_feed_forward_in_tight_memory_is_fully_sharded(mesh):
    with pytest.raises(InfeasibleError, match=r"fits 105 MB a device"):
        feed_forward_plan(mesh, memory_gb=TIGHT_GB, preset="dp")
    plan = feed_forward_plan(mesh, memory_gb=TIGHT_GB)
    axes = set(plan.mesh.names)
    assert {name: set(sum(dims, ())) for name, dims in plan.params.items()} == {"w1": axes, "w2": axes}
    products = batch_factors(plan)
    assert len(products) == 5
    assert all({split for _, split in splits} <= {"m0", "k0"} for splits in products)
    reduced = [c for c in plan.prediction.collectives if c.kind in ("reduce_scatter", "all_reduce")]
    assert {c.kind for c in reduced} == {"reduce_scatter"}
    assert plan.prediction.peak_bytes <= TIGHT_GB * 1e9


@pytest.mark.parametrize("mesh", ["x=256", "x=32,y=8"])
def test_meta_feed_forward_with_memory_to_spare_costs_no_more_than_data_parallelism(mesh):
    plan, plain = feed_forward_plan(mesh), feed_forward_plan(mesh, preset="dp")
    assert plan.solution.objective_s <= plain.solution.objective_s * (1 + 1e-9)
    assert {c.kind: c.nbytes for c in plain.prediction.collectives} == {"all_reduce": 2 * WIDE * HIDDEN * 4}
    assert all({split for _, split in splits} <= {"m0", "k0"} for splits in batch_factors(plan))
