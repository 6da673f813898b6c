"""compare: the unrestricted plan beside every preset, and pipelines beside the best one where that is searched for."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import typer

from autopar import api
from autopar.api.staging.assemble import Planned
from autopar.api.staging.presets import PIPELINES
from autopar.cli.console import FAILED, note, progress, show, show_json
from autopar.cli.options import Searching
from autopar.cli.pipelines import Asked, pipeline_json, plan_asked, plan_best
from autopar.cli.planning import Job, prepare_job
from autopar.cli.printing import plan_json
from autopar.cost import CostModel
from autopar.errors import InfeasibleError, MeshError, MicrobatchError, PinError, PresetError
from autopar.ir.layers import LayerError
from autopar.lowering.pipeline.cut import PipelineError
from autopar.lowering.time.microbatch import split_step
from autopar.plan import PipelinePlan, Plan, Prediction
from autopar.plan.figures import nbytes, seconds
from autopar.plan.terminal import table
from autopar.planner.presets import PRESETS
from autopar.planner.search import Prepared, prepare
from autopar.solver.schedule import ScheduleError

UNRESTRICTED, BEST_STAGES = "autopar", "stages"
NOT_SO = (InfeasibleError, LayerError, MeshError, MicrobatchError, PinError, PipelineError, PresetError, ScheduleError)
"""Why a step has no pipeline of some kind."""
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
    plan: Plan | PipelinePlan | None
    refused: str = ""

    @property
    def cost_s(self) -> float:
        """What entries of a kind are compared by: the solver's cost of a plan, the predicted step of a pipeline."""
        if self.plan is None:
            return math.inf
        return self.plan.step_s if isinstance(self.plan, PipelinePlan) else self.plan.solution.objective_s

    @property
    def step_s(self) -> float:
        """The predicted step."""
        assert self.plan is not None
        return self.plan.step_s if isinstance(self.plan, PipelinePlan) else self.plan.prediction.step_s


def compare(request: Searching) -> None:
    """Shows the comparison; ends with exit code 1 if a preset beats the unrestricted plan."""
    searched = request.stages == api.AUTO
    job = prepare_job(replace(request, stages=None, schedule=None, chunks=None, remat=None))
    (flat, beaten_by), piped = _entries(job), _pipeline_entries(job, request, searched)
    if flat[0].plan is None:
        raise InfeasibleError(flat[0].refused, fix="raise --memory-gb, or use more devices")
    beaten_by += [entry.name for entry in piped if searched and _cheaper(entry, piped[0])]
    entries = [*flat, *piped]
    if request.json:
        show_json({"plans": {e.name: _as_json(e) for e in entries}, "beaten_by": beaten_by})
    else:
        show(_table(entries, _n_devices(job)), *(f"{e.name}: {e.refused}" for e in entries if e.refused))
    if beaten_by:
        note(f"{', '.join(beaten_by)} cost less than the unrestricted plan, which should not be", "red")
        raise typer.Exit(FAILED)


def preset_names() -> list[str]:
    """Every preset once, without aliases."""
    return [name for name, preset in PRESETS.items() if preset.__name__ == name]


def _entries(job: Job) -> tuple[list[Entry], list[str]]:
    """The best plan of every preset over the meshes, and the presets that beat the unrestricted plan on one of them."""
    found: dict[str, Entry] = {}
    beaten_by: dict[str, None] = {}
    names = ["", *preset_names()]
    with progress("comparing") as update:
        for options, cost in job.per_mesh():
            update(f"building the problem on mesh {options.mesh}")
            prepared = prepare(split_step(job.traced, options.splitting()), cost, strict=options.strict)
            here: dict[str, Entry] = {}
            for name in names:
                update(f"{name or 'the unrestricted plan'} on mesh {options.mesh}")
                here[name] = _entry(prepared, cost, replace(options, preset=name))
                found[name] = _better(found.get(name), here[name])
            beaten_by |= {entry.name: None for entry in here.values() if _cheaper(entry, here[""])}
    return [found[name] for name in names], list(beaten_by)


