"""Microbatches and chunks on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autopar.cli import app
from autopar.plan import Plan, Splitting

PROGRAM = str(Path(__file__).parents[1] / "cli" / "programs" / "quadratic.py")


def ran(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_plan_in_microbatches_runs_as_one_device_does(tmp_path):
    path = str(tmp_path / "plan.json")
    found = ran("plan", PROGRAM, "--mesh", "data=2", "--microbatches", "4", "--chunk", "dot_general[1]=2", "-o", path)
    assert found["microbatches"] == 4
    assert Plan.load(path).splitting == Splitting(4, (("dot_general", 1, 2),))
    trained = ran("run", PROGRAM, "--plan", path, "--steps", "2", "--check")
    assert trained["max_rel_error"] < 1e-5
    shown = CliRunner().invoke(app, ["explain", path])
    assert "4 microbatches, dot_general[1] in 2 parts" in shown.stdout


def test_auto_stays_at_one_microbatch_where_memory_does_not_bind():
    assert ran("plan", PROGRAM, "--mesh", "data=2", "--microbatches", "auto")["microbatches"] == 1


WRONG = {
    "--microbatches many is not a number": ("--microbatches", "many"),
    "--chunk head does not parse": ("--chunk", "head"),
    "3 microbatches do not divide the batch of 16": ("--microbatches", "3"),
    "chunk 'head' says no dimension": ("--chunk", "head=2"),
    "in 0 parts cannot be": ("--chunk", "head[1]=0"),
    "the step has no dimension 'vocab'": ("--chunk", "vocab=2"),
    "cannot be": ("--allow", "anything"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_refused_with_a_fix(message):
    result = CliRunner().invoke(app, ["plan", PROGRAM, "--mesh", "data=2", *WRONG[message]])
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and message in said and "to fix:" in said
