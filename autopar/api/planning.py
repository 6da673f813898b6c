"""From a traced step to the best plan: meshes, memory rounds, prediction. Nothing here runs a step."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from autopar.cluster import Mesh, mesh_candidates
from autopar.cost import CostModel, RooflineCost, hardware, on_chip_bytes, rounds_products
from autopar.errors import InfeasibleError
from autopar.ir.arguments import Adapted
from autopar.ir.trace import Traced, trace
from autopar.lowering import predict
from autopar.lowering.local_program import LocalProgram, build_local_program
from autopar.lowering.spmd import argument_shardings
from autopar.plan import Plan, Prediction
from autopar.planner.intra import Formulation
from autopar.planner.pins import restrict
from autopar.planner.search import Limits, Masks, Prepared, prepare, search
from autopar.solver import Choice

AXES = ("data", "tensor")
"""Axis names of the meshes tried when the user names none."""

MEMORY_GAP = 5e-3
"""How close to its bound the solver must come under a memory limit; the last tenth of a percent can take minutes."""

MEMORY_ROUNDS = 4
"""How often the solver's limit is tightened when the lowered program's peak is above the limit."""


@dataclass(frozen=True)
class Options:
    """How to plan.

    Attributes:
        mesh: the mesh, as a Mesh or as ``"data=2,tensor=4"``; None searches the shapes of ``devices`` devices.
        devices: how many devices to plan for; None means those that JAX sees.
        hardware: a profile's name or file; None means that of the devices that JAX sees.
        memory_gb: memory of one device in 1e9 bytes; None means that of the profile.
        preset: name of a preset, empty for none.
        pins: (name pattern, spec) pairs, as ``("params/.*kernel", ",tensor")``.
        strict: raise on a primitive without a rule instead of replicating it.
        seconds: time for the solver, per mesh.
        cost: a cost model instead of ``hardware``'s.
        on_progress: called with the solver's progress.
    """

    mesh: Mesh | str | None = None
    devices: int | None = None
    hardware: str | None = None
    memory_gb: float | None = None
    preset: str = ""
    pins: tuple[tuple[str, str], ...] = ()
    strict: bool = False
    seconds: float = 60.0
    cost: CostModel | None = None
    on_progress: Callable[[Any], None] | None = field(default=None, compare=False, repr=False)

    def meshes(self) -> tuple[Mesh, ...]:
        """The meshes to try."""
        if self.cost is not None:
            return (self.cost.mesh,)
        if self.mesh is not None:
            return (Mesh.parse(self.mesh) if isinstance(self.mesh, str) else self.mesh,)
        n_devices = self.devices or jax.device_count()
        found = mesh_candidates(n_devices, AXES)[::-1]
        alike = n_devices <= hardware(self.hardware or detect_hardware()).domain_devices
        if self.preset or self.pins or not alike:
            return found
        # Where all links are alike, names mean nothing to an unrestricted plan: 4 x 2 and 2 x 4 are one mesh.
        return tuple({tuple(sorted(mesh.shape)): mesh for mesh in found[::-1]}.values())

    def cost_model(self, mesh: Mesh) -> CostModel:
        """The prices on one mesh."""
        return self.cost or RooflineCost(hardware(self.hardware or detect_hardware()), mesh)

    def limit_bytes(self, cost: CostModel) -> float:
        """Memory of one device."""
        return self.memory_gb * 1e9 if self.memory_gb is not None else cost.memory_bytes


def detect_hardware() -> str:
    """The name of the profile of the devices that JAX sees; "cpu" when none fits."""
    kind = jax.devices()[0].device_kind.lower()
    known = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v5": "v5p", "v6": "v6e"}
    known |= {name: name for name in ("v100", "a100", "h100", "h200", "b200")}
    return next((profile for mark, profile in known.items() if mark in kind), "cpu")


def traced_in_time(adapted: Adapted) -> tuple[Traced, float]:
    """The traced step and the CPU seconds that tracing took."""
    start = time.process_time()
    traced = trace(adapted.function, *adapted.arguments)
    return traced, time.process_time() - start


def plan_traced(traced: Traced, trace_s: float, options: Options) -> Plan:
    """The best plan over the meshes of the options; a mesh on which nothing fits is passed over if another fits."""
    best: Plan | None = None
    refused: InfeasibleError | None = None
    for mesh in options.meshes():
        cost = options.cost_model(mesh)
        prepared = prepare(traced, cost, strict=options.strict)
        try:
            found = plan_prepared(prepared, cost, options)
        except InfeasibleError as error:
            refused = error
            continue
        if best is None or found.prediction.step_s < best.prediction.step_s:
            best = found
    if best is None:
        assert refused is not None
        raise refused
    named = options.hardware or best.hardware  # the file of a profile, not the name that it bears
    timed = replace(best.solution, trace_s=trace_s)
    return replace(best, hardware=named, solution=timed, place=functools.partial(argument_shardings, traced.in_tree))


def plan_prepared(prepared: Prepared, cost: CostModel, options: Options, masks: Masks | None = None) -> Plan:
    """The best plan on one mesh under the preset and pins (or ``masks`` instead of them).

    Memory is priced only when the best plan without a limit does not fit; then the solver's limit is tightened until
    the lowered program does.
    """
    if masks is None:
        masks = restrict(prepared.graph, prepared.formulator, options.preset, options.pins)
    unlimited = Limits(None, options.seconds, on_progress=options.on_progress)
    found = _lowered(prepared, cost, options, *search(prepared, unlimited, masks))
    limit = options.limit_bytes(cost)
    most = limit + on_chip_bytes(cost)  # the solver's rows count what the compiler may put on the chip
    allowed = most
    for attempt in range(MEMORY_ROUNDS):
        if found.prediction.peak_bytes <= limit:
            return found
        limits = Limits(allowed, options.seconds, MEMORY_GAP, options.on_progress, count_copies=attempt > 0)
        try:
            found = _lowered(prepared, cost, options, *search(prepared, limits, masks))
        except InfeasibleError as error:
            # The solver counts a little differently from the lowered program: take the least that it can reach.
            least = getattr(error.__cause__, "least_bytes", math.inf)
            if attempt == 0 or not allowed < least <= most:
                raise
            allowed = least * (1 + 1e-6)
            continue
        if attempt > 0:
            allowed *= 0.98 * most / (found.prediction.peak_bytes + most - limit)
    if found.prediction.peak_bytes <= limit:
        return found
    raise InfeasibleError(
        f"no plan was found that fits {limit / 1e9:.3g} GB a device",
        where=f"mesh {cost.mesh}; the last plan needs {found.prediction.peak_bytes / 1e9:.3g} GB",
        fix="raise --memory-gb, use more devices, or make the batch smaller",
    )


def _lowered(
    prepared: Prepared,
    cost: CostModel,
    options: Options,
    found: Plan,
    formulation: Formulation,
    choice: Choice,
) -> Plan:
    """The plan with what its local program costs."""
    local = build_local_program(prepared.traced.program, found, cost)
    chosen = zip(formulation.units, choice.strategies, strict=True)
    compute_s = float(sum(formulation.pricing.vector(unit)[label] for unit, label in chosen))
    return replace(
        found,
        prediction=prediction(local, compute_s, cost),
        preset=options.preset,
        pins=options.pins,
        runtime=(prepared, formulation, choice),
    )


def prediction(local: LocalProgram, compute_s: float, cost: CostModel) -> Prediction:
    """What a local program costs; ``compute_s`` is the planner's price of its equations."""
    buffers = predict.live_buffers(local, rounds_products=rounds_products(cost))
    communication_s = predict.communication_s(local)
    state_bytes = sum(predict.local_bytes(slot, local) for slot in local.inputs)
    peak_bytes = predict.peak(buffers)[0]
    return Prediction(
        step_s=compute_s + communication_s,
        compute_s=compute_s,
        communication_s=communication_s,
        peak_bytes=max(state_bytes, peak_bytes - on_chip_bytes(cost)),
        state_bytes=state_bytes,
        flops=predict.flops(local),
        collectives=predict.collectives(local),
    )
