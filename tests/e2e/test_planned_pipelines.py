"""Pipelines that were searched for or planned within a memory limit: they run as planned, from a file too."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import autopar
from autopar.errors import InfeasibleError, PinError, PlanError
from autopar.plan import Collective, PipelinePlan, load_plan
from autopar.planner import search as planner_search
from benchmarks.cases import O0
from models import gpt
from tests.e2e.beside import assert_trains_as_one_device_does, made

TINY: dict[str, Any] = {
    "layers": 1, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 8, "optimizer": "sgd"
}  # fmt: skip
STEPS = 3


@pytest.fixture(scope="module")
def searched(slow: str) -> PipelinePlan:
    """Three devices: two stages of one and two."""
    step, state, batch = made("gpt", **TINY)
    settings = {"microbatches": (4,), "layers": 4, "stage_devices": (1, 2)}
    return autopar.plan_stages(step, state, batch, devices=3, hardware=slow, **settings)


def test_a_searched_pipeline_on_unequal_submeshes_trains_as_one_device_does_without_another_search(
    searched: PipelinePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(mesh.n_devices for mesh in searched.meshes) == [1, 2]
    path = tmp_path / "plan.json"
    searched.save(path)
    again = load_plan(path)
    assert again == searched
    monkeypatch.setattr(planner_search, "solve", None)  # nothing is solved from here on
    step, state, batch = made("gpt", **TINY)
    train = autopar.compile(step, again, compiler_options=O0)
    assert_trains_as_one_device_does(train, STEPS, "gpt", **TINY)
    assert train.plan(state, batch) == searched


def test_a_plan_says_what_every_stage_costs_and_what_came_close(searched: PipelinePlan) -> None:
    for stage in searched.stages:
        p = stage.prediction
        assert p.busy_s == pytest.approx(4 * (p.forward_s + p.backward_s + p.weight_s))
        assert p.busy_s + p.once_s <= searched.step_s
        assert p.bubble_s > 0 and p.peak_bytes > p.state_bytes
        assert stage.plan.prediction.compute_s <= p.busy_s + p.once_s
    assert [stage.prediction.in_flight for stage in searched.stages] == [2, 1]
    assert searched.stages[0].prediction.sent_bytes >= 4 * TINY["batch"] * TINY["seq"] * TINY["width"]
    for part in ("2 stages on 3 devices", "1f1b, 4 microbatches", "data=2,tensor=1", "CPU seconds", "slicing"):
        assert part in str(searched)
    assert set(searched.seconds) == {"trace", "layers", "intra", "slicing", "stages"}


MESHES = ["data=2,tensor=2", "data=2"]


@functools.cache
def planned(memory_gb: float | None, schedule: str = "1f1b", hardware: str = "v5e") -> PipelinePlan:
    step, state, batch = gpt.make(**TINY, abstract=True)
    how = {"submeshes": 2, "schedule": schedule, "microbatches": 4, "mesh": MESHES}
    return autopar.pipeline(step, **how, hardware=hardware, memory_gb=memory_gb).plan(state, batch)


def test_less_memory_makes_stages_leaner_and_they_still_train_as_one_device_does() -> None:
    free, tight = planned(None), planned(0.2e-3)
    assert free.peak_bytes > 0.2e6 >= tight.peak_bytes
    assert tight.step_s > free.step_s
    assert any(stage.price_s_per_byte > 0 for stage in tight.stages)
    train = autopar.pipeline(made("gpt", **TINY)[0], plan=tight, compiler_options=O0)
    assert_trains_as_one_device_does(train, STEPS, "gpt", **TINY)


def test_memory_counts_every_microbatch_in_flight() -> None:
    few, many = planned(None), planned(None, "gpipe")
    for one, other in zip(few.stages, many.stages, strict=True):
        assert other.prediction.in_flight == 4
        more = (4 - one.prediction.in_flight) * one.prediction.kept_bytes
        assert other.prediction.peak_bytes == pytest.approx(one.prediction.peak_bytes + more)


def test_gradients_are_scattered_in_every_microbatch_where_memory_is_worth_it(slow: str) -> None:
    step, state, batch = made("gpt", **TINY)
    how: dict[str, Any] = {"microbatches": 4, "mesh": "data=2", "preset": "zero2", "hardware": slow}
    free = autopar.pipeline(step, **how).plan(state, batch)
    limit_gb = 0.95e-9 * free.peak_bytes
    tight = autopar.pipeline(step, **how, memory_gb=limit_gb).plan(state, batch)
    assert tight.peak_bytes <= 1e9 * limit_gb
    assert not any(stage.scatters for stage in free.stages) and any(stage.scatters for stage in tight.stages)
    scattered = [sum(c.count for c in collectives(p) if c.kind == "reduce_scatter") for p in (free, tight)]
    assert scattered[1] >= 2 * scattered[0] > 0
    assert_trains_as_one_device_does(autopar.pipeline(step, plan=tight, compiler_options=O0), STEPS, "gpt", **TINY)


def collectives(plan: PipelinePlan) -> list[Collective]:
    return [one for stage in plan.stages for one in stage.plan.prediction.collectives]


def test_too_little_memory_is_refused_with_the_stage_and_what_to_do() -> None:
    text = r"(?s)stage \d does not fit 100 kB a device: .* with 4 microbatches in flight.*state.*--memory-gb to .*1f1b"
    with pytest.raises(InfeasibleError, match=text):
        planned(1e-4, "gpipe")


STALE = {
    "another program": (
        lambda plan: plan,
        {"width": 64},
        r"(?s)the plan is for program \w+, this step is program .*arguments that differ: params/.*plan again",
    ),
    "layers moved": (
        lambda plan: replace(plan, stage_of_layer=(0, 0, 0, 1) if plan.stage_of_layer[2] else (0, 1, 1, 1)),
        {},
        r"(?s)stage 0 was planned for program \w+, layers 0 to \d of this step are program",
    ),
    "submeshes exchanged": (
        lambda plan: replace(plan, meshes=plan.meshes[::-1]),
        {},
        r"stage 0 was planned for place 0, mesh .*; the pipeline runs it at place 0, mesh",
    ),
    "a stage left out": (
        lambda plan: replace(plan, stages=plan.stages[:1]),
        {},
        r"the plan has 1 stages, schedule 1f1b on 2 submeshes has 2",
    ),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_plan_is_refused_by_name(case: str, searched: PipelinePlan) -> None:
    edit, settings, text = STALE[case]
    step, state, batch = gpt.make(**TINY | settings, abstract=True)
    with pytest.raises(PlanError, match=text):
        autopar.pipeline(step, plan=edit(searched)).plan(state, batch)


def test_pins_go_to_the_stages_that_know_the_name() -> None:
    step, state, batch = gpt.make(**TINY, abstract=True)
    how: dict[str, Any] = {"submeshes": 2, "mesh": "tensor=2", "hardware": "v5e"}
    pinned = autopar.pipeline(step, pins=(("^params/h_0/mlp/up/kernel", ",tensor"),), **how).plan(state, batch)
    assert pinned.params["params/h_0/mlp/up/kernel"] == ((), ("tensor",))
    with pytest.raises(PinError, match="'nothing=tensor' matches no value"):
        autopar.pipeline(step, pins=(("nothing", "tensor"),), **how).plan(state, batch)
