"""Pipelines on the command line: ``--stages``, the presets that are pipelines, and what their plans print."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from autopar import api
from autopar.api.pipelining import Pipeline
from autopar.api.staging.assemble import Planned, plan_pipeline
from autopar.api.staging.finalists import plan_searched
from autopar.api.staging.presets import PIPELINES, SUBMESHES, devices_each
from autopar.api.staging.search import Search, search_traced
from autopar.cli.console import note, progress
from autopar.cli.options import Planning, Searching
from autopar.cli.planning import Job, devices_for, parse_microbatches, provenance, traced_job
from autopar.cli.printing import collective_json, plan_json
from autopar.cluster import Mesh
from autopar.errors import InfeasibleError, MeshError, MicrobatchError, PinError, PresetError
from autopar.lowering.pipeline.cut import PipelineError
from autopar.plan import Collective, PipelinePlan
from autopar.solver.schedule import ScheduleError
from autopar.solver.schedule.registry import family

DEFAULT_SCHEDULE = Pipeline().schedule
ALL, NONE = "all", "none"
"""What ``--remat`` takes besides numbers of stages."""
SEARCHED = ("1f1b", "gpipe", "interleaved")
"""Schedules that ``--schedule auto`` tries."""


def wanted(request: Searching) -> bool:
    """Whether a command asks for a pipeline."""
    asked = request.stages, request.schedule, request.chunks, request.remat
    return any(asked) or getattr(request, "preset", "") in PIPELINES


@dataclass(frozen=True)
class Asked:
    """A pipeline of a given shape.

    Attributes:
        how: schedule, submeshes, microbatches, stages on each, and which of them run their forward part again.
        inner: the preset of the stages.
        meshes: what the command names; empty to try every shape.
        devices: of all submeshes; None for those at hand.
    """

    how: Pipeline
    inner: str
    meshes: tuple[Mesh, ...]
    devices: int | None

    @staticmethod
    def of(request: Searching, preset: str) -> "Asked":
        """Reads the options of a command.

        Raises:
            ScheduleError, MicrobatchError, MeshError: they do not fit together.
        """
        usual = PIPELINES.get(preset)
        schedule = _one_schedule(request, usual.schedule if usual else DEFAULT_SCHEDULE)
        chunks = request.chunks or family(schedule).traits.chunks
        stages = _number_of_stages(request, chunks)
        if stages % chunks:
            raise ScheduleError(
                f"{stages} stages cannot be shared out, {chunks} to a submesh",
                where=f"schedule {schedule}",
                fix=f"give a multiple of {chunks} as --stages, or another --chunks",
            )
        microbatches = parse_microbatches(request.microbatches) if request.microbatches else Pipeline().microbatches
        if not isinstance(microbatches, int):
            raise MicrobatchError(
                "--microbatches auto goes with --stages auto", fix="give a number, or search with --stages auto"
            )
        how = Pipeline(stages // chunks, schedule, microbatches, chunks, remat=_stages_again(request.remat))
        how.tasks()  # refuses what the schedule cannot take before anything takes time
        meshes = tuple(map(Mesh.parse, request.mesh or ()))
        found = Asked(how, usual.inner if usual else preset, meshes, request.devices)
        found.check_meshes()
        return found

    def check_meshes(self) -> None:
        """Raises MeshError where the meshes that are named do not fit the other options."""
        if self.meshes and len(self.meshes) not in (1, self.how.submeshes):
            raise MeshError(
                f"{len(self.meshes)} meshes for {self.how.submeshes} submeshes",
                where=f"schedule {self.how.schedule}, {self.how.chunks} stages on each",
                fix="give --mesh once for all submeshes, or once for each",
            )
        if self.meshes and self.devices not in (None, self.needed):
            raise MeshError(
                f"{self.how.submeshes} submeshes {', '.join(map(str, self.meshes))} have {self.needed} devices, "
                f"--devices says {self.devices}",
                fix="give one of the two",
            )

    @property
    def needed(self) -> int:
        """Devices of the meshes that are named."""
        times = self.how.submeshes if len(self.meshes) == 1 else 1
        return times * sum(mesh.n_devices for mesh in self.meshes)

    def shapes(self, preset: str, options: api.Options) -> Iterator[tuple[Mesh, ...]]:
        """The meshes to try: what the command names, what the preset wants, or every shape of an even share."""
        if self.meshes:
            yield self.meshes
            return
        each = devices_each(options.devices or 1, self.how.submeshes)
        if preset in PIPELINES:
            yield (PIPELINES[preset].submesh(each),)
        else:
            yield from ((mesh,) for mesh in replace(options, mesh=None, devices=each, preset=self.inner).meshes())


def _one_schedule(request: Searching, usual: str) -> str:
    named = request.schedule or [usual]
    if len(named) > 1 or named == [api.AUTO]:
        raise ScheduleError(
            f"--schedule {' --schedule '.join(named)} leaves a choice",
            fix="give one schedule, or search with --stages auto",
        )
    return named[0]


def _number_of_stages(request: Searching, chunks: int) -> int:
    if request.stages is None:
        return SUBMESHES * chunks
    if not request.stages.isdigit() or int(request.stages) < 1:
        raise ScheduleError(f"--stages {request.stages} is not a number", fix="give a number from 1 on, or auto")
    return int(request.stages)


def _stages_again(text: str | None) -> bool | frozenset[int]:
    if text in (None, NONE, ALL):
        return text == ALL
    if not all(number.isdigit() for number in text.split(",")):
        raise PipelineError(
            f"--remat {text} names no stages",
            fix="give all, none, or numbers of stages as 0,2; auto goes with --stages auto",
        )
    return frozenset(map(int, text.split(",")))


def plan_request(request: Planning, *, to_run: bool = False) -> tuple[Job, PipelinePlan]:
    """The pipeline that a command asks for, saved where it says; refused early if it is ``to_run`` and cannot."""
    job, found = _searched(request) if request.stages == api.AUTO else _asked(request)
    plan = replace(found, provenance=provenance(job))
    if to_run:
        devices_for(*plan.meshes)
    if request.output is not None:
        plan.save(request.output)
        note(f"plan written to {request.output}")
    return job, plan


def _asked(request: Planning) -> tuple[Job, PipelinePlan]:
    asked = Asked.of(request, request.preset)
    needed = asked.needed or request.devices
    job = traced_job(request, None, needed, needed or 0)
    return job, plan_asked(job, asked, request.preset).plan


def plan_asked(job: Job, asked: Asked, preset: str) -> Planned:
    """The best plan of a pipeline of a given shape over the meshes to try."""
    best: Planned | None = None
    refused: InfeasibleError | None = None
    with progress("planning") as update:
        for meshes in asked.shapes(preset, job.options):
            update(f"planning {asked.how.submeshes} submeshes {', '.join(map(str, meshes))}")
            own = replace(job.options, mesh=None, microbatches=1, preset=asked.inner, cost=job.prices(meshes[0]))
            try:
                found = plan_pipeline(job.traced, asked.how.layout(meshes, own), own, trace_s=job.trace_s)
            except InfeasibleError as error:
                refused = error if refused is None or error.least_bytes < refused.least_bytes else refused
                continue
            best = found if best is None or found.plan.step_s < best.plan.step_s else best
    if best is None:
        assert refused is not None
        raise refused
    return best


def _searched(request: Planning) -> tuple[Job, PipelinePlan]:
    for given, error, text in (
        (request.mesh, MeshError, "--mesh"),
        (request.preset, PresetError, "--preset"),
        (request.pin, PinError, "--pin"),
    ):
        if given:
            raise error(f"{text} does not go with --stages auto", fix="give a number of stages, or leave it out")
    if request.remat not in (None, api.AUTO, NONE):
        raise PipelineError(
            f"--remat {request.remat} does not go with --stages auto",
            fix="give a number of stages, or let the search choose: --remat auto, or none",
        )
    job = traced_job(request, None, request.devices, request.devices or 0)
    return job, plan_best(job, request).plan


def plan_best(job: Job, request: Searching) -> Planned:
    """The best pipeline of any number of stages."""
    given = parse_microbatches(request.microbatches) if request.microbatches else api.AUTO
    schedules = tuple(request.schedule or (DEFAULT_SCHEDULE,))
    search = Search(
        devices=job.options.devices or 1,
        hardware=job.options.hardware,
        microbatches=(given,) if isinstance(given, int) else (),
        schedules=SEARCHED if schedules == (api.AUTO,) else schedules,
        memory_gb=job.options.memory_gb,
        chunks=(request.chunks or 2,),
        allow=job.options.allow,
        remat=request.remat != NONE,
    )
    with progress(f"searching for stages on {search.devices} devices") as update:
        found = search_traced(job.traced, job.trace_s, search)
        update("planning the stages")
        return plan_searched(job.traced, found)


def pipeline_json(plan: PipelinePlan) -> dict[str, Any]:
    """What ``autopar plan --json`` prints of a pipeline: that of a plan, sums over its stages, and each stage."""
    solutions = [stage.plan.solution for stage in plan.stages]
    objective_s, bound_s = sum(s.objective_s for s in solutions), sum(s.lower_bound_s for s in solutions)
    unruled = dict.fromkeys(name for s in solutions for name, _ in s.replicated_primitives)
    alike = plan.meshes[0].sizes if len(set(plan.meshes)) == 1 else {}
    return {
        "objective_s": objective_s,
        "lower_bound_s": bound_s,
        "gap": 0.0 if objective_s <= 0 else max(0.0, 1 - bound_s / objective_s),
        "proven_optimal": all(s.proven_optimal for s in solutions),
        "step_s": plan.step_s,
        "peak_bytes": plan.peak_bytes,
        "flops_per_device": _most_flops(plan),
        "microbatches": plan.microbatches,
        "collectives": [collective_json(c) for c in _collectives(plan)],
        "trace_s": plan.seconds.get("trace", 0.0),
        "build_s": sum(s.build_s for s in solutions),
        "solve_s": sum(s.solve_s for s in solutions),
        "n_equations": sum(s.n_equations for s in solutions),
        "n_nodes": sum(s.n_nodes for s in solutions),
        "replicated_primitives": list(unruled),
        "params": {name: [list(axes) for axes in dims] for name, dims in plan.params.items()},
        "mesh": {"stage": len(plan.meshes)} | alike,
        "schedule": plan.schedule,
        "chunks": plan.chunks,
        "stage_of_layer": list(plan.stage_of_layer),
        "planned_s": dict(plan.seconds),
        "runner_ups": [asdict(other) for other in plan.runner_ups],
        "stages": [
            {"layers": list(plan.layers[index]), "place": stage.device, "scatters": stage.scatters}
            | {"rematerialised": stage.rematerialised}
            | asdict(stage.prediction)
            | {"plan": plan_json(stage.plan)}
            for index, stage in enumerate(plan.stages)
        ],
    }


def _most_flops(plan: PipelinePlan) -> float:
    totals = [0.0] * len(plan.meshes)
    for stage in plan.stages:
        totals[stage.device] += stage.plan.prediction.flops
    return max(totals)


def _collectives(plan: PipelinePlan) -> list[Collective]:
    """Of all stages, summed by kind and axes, most bytes first."""
    totals: dict[tuple[str, tuple[str, ...]], Collective] = {}
    for one in (one for stage in plan.stages for one in stage.plan.prediction.collectives):
        before = totals.get((one.kind, one.axes), replace(one, nbytes=0.0, count=0))
        totals[one.kind, one.axes] = replace(one, nbytes=before.nbytes + one.nbytes, count=before.count + one.count)
    return sorted(totals.values(), key=lambda one: -one.nbytes)
