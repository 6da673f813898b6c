"""From the options of a command to a plan: loads the target, forces devices, searches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from autopar import api
from autopar.cli.console import note, noticed_interrupts, progress
from autopar.cli.options import Planning, Searching
from autopar.cluster import Mesh
from autopar.cost import CostModel, RooflineCost, hardware
from autopar.cost.measured import MeasuredCost
from autopar.errors import AutoparError, HardwareError, InfeasibleError, MeshError, MicrobatchError, PinError
from autopar.ir.arguments import Adapted, adapt
from autopar.ir.trace import Traced
from autopar.lowering.pipeline.build import submeshes
from autopar.plan import Plan
from autopar.plan.figures import certificate
from autopar.planner.pins import parse_pin
from autopar.targets import Target, load, parse_settings

DEFAULT_DEVICES = 8
"""How many devices a plan is for when nobody says and the machine has one CPU."""

TIMINGS = Path.home() / ".cache" / "autopar"
"""Where ``--costs measured`` keeps its timings."""


def force_devices(n_devices: int) -> None:
    """Makes the CPU stand for as many devices, unless JAX already runs in this process."""
    try:
        jax.config.update("jax_num_cpu_devices", max(n_devices, DEFAULT_DEVICES))
    except RuntimeError:
        return  # JAX runs already: its devices are what there is


def devices_for(*meshes: Mesh) -> Sequence[Any]:
    """The devices to run on, for one mesh or one after the other: JAX's own, or CPU devices where those are too few.

    Raises:
        MeshError: there are too few of either.
    """
    own, needed = jax.devices(), sum(mesh.n_devices for mesh in meshes)
    found = own if len(own) >= needed else jax.devices("cpu")
    return [device for mesh in submeshes(meshes, found) for device in mesh.devices.flat]


def read_target(text: str, settings: list[str] | None) -> Target:
    """The TARGET with its ``--set`` pairs."""
    return load(text, parse_settings(settings or []))


@dataclass(frozen=True)
class Job:
    """A target that has been traced, ready to be planned under any restriction.

    Attributes:
        target: what is planned.
        traced: its step.
        trace_s: seconds that tracing took.
        options: how to plan it.
        costs: "roofline" or "measured".
    """

    target: Target
    traced: Traced
    trace_s: float
    options: api.Options
    costs: str

    def per_mesh(self) -> list[tuple[api.Options, CostModel]]:
        """The options and the prices of every mesh to try."""
        pairs = ((mesh, self.prices(mesh)) for mesh in self.options.meshes())
        return [(replace(self.options, mesh=mesh, cost=cost), cost) for mesh, cost in pairs]

    def prices(self, mesh: Mesh) -> CostModel:
        """The prices on a mesh."""
        roofline = RooflineCost(hardware(self.options.hardware or "cpu"), mesh)
        return MeasuredCost(roofline, TIMINGS) if self.costs == "measured" else roofline


def prepare_job(request: Searching) -> Job:
    """Loads and traces the target of a command."""
    mesh = one_mesh(request)
    return traced_job(request, mesh, request.devices, mesh.n_devices if mesh else request.devices or 0)


def traced_job(request: Searching, mesh: Mesh | None, devices: int | None, needed: int) -> Job:
    """Loads and traces the target of a command.

    Args:
        request: the command's options.
        mesh: to plan for, if it is known.
        devices: to plan for where there is no mesh; None for those at hand.
        needed: how many devices should be there to run on.
    """
    if request.costs not in ("roofline", "measured"):
        raise HardwareError(f"unknown costs '{request.costs}'", fix="choose roofline or measured")
    pins = tuple(map(parse_pin, request.pin or ()))
    target = read_target(request.target, request.set)
    force_devices(needed)
    options = api.Options(
        mesh=mesh,
        devices=devices or default_devices(),
        hardware=request.hardware or api.detect_hardware(),
        memory_gb=request.memory_gb,
        pins=pins,
        microbatches=parse_microbatches(request.microbatches),
        rounds=request.rounds,
        chunk=tuple(map(parse_chunk, request.chunk or ())),
        allow=tuple(request.allow or ()),
        strict=request.strict,
        seconds=request.seconds,
    )
    for each in options.meshes()[:1]:
        options.cost_model(each)  # refuses unknown hardware before anything takes time
    with progress(f"tracing {target.text}"):
        traced, trace_s = api.traced_in_time(adapted(target))
    return Job(target, traced, trace_s, options, request.costs)


def one_mesh(request: Searching) -> Mesh | None:
    """The mesh that a command names; raises MeshError where it names another number of devices, or several meshes."""
    if not request.mesh:
        return None
    mesh = Mesh.parse(request.mesh[0])
    if len(request.mesh) > 1:
        raise MeshError(
            f"{len(request.mesh)} meshes for one program", fix="give one --mesh, or --stages for a pipeline on several"
        )
    if request.devices not in (None, mesh.n_devices):
        raise MeshError(
            f"mesh {mesh} has {mesh.n_devices} devices, --devices says {request.devices}",
            fix="give one of the two",
        )
    return mesh


def parse_microbatches(text: str | None) -> int | str:
    """A number, one if none is given; or "auto"."""
    if text is None:
        return 1
    if text == api.AUTO or text.isdigit():
        return text if text == api.AUTO else int(text)
    raise MicrobatchError(f"--microbatches {text} is not a number", fix="give a number from 1 on, or auto")


def parse_chunk(text: str) -> tuple[str, int]:
    """``PATTERN[DIM]=N``."""
    name, _, count = text.rpartition("=")
    if not name or not count.isdigit():
        raise MicrobatchError(
            f"--chunk {text} does not parse", fix="write it as --chunk '.*head/dot_general[2]=8' or vocab=8"
        )
    return name, int(count)


def default_devices() -> int:
    """As many as there are accelerators; eight where there are none, or one."""
    n_devices = jax.device_count()
    return n_devices if jax.default_backend() != "cpu" and n_devices > 1 else DEFAULT_DEVICES


def adapted(target: Target) -> Adapted:
    """The target's step as a pure function of shapes."""
    step, state, batch = target.abstract()
    return adapt(step, (state, batch))


