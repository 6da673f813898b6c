"""plan, run and plan-and-run."""

from dataclasses import fields
from typing import Any

import typer

from autopar.cli import pipelines
from autopar.cli.console import FAILED, note, show, show_json
from autopar.cli.options import Planning, PlanningAndRunning, Running
from autopar.cli.planning import Job, force_devices, plan_request, read_target
from autopar.cli.printing import plan_json
from autopar.cli.training import TOLERANCE, Training, losses_table, train
from autopar.plan import PipelinePlan, Plan, load_plan
from autopar.plan.figures import seconds
from autopar.plan.terminal import table


def plan(request: Planning) -> None:
    """Shows the best plan."""
    _, found = _planned(request)
    if request.json:
        show_json(_as_json(found))
    else:
        _show(found)


def run(request: Running) -> None:
    """Trains under the plan of a file, or under one made now."""
    if request.plan is None:
        shared = {field.name for field in fields(Running)} & {field.name for field in fields(Planning)}
        job, found = _planned(Planning(**{name: getattr(request, name) for name in shared}), to_run=True)
        target = job.target
    else:
        found, target = load_plan(request.plan), read_target(request.target, request.set)
        force_devices(found.n_devices if isinstance(found, PipelinePlan) else found.mesh.n_devices)
    _report(found, train(target, found, request.steps, request.check), request.json)


def plan_and_run(request: PlanningAndRunning) -> None:
    """Plans, shows the plan, trains."""
    job, found = _planned(request, to_run=True)
    if not request.json:
        _show(found)
    _report(found, train(job.target, found, request.steps, request.check), request.json)


def _planned(request: Planning, *, to_run: bool = False) -> tuple[Job, Plan | PipelinePlan]:
    if pipelines.wanted(request):
        return pipelines.plan_request(request, to_run=to_run)
    return plan_request(request, to_run=to_run)


def _as_json(plan: Plan | PipelinePlan) -> dict[str, Any]:
    return pipelines.pipeline_json(plan) if isinstance(plan, PipelinePlan) else plan_json(plan)


def _show(plan: Plan | PipelinePlan) -> None:
    if isinstance(plan, PipelinePlan):
        show(plan)
    else:
        show(plan, _spent(plan))


def _spent(plan: Plan) -> str:
    s = plan.solution
    return (
        f"planned in {s.trace_s + s.build_s + s.solve_s:.1f} CPU seconds (tracing {s.trace_s:.1f}, building "
        f"{s.build_s:.1f}, solving {s.solve_s:.1f}): {s.n_equations} equations, {s.n_nodes} nodes\n"
    )


def _report(plan: Plan | PipelinePlan, training: Training, as_json: bool) -> None:
    """Shows losses and the verdict; ends with exit code 1 if they differ from one device."""
    checked = bool(training.reference_loss)
    if as_json:
        extra: dict[str, Any] = {"loss": list(training.loss), "step_time_s": training.step_time_s}
        if checked:
            extra |= {
                "reference_loss": list(training.reference_loss),
                "max_rel_error": training.max_rel_error,
            }
        show_json(_as_json(plan) | extra)
    else:
        columns = "step|loss|on one device" if checked else "step|loss|"
        losses = table(f"training on {len(training.devices)} {training.devices[0]} devices", columns, columns)
        for row in losses_table(training):
            losses.add_row(*row)
        show(losses, f"{seconds(training.step_time_s)} a step (median after the first)")
        if checked:
            show(f"largest relative difference from one device: {training.max_rel_error:.1e}")
    if checked and not training.max_rel_error <= TOLERANCE:
        note(
            f"losses differ from one device by {training.max_rel_error:.1e}, more than {TOLERANCE:.0e}",
            "red",
        )
        raise typer.Exit(FAILED)
