"""explain and diff: what plan files say."""

from dataclasses import asdict
from typing import Any

from autopar import api
from autopar.cli.console import note, progress, show, show_json
from autopar.cli.options import Comparing, Explaining
from autopar.cli.planning import Job, adapted, force_devices, read_target
from autopar.errors import PlanError
from autopar.plan import Plan
from autopar.plan.figures import flops, nbytes, seconds
from autopar.plan.terminal import escape, table
from autopar.planner import diff as differ
from autopar.planner.explain import Alternative, alternatives, find_value, readers_of, specs_of
from autopar.planner.pins import restrict
from autopar.planner.search import prepare
from autopar.spec import Spec


def explain(request: Explaining) -> None:
    """Shows the values of a plan, or the alternatives of one value."""
    plan = Plan.load(request.plan)
    if request.value is None:
        if request.json:
            show_json({name: str(spec) for name, spec in plan.values.items()})
        else:
            show(plan, _values_table(plan))
        return
    found, readers = _alternatives(plan, _job(plan, request), request.value)
    if request.json:
        alternatives = [_as_json(one) for one in found]
        show_json({"value": request.value, "read_by": list(readers), "alternatives": alternatives})
    else:
        show(_why(plan, request.value), _readers_table(plan, request.value, readers))
        show(_alternatives_table(request.value, found))


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
    api.check_fits(plan, traced)
    return Job(target, traced, trace_s, options, recorded.get("costs") or "roofline")


def _alternatives(plan: Plan, job: Job, name: str) -> tuple[list[Alternative], tuple[str, ...]]:
    """What else the value could be, cheapest first, and the equations that read it."""
    ((options, cost),) = job.per_mesh()
    with progress("building the problem") as update:
        prepared = prepare(job.traced, cost)
        masks = restrict(prepared.graph, prepared.formulator, plan.preset, plan.pins)
        value = find_value(prepared.graph, name)
        total, found = len(specs_of(prepared, value)), []
        replan = lambda narrowed: api.plan_prepared(prepared, cost, options, narrowed)  # noqa: E731
        update(f"alternative 1 of {total - 1}")
        for one in alternatives(prepared, plan, name, masks, replan):
            found.append(one)
            update(f"alternative {len(found)} of {total - 1}")
    ordered = sorted(found, key=lambda one: (bool(one.refused), one.objective_s))
    return ordered, readers_of(prepared.graph, value)


def _why(plan: Plan, name: str) -> str:
    """One line on the value's place in the plan."""
    shapes = {argument.name: argument.shape for argument in plan.arguments}
    shape = f" of shape {shapes[name]}" if name in shapes else ""
    splits = ", ".join(f"{axis} splits {split}" for axis, split in plan.equations.get(name, ()))
    return escape(f"{name}{shape} lies as {plan.values[name]} on mesh {plan.mesh}{f'; {splits}' if splits else ''}")


def _readers_table(plan: Plan, name: str, readers: tuple[str, ...]) -> Any:
    """The equations that read a value, what each mesh axis splits in them, and the copy that they read."""
    shown = table(f"equations that read {name}", "equation|what each axis splits|from a copy laid out as")
    copies = {reader: view.spec for view in plan.views.get(name, ()) for reader in view.readers}
    for reader in readers:
        splits = ", ".join(f"{axis}: {split}" for axis, split in plan.equations.get(reader, ()))
        shown.add_row(reader, splits, escape(str(copies[reader])) if reader in copies else "")
    return shown


def _alternatives_table(name: str, found: list[Alternative]) -> Any:
    figures = "step|compute|communication|peak memory"
    shown = table(f"layouts of {name}, and what each adds to the step", f"spec|{figures}|", figures)
    for one in found:
        if one.refused:
            shown.add_row(escape(str(one.spec)), "", "", "", "", f"none: {one.refused}")
            continue
        times = (_signed_s(x) for x in (one.objective_s, one.compute_s, one.communication_s))
        shown.add_row(escape(str(one.spec)), *times, _signed_bytes(one.peak_bytes), "chosen" if one.chosen else "")
    return shown


def _signed_s(value_s: float) -> str:
    return f"+{seconds(value_s)}" if value_s >= 1e-12 else "0" if value_s > -1e-12 else f"-{seconds(-value_s)}"


def _signed_bytes(value: float) -> str:
    return "0" if not value else f"{'+' if value > 0 else '-'}{nbytes(abs(value))}"


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
    if found.empty:
        show("the plans decide the same")
        return
    show("mesh " + " -> ".join(dict.fromkeys(found.mesh)))
    show(_figures_table("predicted", found.figures), _modules_table(found.modules))
    show(_figures_table("bytes sent by a device", found.collectives))


def _figures_table(title: str, figures: tuple[differ.Figure, ...]) -> Any:
    shown = table(title, "|before|after|change", "before|after|change")
    for figure in figures:
        text, signed = (seconds, _signed_s) if figure.name.endswith("_s") else (nbytes, _signed_bytes)
        if figure.name == "flops":
            text, signed = flops, "{:+.4g}".format
        shown.add_row(figure.name, text(figure.before), text(figure.after), signed(figure.change))
    return shown


def _modules_table(modules: tuple[differ.Module, ...]) -> Any:
    shown = table("layouts", "module|value|before|after")
    for module in modules:
        count = f"{module.name or 'outside modules'} ({len(module.changes)} of {module.n_values})"
        for i, change in enumerate(module.changes):
            name = change.name.rpartition("/")[2]
            shown.add_row(count if i == 0 else "", name, _spec(change.before), _spec(change.after))
    return shown


def _spec(spec: Spec | None) -> str:
    return "absent" if spec is None else escape(str(spec))


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
