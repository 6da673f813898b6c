"""The Python surface: ``parallelize``, ``plan`` and ``compile``. Thin; the work is done in planner and lowering."""

import functools
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax

from autopar.cluster import Mesh, mesh_candidates
from autopar.compat import shape_struct
from autopar.cost import CostModel, RooflineCost, hardware, on_chip_bytes, rounds_products
from autopar.errors import InfeasibleError, PlanError
from autopar.ir.arguments import Adapted, adapt
from autopar.ir.fingerprint import fingerprint
from autopar.ir.trace import Traced, trace
from autopar.lowering import predict
from autopar.lowering.jit import lower_jit
from autopar.lowering.local_program import LocalProgram, build_local_program
from autopar.lowering.spmd import device_mesh, lower, shardings
from autopar.plan import Plan, Prediction
from autopar.planner.intra import Formulation
from autopar.planner.pins import restrict
from autopar.planner.search import Limits, Masks, Prepared, prepare, search
from autopar.solver import Choice

AXES = ("data", "tensor")
"""Axis names of the meshes tried when the user names none."""

MEMORY_GAP = 2e-3
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
        return mesh_candidates(self.devices or jax.device_count(), AXES)

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


def plan(step: Callable[..., Any], *args: Any, static_argnums: Sequence[int] = (), **options: Any) -> Plan:
    """The best plan for ``step(*args)``; shapes suffice, nothing runs and no device is touched.

    Args:
        step: a train step: a pure function of pytrees, or one that updates Flax NNX objects.
        *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.
        static_argnums: arguments that are hashable Python values.
        **options: see ``Options``.

    Raises:
        TraceError, MeshError, PinError, PresetError, HardwareError, InfeasibleError: see their texts.
    """
    adapted = adapt(step, args, static_argnums)
    return plan_traced(*traced_in_time(adapted), Options(**options))


def traced_in_time(adapted: Adapted) -> tuple[Traced, float]:
    """The traced step and the CPU seconds that tracing took."""
    start = time.process_time()
    traced = trace(adapted.function, *adapted.arguments)
    return traced, time.process_time() - start


def plan_traced(traced: Traced, trace_s: float, options: Options) -> Plan:
    """The best plan over the meshes of the options."""
    best: Plan | None = None
    for mesh in options.meshes():
        cost = options.cost_model(mesh)
        prepared = prepare(traced, cost, strict=options.strict)
        found = plan_prepared(prepared, cost, options)
        if best is None or found.prediction.step_s < best.prediction.step_s:
            best = found
    assert best is not None
    named = options.hardware or best.hardware  # the file of a profile, not the name that it bears
    timed = replace(best.solution, trace_s=trace_s)
    return replace(best, hardware=named, solution=timed, place=functools.partial(argument_shardings, traced.in_tree))


def argument_shardings(tree: Any, plan: Plan, devices: Sequence[Any] | None = None) -> Any:
    """The plan's specs of the step's arguments as NamedShardings, in the structure ``tree``."""
    specs = [argument.spec for argument in plan.arguments[: tree.num_leaves]]
    return jax.tree.unflatten(tree, shardings(specs, device_mesh(plan.mesh, devices)))


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
        f"no plan was found that fits {limit / 1e9:.3f} GB a device",
        where=f"mesh {cost.mesh}; the last plan needs {found.prediction.peak_bytes / 1e9:.3f} GB",
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


