"""explain and diff: what plan files say."""

from dataclasses import asdict
from typing import Any

from autopar import api
from autopar.cli.console import note, progress, show, show_json
from autopar.cli.options import Comparing, Explaining
from autopar.cli.planning import Job, adapted, force_devices, read_target
from autopar.errors import PlanError
from autopar.plan import Plan
from autopar.plan.terminal import escape, table
from autopar.planner import diff as differ
from autopar.planner.explain import Alternative, Explanation, explained
from autopar.planner.pins import restrict
from autopar.planner.search import prepare


def explain(request: Explaining) -> None:
    """Shows the values of a plan, or the alternatives of one value."""
    plan = Plan.load(request.plan)
    if request.value is None:
        if request.json:
            show_json({name: str(spec) for name, spec in plan.values.items()})
        else:
            show(plan, _values_table(plan))
        return
    found = _explained(plan, _job(plan, request), request.value)
    if request.json:
        alternatives = [_as_json(one) for one in found.alternatives]
        show_json({"value": request.value, "read_by": list(found.readers), "alternatives": alternatives})
    else:
        show(found)


def _values_table(plan: Plan) -> Any:
    found = table("values", "name|spec|copies in other layouts")
    for name, spec in plan.values.items():
        copies = "; ".join(f"{view.spec} for {', '.join(view.readers)}" for view in plan.views.get(name, ()))
        found.add_row(name, escape(str(spec)), escape(copies))
    return found


def _job(plan: Plan, request: Explaining) -> Job:
    """The step that the plan was made for, traced again."""
    recorded = plan.provenance
    text = request.target or recorded.get("target", "")
    if not text:
        raise PlanError(f"{request.plan} does not say what it is a plan for", fix="add --target path/to/file.py")
    target = read_target(text, request.set or recorded.get("settings", "").split())
    force_devices(plan.mesh.n_devices)
    memory = recorded.get("memory_gb", "")
    options = api.Options(
        mesh=plan.mesh,
        hardware=recorded.get("hardware") or plan.hardware or None,
        memory_gb=float(memory) if memory else None,
        preset=plan.preset,
        pins=plan.pins,
    )
    with progress(f"tracing {text}"):
        traced, trace_s = api.traced_in_time(adapted(target))
    traced = api.check_fits(plan, traced)
    return Job(target, traced, trace_s, options, recorded.get("costs") or "roofline")


def _explained(plan: Plan, job: Job, name: str) -> Explanation:
    """What else the value could be, and the equations that read it."""
    ((options, cost),) = job.per_mesh()
    with progress("building the problem") as update:
        prepared = prepare(job.traced, cost)
        masks = restrict(prepared.graph, prepared.formulator, plan.preset, plan.pins)
        replan = lambda narrowed: api.plan_prepared(prepared, cost, options, narrowed)  # noqa: E731
        return explained(prepared, plan, name, masks, replan, update)


def _as_json(one: Alternative) -> dict[str, Any]:
    return asdict(one) | {"spec": [list(dim) for dim in one.spec.dims], "partial": sorted(one.spec.partial)}


def diff(request: Comparing) -> None:
    """Shows what two plans decide differently."""
    found = differ.diff(Plan.load(request.before), Plan.load(request.after))
    if request.json:
        show_json(_diff_json(found))
        return
    if not found.same_program:
        note("the plans are for different programs", "yellow")
    show(found)


def _diff_json(found: differ.PlanDiff) -> dict[str, Any]:
    return {
        "same_program": found.same_program,
        "mesh": list(found.mesh),
        "figures": {f.name: {"before": f.before, "after": f.after} for f in found.figures},
        "collectives": {f.name: {"before": f.before, "after": f.after} for f in found.collectives},
        "modules": {
            module.name: {c.name: [str(c.before), str(c.after)] for c in module.changes} for module in found.modules
        },
    }
