"""Pipelines whose stages run their forward part again: the results of one device, and only what was sent is kept."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.cluster import Mesh
from autopar.errors import InfeasibleError
from autopar.ir.layers import layer_boundary
from autopar.ir.stages import Part, Tag
from autopar.ir.trace import trace
from autopar.lowering.audit import Audit, audit
from autopar.lowering.instructions import Move
from autopar.lowering.pipeline.build import Compiled
from autopar.lowering.pipeline.compile import slot_shape, slot_sharding
from autopar.lowering.pipeline.cut import Layout, PipelineError
from autopar.lowering.pipeline.parts import kept_bytes
from autopar.plan import PipelinePlan, load_plan
from autopar.solver.schedule import make_schedule
from autopar.solver.schedule.validate import most_held
from benchmarks.cases import O0
from benchmarks.pipelines import compiled_layout
from tests.closeness import assert_close
from tests.e2e import test_pipeline_schedules as chain
from tests.e2e.beside import made, on_one_device, trained

SMALL: dict[str, Any] = {
    "layers": 1, "width": 32, "heads": 4, "vocab": 64, "seq": 32, "batch": 8, "optimizer": "sgd", "dropout": 0.1
}  # fmt: skip
STEPS, M = 3, 4


def trains_as_one_device_does(train: Any) -> None:
    """Dropout is on: other masks the second time would give other gradients."""
    _, state, batch = made("gpt", **SMALL)
    losses, params = trained(train, state, batch, STEPS)
    expected, expected_params = on_one_device(STEPS, "gpt", **SMALL)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert_close(params, expected_params)


@functools.cache
def staged(remat: bool) -> tuple[PipelinePlan, Compiled]:
    step, state, batch = made("gpt", **SMALL)
    how: dict[str, Any] = {"submeshes": 2, "microbatches": M, "mesh": "data=2", "hardware": "cpu"}
    train = autopar.pipeline(step, **how, remat=remat, compiler_options=O0)
    return train.plan(state, batch), train.compiled(state, batch)


def test_stages_that_compute_again_keep_what_they_were_sent() -> None:
    plan, compiled = staged(True)
    assert plan.remat == {0, 1}
    for stage, runner in zip(plan.stages, compiled.runners, strict=True):
        assert stage.prediction.kept_bytes == kept_bytes(runner.parts, compiled.cut.varying)
        (forward,) = (piece for piece in runner.parts.pieces if piece.tag.part == Part.FORWARD)
        later = {slot for piece in runner.parts.pieces if piece is not forward for slot in piece.local.inputs}
        assert {slot.value for slot in later.intersection(forward.kept)} <= set(runner.parts.inputs)


@pytest.mark.parametrize(("name", "p"), [("zb_h1", 2), ("chimera", 2), ("bpipe", 4)])
def test_computing_again_goes_with_split_backward_parts_replicas_and_evictions(name: str, p: int) -> None:
    schedule = make_schedule(name, p, M)
    layout = Layout(schedule, (Mesh.parse("data=1"),) * p, remat=frozenset(range(schedule.n_stages)))
    run = compiled_layout(trace(chain.step, *chain.arguments()), layout)
    params, batch = chain.arguments()
    for _ in range(2):
        params, metrics = run(params, batch)
    assert_close((params, metrics), chain.reference(2))
    assert run.peaks == [most_held(schedule, device) for device in range(p)]
    rows = 4 * chain.WIDTH * chain.arguments()[1]["x"].shape[0] // M
    last = max(runner.stage for runner in run.runners)
    for runner in run.runners:  # the last stage is sent its part of the targets, too
        assert kept_bytes(runner.parts, run.cut.varying) == rows * (1 + (runner.stage == last))


def test_the_compiler_finds_products_of_the_forward_part_in_the_backward_part_and_less_among_its_arguments() -> None:
    (before, plain), (after, lean) = map(staged, (False, True))
    for index in (0, 1):
        forward, backward = (audited(plain, index, part) for part in (Part.FORWARD, Part.BACKWARD))
        found = audited(lean, index, Part.BACKWARD)
        assert found.product_flops > backward.product_flops + 0.5 * forward.product_flops
        kept, left = (plan.stages[index].prediction.kept_bytes for plan in (before, after))
        assert left < 0.05 * kept
        # Not by all of that: it reads the parameters of the forward part, too.
        assert found.argument_bytes < backward.argument_bytes - 0.6 * (kept - left)


def audited(compiled: Compiled, index: int, part: Part) -> Audit:
    runner = compiled.runners[index]
    piece = runner.pieces[Tag(part)]
    slots = (*piece.piece.local.inputs, *piece.piece.sums)
    places = [(slot_shape(slot, runner.mesh), slot.value.dtype, slot_sharding(slot, runner.mesh)) for slot in slots]
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype, place in places]
    return audit(piece.function.lower(*shapes).compile(compiler_options=O0), compiled.local_programs[index].mesh)


SEARCH: dict[str, Any] = {"devices": 4, "hardware": "cpu", "microbatches": (M,), "layers": 4, "stage_devices": (2,)}


def best(memory_gb: float | None, **options: Any) -> PipelinePlan:
    step, state, batch = made("gpt", **SMALL)
    return autopar.plan_stages(step, state, batch, memory_gb=memory_gb, **SEARCH, **options)


def test_where_memory_is_short_the_search_finds_stages_that_compute_again_and_they_train_as_one_device_does(
    tmp_path: Path,
) -> None:
    limit_gb = 0.29e-3
    with pytest.raises(InfeasibleError, match="no slicing fits 290000 bytes per device"):
        best(limit_gb, remat=False)
    plan = best(limit_gb)
    assert plan.remat == {0} and plan.peak_bytes <= 1e9 * limit_gb < best(None).peak_bytes
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    assert again == plan
    train: Any = autopar.compile(made("gpt", **SMALL)[0], again, compiler_options=O0)
    trains_as_one_device_does(train)
    compiled = train.compiled(*made("gpt", **SMALL)[1:])
    assert compiled.peaks == [2, 1] == [stage.prediction.in_flight for stage in plan.stages]
    for stage, runner in zip(plan.stages, compiled.runners, strict=True):
        assert stage.prediction.kept_bytes == kept_bytes(runner.parts, compiled.cut.varying)


def test_what_was_sent_in_parts_is_gathered_again_and_not_kept_whole() -> None:
    def step(weights: list[jax.Array], x: jax.Array) -> Any:
        def loss(weights: list[jax.Array]) -> jax.Array:
            value = x
            for weight in weights:
                value = layer_boundary(jnp.tanh(value @ weight))
            return jnp.mean(value**2)

        value, gradients = jax.value_and_grad(loss)(weights)
        return [w - 0.1 * g for w, g in zip(weights, gradients, strict=True)], value

    arguments = [0.1 * jax.random.normal(jax.random.key(i), (64, 64)) for i in range(2)], jnp.ones((16, 64))
    how: dict[str, Any] = {"microbatches": 2, "stage_of_layer": (0, 1), "mesh": "tensor=4", "hardware": "cpu"}
    pins = (("^name$", ",tensor"), ("^1$", ",tensor"))
    train = autopar.pipeline(step, remat=(1,), pins=pins, donate=False, compiler_options=O0, **how)
    pieces = [piece for piece in train.compiled(*arguments).runners[1].parts.pieces if piece.tag.part.per_microbatch]
    moves = [i for piece in pieces for i in piece.local.instructions if isinstance(i, Move)]
    assert [move.source.value.name for move in moves].count("name") == len(pieces) == 2
    assert train.plan(*arguments).stages[1].prediction.kept_bytes == 4 * 8 * 64 / 4
    assert_close(train(*arguments), jax.jit(step)(*arguments))


def test_a_stage_that_is_not_there_is_refused() -> None:
    step, state, batch = made("gpt", **SMALL)
    with pytest.raises(PipelineError, match=r"(?s)remat names stage 2, there are stages 0 to 1.*schedule 1f1b"):
        autopar.pipeline(step, remat=(0, 2)).plan(state, batch)
