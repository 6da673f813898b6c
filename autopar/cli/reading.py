"""explain and diff: what plan files say."""

import difflib
from dataclasses import asdict
from typing import Any

from autopar import api
from autopar.api.staging.stored import timeline_of
from autopar.cli.console import note, progress, show, show_json
from autopar.cli.options import Comparing, Explaining
from autopar.cli.pipelines import pipeline_json
from autopar.cli.planning import Job, adapted, force_devices, read_target
from autopar.errors import PinError, PlanError
from autopar.plan import PipelinePlan, Plan, load_plan
from autopar.plan.terminal import escape, table
from autopar.planner import diff as differ
from autopar.planner.explain import Alternative, Explanation, explained
from autopar.planner.pins import restrict
from autopar.planner.search import prepare
from autopar.solver.schedule.draw import draw_text


def explain(request: Explaining) -> None:
    """Shows the values of a plan, or the alternatives of one value."""
    plan = load_plan(request.plan)
    if isinstance(plan, PipelinePlan):
        _explain_pipeline(plan, request)
        return
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


def _explain_pipeline(plan: PipelinePlan, request: Explaining) -> None:
    """Shows the stages of a pipeline and when each runs what; or the layouts of a value at the stages that know it."""
    if request.value is None:
        if request.json:
            show_json(pipeline_json(plan))
        else:
            show(plan, "\nwhen a step runs what, as predicted:", escape(draw_text(timeline_of(plan))))
        return
    known = {
        i: stage.plan.values[request.value] for i, stage in enumerate(plan.stages) if request.value in stage.plan.values
    }
    if not known:
        names = {name for stage in plan.stages for name in stage.plan.values}
        close = difflib.get_close_matches(request.value, names, 3, 0.4)
        raise PinError(
            f"the plan has no value {request.value}",
            where=f"{len(plan.stages)} stages",
            fix=f"names that are close: {', '.join(close)}"
            if close
            else "autopar explain plan.json --json lists parameters",
        )
    if request.json:
        show_json({"value": request.value, "stages": {str(i): str(spec) for i, spec in known.items()}})
        return
    found = table(request.value, "stage|mesh|spec")
    for index, spec in known.items():
        found.add_row(str(index), str(plan.stages[index].plan.mesh), escape(str(spec)))
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
