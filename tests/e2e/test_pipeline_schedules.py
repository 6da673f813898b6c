"""Every schedule on a small chain of layers: the results of one device, no more in flight than it says, measured."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.cluster import Mesh
from autopar.ir.layers import layer_boundary
from autopar.ir.stages import Part, Tag
from autopar.ir.trace import trace
from autopar.lowering.instructions import Move
from autopar.lowering.pipeline.build import Compiled, compile_pipeline
from autopar.lowering.pipeline.cut import Layout, PipelineError, into_stages
from autopar.lowering.pipeline.parts import kept_bytes
from autopar.lowering.pipeline.step import Call
from autopar.lowering.pipeline.trace import chrome_trace, measure, spans_of
from autopar.solver.schedule import SCHEDULES, TaskCosts, make_schedule, simulate
from autopar.solver.schedule.validate import most_held
from benchmarks.cases import O0
from benchmarks.pipelines import build, compiled_layout

WIDTH, LAYERS = 8, 8


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32) * 0.3


SCALE = np.linspace(0.9, 1.1, WIDTH, dtype=np.float32)
"""An array that the step closes over."""


def step(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        x = batch["x"]
        for name in sorted(params):
            x = jnp.tanh(x @ params[name]) * SCALE
        return jnp.mean((x - batch["y"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda p, g: p - 0.5 * g / jnp.maximum(norm, 0.01), params, gradients), (value, norm)


def arguments(batch: int = 16) -> tuple[Any, Any]:
    params = {f"w{i}": normal(WIDTH, WIDTH) + 0.1 * i * jnp.eye(WIDTH) for i in range(LAYERS)}
    return params, {"x": normal(batch, WIDTH), "y": normal(WIDTH, batch).T}


@functools.cache
def reference(steps: int, size: int = 16) -> Any:
    params, batch = arguments(size)
    for _ in range(steps):
        params, metrics = jax.jit(step, compiler_options=O0)(params, batch)
    return jax.tree.map(np.asarray, (params, metrics))


@functools.cache
def compiled(name: str, p: int, mesh: str = "data=1", batch: int = 16) -> Compiled:
    return build(step, arguments(batch), make_schedule(name, p, 4), mesh)


TABLE = [(name, 4 if name == "bpipe" else 2) for name in SCHEDULES]


@pytest.mark.parametrize(("name", "p"), TABLE, ids=[name for name, _ in TABLE])
def test_a_schedule_computes_the_step_and_keeps_what_it_says(name: str, p: int) -> None:
    run = compiled(name, p)
    params, batch = arguments()
    for _ in range(2):
        params, metrics = run(params, batch)
    for a, b in zip(jax.tree.leaves((params, metrics)), jax.tree.leaves(reference(2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert run.peaks == [most_held(run.schedule, device) for device in range(p)]


def test_gradients_are_summed_over_microbatches_before_they_are_summed_over_devices() -> None:
    run, size = compiled("1f1b", 2, "data=4", 1024), 1024
    params, batch = arguments(size)
    for _ in range(2):
        params, metrics = run(params, batch)
    for a, b in zip(jax.tree.leaves((params, metrics)), jax.tree.leaves(reference(2, size)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for runner in run.runners:
        assert {slot.spec.partial for slot in runner.sums if slot.value.shape} == {frozenset({"data"})}
        for piece in (piece for piece in runner.parts.pieces if piece.tag.part.per_microbatch):
            assert not [i for i in piece.local.instructions if isinstance(i, Move) and i.source.spec.partial]


def test_the_new_state_stays_where_the_next_step_wants_it() -> None:
    run = compiled("1f1b", 2)
    params, batch = arguments()
    new, _ = run(params, batch)
    assert [sorted(d.id for d in new[name].devices()) for name in sorted(new)] == [[0]] * 4 + [[1]] * 4
    again, _ = run(new, batch)
    assert all(array.is_deleted() for array in jax.tree.leaves(new))
    assert not any(array.is_deleted() for array in jax.tree.leaves((params, again)))


def test_a_measured_step_has_every_task_once_in_the_order_of_its_device() -> None:
    like = compiled("zb_h1", 2)
    schedule, settings = like.schedule, {"donate": False, "compiler_options": O0}
    run = compile_pipeline(like.traced, like.cut, like.local_programs, like.meshes, schedule, settings)
    params, batch = arguments()
    measure(run, params, batch)
    found = measure(run, params, batch)
    np.testing.assert_allclose(found.result[1][0], reference(1)[1][0], rtol=1e-5)
    timeline = found.timeline(run)
    for device, order in enumerate(schedule.tasks):
        assert [event.task for event in timeline.by_device[device]] == list(order)
    simulated = spans_of(simulate(schedule, TaskCosts.uniform(2)))
    events = json.loads(chrome_trace({"measured": found.spans, "simulated": simulated}))["traceEvents"]
    names = [{e["name"] for e in events if e["ph"] == "X" and e["pid"] == pid} for pid in (0, 1)]
    assert {"F0:0", "W1:3", "U0:0"} <= names[0] and {"F0:0", "B0:3"} <= names[1]


def test_a_pipeline_that_donates_buffers_is_not_measured() -> None:
    with pytest.raises(PipelineError, match="cannot be measured"):
        measure(compiled("gpipe", 2), *arguments())


def test_stages_and_submeshes_must_fit_the_schedule() -> None:
    run = compiled("gpipe", 2)
    with pytest.raises(PipelineError, match="1 submeshes for the 2 devices of schedule gpipe"):
        compile_pipeline(run.traced, run.cut, run.local_programs, run.meshes[:1], run.schedule)
    with pytest.raises(PipelineError, match="1 stages for the 2 of schedule gpipe"):
        compile_pipeline(run.traced, run.cut, run.local_programs[:1], run.meshes, run.schedule)
    with pytest.raises(PipelineError, match="stage 0 was planned for mesh data=1"):
        wide = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        compile_pipeline(run.traced, run.cut, run.local_programs, (wide, wide), run.schedule)
    with pytest.raises(PipelineError, match="layers on stages 0, 2, 1 are no 2 stages in a row"):
        into_stages(run.cut.step, run.schedule, (0, 2, 1))


@pytest.mark.parametrize("mesh", ["data=1", "data=4"])
def test_a_stage_keeps_the_predicted_bytes_for_a_microbatch(mesh: str) -> None:
    run = compiled("1f1b", 2, mesh, 1024 if mesh == "data=4" else 16)
    leaves = jax.tree.leaves(arguments(1024 if mesh == "data=4" else 16))
    now, kept = run.start(leaves), []
    for call in run.calls.prologue:
        now.run(call)
        now.send(call)
    now.start_sums()
    for stage in (0, 1):
        now.run(forward := Call(stage, Tag(Part.FORWARD), 0), last=False)
        now.send(forward, last=False)
        kept.append(sum(array.addressable_shards[0].data.nbytes for array in now.held(stage, 0).values()))
    assert kept == [kept_bytes(runner.parts, run.cut.varying) for runner in run.runners]


def test_submeshes_may_differ_in_shape() -> None:
    run = build(step, arguments(), make_schedule("1f1b", 3, 4), "data=4", "data=1", "data=2")
    params, metrics = run(*arguments())
    for a, b in zip(jax.tree.leaves((params, metrics)), jax.tree.leaves(reference(1)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [len(params[f"w{i}"].devices()) for i in (0, 4, 7)] == [4, 1, 2]


def test_layers_are_put_on_stages_as_the_layout_says_and_results_of_every_example_are_joined() -> None:
    def marked(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, jax.Array]:
            x = batch["x"]
            for name in sorted(params):
                x = layer_boundary(jnp.tanh(x @ params[name]))
            return jnp.mean((x - batch["y"]) ** 2), x

        reported, gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradients), reported

    layout = Layout(make_schedule("1f1b", 2, 4), (Mesh.parse("data=1"),) * 2, (0, 0, 0, 0, 0, 0, 1, 1))
    run = compiled_layout(trace(marked, *arguments()), layout)
    params, reported = run(*arguments())
    expected = jax.jit(marked, compiler_options=O0)(*arguments())
    for a, b in zip(jax.tree.leaves((params, reported)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [next(iter(params[name].devices())).id for name in sorted(params)] == [0] * 6 + [1] * 2


def test_what_every_microbatch_reads_is_donated_by_none() -> None:
    """A value of the prologue whose last reader is the forward part, with a result of its shape to take its place."""

    def mixed(state: Any, batch: Any) -> Any:
        mixing = 2 * state["mixing"]

        def loss(weights: Any) -> jax.Array:
            x = layer_boundary(jnp.tanh((batch["x"] @ mixing) @ weights["w0"]))
            return jnp.mean((x @ weights["w1"] - batch["y"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state["weights"])
        weights = jax.tree.map(lambda w, g: w - 0.5 * g, state["weights"], gradients)
        return {"mixing": state["mixing"] + 1, "weights": weights}, value

    params, batch = arguments(2 * WIDTH)
    state = {"mixing": params["w2"], "weights": {name: params[name] for name in ("w0", "w1")}}
    run = build(mixed, (state, batch), make_schedule("gpipe", 2, 2), "data=1")
    for a, b in zip(*map(jax.tree.leaves, (run(state, batch), jax.jit(mixed)(state, batch))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
