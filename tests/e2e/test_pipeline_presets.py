"""The pipelines of the literature, and all four axes together: each trains as one device does."""

import functools
from typing import Any

import pytest

import autopar
from autopar.api.staging.presets import PIPELINES, both, devices_each
from autopar.cluster import Mesh
from autopar.errors import MeshError
from autopar.plan import PipelinePlan
from benchmarks.cases import O0
from tests.e2e.beside import assert_trains_as_one_device_does, made

TEXT = {"layers": 1, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 8, "optimizer": "sgd"}
MODELS: dict[str, dict[str, Any]] = {"gpt": {**TEXT, "batch": 16}, "moe": {**TEXT, "layers": 2, "experts": 4}}
STEPS, MICROBATCHES = 3, 4


def check(model: str, **options: Any) -> PipelinePlan:
    """Trains some steps; the plan."""
    step, state, batch = made(model, **MODELS[model])
    train = autopar.pipeline(step, microbatches=MICROBATCHES, compiler_options=O0, **options)
    plan = train.plan(state, batch)
    assert_trains_as_one_device_does(train, STEPS, model, **MODELS[model])
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
    step, state, batch = made("gpt", **MODELS["gpt"])
    how: dict[str, Any] = {"devices": 4, "microbatches": MICROBATCHES, "hardware": hardware}
    return autopar.pipeline(step, preset=preset, **how).plan(state, batch)


def test_the_search_over_stages_costs_no_more_than_any_preset(slow: str) -> None:
    step, state, batch = made("gpt", **MODELS["gpt"])
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
