"""The pipelines of the literature, and all four axes together: each trains as one device does."""

import functools
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import autopar
from autopar.api.staging.presets import PIPELINES, both, devices_each
from autopar.cluster import Mesh
from autopar.cost import hardware, write_profile
from autopar.errors import MeshError
from autopar.plan import PipelinePlan
from benchmarks.cases import O0

TEXT = {"layers": 1, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 8, "optimizer": "sgd"}
MODELS: dict[str, dict[str, Any]] = {"gpt": {**TEXT, "batch": 16}, "moe": {**TEXT, "layers": 2, "experts": 4}}
STEPS, MICROBATCHES = 3, 4


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Devices so slow that splitting a tiny stage pays."""
    return str(slow_profile(tmp_path_factory.mktemp("hardware") / "slow.json"))


def slow_profile(path: Path) -> Path:
    cluster = hardware("v5e")
    device = replace(cluster.device, peak_flops=(("float32", 1e9),), memory_Bps=1e8)
    write_profile(path, replace(cluster, device=device, link=replace(cluster.link, alpha_s=1e-7)), {})
    return path


@functools.cache
def made(model: str) -> Any:
    return importlib.import_module(f"models.{model}").make(**MODELS[model])


@functools.cache
def on_one_device(model: str) -> tuple[list[float], Any]:
    """The loss of each step, and the parameters after the last."""
    step, state, batch = made(model)
    run, losses = jax.jit(step, compiler_options=O0), []
    for _ in range(STEPS):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.params


def distance(a: Any, b: Any) -> float:
    pairs = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in pairs)))


def check(model: str, **options: Any) -> PipelinePlan:
    """Trains some steps; the plan."""
    step, state, batch = made(model)
    train = autopar.pipeline(step, microbatches=MICROBATCHES, compiler_options=O0, **options)
    plan, start, losses = train.plan(state, batch), state.params, []
    for _ in range(STEPS):
        state, metrics = train(state, batch)
        losses.append(float(metrics["loss"]))
    expected, params = on_one_device(model)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert distance(state.params, params) <= 1e-4 * distance(params, start)
    return plan


PRESETS = [pytest.param(name, marks=() if name == "3d" else pytest.mark.slow) for name in PIPELINES]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_trains_as_one_device_does(preset: str, slow: str) -> None:
    plan = check("gpt", preset=preset, hardware=slow)
    assert plan.schedule == PIPELINES[preset].schedule and plan.n_devices == 8
    axes = {axis for dims in plan.params.values() for dim in dims for axis in dim}
    assert axes == ({"tensor"} if preset == "3d" else set())
    sent = {one.axes for stage in plan.stages for one in stage.plan.prediction.collectives if one.nbytes > 1000}
    assert ("data",) in sent and (("tensor",) in sent) == (preset == "3d")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,expert=2", "data=1,tensor=2,expert=2"])
def test_stages_with_data_tensor_and_expert_axes_train_as_one_device_does(mesh: str, slow: str) -> None:
    plan = check("moe", mesh=mesh, hardware=slow)
    experts = [dims for name, dims in plan.params.items() if name.endswith(("experts/up", "experts/down"))]
    assert experts and all("expert" in dims[0] for dims in experts)


@functools.cache
def planned(preset: str, hardware: str) -> PipelinePlan:
    step, state, batch = made("gpt")
    how: dict[str, Any] = {"devices": 4, "microbatches": MICROBATCHES, "hardware": hardware}
    return autopar.pipeline(step, preset=preset, **how).plan(state, batch)


def test_the_search_over_stages_costs_no_more_than_any_preset(slow: str) -> None:
    step, state, batch = made("gpt")
    schedules = tuple(dict.fromkeys(preset.schedule for preset in PIPELINES.values()))
    how: dict[str, Any] = {"microbatches": (MICROBATCHES,), "schedules": schedules, "hardware": slow, "layers": 4}
    best = autopar.plan_stages(step, state, batch, devices=4, stage_devices=(1, 2, 4), **how)
    for preset in PIPELINES:
        assert best.step_s <= planned(preset, slow).step_s * (1 + 1e-9)


@pytest.mark.parametrize(
    ("n_devices", "mesh"), [(1, "data=1,tensor=1"), (4, "data=2,tensor=2"), (6, "data=2,tensor=3")]
)
def test_tensor_and_data_parallelism_share_a_stage(n_devices: int, mesh: str) -> None:
    assert both(n_devices) == Mesh.parse(mesh)


def test_devices_are_shared_out_evenly_or_not_at_all() -> None:
    assert devices_each(8, 2) == 4
    with pytest.raises(MeshError, match="9 devices cannot be divided among 2 submeshes"):
        devices_each(9, 2)
