"""Every mistake that a user of the command can make: exit code 2 and a message that says how to mend it."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autopar.cli import app, console, planning

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs" / "quadratic.py"
QUAD, MESH = str(PROGRAMS), ["--mesh", "x=4"]

MISTAKES = {
    "an unknown preset": (
        ["plan", QUAD, *MESH, "--preset", "ddp"],
        ["unknown preset 'ddp'", "choose one of dp, fsdp, gshard"],
    ),
    "a preset that the mesh has no room for": (
        ["plan", QUAD, *MESH, "--preset", "tp2d"],
        ["preset tp2d needs a mesh of two axes", "use data=2,tensor=4"],
    ),
    "a mesh that does not parse": (
        ["plan", QUAD, "--mesh", "data:2"],
        ["mesh 'data:2': 'data:2' is not name=size", "write it as data=2,tensor=4"],
    ),
    "a mesh with an axis twice": (["plan", QUAD, "--mesh", "x=2,x=4"], ["names an axis twice"]),
    "a mesh and another number of devices": (
        ["plan", QUAD, *MESH, "--devices", "8"],
        ["mesh x=4 has 4 devices, --devices says 8"],
    ),
    "a mesh larger than the devices": (
        ["plan-and-run", QUAD, "--mesh", "x=16"],
        ["mesh x=16 needs 16 devices, there are 8", "use a smaller mesh"],
    ),
    "too little memory": (
        ["plan", QUAD, *MESH, "--memory-gb", "1e-7"],
        [
            "no plan was found that fits 100 B a device",
            "the smallest needs",
            "at its peak: ",
            "raise --memory-gb to",
        ],
    ),
    "a pin that contradicts another": (
        ["plan", QUAD, *MESH, "--pin", "^kernel=x,", "--pin", "^kernel=,x"],
        ["kernel cannot be [-, x]", "another pin", "drop one of the pins that contradict each other"],
    ),
    "a pin that matches nothing": (["plan", QUAD, *MESH, "--pin", "weights=x,"], ["matches no value"]),
    "a pin that the shape cannot carry": (
        ["plan", QUAD, *MESH, "--set", "width=18", "--pin", "^kernel=x,"],
        ["kernel of shape (18, 8) cannot be laid out as [x, -]", "pin dimensions that the axes divide"],
    ),
    "a pin on an unknown axis": (["plan", QUAD, *MESH, "--pin", "^kernel=y,"], ["names axis 'y'"]),
    "a pin that does not parse": (["plan", QUAD, *MESH, "--pin", "kernel"], ["'kernel' is not PATTERN=SPEC"]),
    "a step that cannot be traced": (
        ["plan", f"{QUAD}:make_branching", *MESH],
        ["the step cannot be traced", "quadratic.py:", "make it a pure function of arrays"],
    ),
    "a step that returns no loss": (
        ["run", f"{QUAD}:make_lossless", *MESH],
        ["the step returns no loss", "return (state, loss)"],
    ),
    "a file that does not exist": (
        ["plan", "nowhere.py"],
        ["there is no file nowhere.py", "write it as path/to"],
    ),
    "a module that does not exist": (["plan", "no.where:make"], ["does not import", "No module named 'no'"]),
    "a function that does not exist": (
        ["plan", f"{QUAD}:build"],
        ["has no function 'build'", "quadratic.py:"],
    ),
    "something that is no function": (["plan", f"{QUAD}:not_callable"], ["has no function 'not_callable'"]),
    "an unknown setting": (["plan", QUAD, "--set", "depth=3"], ["refuses its settings", "'depth'", "--set"]),
    "a setting without a value": (["plan", QUAD, "--set", "depth"], ["'depth' is not name=value"]),
    "a make that returns two things": (
        ["plan", f"{QUAD}:make_two"],
        ["returns a tuple of 2", "return (train_step, state, batch)"],
    ),
    "a make that returns a list": (["plan", f"{QUAD}:make_list"], ["returns a list"]),
    "unknown hardware": (["plan", QUAD, "--hardware", "v99"], ["unknown hardware 'v99'", "name one of a100"]),
    "unknown costs": (["plan", QUAD, "--costs", "guessed"], ["unknown costs 'guessed'"]),
    "a plan that does not exist": (["run", QUAD, "--plan", "no.json"], ["plan no.json cannot be read"]),
    "a plan that is something else": (["explain", QUAD], ["is not an autopar plan"]),
    "a plan written nowhere": (
        ["plan", QUAD, *MESH, "-o", "no/folder/plan.json"],
        ["plan no/folder/plan.json cannot be written"],
    ),
    "a problem that does not exist": (["solve", "no.json"], ["there is no file no.json"]),
    "a problem that is something else": (["solve", QUAD], ["is not an IOPDDL instance"]),
    "a profile written nowhere": (["calibrate", "-o", "no/folder.json"], ["cannot be written"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_exit_code_2_and_says_what_to_do(mistake):
    arguments, texts = MISTAKES[mistake]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and not result.stdout
    for text in texts:
        assert text in result.stderr


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    result = CliRunner().invoke(app, ["plan", QUAD, *MESH, "-o", str(path)])
    assert result.exit_code == 0, result.output
    return path


STALE = {
    "run on another program": (["run", QUAD, "--set", "width=32"], "arguments that differ: kernel, x"),
    "audited on another program": (["audit", QUAD, "--set", "width=32"], "arguments that differ: kernel, x"),
}


@pytest.mark.parametrize("case", STALE)
def test_a_plan_for_another_program_is_refused_by_name(case, plan):
    arguments, text = STALE[case]
    result = CliRunner().invoke(app, [*arguments, "--plan", str(plan)])
    assert result.exit_code == 2, result.output
    assert "the plan is for program" in result.stderr and text in result.stderr
    assert "plan again with autopar plan" in result.stderr


def test_a_plan_of_another_version_is_refused(plan, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(json.loads(plan.read_text()) | {"version": 0}))
    result = CliRunner().invoke(app, ["explain", str(path)])
    assert result.exit_code == 2
    assert "has version 0, this autopar reads version 2" in result.stderr


def test_a_damaged_plan_is_refused(plan, tmp_path):
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps({"version": 2}))
    result = CliRunner().invoke(app, ["run", QUAD, "--plan", str(path)])
    assert result.exit_code == 2
    assert "is damaged: KeyError('prediction')" in result.stderr


def test_a_value_that_does_not_exist_is_answered_with_close_names(plan):
    result = CliRunner().invoke(app, ["explain", str(plan), "kernels"])
    assert result.exit_code == 2
    assert "no value is called 'kernels'" in result.stderr and "close to it: kernel" in result.stderr


def test_a_plan_that_does_not_say_its_target_asks_for_one(plan, tmp_path):
    path = tmp_path / "anonymous.json"
    path.write_text(json.dumps(json.loads(plan.read_text()) | {"provenance": {}}))
    result = CliRunner().invoke(app, ["explain", str(path), "kernel"])
    assert result.exit_code == 2
    assert "does not say what it is a plan for" in result.stderr and "add --target" in result.stderr
    told = CliRunner().invoke(app, ["explain", str(path), "kernel", "--target", QUAD])
    assert told.exit_code == 0, told.output


def test_an_unknown_primitive_is_refused_only_when_strict(monkeypatch):
    from autopar.sharding.registry import SHARDING_RULES

    monkeypatch.delitem(SHARDING_RULES, "dot_general")
    result = CliRunner().invoke(app, ["plan", QUAD, *MESH, "--strict"])
    assert result.exit_code == 2
    assert "primitive dot_general has no sharding rule" in result.stderr and "quadratic.py:" in result.stderr
    relaxed = CliRunner().invoke(app, ["plan", QUAD, *MESH])
    assert relaxed.exit_code == 0, relaxed.output
    assert "primitive without a rule" in relaxed.stdout and "dot_general" in relaxed.stdout


def test_an_interrupt_that_is_caught_below_is_still_noticed():
    with console.noticed_interrupts() as seen:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as the solver does when it has an incumbent
    assert seen == [signal.SIGINT]


def test_an_interrupt_during_a_solve_keeps_the_best_plan_so_far(monkeypatch):
    teller = planning._teller

    def interrupting(update, where, interrupts):
        def tell(at):
            if at.bound < 0.99 * at.incumbent < float("inf") and not interrupts:
                os.kill(os.getpid(), signal.SIGINT)
            teller(update, where, interrupts)(at)

        return tell

    monkeypatch.setattr(planning, "_teller", interrupting)
    mlp = [str(ROOT / "models" / "mlp.py"), *["--set", "layers=1", "--set", "width=32", "--set", "batch=16"]]
    result = CliRunner().invoke(app, ["plan", *mlp, "--mesh", "data=2,tensor=4", "--memory-gb", "9.5e-6"])
    assert result.exit_code == 0, result.output
    assert "interrupted: this is the best plan so far, within" in result.stderr
    assert "params/dense_0/kernel" in result.stdout and "of the optimum" in result.stdout


def test_an_interrupt_with_nothing_to_keep_ends_with_exit_code_130(monkeypatch):
    from autopar.cli import commands

    def interrupted(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "plan", interrupted)
    result = CliRunner().invoke(app, ["plan", QUAD])
    assert result.exit_code == 130
    assert "interrupted before there was anything to keep" in result.stderr
