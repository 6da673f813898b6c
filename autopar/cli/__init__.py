"""The ``autopar`` command. Commands import what they need when they run, so that ``--help`` needs no JAX."""

import typer

from autopar.cli import options
from autopar.cli.console import reported

app = typer.Typer(
    name="autopar",
    help="Turns a single-device JAX train step into the best parallel program for a device mesh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
@reported
@options.command(options.Planning)
def plan(request: options.Planning) -> None:
    """Plan a train step and show the plan."""
    from autopar.cli import commands

    commands.plan(request)


@app.command()
@reported
@options.command(options.Running)
def run(request: options.Running) -> None:
    """Train under a plan; --check compares the losses with one device."""
    from autopar.cli import commands

    commands.run(request)


@app.command("plan-and-run")
@reported
@options.command(options.PlanningAndRunning)
def plan_and_run(request: options.PlanningAndRunning) -> None:
    """Plan, show the plan, train, and compare with one device."""
    from autopar.cli import commands

    commands.plan_and_run(request)


@app.command()
@reported
@options.command(options.Searching)
def compare(request: options.Searching) -> None:
    """The unrestricted plan beside every preset."""
    from autopar.cli import comparing

    comparing.compare(request)


@app.command()
@reported
@options.command(options.Explaining)
def explain(request: options.Explaining) -> None:
    """The values of a plan; or why one lies as it does, and what the alternatives cost."""
    from autopar.cli import reading

    reading.explain(request)


@app.command()
@reported
@options.command(options.Comparing)
def diff(request: options.Comparing) -> None:
    """What two plans of one step decide differently, by module."""
    from autopar.cli import reading

    reading.diff(request)


@app.command()
@reported
@options.command(options.Auditing)
def audit(request: options.Auditing) -> None:
    """What the compiler built beside what the plan predicted."""
    from autopar.cli import auditing

    auditing.audit(request)


@app.command()
@reported
@options.command(options.Solving)
def solve(request: options.Solving) -> None:
    """Solve an instance of the IOPDDL contest."""
    from autopar.cli import solving

    solving.solve(request)


@app.command()
@reported
@options.command(options.Calibrating)
def calibrate(request: options.Calibrating) -> None:
    """Measure the devices at hand and write a hardware profile."""
    from autopar.cli import calibrating

    calibrating.calibrate(request)


def main() -> None:
    """The console script."""
    app()
