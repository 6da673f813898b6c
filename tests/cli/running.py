"""The command, run in this process."""

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from autopar.cli import app


def autopar(*arguments: str | Path) -> Result:
    """Runs the command in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def json_of(*arguments: str | Path) -> dict:
    """The one object that a command prints, which must end well."""
    result = autopar(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)
