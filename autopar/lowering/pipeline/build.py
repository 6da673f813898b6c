"""Compiles a step into a pipeline of stages on submeshes, and runs it in the order of a schedule."""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from autopar.cluster import Mesh
from autopar.ir.body import ancestors
from autopar.ir.program import Atom, Constant, Value
from autopar.ir.stages import Part, Stages
from autopar.ir.trace import Traced
from autopar.lowering.instructions import LocalProgram, Slot
from autopar.lowering.pipeline.compile import StageRunner, compile_piece, slot_sharding, zeros_of
from autopar.lowering.pipeline.cut import PipelineError, check_devices
from autopar.lowering.pipeline.order import Calls, order_calls
from autopar.lowering.pipeline.parts import StageParts, cut_parts
from autopar.lowering.pipeline.send import send
from autopar.lowering.pipeline.step import Call, Sending, Shift, StepRun
from autopar.lowering.processes import absent, everywhere, is_here, is_the_same
from autopar.lowering.spmd import copies, device_mesh
from autopar.solver.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Compiled:
    """A pipeline, ready to run.

    Attributes:
        traced: the step.
        cut: its stages.
        local_programs: what each stage runs in one go, before it is cut into parts.
        runners: the compiled stages, replica by replica.
        meshes: the devices behind each device of the schedule.
        schedule: the order of tasks.
        calls: prologues, tasks and updates in the order of dispatch.
        constants: values that depend on nothing but leave the stages or are sliced.
        donate: whether the buffers of the state are reused.
        peaks: of the latest step, for each device the most activations that it kept at one time.
    """

    traced: Traced
    cut: Stages
    local_programs: tuple[LocalProgram, ...]
    runners: tuple[StageRunner, ...]
    meshes: tuple[jax.sharding.Mesh, ...]
    schedule: Schedule
    calls: Calls
    constants: Mapping[Value, Any]
    donate: bool
    peaks: list[int] = field(default_factory=list)

    def __call__(self, *args: Any) -> Any:
        """One step: the step's own arguments and results."""
        results = self.run(jax.tree.leaves(args))
        return jax.tree.unflatten(self.traced.out_tree, results)

    def run(self, leaves: Sequence[Any], watch: Callable[[Call, list[jax.Array]], None] | None = None) -> list[Any]:
        """One step on flat arguments.

        Args:
            leaves: argument leaves.
            watch: called with every piece that was dispatched, and its results.
        """
        run = self.start(leaves)
        for call in self.calls.prologue:
            _watched(run, call, True, watch)
            run.send(call)
        if self.schedule.n_microbatches > 1:
            run.start_sums()
        for call, last in self.calls.tasks:
            if isinstance(call, Shift):
                run.shift(call)
            elif isinstance(call, Sending):
                run.send(call.call, last=last)
            else:
                _watched(run, call, last, watch)
        run.finish_loop()
        for call in self.calls.update:
            _watched(run, call, True, watch)
            run.send(call)
        self.peaks[:] = [run.peak.get(device, 0) for device in range(self.schedule.n_devices)]
        return self._readable([self._result(run, atom) for atom in self.cut.step.outputs])

    def start(self, leaves: Sequence[Any]) -> StepRun:
        """A step whose arguments are in place, and of which nothing has run."""
        inputs = self.cut.step.inputs
        arguments = dict(zip(inputs, (*leaves, *self.traced.program.constants), strict=True))
        run = StepRun(self.cut, self.runners, self.meshes, {**self.constants, **arguments})
        self._place(run, dict(zip(inputs, leaves, strict=False)))
        for index, placed in enumerate(self.closed_over):
            run.held(index).update(placed)
        return run

    @functools.cached_property
    def closed_over(self) -> list[dict[Slot, jax.Array]]:
        """The arrays that the step closes over, where each runner wants them."""
        program = self.traced.program
        arrays = dict(zip(program.inputs[len(program.arguments) :], program.constants, strict=True))
        placed = []
        for runner in self.runners:
            read = [(slot, arrays[value]) for value, slot in runner.parts.inputs.items() if value in arrays]
            placed.append({slot: send(array, slot_sharding(slot, runner.mesh)) for slot, array in read})
        return placed

    @property
    def shardings(self) -> Any:
        """Where each argument is read first, or lives between steps, in the structure of the arguments.

        What ``autopar.morph`` wants, to go on with the state of another plan: ``morph(state, compiled.shardings[0])``.
        """
        step, runners = self.cut.step, self.runners[: len(self.cut.stages)]
        unread, places = NamedSharding(self.meshes[0], PartitionSpec()), []
        for value in step.inputs[: self.traced.in_tree.num_leaves]:
            readers = [i for i, runner in enumerate(runners) if value in runner.parts.inputs]
            homes = [self.cut.home[value]] if self.cut.home.get(value) in readers else readers
            places += [slot_sharding(runners[i].parts.inputs[value], runners[i].mesh) for i in homes[:1]] or [unread]
        return jax.tree.unflatten(self.traced.in_tree, places)

    def init(self, init_fn: Callable[..., Any], *args: Any) -> Any:
        """Runs ``init_fn(*args)`` so that every array of the state is born on its stage, whole on no host.

        Args:
            init_fn: makes the state, the first argument of the step.
            *args: its arguments, such as a key; of several processes, the same in each.
        """
        places, structure = jax.tree.flatten(self.shardings[0])
        shapes, leaves = jax.tree.leaves(jax.eval_shape(init_fn, *args)), {}
        for mesh in dict.fromkeys(place.mesh for place in places):
            own = [i for i, place in enumerate(places) if place.mesh == mesh]
            if is_here(places[own[0]]):
                some = jax.jit(_leaves_of(init_fn, own), out_shardings=[places[i] for i in own])
                leaves |= zip(own, some(*args), strict=True)
            else:
                leaves |= {i: absent(shapes[i].shape, shapes[i].dtype, places[i]) for i in own}
        return jax.tree.unflatten(structure, [leaves[i] for i in range(len(places))])

    def _place(self, run: StepRun, arguments: Mapping[Value, Any]) -> None:
        seen: set[int] = set()
        for index, runner in enumerate(self.runners):
            shared: list[Slot] = []
            for value in (value for value in runner.parts.inputs if value in arguments):
                array = arguments[value]
                there = run.put(index, value, array) is array
                if self.donate and self.cut.home.get(value) == index and (not there or id(array) in seen):
                    shared.append(runner.parts.inputs[value])
                seen.add(id(array))
            # device_put may keep a shard of its source: only a program's results are surely new buffers.
            held = run.held(index)
            if shared and is_here(held[shared[0]].sharding):
                held.update(zip(shared, copies([held[slot] for slot in shared]), strict=True))

    def _result(self, run: StepRun, atom: Atom) -> Any:
        if isinstance(atom, Constant):
            return jnp.asarray(atom.value, atom.aval.dtype)
        if atom in run.wholes:
            return run.wholes[atom]
        parts = {total: part for part, total in self.cut.step.sums.items()}
        stage = self.cut.maker[atom]
        return run.held(stage)[self.runners[stage].parts.outputs[parts.get(atom, atom)]]

    def _readable(self, results: list[Any]) -> list[Any]:
        """The results, with numbers that some process has not (a loss, a count of steps) in all of them."""
        missing = [i for i, result in enumerate(results) if self._is_missing_somewhere(result)]
        if missing:
            for i, array in zip(missing, everywhere([results[i] for i in missing], self.devices), strict=True):
                results[i] = array
        return results

    def _is_missing_somewhere(self, result: Any) -> bool:
        stays = not isinstance(result, jax.Array) or not isinstance(result.sharding, NamedSharding)
        if stays or result.shape or jnp.issubdtype(result.dtype, jax.dtypes.extended):
            return False
        return {d.process_index for d in result.sharding.device_set} != {d.process_index for d in self.devices}

    @functools.cached_property
    def devices(self) -> tuple[Any, ...]:
        """All devices of the pipeline."""
        return _all_devices(self.meshes)