def plan_job(job: Job, preset: str = "") -> Plan:
    """The best plan over the meshes, with progress; Ctrl-C keeps the best one so far."""
    best: Plan | None = None
    refused: AutoparError | None = None
    choices = job.per_mesh()
    with progress("planning") as update, noticed_interrupts() as interrupts:
        for number, (options, _) in enumerate(choices, 1):
            where = f"planning for mesh {options.mesh} ({number} of {len(choices)})"
            update(where)
            told = replace(options, preset=preset, on_progress=_teller(update, where, interrupts))
            try:
                found = api.plan_traced(job.traced, job.trace_s, told)
            except (InfeasibleError, PinError) as error:
                refused = error  # another mesh may do
            except KeyboardInterrupt:
                pass  # there is no incumbent yet; a mesh before this one may have given a plan
            else:
                best = found if best is None else min(best, found, key=lambda plan: plan.prediction.bundled_s)
            if interrupts:
                break
    if best is None:
        raise KeyboardInterrupt if interrupts or refused is None else refused
    if interrupts:
        note(f"interrupted: this is the best plan so far, {certificate(best)} on mesh {best.mesh}", "yellow")
    return replace(best, provenance=provenance(job))


def provenance(job: Job) -> dict[str, str]:
    """What is needed to plan again."""
    options = job.options
    return {
        "target": job.target.text,
        "settings": " ".join(f"{name}={value}" for name, value in job.target.settings.items()),
        "memory_gb": "" if options.memory_gb is None else str(options.memory_gb),
        "hardware": options.hardware or "",
        "costs": job.costs,
    }


def _teller(update: Callable[[str], None], where: str, interrupts: Sequence[int]) -> Callable[[Any], None]:
    """Shows incumbent and bound of a running solve; after a Ctrl-C, ends each later one at its first incumbent."""

    def tell(at: Any) -> None:
        cost = f"{at.incumbent * 1e3:.3f} ms" if at.incumbent < float("inf") else "none yet"
        update(f"{where}: {at.stage}, best {cost}, at least {max(at.bound, 0) * 1e3:.3f} ms")
        if interrupts and at.incumbent < float("inf") and at.stage != "done":
            raise KeyboardInterrupt

    return tell


def plan_request(request: Planning, *, to_run: bool = False) -> tuple[Job, Plan]:
    """The plan that a command asks for, saved where it says; refused early if it is ``to_run`` and cannot."""
    job = prepare_job(request)
    if to_run:
        devices_for(job.options.meshes()[0])
    plan = plan_job(job, request.preset)
    if request.output is not None:
        plan.save(request.output)
        note(f"plan written to {request.output}")
    return job, plan
