"""From a traced step to the best plan: meshes, memory rounds, prediction. Nothing here runs a step."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from autopar.api.fitting import fitting
from autopar.api.refusal import too_little_memory
from autopar.api.splitting import AUTO, Chunks, plan_over_time, splitting_of
from autopar.cluster import Mesh, mesh_candidates
from autopar.cost import CostModel, RooflineCost, hardware, overlaps
from autopar.errors import InfeasibleError, MicrobatchError
from autopar.ir.arguments import Adapted
from autopar.ir.trace import Traced, trace
from autopar.lowering import predict
from autopar.lowering.bundles import spared_s
from autopar.lowering.instructions import LocalProgram
from autopar.lowering.local_program import build_local_program
from autopar.lowering.routes import routes
from autopar.lowering.simulate import hidden_s
from autopar.lowering.spmd import argument_shardings
from autopar.plan import Plan, Prediction, Splitting
from autopar.planner.intra import Formulation
from autopar.planner.pins import restrict
from autopar.planner.piping import PIPE
from autopar.planner.search import Limits, Masks, Prepared, prepare, search
from autopar.solver import Choice

AXES = ("data", "tensor")
"""Axis names of the meshes tried when the user names none."""

MEMORY_GAP = 5e-3
"""How close to its bound the solver must come under a memory limit; the last tenth of a percent can take minutes."""


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
        microbatches: parts of the batch that a step takes one after the other, exactly; "auto" tries 1, 2, 4, ... while
            memory binds.
        chunk: ``{"name pattern[dimension]": parts}`` of values that are never made whole; or ``{"vocab": parts}``,
            ``{"seq": parts}`` for the largest value with that dimension.
        batch: pattern of the names of the arguments whose dimension 0 is the batch; empty to guess.
        allow: "recompute" and "ghost_batch_norm": what to accept where microbatches need a value of the whole batch.
        rounds: on a mesh with an axis "pipe", how often a microbatch goes through all stages: more rounds, less bubble.
        on_progress: called with the solver's progress.

    On a mesh with an axis called "pipe" the step's scan over layers becomes a pipeline of as many stages; the number of
    microbatches is then searched if it is not given.
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
    microbatches: int | str = 1
    chunk: Chunks = ()
    batch: str = ""
    allow: str | tuple[str, ...] = ()
    rounds: int = 1
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

    def splitting(self) -> Splitting:
        """How to split the step over time; as many microbatches as stages, or one, where no number is given."""
        stages = self.meshes()[0].sizes.get(PIPE, 1) if self.mesh or self.cost else 1
        microbatches = stages if self.microbatches in (AUTO, 1) else self.microbatches
        given = splitting_of(microbatches, self.chunk, self.batch, self.allow)
        if self.rounds != 1 and (stages == 1 or self.rounds < 1):
            raise MicrobatchError(
                f"rounds={self.rounds} of a pipeline on mesh {self.mesh}",
                fix="give a mesh with an axis 'pipe', or rounds=1",
            )
        return replace(given, stages=stages, rounds=self.rounds)

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
    """The best plan over the meshes and the numbers of microbatches of the options."""
    plan_one = functools.partial(_plan_split, trace_s=trace_s, options=options)
    return plan_over_time(traced, options.microbatches, options.splitting(), plan_one)


def _plan_split(traced: Traced, *, trace_s: float, options: Options) -> Plan:
    """The best plan over the meshes; a mesh on which nothing fits is passed over if another fits."""
    best: Plan | None = None
    refused: InfeasibleError | None = None
    for mesh in options.meshes():
        cost = options.cost_model(mesh)
        prepared = prepare(traced, cost, strict=options.strict)
        try:
            found = plan_prepared(prepared, cost, options)
        except InfeasibleError as error:
            refused = error if refused is None or error.least_bytes < refused.least_bytes else refused
            continue
        if best is None or found.prediction.bundled_s < best.prediction.bundled_s:
            best = found
    if best is None:
        assert refused is not None
        raise refused
    named = options.hardware or best.hardware  # the file of a profile, not the name that it bears
    timed = replace(best.solution, trace_s=trace_s)
    return replace(best, hardware=named, solution=timed, place=functools.partial(argument_shardings, traced.in_tree))


def plan_prepared(prepared: Prepared, cost: CostModel, options: Options, masks: Masks | None = None) -> Plan:
    """The best plan on one mesh under the preset and pins (or ``masks`` instead of them).

    Memory is priced only when the best plan without a limit does not fit.

    Raises:
        InfeasibleError: no plan was found that fits.
    """
    allowed = restrict(prepared.graph, prepared.formulator, options.preset, options.pins) if masks is None else masks

    def planned(limits: Limits) -> Plan:
        return _lowered(prepared, cost, options, *search(prepared, limits, allowed))

    def within(limit_bytes: float) -> Plan:
        return planned(Limits(limit_bytes, options.seconds, MEMORY_GAP, options.on_progress))

    def counted_bytes(plan: Plan) -> float:
        _, formulation, choice = plan.runtime
        problem = formulation.problem if formulation.problem.usages else prepared.formulator.formulate(0.0).problem
        return problem.peak(choice.strategies)

    best = planned(Limits(None, options.seconds, on_progress=options.on_progress))
    limit_bytes = options.limit_bytes(cost)
    if best.prediction.peak_bytes > limit_bytes:
        best = fitting(limit_bytes, best, counted_bytes, within)
    if best.prediction.peak_bytes > limit_bytes:
        raise too_little_memory(limit_bytes, best, cost)
    return best


def _lowered(
    prepared: Prepared,
    cost: CostModel,
    options: Options,
    found: Plan,
    formulation: Formulation,
    choice: Choice,
) -> Plan:
    """The plan with what its local program costs."""
    local = build_local_program(prepared.traced.program, found, cost, prepared.rules)
    noted = as_lowered(found, local, options, (prepared, formulation, choice))
    seconds = equation_seconds(formulation, choice)
    return replace(noted, prediction=prediction(local, seconds, cost, prepared.traced.state))


def as_lowered(
    found: Plan, local: LocalProgram, options: Options, runtime: tuple[Prepared, Formulation, Choice]
) -> Plan:
    """A plan as a search found it with what its local program and its options add: how to run it, not what it costs."""
    return replace(found, routes=routes(local), preset=options.preset, pins=options.pins, runtime=runtime)


def equation_seconds(formulation: Formulation, choice: Choice) -> dict[str, float]:
    """Seconds that a step spends in each equation, by name; a cluster's under the name of its first one."""
    equations, found = formulation.pricing.graph.program.equations, dict[str, float]()
    for unit, label in zip(formulation.units, choice.strategies, strict=True):
        price_s = float(formulation.pricing.vector(unit)[label])
        if price_s:
            found[equations[unit.position].name] = price_s
    return found


def prediction(
    local: LocalProgram, seconds: Mapping[str, float], cost: CostModel, state: Sequence[tuple[int, int]] = ()
) -> Prediction:
    """What a local program costs.

    Args:
        local: the program.
        seconds: the planner's price of each equation, over a whole step, by name.
        cost: prices its collectives, and knows the memory of a device.
        state: (input, output) pairs that share a buffer.
    """
    compute_s, communication_s = sum(seconds.values()) - predict.inside_s(local), predict.communication_s(local)
    memory, beside = predict.memory(local, cost, state), overlaps(cost)
    spared = 0.0 if beside else spared_s(local, cost)
    return Prediction(
        step_s=compute_s + communication_s - (hidden_s(local, seconds, overlap=True) if beside else spared),
        compute_s=compute_s,
        communication_s=communication_s,
        peak_bytes=memory.peak_bytes,
        on_chip_bytes=memory.on_chip_bytes,
        state_bytes=sum(predict.local_bytes(slot, local) for slot in local.inputs),
        flops=predict.flops(local),
        spared_s=spared,
        collectives=predict.collectives(local),
    )
