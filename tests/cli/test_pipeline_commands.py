"""Pipelines on the command line: planned, kept, run, explained, compared; and every mistake by its name."""

from pathlib import Path

import pytest

from autopar.plan import PipelinePlan, load_plan
from tests.cli.running import autopar, json_of
from tests.cli.test_commands import PLAN_KEYS, ROOT

MLP = [str(ROOT / "models" / "mlp.py"), "--set", "layers=2", "--set", "width=32", "--set", "batch=16"]
STAGE_KEYS = {
    *(
        "layers",
        "place",
        "scatters",
        "rematerialised",
        "forward_s",
        "backward_s",
        "weight_s",
        "once_s",
        "transfer_s",
        "busy_s",
        "bubble_s",
    ),
    *("state_bytes", "kept_bytes", "extra_bytes", "peak_bytes", "in_flight", "sent_bytes", "left_bytes", "plan"),
}
TWO = ["--stages", "2", "--schedule", "1f1b", "--microbatches", "4", "--mesh", "data=2"]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A plan of two stages on two devices each."""
    found = tmp_path_factory.mktemp("plans") / "pipeline.json"
    result = autopar("plan", *MLP, *TWO, "-o", found)
    assert result.exit_code == 0, result.output
    for text in ("2 stages on 4 devices (cpu)", "1f1b, 4 microbatches", "data=2", "bubble", "proven optimal"):
        assert text in result.stdout
    return found


def test_a_plan_knows_how_it_was_made_and_runs_from_its_file(path):
    plan = load_plan(path)
    assert isinstance(plan, PipelinePlan) and plan.provenance["target"] == MLP[0]
    found = json_of("run", *MLP, "--plan", path, "--steps", "2", "--check")
    assert {"loss", "reference_loss", "max_rel_error", "step_time_s"} <= set(found)
    assert found["max_rel_error"] < 1e-5
    assert found["step_s"] == plan.step_s


def test_json_has_the_keys_of_a_plan_and_one_entry_a_stage():
    found = json_of("plan", *MLP, *TWO)
    assert set(found) > PLAN_KEYS
    assert found["mesh"] == {"stage": 2, "data": 2} and found["microbatches"] == 4
    assert [set(stage) for stage in found["stages"]] == [STAGE_KEYS] * 2
    assert [stage["layers"] for stage in found["stages"]] == [[0, 0], [1, 1]]
    assert set(found["stages"][0]["plan"]) == PLAN_KEYS
    assert found["peak_bytes"] == max(stage["peak_bytes"] for stage in found["stages"])
    assert {name.split("/")[1] for name in found["params"] if "/" in name} >= {"dense_0", "dense_1"}


def test_submeshes_may_differ_and_are_planned_and_run_at_once():
    found = json_of("plan-and-run", *MLP, *TWO, "--mesh", "data=1", "--steps", "2")
    assert found["max_rel_error"] < 1e-5
    assert found["mesh"] == {"stage": 2}
    assert [stage["plan"]["mesh"] for stage in found["stages"]] == [{"data": 2}, {"data": 1}]


def test_a_search_for_stages_shows_what_came_close_and_keeps_the_plan(tmp_path):
    path = tmp_path / "best.json"
    wanted = ["--stages", "auto", "--devices", "2", "--schedule", "auto", "-o", path]
    result = autopar("plan", *MLP, *wanted)
    assert result.exit_code == 0, result.output
    for text in ("runner-ups", "schedule", "CPU seconds", "slicing"):
        assert text in result.stdout
    plan = load_plan(path)
    assert isinstance(plan, PipelinePlan) and plan.runner_ups and plan.n_devices <= 2


def test_stages_that_run_their_forward_part_again_are_named_and_run_from_the_file(path, tmp_path):
    lean, before = tmp_path / "lean.json", load_plan(path)
    result = autopar("plan", *MLP, *TWO, "--remat", "0", "-o", lean)
    assert result.exit_code == 0 and "forward again before backward in stages 0" in result.stdout, result.output
    plan = load_plan(lean)
    assert isinstance(plan, PipelinePlan) and isinstance(before, PipelinePlan)
    assert [stage.rematerialised for stage in plan.stages] == [True, False]
    assert plan.stages[0].prediction.kept_bytes < before.stages[0].prediction.kept_bytes
    assert json_of("run", *MLP, "--plan", lean, "--steps", "2", "--check")["max_rel_error"] < 1e-5


def test_explain_shows_stages_and_when_they_run_what(path):
    result = autopar("explain", path)
    assert result.exit_code == 0, result.output
    for text in ("2 stages on 4 devices", "device 0 |F0 ", "device 1 |.", "B3"):
        assert text in result.stdout
    assert len(json_of("explain", path)["stages"]) == 2


def test_explain_shows_a_value_at_the_stages_that_know_it(path):
    found = json_of("explain", path, "params/dense_0/kernel")
    assert set(found["stages"]) == {"0"}
    assert "data=2" in autopar("explain", path, "params/dense_0/kernel").stdout


def test_presets_of_pipelines_divide_the_devices():
    found = json_of("plan", *MLP, "--preset", "3d", "--devices", "8")
    assert found["mesh"] == {"stage": 2, "data": 2, "tensor": 2} and found["schedule"] == "1f1b"
    found = json_of("plan", *MLP, "--preset", "interleaved", "--devices", "8")
    assert found["mesh"] == {"stage": 2, "data": 4} and len(found["stages"]) == 4 and found["chunks"] == 2


def test_compare_has_a_row_for_every_pipeline_and_the_best_one_is_not_beaten():
    found = json_of("compare", *MLP, "--mesh", "data=2", "--stages", "auto")
    assert list(found["plans"])[-5:] == ["stages", "gpipe", "1f1b", "interleaved", "3d"]
    assert found["beaten_by"] == []
    assert all(found["plans"]["stages"]["step_s"] <= found["plans"][name]["step_s"] for name in ("gpipe", "1f1b"))


MISTAKES = {
    "an unknown schedule": (["--stages", "2", "--schedule", "2f2b"], ["no schedule is called '2f2b'", "choose one of"]),
    "several schedules": (
        ["--stages", "2", "--schedule", "1f1b", "--schedule", "gpipe"],
        ["leaves a choice", "--stages auto"],
    ),
    "stages that are no number": (["--stages", "two"], ["--stages two is not a number"]),
    "no stages": (["--stages", "0"], ["--stages 0 is not a number"]),
    "stages that chunks do not divide": (
        ["--stages", "3", "--schedule", "interleaved"],
        ["3 stages cannot be shared out, 2 to a submesh", "a multiple of 2"],
    ),
    "more stages than places to cut": (
        ["--stages", "64", "--devices", "64"],
        ["64 layers are asked for, the forward pass has", "ask for fewer layers or stages"],
    ),
    "devices that stages do not divide": (
        ["--stages", "3", "--devices", "8"],
        ["8 devices cannot be divided among 3 submeshes"],
    ),
    "microbatches that do not divide the batch": (
        ["--stages", "2", "--microbatches", "3"],
        ["3 microbatches do not divide the batch of 16", "choose a divisor"],
    ),
    "microbatches to be found": (["--stages", "2", "--microbatches", "auto"], ["goes with --stages auto"]),
    "too many meshes": (
        ["--stages", "2", *["--mesh", "data=2"] * 3],
        ["3 meshes for 2 submeshes", "once for each"],
    ),
    "meshes and another number of devices": (
        ["--stages", "2", "--mesh", "data=2", "--devices", "8"],
        ["have 4 devices, --devices says 8"],
    ),
    "several meshes without stages": (["--mesh", "data=2", "--mesh", "data=4"], ["2 meshes for one program"]),
    "a mesh for a search": (["--stages", "auto", "--mesh", "data=2"], ["--mesh does not go with --stages auto"]),
    "a preset for a search": (["--stages", "auto", "--preset", "dp"], ["--preset does not go with --stages auto"]),
    "stages to run again that are no numbers": (
        ["--stages", "2", "--remat", "first"],
        ["--remat first names no stages", "give all, none, or numbers"],
    ),
    "a stage to run again that is not there": (
        ["--stages", "2", "--mesh", "data=1", "--remat", "1,2"],
        ["remat names stage 2, there are stages 0 to 1"],
    ),
    "stages to run again for a search": (
        ["--stages", "auto", "--remat", "all"],
        ["--remat all does not go with --stages auto"],
    ),
    "too little memory": (
        ["--stages", "2", "--mesh", "data=1", "--memory-gb", "1e-6"],
        ["does not fit 1 kB a device", "microbatches in flight", "raise --memory-gb to"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_exit_code_2_and_says_what_to_do(mistake):
    arguments, texts = MISTAKES[mistake]
    result = autopar("plan", *MLP, *arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and not result.stdout
    for text in texts:
        assert text in result.stderr


def test_a_plan_of_a_pipeline_is_refused_where_one_mesh_is_wanted(path):
    result = autopar("audit", *MLP, "--plan", path)
    assert result.exit_code == 2
    assert "is the plan of a pipeline" in result.stderr


def test_a_stale_plan_is_refused_by_name(path):
    result = autopar("run", MLP[0], "--set", "layers=2", "--set", "width=64", "--set", "batch=16", "--plan", path)
    assert result.exit_code == 2
    assert "the plan is for program" in result.stderr and "arguments that differ: params/dense_0" in result.stderr


def test_a_value_that_no_stage_has_is_answered_with_close_names(path):
    result = autopar("explain", path, "params/dense_0/kernels")
    assert result.exit_code == 2
    assert "names that are close: params/dense_0/kernel" in result.stderr