def _leaves_of(function: Callable[..., Any], positions: Sequence[int]) -> Callable[..., list[Any]]:
    return lambda *args: [jax.tree.leaves(function(*args))[i] for i in positions]


def _watched(run: StepRun, call: Call, last: bool, watch: Callable[[Call, list[jax.Array]], None] | None) -> None:
    results = run.run(call, last=last)
    if watch is not None:
        watch(call, results)


def submeshes(meshes: Sequence[Mesh], devices: Sequence[Any] | None = None) -> list[jax.sharding.Mesh]:
    """The devices of each submesh, one after the other; raises MeshError where there are too few."""
    rest, found = list(jax.devices() if devices is None else devices), []
    for mesh in meshes:
        found.append(device_mesh(mesh, rest))
        rest = rest[mesh.n_devices :]
    return found


def compile_pipeline(
    traced: Traced,
    stages: Stages,
    local_programs: Sequence[LocalProgram],
    meshes: Sequence[jax.sharding.Mesh],
    schedule: Schedule,
    settings: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles a pipeline.

    Args:
        traced: the step.
        stages: the step in stages.
        local_programs: the planned local program of each stage.
        meshes: the devices behind each device of the schedule, of the shape that the programs of its stages want.
        schedule: the order of tasks.
        settings: "donate": whether buffers are reused, those of the state too (True); "compiler_options": for XLA.

    Raises:
        PipelineError: numbers or shapes differ, or what several processes have planned.
    """
    _check_sizes(local_programs, meshes, schedule)
    _check_processes(local_programs, meshes)
    settings = settings or {}
    donate = settings.get("donate", True) and len(schedule.placements) == 1
    pairs = zip(local_programs, stages.stages, strict=True)
    parts = [cut_parts(local, stage, stages.varying) for local, stage in pairs]
    own = [_own(i, part, parts, stages) if donate else None for i, part in enumerate(parts)]
    compiler = _Compiler(stages.step.monoids, schedule.n_microbatches > 1, settings.get("compiler_options"))
    runners = []
    for replica, row in enumerate(schedule.placements):
        for i, device in enumerate(row):
            place = (i, replica, device)
            runners.append(compiler.runner(place, parts[i], meshes[device], own[i]))
    calls = order_calls(runners, schedule)
    programs, constants = tuple(local_programs), _constants(stages)
    return Compiled(traced, stages, programs, tuple(runners), tuple(meshes), schedule, calls, constants, donate)


@dataclass(frozen=True)
class _Compiler:
    """What the compilation of all stages shares."""

    monoids: Mapping[Value, str]
    adds: bool
    options: Mapping[str, Any] | None

    def runner(
        self, place: tuple[int, int, int], part: StageParts, mesh: jax.sharding.Mesh, own: Sequence[Slot] | None
    ) -> StageRunner:
        """A replica of a stage; ``place`` is the stage, the replica, the device of the schedule."""
        monoids = self.monoids if self.adds else None
        pieces = {}
        for piece in part.pieces:
            if place[1] == 0 or piece.tag.part != Part.UPDATE:
                dying = own and [slot for slot in own if part.last_reader[slot] == piece.tag]
                pieces[piece.tag] = compile_piece(piece, mesh, dying, monoids, self.options)
        sums = tuple(slot for piece in part.pieces for slot in piece.sums)
        return StageRunner(*place, part, mesh, pieces, sums, zeros_of(sums, mesh, self.monoids))


def _check_sizes(
    local_programs: Sequence[LocalProgram], meshes: Sequence[jax.sharding.Mesh], schedule: Schedule
) -> None:
    check_devices(len(meshes), schedule)
    if len(local_programs) != schedule.n_stages:
        raise PipelineError(
            f"{len(local_programs)} stages for the {schedule.n_stages} of schedule {schedule.name}",
            fix="pass one program for every stage",
        )
    for row in schedule.placements:
        for stage, device in enumerate(row):
            wanted, found = local_programs[stage].mesh, dict(meshes[device].shape)
            if wanted.sizes != found:
                raise PipelineError(
                    f"stage {stage} was planned for mesh {wanted}, device {device} of the schedule is {found}",
                    where=f"schedule {schedule.name}",
                    fix="plan stages on the submesh that runs them; stages of one device share its shape",
                )


def _check_processes(local_programs: Sequence[LocalProgram], meshes: Sequence[jax.sharding.Mesh]) -> None:
    """All processes with devices of the pipeline must have planned the same."""
    devices = _all_devices(meshes)
    if len({device.process_index for device in devices}) == 1:
        return
    slots = [repr(slot) for local in local_programs for i in local.instructions for slot in (*i.inputs, *i.outputs)]
    if not is_the_same(hashlib.sha256("\n".join(slots).encode()).hexdigest(), devices):
        raise PipelineError(
            "the processes have planned different stages",
            where=f"process {jax.process_index()} of {jax.process_count()}",
            fix="plan in one process, save the plan, and load it in all: autopar.pipeline(step, plan=...)",
        )


def _all_devices(meshes: Sequence[jax.sharding.Mesh]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(device for mesh in meshes for device in mesh.devices.flat))


def _own(index: int, part: StageParts, parts: Sequence[StageParts], stages: Stages) -> list[Slot]:
    """Slots whose arrays are this stage's alone: first state that stays here, then what is made here and not sent."""

    def stays(slot: Slot) -> bool:
        readers = sum(slot.value in other.inputs for other in parts)
        return part.inputs.get(slot.value) is slot and readers == 1 and stages.home.get(slot.value) == index

    def again(slot: Slot) -> bool:
        """Whether the next microbatch reads it, too."""
        return part.last_reader[slot].part.per_microbatch and slot.value not in stages.varying

    ends = {*part.inputs.values(), *part.outputs.values()}
    made = (slot for slot in part.last_reader if slot not in ends)
    return [slot for slot in (*filter(stays, part.last_reader), *made) if not again(slot)]


def _constants(stages: Stages) -> dict[Value, Any]:
    """Results and sliced values that depend on nothing."""
    step = stages.step
    known = stages.maker.keys() | set(step.inputs)
    ends = [v for v in (*step.outputs, *step.slices.values()) if isinstance(v, Value) and v not in known]
    if not ends:
        return {}
    needed = ancestors(step.equations, ends)
    env: dict[Value, Any] = {}
    for eqn in (eqn for eqn in step.equations if eqn in needed):
        operands = [jnp.asarray(a.value, a.aval.dtype) if isinstance(a, Constant) else env[a] for a in eqn.inputs]
        results = eqn.primitive.bind(*operands, **eqn.params)
        env.update(zip(eqn.outputs, results if eqn.primitive.multiple_results else [results], strict=True))
    return {value: env[value] for value in ends}
