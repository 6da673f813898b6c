"""Steps that run under a plan: placed, donated, compiled once for each set of shapes."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax

from autopar.api.agreeing import agreed_plan
from autopar.api.planning import Options, argument_shardings, detect_hardware, plan_traced, traced_in_time
from autopar.compat import shape_struct
from autopar.errors import MicrobatchError, PlanError
from autopar.ir.arguments import Adapted, adapt
from autopar.ir.fingerprint import fingerprint
from autopar.ir.trace import Traced
from autopar.lowering.jit import lower_jit
from autopar.lowering.local_program import build_local_program
from autopar.lowering.morph import morph
from autopar.lowering.processes import one_at_a_time
from autopar.lowering.spmd import copies, device_mesh, lower, shardings
from autopar.lowering.time.microbatch import split_step
from autopar.plan import Plan


class ParallelStep:
    """A train step that plans at its first call and then runs on the mesh. Made by ``parallelize`` or ``compile``.

    Where the mesh has devices of several processes (``jax.distributed``), each of them makes the same calls. A NumPy
    array, a number, or a JAX array on one device is then the same whole array in every process: each puts its own
    blocks on its own devices. An array under a ``NamedSharding`` is one array of all, such as a batch of which each
    process has read its own rows: ``jax.make_array_from_process_local_data(plan.shardings[1][name], rows)``. All run
    the plan of the first process.
    """

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
        found = agreed_plan(self._find_plan(traced, trace_s, options, settings), settings.devices)
        traced = split_step(traced, found.splitting)
        self.traced, self.devices, self.target = traced, settings.devices, settings.lower
        place = functools.partial(argument_shardings, traced.in_tree, devices=settings.devices)
        self.plan = replace(found, place=place)
        # The plan has its routes; prices are asked only where it was edited by hand, and then those of these devices.
        cost = replace(options, mesh=found.mesh).cost_model(found.mesh)
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
        return [_put(constant, place) for constant, place in zip(program.constants, places, strict=True)]

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
            may_share = isinstance(leaf, jax.Array) or not sharding.is_fully_addressable
            if i in donated and may_share and (not there or id(leaf) in seen):
                shared.append(i)
            seen.add(id(leaf))
            placed.append(leaf if there else _put(leaf, sharding, may_alias=False if i in donated else None))
        # device_put may keep a shard of its source, may_alias or not: only a program's results are surely new buffers.
        for i, copy in zip(shared, copies([placed[i] for i in shared]), strict=True):
            placed[i] = copy
        return placed

    def run(self, adapted: Adapted) -> Any:
        """One step on arguments of the shapes that it was compiled for."""
        placed = self.place(jax.tree.leaves(adapted.arguments))
        run = one_at_a_time(jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec()), self.function)
        results = run(*placed, *self.constants)
        return adapted.restore(jax.tree.unflatten(self.traced.out_tree, results))


def _put(array: Any, sharding: jax.sharding.NamedSharding, *, may_alias: bool | None = None) -> jax.Array:
    """The array where the plan wants it; in several processes one array of all, or the same whole array in each."""
    if sharding.is_fully_addressable and getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, sharding, may_alias=may_alias)
    return morph(array, sharding)


def check_fits(plan: Plan, traced: Traced) -> Traced:
    """The step in the plan's microbatches; raises PlanError unless the plan was made for this program."""
    try:
        traced = split_step(traced, plan.splitting)
    except MicrobatchError as error:
        raise PlanError(f"the plan's microbatches do not fit this step: {error.what}", fix=error.fix) from error
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
    return traced
