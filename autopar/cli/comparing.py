"""compare: the unrestricted plan beside every preset."""

from dataclasses import dataclass, replace
from typing import Any

import typer

from autopar import api
from autopar.cli.commands import plan_json
from autopar.cli.console import FAILED, note, progress, show, show_json
from autopar.cli.options import Searching
from autopar.cli.planning import Job, prepare_job
from autopar.cost import CostModel
from autopar.errors import InfeasibleError, PinError, PresetError
from autopar.lowering.time.microbatch import split_step
from autopar.plan import Plan
from autopar.plan.figures import nbytes, seconds
from autopar.plan.terminal import table
from autopar.planner.presets import PRESETS
from autopar.planner.search import Prepared, prepare

UNRESTRICTED = "autopar"
SLACK = 1e-6
"""Relative difference of two costs that is rounding."""


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: the best plan of a preset over the meshes, or why there is none.

    Attributes:
        name: of the preset.
        plan: its cheapest plan.
        refused: why there is none.
    """

    name: str
    plan: Plan | None
    refused: str = ""


def compare(request: Searching) -> None:
    """Shows the comparison; ends with exit code 1 if a preset beats the unrestricted plan."""
    job = prepare_job(request)
    entries = _entries(job)
    best = entries[0].plan
    if best is None:
        raise InfeasibleError(entries[0].refused, fix="raise --memory-gb, or use more devices")
    beaten_by = [e.name for e in entries[1:] if e.plan and _cheaper(e.plan, best)]
    if request.json:
        show_json({"plans": {e.name: _as_json(e) for e in entries}, "beaten_by": beaten_by})
    else:
        show(_table(entries, best), *(f"{e.name}: {e.refused}" for e in entries if e.refused))
    if beaten_by:
        note(f"{', '.join(beaten_by)} cost less than the unrestricted plan, which should not be", "red")
        raise typer.Exit(FAILED)


def preset_names() -> list[str]:
    """Every preset once, without aliases."""
    return [name for name, preset in PRESETS.items() if preset.__name__ == name]


def _entries(job: Job) -> list[Entry]:
    found: dict[str, Entry] = {}
    names = ["", *preset_names()]
    with progress("comparing") as update:
        for options, cost in job.per_mesh():
            update(f"building the problem on mesh {options.mesh}")
            prepared = prepare(split_step(job.traced, options.splitting()), cost, strict=options.strict)
            for name in names:
                update(f"{name or 'the unrestricted plan'} on mesh {options.mesh}")
                entry = _entry(prepared, cost, replace(options, preset=name))
                found[name] = _better(found.get(name), entry)
    return [found[name] for name in names]


def _entry(prepared: Prepared, cost: CostModel, options: api.Options) -> Entry:
    name = options.preset or UNRESTRICTED
    try:
        return Entry(name, api.plan_prepared(prepared, cost, options))
    except (InfeasibleError, PresetError, PinError) as error:
        return Entry(name, None, error.what)


def _better(old: Entry | None, new: Entry) -> Entry:
    """The entry with the cheaper plan; one with a plan before one without."""
    if old is None or old.plan is None or new.plan is None:
        return new if old is None or old.plan is None else old
    return new if new.plan.prediction.serial_s < old.plan.prediction.serial_s else old


def _cheaper(one: Plan, other: Plan) -> bool:
    """Whether a plan costs less than what the other may miss of its optimum explains."""
    return one.solution.objective_s < other.solution.objective_s * (1 - SLACK)


def _as_json(entry: Entry) -> dict[str, Any]:
    return {"refused": entry.refused} if entry.plan is None else plan_json(entry.plan)


def _table(entries: list[Entry], best: Plan) -> Any:
    columns = "plan|mesh|step|ratio|compute|communication|peak memory|sent|certificate"
    found = table(
        f"plans for {best.mesh.n_devices} devices",
        columns,
        "step|ratio|compute|communication|peak memory|sent",
    )
    for entry in entries:
        if entry.plan is None:
            found.add_row(entry.name, "none")
            continue
        p = entry.plan.prediction
        found.add_row(
            entry.name,
            str(entry.plan.mesh),
            seconds(p.step_s),
            f"{p.step_s / best.prediction.step_s:.2f}",
            seconds(p.compute_s),
            seconds(p.communication_s),
            nbytes(p.peak_bytes),
            nbytes(sum(c.nbytes for c in p.collectives)),
            "proven" if entry.plan.solution.proven_optimal else f"gap {entry.plan.solution.gap:.2%}",
        )
    return found
