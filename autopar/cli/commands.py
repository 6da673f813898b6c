"""plan, run and plan-and-run."""

from typing import Any

import typer

from autopar.cli.console import FAILED, note, show, show_json
from autopar.cli.options import Planning, PlanningAndRunning, Running
from autopar.cli.planning import force_devices, plan_request, read_target
from autopar.cli.training import TOLERANCE, Training, losses_table, train
from autopar.plan import Plan
from autopar.plan.figures import seconds
from autopar.plan.terminal import table


def plan(request: Planning) -> None:
    """Shows the best plan."""
    _, found = plan_request(request)
    if request.json:
        show_json(plan_json(found))
    else:
        show(found, _spent(found))


def run(request: Running) -> None:
    """Trains under the plan of a file, or under one made now."""
    if request.plan is None:
        planning = Planning(target=request.target, set=request.set, mesh=request.mesh)
        job, found = plan_request(planning, to_run=True)
        target = job.target
    else:
        found, target = Plan.load(request.plan), read_target(request.target, request.set)
        force_devices(found.mesh.n_devices)
    _report(found, train(target, found, request.steps, request.check), request.json)


def plan_and_run(request: PlanningAndRunning) -> None:
    """Plans, shows the plan, trains."""
    job, found = plan_request(request, to_run=True)
    if not request.json:
        show(found, _spent(found))
    _report(found, train(job.target, found, request.steps, request.check), request.json)


def plan_json(plan: Plan) -> dict[str, Any]:
    """What ``autopar plan --json`` prints."""
    solution, prediction = plan.solution, plan.prediction
    return {
        "objective_s": solution.objective_s,
        "lower_bound_s": solution.lower_bound_s,
        "gap": solution.gap,
        "proven_optimal": solution.proven_optimal,
        "step_s": prediction.step_s,
        "peak_bytes": prediction.peak_bytes,
        "flops_per_device": prediction.flops,
        "microbatches": plan.microbatches,
        "collectives": [collective_json(c) for c in prediction.collectives],
        "trace_s": solution.trace_s,
        "build_s": solution.build_s,
        "solve_s": solution.solve_s,
        "n_equations": solution.n_equations,
        "n_nodes": solution.n_nodes,
        "replicated_primitives": [name for name, _ in solution.replicated_primitives],
        "params": {name: [list(axes) for axes in dims] for name, dims in plan.params.items()},
        "mesh": plan.mesh.sizes,
    }


def collective_json(one: Any) -> dict[str, Any]:
    """Collectives of a plan or of a compiled program as JSON."""
    return {"kind": one.kind, "axes": list(one.axes), "bytes": one.nbytes, "count": one.count}


def _spent(plan: Plan) -> str:
    s = plan.solution
    return (
        f"planned in {s.trace_s + s.build_s + s.solve_s:.1f} CPU seconds (tracing {s.trace_s:.1f}, building "
        f"{s.build_s:.1f}, solving {s.solve_s:.1f}): {s.n_equations} equations, {s.n_nodes} nodes\n"
    )


def _report(plan: Plan, training: Training, as_json: bool) -> None:
    """Shows losses and the verdict; ends with exit code 1 if they differ from one device."""
    checked = bool(training.reference_loss)
    if as_json:
        extra: dict[str, Any] = {"loss": list(training.loss), "step_time_s": training.step_time_s}
        if checked:
            extra |= {
                "reference_loss": list(training.reference_loss),
                "max_rel_error": training.max_rel_error,
            }
        show_json(plan_json(plan) | extra)
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
