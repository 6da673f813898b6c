"""A state moves between layouts, meshes and numbers of devices; a run goes on as if nothing had happened."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import autopar
from autopar.api.pipelining import PipelineStep
from autopar.errors import PlanError
from autopar.lowering.morph import morph, parts
from models import mlp

O0 = {"xla_backend_optimization_level": 0}
SHAPE = (8, 16)
SPECS = (
    PartitionSpec(),
    PartitionSpec("a"),
    PartitionSpec(None, "b"),
    PartitionSpec("b", "a"),
    PartitionSpec(("a", "b")),
    PartitionSpec(None, ("b", "a")),
)
MESHES = ((2, 4), (4, 2), (2, 2), (1, 1), (1, 8))


def layout(shape: tuple[int, int], first: int, spec: PartitionSpec) -> NamedSharding:
    """A sharding over a mesh of the devices from ``first`` on."""
    devices = np.roll(jax.devices(), -first)[: shape[0] * shape[1]].reshape(shape)
    return NamedSharding(jax.sharding.Mesh(devices, ("a", "b")), spec)


layouts = st.builds(layout, st.sampled_from(MESHES), st.integers(0, 7), st.sampled_from(SPECS))


@settings(max_examples=60, deadline=None)
@given(layouts, layouts)
def test_an_array_keeps_its_values_between_any_two_layouts(before, after):
    whole = np.arange(128, dtype=np.float32).reshape(SHAPE)
    moved = morph(jax.device_put(whole, before), after)
    assert moved.sharding == after
    for shard in moved.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index])


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from((1, 2, 4, 8)))
def test_the_parts_of_a_block_tile_it(start, size, n_sources):
    stop, width = min(8, start + size), 8 // n_sources
    found = parts(((start, stop),), [((i, i + width),) for i in range(0, 8, width)])
    assert [i for part in found for i in range(*part.box[0])] == list(range(start, stop))


def test_donated_arrays_are_gone_and_those_in_place_are_kept():
    here, there = layout((2, 4), 0, PartitionSpec("a")), layout((2, 2), 4, PartitionSpec("b"))
    state = {"moves": jax.device_put(jnp.ones(SHAPE), here), "stays": jax.device_put(jnp.ones(SHAPE), there)}
    moved = morph(state, {"moves": there, "stays": there}, donate=True)
    assert state["moves"].is_deleted() and moved["stays"] is state["stays"]


def test_a_donated_array_leaves_nothing_behind_that_the_moved_one_needs():
    whole = np.arange(128, dtype=np.float32).reshape(SHAPE)
    here = jax.device_put(whole, layout((2, 4), 0, PartitionSpec("a")))
    moved = morph(here, layout((2, 2), 0, PartitionSpec("a")), donate=True)  # two blocks stay on their devices
    assert here.is_deleted()
    np.testing.assert_array_equal(moved, whole)


def test_random_keys_move_too():
    keys = jax.random.split(jax.random.key(0), 8)
    moved = morph(jax.device_put(keys, layout((2, 4), 0, PartitionSpec("a"))), layout((2, 2), 4, PartitionSpec("b")))
    assert (jax.random.key_data(moved) == jax.random.key_data(keys)).all()


def test_another_structure_is_refused():
    with pytest.raises(PlanError, match=r"differ in structure: 1 and 2 leaves\n.*plan\.shardings"):
        morph({"x": jnp.ones(3)}, {"x": layout((2, 4), 0, PartitionSpec()), "y": layout((2, 4), 0, PartitionSpec())})


def curve(state, batch, reference_step, runs):
    """Losses of three steps under each mesh, the state morphed in between, and those of one device."""
    found = []
    for mesh in runs:
        step = autopar.parallelize(reference_step, mesh=mesh)
        state = morph(state, step.plan(state, batch).shardings[0])
        for _ in range(3):
            state, metrics = step(state, batch)
            found.append(float(metrics["loss"]))
    return found


def test_a_run_resumed_on_fewer_devices_follows_the_same_losses():
    step, state, batch = mlp.make(layers=2, width=32, batch=16, dropout=0.0)
    expected, reference = [], state
    for _ in range(6):
        reference, metrics = jax.jit(step)(reference, batch)
        expected.append(float(metrics["loss"]))
    found = curve(state, batch, step, ("data=2,tensor=4", "data=2,tensor=2"))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_run_resumed_in_other_stages_and_without_stages_follows_the_same_losses():
    step, state, batch = mlp.make(layers=2, width=16, batch=16, dropout=0.0, optimizer="sgd")
    stages = functools.partial(autopar.pipeline, step, microbatches=2, compiler_options=O0)
    runs = (
        autopar.parallelize(step, mesh="data=2,tensor=2", preset="zero3"),
        stages(submeshes=2, schedule="1f1b", mesh="data=2"),
        stages(submeshes=3, schedule="gpipe", mesh="data=1"),
        autopar.parallelize(step, mesh="data=2"),
    )
    reference, one = jax.tree.map(jnp.copy, state), jax.jit(step, compiler_options=O0)
    for run in runs:
        pipelined = isinstance(run, PipelineStep)
        places = (run.compiled(state, batch) if pipelined else run.plan(state, batch)).shardings[0]
        state = morph(state, places)
        assert all(jax.tree.leaves(jax.tree.map(lambda x, place: x.sharding == place, state, places)))
        for _ in range(2):
            state, metrics = run(state, batch)
            reference, expected = one(reference, batch)
            np.testing.assert_allclose(float(metrics["loss"]), expected["loss"], rtol=1e-5)


def test_a_checkpoint_of_one_plan_loads_into_another(tmp_path):
    def step(state, batch):
        params, opt = state
        grads = jax.grad(lambda p: jnp.mean((batch @ p) ** 2))(params)
        updates, opt = optax.adam(1e-2).update(grads, opt)
        return optax.apply_updates(params, updates), opt

    params = jnp.linspace(-1.0, 1.0, 64 * 32).reshape(64, 32)
    state, batch = (params, optax.adam(1e-2).init(params)), jnp.ones((16, 64))
    first, second = (autopar.parallelize(step, mesh=m, preset="zero3") for m in ("data=8", "data=4"))
    state = morph(state, first.plan(state, batch).shardings[0])
    state = first(state, batch)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        places = second.plan(state, batch).shardings[0]
        shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
        restored = checkpointer.restore(tmp_path / "state", shapes)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, restored, places)))
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x, y)
    assert not isinstance(jax.tree.leaves(restored)[0].sharding, SingleDeviceSharding)
