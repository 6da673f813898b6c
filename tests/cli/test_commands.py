"""Every command on a small model: what it shows, its JSON, its exit code."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from autopar.plan import Plan
from autopar.sharding.registry import SHARDING_RULES
from tests.cli.running import autopar, json_of

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs" / "quadratic.py"
MLP = [str(ROOT / "models" / "mlp.py"), "--set", "layers=1", "--set", "width=32", "--set", "batch=16"]
MESH = ["--mesh", "data=2,tensor=4"]
PLAN_KEYS = {
    *("objective_s", "lower_bound_s", "gap", "proven_optimal", "step_s", "peak_bytes", "flops_per_device"),
    *("collectives", "trace_s", "build_s", "solve_s", "n_equations", "n_nodes", "replicated_primitives"),
    *("params", "mesh", "microbatches"),
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory) -> dict[str, Path]:
    """A plan without restrictions and one of data parallelism."""
    folder = tmp_path_factory.mktemp("plans")
    paths = {"free": folder / "free.json", "dp": folder / "dp.json"}
    for name, restriction in (("free", []), ("dp", ["--preset", "dp"])):
        result = autopar("plan", *MLP, *MESH, *restriction, "-o", paths[name])
        assert result.exit_code == 0, result.output
    return paths


def test_plan_shows_the_mesh_the_arguments_and_the_certificate():
    result = autopar("plan", *MLP, *MESH)
    assert result.exit_code == 0, result.output
    for text in (
        "data=2,tensor=4 (8 devices, cpu)",
        "params/dense_0/kernel",
        "proven optimal",
        "CPU seconds",
    ):
        assert text in result.stdout


def test_plan_prints_exactly_the_documented_json():
    found = json_of("plan", *MLP, *MESH)
    assert set(found) == PLAN_KEYS
    assert found["mesh"] == {"data": 2, "tensor": 4}
    assert found["proven_optimal"] and found["gap"] == pytest.approx(0, abs=1e-9)
    assert found["step_s"] > 0 and found["peak_bytes"] > 0 and found["flops_per_device"] > 0
    assert len(found["params"]["params/dense_0/kernel"]) == 2
    assert all(set(c) == {"kind", "axes", "bytes", "count"} for c in found["collectives"])


def test_plan_without_a_mesh_tries_every_shape_of_eight_devices():
    found = json_of("plan", *MLP)
    assert found["mesh"]["data"] * found["mesh"]["tensor"] == 8
    assert found["step_s"] <= json_of("plan", *MLP, *MESH)["step_s"] * (1 + 1e-9)


def test_pins_and_presets_restrict_the_plan():
    pinned = json_of("plan", *MLP, *MESH, "--pin", "params/dense_0/kernel=data,tensor")
    assert pinned["params"]["params/dense_0/kernel"] == [["data"], ["tensor"]]
    parallel = json_of("plan", *MLP, *MESH, "--preset", "dp")
    assert all(axes == [] for dims in parallel["params"].values() for axes in dims)


def test_a_plan_knows_how_it_was_made(plans):
    plan = Plan.load(plans["dp"])
    assert plan.preset == "dp" and plan.hardware == "cpu"
    assert plan.provenance["target"] == MLP[0]
    assert plan.provenance["settings"] == "layers=1 width=32 batch=16"
    assert Plan.from_json(plan.to_json()) == plan


def test_run_trains_under_a_plan_and_agrees_with_one_device(plans):
    found = json_of("run", *MLP, "--plan", plans["dp"], "--steps", "3", "--check")
    assert set(found) == PLAN_KEYS | {"loss", "reference_loss", "max_rel_error", "step_time_s"}
    assert len(found["loss"]) == len(found["reference_loss"]) == 3
    assert found["max_rel_error"] < 1e-5 and found["step_time_s"] > 0


def test_plan_and_run_plans_trains_and_checks():
    result = autopar("plan-and-run", PROGRAMS, "--mesh", "x=4", "--steps", "2")
    assert result.exit_code == 0, result.output
    for text in ("kernel", "on one device", "largest relative difference from one device"):
        assert text in result.stdout


def test_run_trains_a_flax_nnx_step_that_updates_its_objects_in_place():
    found = json_of("plan-and-run", f"{PROGRAMS}:make_nnx", "--mesh", "data=8", "--preset", "zero3", "--steps=3")
    assert found["max_rel_error"] < 1e-5
    assert found["loss"][2] < found["loss"][1] < found["loss"][0]


def test_losses_that_differ_from_one_device_end_with_exit_code_1(monkeypatch):
    monkeypatch.setitem(SHARDING_RULES, "backwards", lambda *_: None)  # so that the wrong one is taken back
    wrong = [f"{PROGRAMS}:make_wrong", "--mesh", "x=4", "--pin", "backwards=x,", "--steps", "2", "--json"]
    result = autopar("plan-and-run", *wrong)
    assert result.exit_code == 1, result.output
    assert "losses differ from one device by" in result.stderr
    assert json.loads(result.stdout)["max_rel_error"] > 0.1


def test_compare_prices_every_preset_and_none_beats_the_plan():
    found = json_of("compare", *MLP, *MESH)
    assert list(found["plans"])[:3] == ["autopar", "dp", "zero1"]
    assert found["beaten_by"] == []
    assert found["plans"]["gshard"] == {"refused": "preset gshard needs expert weights, the step has none"}
    assert found["plans"]["autopar"]["step_s"] < found["plans"]["dp"]["step_s"]


def test_compare_shows_a_row_for_every_preset():
    result = autopar("compare", PROGRAMS, "--mesh", "x=2,y=2")
    assert result.exit_code == 0, result.output
    for name in ("autopar", "dp", "zero1", "zero2", "zero3", "megatron", "megatron_sp", "tp2d", "gshard"):
        assert f"\n{name} " in result.stdout


def test_explain_lists_the_values(plans):
    result = autopar("explain", plans["free"])
    assert result.exit_code == 0, result.output
    assert "MLP/dense_0/dot_general" in result.stdout


def test_explain_prices_every_other_layout_of_a_value(plans):
    explained = json_of("explain", plans["free"], "params/dense_0/kernel")
    assert "MLP/dense_0/dot_general" in explained["read_by"]
    found = explained["alternatives"]
    chosen = [one for one in found if one["chosen"]]
    assert len(chosen) == 1 and found[0] == chosen[0]
    assert len(found) == 9  # each of two axes on one of two dimensions or none
    for one in found:
        assert one["objective_s"] >= -1e-12
        assert one["objective_s"] == pytest.approx(one["compute_s"] + one["communication_s"], abs=1e-9)


def test_explain_says_which_layouts_a_preset_excludes(plans):
    result = autopar("explain", plans["dp"], "params/dense_0/kernel")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("the preset or a pin excludes it") == 8


def test_diff_shows_what_changed_by_module(plans):
    result = autopar("diff", plans["free"], plans["dp"])
    assert result.exit_code == 0, result.output
    assert "step_s" in result.stdout and "MLP/dense_0" in result.stdout
    found = json_of("diff", plans["free"], plans["dp"])
    assert found["same_program"]
    assert found["modules"]["MLP/dense_0"]["MLP/dense_0/dot_general"][1] == "[data·tensor, -]"


def test_a_plan_does_not_differ_from_itself(plans):
    assert "the plans decide the same" in autopar("diff", plans["dp"], plans["dp"]).stdout


def test_audit_finds_the_collectives_that_the_plan_predicted(plans):
    found = json_of("audit", *MLP, "--plan", plans["dp"])
    assert set(found) == {"collectives", "flops", "peak_bytes"}
    assert all(set(found[name]) == {"predicted", "compiled"} for name in found)
    sides = {
        side: {(c["kind"], *c["axes"]): c["bytes"] for c in found["collectives"][side]}
        for side in ("predicted", "compiled")
    }
    assert sides["predicted"] == sides["compiled"] != {}


def test_audit_shows_both_sides(plans):
    result = autopar("audit", *MLP, "--plan", plans["dp"])
    assert result.exit_code == 0, result.output
    assert "peak memory" in result.stdout and "equal" in result.stdout


INSTANCE = {
    "problem": {
        "name": "two",
        "nodes": {
            "intervals": [[0, 2], [1, 3]],
            "costs": [[15, 55, 65], [45, 51]],
            "usages": [[10, 20, 30], [40, 50]],
        },
        "edges": {"nodes": [[0, 1]], "costs": [[30, 10, 0, 15, 20, 0]]},
        "usage_limit": 60,
    }
}


def test_solve_reports_the_exact_cost_and_the_strategies(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(json.dumps(INSTANCE))
    found = json_of("solve", path)
    assert set(found) == {"cost", "lower_bound", "gap", "feasible", "seconds", "strategies"}
    assert (found["cost"], found["strategies"], found["feasible"], found["gap"]) == (76, [0, 1], True, 0.0)
    assert "peak usage" in autopar("solve", path).stdout


def test_a_deterministic_solve_returns_the_same_choice_each_time(tmp_path):
    # A dense graph under a limit: too wide to eliminate, so that random search has a part in it.
    random = np.random.default_rng(5)
    nodes, pairs = 30, [(u, v) for v in range(30) for u in range(v) if random.random() < 0.4]
    instance = {
        "nodes": {
            "intervals": [[0, 1]] * nodes,
            "costs": random.integers(1000, size=(nodes, 8)).tolist(),
            "usages": [list(range(8))] * nodes,
        },
        "edges": {"nodes": pairs, "costs": random.integers(1000, size=(len(pairs), 64)).tolist()},
        "usage_limit": 50,
    }
    path = tmp_path / "dense.json"
    path.write_text(json.dumps({"problem": instance}))
    one, two = (json_of("solve", path, "--seconds", "0.1", "--deterministic", "--seed", "7") for _ in range(2))
    assert one["feasible"] and one["gap"] > 0.0
    assert {**one, "seconds": 0.0} == {**two, "seconds": 0.0}


def test_a_calibrated_profile_prices_a_plan_that_runs(tmp_path):
    profile, plan = tmp_path / "profile.json", tmp_path / "plan.json"
    result = autopar("calibrate", "-o", profile, "--quick")
    assert result.exit_code == 0, result.output
    assert "GFLOP/s" in result.stdout
    made = autopar("plan", PROGRAMS, "--mesh", "x=4", "--hardware", profile, "-o", plan)
    assert made.exit_code == 0, made.output
    assert json_of("run", PROGRAMS, "--plan", plan, "--steps", "2", "--check")["max_rel_error"] < 1e-5


def subprocess_of(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with no word about devices in its environment."""
    kept = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    code = "from autopar.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=120)


def test_a_fresh_process_forces_the_devices_that_the_mesh_needs():
    run = subprocess_of("plan-and-run", PROGRAMS, "--mesh", "x=12", "--set", "batch=24", "--steps=2", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["mesh"] == {"x": 12}
    assert "planning" not in run.stdout


def test_help_needs_no_jax():
    code = "import sys; from autopar.cli import app; from typer.testing import CliRunner\n"
    code += "print(CliRunner().invoke(app, ['plan', '--help']).stdout); assert 'jax' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "--memory-gb" in run.stdout and "TARGET" in run.stdout