class ParallelStep:
    """A train step that plans at its first call and then runs on the mesh. Made by ``parallelize`` or ``compile``."""

    def __init__(self, step: Callable[..., Any], options: Options, settings: "Settings") -> None:
        self.step, self.options, self.settings = step, options, settings
        self._programs: dict[Any, _Compiled] = {}
        functools.update_wrapper(self, step)

    def plan(self, *args: Any, **keywords: Any) -> Plan:
        """The plan for these arguments, without running; shapes suffice, and no device is touched."""
        return self.compiled(*args, **keywords).plan

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Runs the step; the state that it returns stays sharded."""
        adapted = adapt(self.step, args, self.settings.static_argnums, keywords)
        return self._compiled(adapted).run(adapted)

    def init(self, init_fn: Callable[..., Any], *args: Any, batch: Any = None) -> Any:
        """Runs ``init_fn(*args)`` so that every array is born sharded, never whole on one device.

        Args:
            init_fn: makes the state, the first argument of the step.
            *args: its arguments, such as a key.
            batch: the step's other arguments (shapes suffice), as a tuple or a single one.
        """
        state = jax.eval_shape(init_fn, *args)
        rest = batch if isinstance(batch, tuple) else (batch,)
        compiled = self.compiled(state, *rest)
        placed = compiled.shardings[: len(jax.tree.leaves(state))]
        return jax.jit(init_fn, out_shardings=jax.tree.unflatten(jax.tree.structure(state), placed))(*args)

    def compiled(self, *args: Any, **keywords: Any) -> "_Compiled":
        """The program for arguments of these shapes, planned and lowered once."""
        return self._compiled(adapt(self.step, args, self.settings.static_argnums, keywords))

    def _compiled(self, adapted: Adapted) -> "_Compiled":
        leaves, tree = jax.tree.flatten(adapted.arguments)
        key = (tree, adapted.key, tuple(map(shape_struct, leaves)))
        if key not in self._programs:
            self._programs[key] = _Compiled(adapted, self.options, self.settings)
        return self._programs[key]


@dataclass(frozen=True)
class Settings:
    """How to run.

    Attributes:
        plan: a plan to run instead of planning.
        donate: whether the state's buffers may be reused.
        static_argnums: arguments that are hashable Python values.
        devices: the devices of the mesh, in row-major order; None means the first that JAX sees.
        cache_dir: where plans are kept between runs; None keeps none.
        lower: "spmd", every collective explicit; or "jit", the plan's specs as constraints that XLA partitions.
    """

    plan: Plan | None = None
    donate: bool = True
    static_argnums: tuple[int, ...] = ()
    devices: Sequence[Any] | None = None
    cache_dir: Path | None = None
    lower: Literal["spmd", "jit"] = "spmd"


class _Compiled:
    """One planned program and how to call it; it is lowered, and devices are touched, when it is first run."""

    def __init__(self, adapted: Adapted, options: Options, settings: Settings) -> None:
        traced, trace_s = traced_in_time(adapted)
        self.traced, self.devices, self.target = traced, settings.devices, settings.lower
        found = self._find_plan(traced, trace_s, options, settings)
        place = functools.partial(argument_shardings, traced.in_tree, devices=settings.devices)
        self.plan = replace(found, place=place)
        hardware_name = options.hardware or found.hardware or None
        cost = replace(options, mesh=found.mesh, hardware=hardware_name).cost_model(found.mesh)
        self.local = build_local_program(traced.program, found, cost)
        self.donated = tuple(i for i, _ in traced.state) if settings.donate else ()

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        return device_mesh(self.plan.mesh, self.devices)

    @functools.cached_property
    def shardings(self) -> list[jax.sharding.NamedSharding]:
        """Where every program input lives: argument leaves, then constants."""
        return list(shardings([slot.spec for slot in self.local.inputs], self.mesh))

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        """The jitted program on flat inputs."""
        if self.target == "jit":
            return lower_jit(self.traced.program, self.plan, self.mesh, self.donated)
        return lower(self.local, self.mesh, self.donated)

    @functools.cached_property
    def constants(self) -> list[jax.Array]:
        """The arrays that the step closes over, on the devices."""
        program = self.traced.program
        places = self.shardings[len(program.arguments) :]
        return [jax.device_put(c, s) for c, s in zip(program.constants, places, strict=True)]

    @staticmethod
    def _find_plan(traced: Traced, trace_s: float, options: Options, settings: Settings) -> Plan:
        if settings.plan is not None:
            check_fits(settings.plan, traced)
            return settings.plan
        if settings.cache_dir is None:
            return plan_traced(traced, trace_s, options)
        key = f"{fingerprint(traced.program)}|{options}|{options.meshes()}|{options.hardware or detect_hardware()}"
        path = settings.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if path.exists():
            return Plan.load(path)
        found = plan_traced(traced, trace_s, options)
        settings.cache_dir.mkdir(parents=True, exist_ok=True)
        found.save(path)
        return found

    def place(self, leaves: Sequence[Any]) -> list[Any]:
        """Puts argument leaves where the plan wants them; a buffer to donate is never shared with anything else."""
        placed, seen, shared = [], set(), []
        donated = set(self.donated)
        for i, (leaf, sharding) in enumerate(zip(leaves, self.shardings, strict=False)):
            there = getattr(leaf, "sharding", None) == sharding
            if i in donated and isinstance(leaf, jax.Array) and (not there or id(leaf) in seen):
                shared.append(i)
            seen.add(id(leaf))
            placed.append(leaf if there else jax.device_put(leaf, sharding, may_alias=False if i in donated else None))
        # device_put may keep a shard of its source, may_alias or not: only a program's results are surely new buffers.
        for i, copy in zip(shared, _copies([placed[i] for i in shared]), strict=True):
            placed[i] = copy
        return placed

    def run(self, adapted: Adapted) -> Any:
        """One step on arguments of the shapes that it was compiled for."""
        placed = self.place(jax.tree.leaves(adapted.arguments))
        results = self.function(*placed, *self.constants)
        return adapted.restore(jax.tree.unflatten(self.traced.out_tree, results))


@jax.jit
def _copies(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jax.numpy.copy(array) for array in arrays]


def check_fits(plan: Plan, traced: Traced) -> None:
    """Raises PlanError unless the plan was made for this program."""
    actual = fingerprint(traced.program)
    if plan.fingerprint != actual:
        known = {arg.name: arg.shape for arg in plan.arguments}
        changed = [v.name for v in traced.program.inputs if known.get(v.name) != tuple(v.shape)]
        raise PlanError(
            f"the plan is for program {plan.fingerprint}, this step is program {actual}",
            where=f"arguments that differ: {', '.join(changed[:5])}"
            if changed
            else "the arguments agree, the equations do not",
            fix="plan again with autopar plan",
        )


def compile(step: Callable[..., Any], plan: Plan, **settings: Any) -> ParallelStep:
    """A callable that runs ``step`` under a plan.

    Args:
        step: the step that the plan was made for.
        plan: the plan.
        **settings: those of ``Settings``.

    Raises:
        PlanError: at the first call, if the plan was made for another program.
        MeshError: there are fewer devices than the plan's mesh needs.
    """
    return ParallelStep(step, Options(mesh=plan.mesh), Settings(plan=plan, **settings))


_SETTINGS = ("plan", "donate", "static_argnums", "devices", "cache_dir", "lower")


def parallelize(step: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorates a single-device train step so that it runs on every device.

    Args:
        step: the step; omitted when options are given: ``@parallelize(mesh="data=2,tensor=4")``.
        **options: those of ``Options`` and ``Settings``.
    """
    if step is None:
        return functools.partial(parallelize, **options)
    settings = {name: options.pop(name) for name in _SETTINGS if name in options}
    return ParallelStep(step, Options(**options), Settings(**settings))
