"""The plan of a pipeline as data: JSON and back, in a terminal, in a notebook. None of it needs JAX."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.plan import PipelinePlan, Plan, PlannedStage, RunnerUp, Splitting, StagePrediction, load_plan
from autopar.plan.pipeline_views import bubble_share
from tests.plan.test_views import PLAN, ROOT

PREDICTION = StagePrediction(
    forward_s=1e-3,
    backward_s=2e-3,
    weight_s=0.0,
    once_s=4e-3,
    transfer_s=1e-4,
    busy_s=12e-3,
    bubble_s=3e-3,
    state_bytes=3e6,
    kept_bytes=1e6,
    extra_bytes=2e6,
    peak_bytes=7e6,
    in_flight=2,
    sent_bytes=5e5,
)
MESHES = (PLAN.mesh, Mesh.parse("data=1,tensor=2"))
PIPELINE = PipelinePlan(
    fingerprint="fedcba9876543210",
    hardware="v5e",
    schedule="1f1b",
    chunks=1,
    splitting=Splitting(4, batch="inputs", allow=("recompute",)),
    stage_of_layer=(0, 0, 0, 1),
    meshes=MESHES,
    stages=(
        PlannedStage(0, PLAN, 0.0, False, PREDICTION, rematerialised=True),
        PlannedStage(1, replace(PLAN, mesh=MESHES[1]), 2e-9, True, replace(PREDICTION, in_flight=1, transfer_s=0.0)),
    ),
    devices_per_host=4,
    step_s=20e-3,
    pins=(("params/<w>", ",tensor"),),
    runner_ups=(RunnerUp(25e-3, 0.25, ("schedule gpipe for 1f1b", "stages 3 for 2")),),
    seconds={"trace": 1.0, "stages": 2.0},
    provenance={"target": "models/gpt.py"},
)


def test_a_pipeline_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "plan.json"
    PIPELINE.save(path)
    assert load_plan(path) == PIPELINE
    PLAN.save(path)
    assert load_plan(path) == PLAN


def test_layers_and_figures_follow_from_the_stages():
    assert PIPELINE.layers == ((0, 2), (3, 3)) and PIPELINE.n_devices == 10 and PIPELINE.microbatches == 4
    assert PIPELINE.peak_bytes == 7e6
    assert PIPELINE.params == PLAN.params
    assert PIPELINE.remat == {0}
    assert bubble_share(PIPELINE) == pytest.approx(3 / 20)


@pytest.mark.parametrize("what", ["terminal", "notebook"])
def test_a_page_says_what_every_stage_costs_and_what_came_close(what):
    text = str(PIPELINE) if what == "terminal" else PIPELINE._repr_html_()
    for part in (
        *(
            "2 stages on 10 devices (v5e)",
            "1f1b, 4 microbatches",
            "20 ms, 15% of",
            "7 MB",
            "within 1.00% of the optimum",
            "forward again before backward in stages 0",
        ),
        *("data=2,tensor=4", "data=1,tensor=2", "0-2", "2 ms", "500 kB", "schedule gpipe for 1f1b; stages 3 for 2"),
        *("+25.0%", "3.0 CPU seconds: trace 1.0, stages 2.0"),
    ):
        assert part in text
    assert ("pin params/&lt;w&gt;=,tensor" if what == "notebook" else "pin params/<w>=,tensor") in text


def test_a_plan_that_says_nothing_of_rematerialised_stages_has_none(tmp_path):
    path, data = tmp_path / "plan.json", json.loads(PIPELINE.to_json())
    for stage in data["stages"]:
        del stage["rematerialised"], stage["prediction"]["left_bytes"]
    path.write_text(json.dumps(data))
    plan = load_plan(path)
    assert isinstance(plan, PipelinePlan) and not plan.remat


DAMAGED = {
    "another version": (lambda data: data | {"version": 0}, "has version 0, this autopar reads version"),
    "another kind": (lambda data: data | {"kind": "forest"}, r"(?s)is the plan of a forest.*autopar.load_plan"),
    "no stages": (lambda data: {k: v for k, v in data.items() if k != "stages"}, r"is damaged: KeyError\('stages'\)"),
    "a mesh that does not parse": (lambda data: data | {"meshes": ["data:2"]}, "is damaged: MeshError"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_file_that_is_no_plan_is_refused(case, tmp_path):
    damage, text = DAMAGED[case]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(damage(json.loads(PIPELINE.to_json()))))
    with pytest.raises(PlanError, match=text):
        load_plan(path)


def test_what_wants_a_plan_for_one_mesh_refuses_a_pipeline(tmp_path):
    with pytest.raises(PlanError, match=r"(?s)is the plan of a pipeline.*autopar.load_plan"):
        Plan.from_json(PIPELINE.to_json())
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match="cannot be written"):
        PIPELINE.save(tmp_path / "none" / "plan.json")


def test_pipelines_are_read_and_shown_without_jax(tmp_path):
    path = tmp_path / "plan.json"
    PIPELINE.save(path)
    code = f"import sys, autopar; print(autopar.load_plan({str(path)!r})); assert 'jax' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    assert "2 stages on 10 devices" in found.stdout