def _entry(prepared: Prepared, cost: CostModel, options: api.Options) -> Entry:
    name = options.preset or UNRESTRICTED
    try:
        return Entry(name, api.plan_prepared(prepared, cost, options))
    except (InfeasibleError, PresetError, PinError) as error:
        return Entry(name, None, error.what)


def _n_devices(job: Job) -> int:
    return job.options.meshes()[0].n_devices


def _pipeline_entries(job: Job, request: Searching, searched: bool) -> list[Entry]:
    """The pipelines of the literature on as many devices; before them the best one, if it is searched for."""
    own = replace(request, mesh=None, devices=_n_devices(job))
    if searched:
        own = replace(own, stages=None, remat=None)
    job = replace(job, options=replace(job.options, mesh=None, devices=own.devices, microbatches=1))
    with progress("comparing pipelines") as update:
        found = [_pipeline_entry(BEST_STAGES, lambda: plan_best(job, request))] if searched else []
        for name in PIPELINES:
            update(f"pipeline {name}")
            planned = functools.partial(_planned, job, own, name)
            found.append(_pipeline_entry(name, planned))
    return found


def _planned(job: Job, request: Searching, preset: str) -> Planned:
    return plan_asked(job, Asked.of(request, preset), preset)


def _pipeline_entry(name: str, planned: Callable[[], Planned]) -> Entry:
    try:
        return Entry(name, planned().plan)
    except NOT_SO as error:
        return Entry(name, None, error.what)


def _better(old: Entry | None, new: Entry) -> Entry:
    """The entry with the cheaper plan; one with a plan before one without."""
    if old is None or old.plan is None or new.plan is None:
        return new if old is None or old.plan is None else old
    return new if _bundled_s(new) < _bundled_s(old) else old


def _bundled_s(entry: Entry) -> float:
    assert isinstance(entry.plan, Plan)
    return entry.plan.prediction.bundled_s


def _cheaper(one: Entry, other: Entry) -> bool:
    """Whether a plan costs less than another by more than rounding."""
    return one.cost_s < other.cost_s * (1 - SLACK)


def _as_json(entry: Entry) -> dict[str, Any]:
    if isinstance(entry.plan, PipelinePlan):
        return pipeline_json(entry.plan)
    return {"refused": entry.refused} if entry.plan is None else plan_json(entry.plan)


def _table(entries: list[Entry], n_devices: int) -> Any:
    columns = "plan|mesh|step|ratio|compute|communication|peak memory|sent|certificate"
    found = table(
        f"plans for {n_devices} devices",
        columns,
        "step|ratio|compute|communication|peak memory|sent",
    )
    for entry in entries:
        if entry.plan is None:
            found.add_row(entry.name, "none")
            continue
        mesh, p, peak_bytes, sent_bytes, proven = _figures(entry.plan)
        found.add_row(
            entry.name,
            mesh,
            seconds(entry.step_s),
            f"{entry.step_s / entries[0].step_s:.2f}",
            seconds(p.compute_s),
            seconds(p.communication_s),
            nbytes(peak_bytes),
            nbytes(sent_bytes),
            proven,
        )
    return found


def _figures(plan: Plan | PipelinePlan) -> tuple[str, Prediction, float, float, str]:
    """Mesh, times, memory, bytes sent and certificate: of a plan, or of the busiest stage of a pipeline."""
    if isinstance(plan, PipelinePlan):
        busiest = max(plan.stages, key=lambda stage: stage.prediction.busy_s)
        _, p, _, sent_bytes, proven = _figures(busiest.plan)
        alike = len(set(plan.meshes)) == 1
        mesh = f"{len(plan.meshes)} x {plan.meshes[0]}" if alike else "; ".join(map(str, plan.meshes))
        return mesh, p, plan.peak_bytes, sent_bytes + busiest.prediction.sent_bytes, proven
    proven = "proven" if plan.solution.proven_optimal else f"gap {plan.solution.gap:.2%}"
    p = plan.prediction
    return str(plan.mesh), p, p.peak_bytes, sum(c.nbytes for c in p.collectives), proven
