"""Collectives that are sent as one: the same values, fewer meetings, and the audit still counts every array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import autopar
from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.lowering import hlo
from autopar.lowering.audit import audit, compare
from autopar.lowering.bundles import bundled, spared_s
from autopar.lowering.instructions import Bundle, Instruction, LocalProgram, Move, Run, Slot, reads
from autopar.lowering.predict import collectives
from autopar.lowering.reshard import execute, execute_together
from autopar.lowering.spmd import device_mesh, lower, partition_spec, run_instructions
from autopar.sharding.moves import Step
from models import gpt

LAYERS, WIDTH, BATCH = 4, 64, 256


def step(params: list[Any], x: Any) -> Any:
    def loss(params: list[Any]) -> Any:
        h = x
        for w in params:
            h = jnp.tanh(h @ w)
        return jnp.sum(h**2)

    value, grads = jax.value_and_grad(loss)(params)
    return [w - 0.1 * g for w, g in zip(params, grads, strict=True)], value


def stacked_step(params: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
        block = lambda h, w: (jnp.tanh(jnp.tanh(h @ w[0]) @ w[1]), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(block, x, params)[0] ** 2)

    return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss)(params))


MATRICES = [np.random.default_rng(at).normal(0, 0.1, (WIDTH, WIDTH)).astype(np.float32) for at in range(LAYERS)]
X = np.random.default_rng(9).normal(size=(BATCH, WIDTH)).astype(np.float32)
PROGRAMS: dict[str, tuple[Any, Any]] = {
    "layers": (step, (MATRICES, X)),
    "scan": (stacked_step, ((np.stack(MATRICES), np.stack(MATRICES)), X)),
}
CASES = [("layers", "zero2", "data=4"), ("layers", "zero3", "data=4"), ("scan", "zero3", "data=4")]
CASES += [("layers", "tp2d", "data=2,tensor=2"), ("layers", "zero2", "data=2,tensor=2")]


@functools.cache
def planned(name: str, preset: str, mesh: str) -> Any:
    fn, args = PROGRAMS[name]
    return autopar.parallelize(fn, mesh=mesh, preset=preset, donate=False).compiled(*args)


def one_by_one(local: LocalProgram, mesh: jax.sharding.Mesh) -> Any:
    """The program as it is, every collective by itself."""
    ins, outs = (
        [partition_spec(s.spec) for s in some if isinstance(s, Slot)] for some in (local.inputs, local.outputs)
    )
    run = lambda *blocks: run_instructions(local, blocks)  # noqa: E731
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=tuple(ins), out_specs=outs, check_vma=False))


def alone(instructions: tuple[Instruction, ...]) -> list[Move]:
    moves = [i for i in instructions if isinstance(i, Move) and i.resharding.steps]
    return [move for move in moves if move.resharding.steps[0].kind in ("all_gather", "reduce_scatter")]


@pytest.mark.parametrize(("name", "preset", "mesh"), CASES)
def test_bundling_changes_no_bit(name: str, preset: str, mesh: str):
    program = planned(name, preset, mesh)
    flat = jax.tree.leaves(PROGRAMS[name][1])
    together = lower(program.local, program.mesh)(*flat)
    for one, other in zip(one_by_one(program.local, program.mesh)(*flat), together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("name", "preset", "mesh"), CASES)
def test_the_audit_counts_every_array_of_a_bundle(name: str, preset: str, mesh: str):
    program = planned(name, preset, mesh)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(PROGRAMS[name][1])]
    compiled = program.function.lower(*shapes).compile()
    assert compare(program.plan.prediction.collectives, audit(compiled, program.plan.mesh), program.plan.mesh) == ()


def test_all_gradients_are_scattered_together_and_all_parameters_gathered_together():
    found = bundled(planned("layers", "zero2", "data=4").local).instructions
    bundles = [i for i in found if isinstance(i, Bundle)]
    assert [(b.moves[0].resharding.steps[0].kind, len(b.moves)) for b in bundles] == [
        ("reduce_scatter", LAYERS),
        ("all_gather", LAYERS),
    ]
    assert not alone(found)


def test_the_compiler_sends_a_bundle_as_one_array():
    program = planned("layers", "zero2", "data=4")
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(PROGRAMS["layers"][1])]
    found = hlo.communications(hlo.parse(program.function.lower(*shapes).compile().as_text()), 4)
    sent = {(one.kind, one.arrays, one.nbytes) for one in found if one.kind != "all_reduce"}
    assert sent == {(kind, LAYERS, LAYERS * WIDTH * WIDTH * 4) for kind in ("all_gather", "reduce_scatter")}


def test_no_bundle_is_larger_than_it_may_be():
    found = bundled(planned("layers", "zero2", "data=4").local, most_bytes=2 * WIDTH * WIDTH * 4).instructions
    assert {len(i.moves) for i in found if isinstance(i, Bundle)} == {2}
    none = bundled(planned("layers", "zero2", "data=4").local, most_bytes=0).instructions
    assert not any(isinstance(i, Bundle) for i in none) and len(alone(none)) == 2 * LAYERS


@pytest.mark.parametrize(("name", "preset", "mesh"), CASES)
def test_everything_runs_once_and_after_what_it_needs(name: str, preset: str, mesh: str):
    local = planned(name, preset, mesh).local
    found = bundled(local)
    made = set(found.inputs)
    for instruction in found.instructions:
        assert made.issuperset(reads(instruction)) and made.isdisjoint(instruction.outputs)
        after = instruction.after if isinstance(instruction, Move | Run) else None
        assert after is None or after in made
        made.update(instruction.outputs)
    assert made.issuperset(local.outputs)
    assert collectives(found) == collectives(local)


def test_what_is_gathered_again_to_save_memory_is_gathered_by_itself():
    made = gpt.make(abstract=True, layers=2, width=64, heads=8, seq=16, vocab=64, batch=16, remat=True)
    local = autopar.parallelize(made[0], mesh="data=4", preset="zero3").compiled(*made[1:]).local
    moves = [i for i in local.instructions if isinstance(i, Move) and i.repeat]
    assert moves and set(moves) <= set(bundled(local).instructions)


SIZES = {"a": 2, "b": 2}
AXES = [("a",), ("b",), ("a", "b"), ("b", "a")]
VALUES = st.lists(
    st.integers(1, 3).flatmap(
        lambda rank: st.tuples(st.integers(0, rank - 1), st.tuples(*[st.sampled_from([4, 8, 12])] * rank))
    ),
    min_size=2,
    max_size=3,
)


@pytest.mark.parametrize("kind", ["all_gather", "reduce_scatter"])
@settings(max_examples=12, deadline=None)
@given(values=VALUES, axes=st.sampled_from(AXES), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_values_sent_together_arrive_as_they_do_alone(kind: str, values: Any, axes: Any, dtype: str):
    steps = [Step(kind, axes, dim, nbytes=1.0) for dim, _ in values]
    blocks = [np.random.default_rng(at).normal(size=(4, *shape)) for at, (_, shape) in enumerate(values)]

    def run(*blocks: Any) -> Any:
        there = [x[0] for x in blocks]
        apart = [execute([s], x, SIZES) for s, x in zip(steps, there, strict=True)]
        return jax.tree.map(lambda x: x[None], (apart, execute_together(steps, there, SIZES)))

    everywhere = P(("a", "b"))
    mesh = device_mesh(Mesh.parse("a=2,b=2"))
    mapped = jax.shard_map(run, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    apart, together = jax.jit(mapped)(*(jnp.asarray(x, dtype) for x in blocks))
    for one, other in zip(apart, together, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


def test_a_bundle_spares_what_its_collectives_cost_beyond_one_of_all_their_bytes():
    cost = RooflineCost(hardware("cpu"), Mesh.parse("data=4"))
    each, kinds = WIDTH * WIDTH * 4.0, ("reduce_scatter", "all_gather")
    fixed_s = sum(cost.collective_s(kind, each, ("data",)) - each * rate(cost, kind) for kind in kinds)
    assert spared_s(planned("layers", "zero2", "data=4").local, cost) == pytest.approx((LAYERS - 1) * fixed_s)


def rate(cost: RooflineCost, kind: str) -> float:
    """Seconds per byte."""
    return (cost.collective_s(kind, 2e9, ("data",)) - cost.collective_s(kind, 1e9, ("data",))) / 1e9


def test_only_where_devices_do_not_compute_while_they_send_does_the_prediction_count_on_bundles():
    cpu, tpu = (
        autopar.plan(step, *PROGRAMS["layers"][1], mesh="data=4", preset="zero2", hardware=name).prediction
        for name in ("cpu", "v5e")
    )
    assert 0 < cpu.spared_s < cpu.communication_s and cpu.step_s == pytest.approx(cpu.serial_s - cpu.spared_s)
    assert tpu.spared_s == 0 and tpu.bundled_s == tpu.serial_s


def test_a_plan_of_one_large_bundle_is_chosen_before_one_of_many_meetings():
    state, batch = gpt.make(abstract=True)[1:]
    assert str(autopar.plan(gpt.train_step, state, batch, hardware="cpu", devices=8).mesh) == "data=8,tensor=1"
