"""One step of a pipeline in progress: which arrays are where, who gets them next, when they are dropped.

One process dispatches everything and waits for nothing: JAX runs what is ready. A value is sent after its maker was
dispatched, at its place in the line (``order.py``), and dropped (or its buffer reused) when its last reader is. Several
processes all go through the same calls in the same order; each runs what its own devices have a part in, and keeps
arrays without blocks for the rest.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from autopar.ir.program import Value
from autopar.ir.stages import Part, Stages, Tag
from autopar.lowering.instructions import Slot
from autopar.lowering.pipeline.compile import StageRunner, slot_sharding
from autopar.lowering.pipeline.send import send
from autopar.lowering.processes import absent, is_here, on, one_at_a_time
from autopar.lowering.time.phased import COMBINE

ONCE = -1
"""The microbatch of what there is one of in a step."""


@dataclass(frozen=True)
class Call:
    """One run of a piece: a task of the schedule, or a round of the prologue or the update.

    Attributes:
        stage: which stage.
        tag: which piece of it.
        microbatch: which microbatch; ``ONCE`` outside of the loop.
        replica: which replica of the stage.
    """

    stage: int
    tag: Tag
    microbatch: int = ONCE
    replica: int = 0

    def __str__(self) -> str:
        number = self.tag.round if self.microbatch == ONCE else self.microbatch
        return f"{self.tag.part.letter}{self.stage}:{number}"


@dataclass(frozen=True)
class Sending:
    """Sends what a piece made to the stages that read it."""

    call: Call


@dataclass(frozen=True)
class Shift:
    """Moves what a stage keeps for a microbatch to the devices of another, or back.

    Attributes:
        stage, microbatch: whose.
        device: the device of the schedule that keeps it from now on.
    """

    stage: int
    microbatch: int
    device: int


@dataclass
class StepRun:
    """The arrays of one step in progress.

    Attributes:
        cut: the step in stages.
        runners: the compiled stages, replica by replica.
        meshes: the devices behind each device of the schedule.
        wholes: arrays of which the microbatches are slices, where no stage makes them.
        arrays: what is there now, by runner and microbatch.
        unsent: what was made and is not yet sent.
        stacked: for each value of which every microbatch keeps its own, those so far.
        kept: for each device, the (runner, microbatch) pairs that it keeps something for.
        peak: for each device, the most pairs at one time.
    """

    cut: Stages
    runners: Sequence[StageRunner]
    meshes: Sequence[jax.sharding.Mesh]
    wholes: Mapping[Value, Any]
    arrays: dict[tuple[int, int], dict[Slot, jax.Array]] = field(default_factory=dict)
    unsent: dict[Call, dict[Slot, jax.Array]] = field(default_factory=dict)
    stacked: dict[Value, dict[int, jax.Array]] = field(default_factory=dict)
    kept: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    peak: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_stages = len(self.cut.stages)
        self.n_replicas = len(self.runners) // self.n_stages

    def held(self, runner: int, microbatch: int = ONCE) -> dict[Slot, jax.Array]:
        """The arrays of one runner and microbatch."""
        return self.arrays.setdefault((runner, microbatch), {})

    def put(self, index: int, value: Value, array: Any, microbatch: int = ONCE) -> jax.Array:
        """Places a value on the devices of a runner that reads it, as it reads it."""
        runner = self.runners[index]
        slot = runner.parts.inputs[value]
        placed = send(array, slot_sharding(slot, runner.mesh))
        self.held(index, microbatch)[slot] = placed
        return placed

    def start_sums(self) -> None:
        """Gives every stage the sums of no microbatch."""
        for index, runner in enumerate(self.runners):
            self.held(index).update(zip(runner.sums, runner.zeros(), strict=True))

    def whole(self, value: Value) -> Any:
        """A value of which there is one in a step, from the stage that makes it."""
        if value in self.wholes:
            return self.wholes[value]
        stage = self.cut.maker[value]
        return self.held(stage)[self.runners[stage].parts.outputs[value]]

    def run(self, call: Call, *, last: bool = True) -> list[jax.Array]:
        """Dispatches a piece, and drops what it read last.

        Args:
            call: which piece, for which microbatch.
            last: whether no later microbatch runs this piece.
        """
        index = call.replica * self.n_stages + call.stage
        runner = self.runners[index]
        compiled, once = runner.pieces[call.tag], self.held(index)
        if call.tag.part == Part.FORWARD:
            self._feed(index, call.microbatch)
        piece = compiled.piece
        taken = [self._take(index, call, slot, last) for slot in piece.local.inputs]
        results = compiled.function(*taken, *(once.pop(slot) for slot in piece.sums if slot in once))
        kept, sums = results[: len(piece.kept)], results[len(piece.kept) :]
        for slot, array in zip(piece.kept, kept, strict=True):
            if call.microbatch == ONCE or slot in runner.parts.last_reader:
                self.held(index, call.microbatch)[slot] = array
            if slot in runner.results:
                self.unsent.setdefault(call, {})[slot] = array
        once.update(zip(piece.sums, sums, strict=True))
        self._count(runner.device, index, call.microbatch)
        return results

    def send(self, call: Call, *, last: bool = True) -> None:
        """Sends the results of a piece that was dispatched; of the last microbatch that runs it, the sums too."""
        runner = self.runners[call.replica * self.n_stages + call.stage]
        for slot, array in self.unsent.pop(call, {}).items():
            self._deliver(call.replica, slot.value, array, call.microbatch)
            if slot.value in self.cut.step.stacks:
                self.stacked.setdefault(slot.value, {})[call.microbatch] = array
        if last and self.n_replicas == 1:
            self._send_sums(runner.pieces[call.tag].piece.sums)

    def _feed(self, index: int, microbatch: int) -> None:
        """Gives a stage its slices of what the microbatches are cut from."""
        for part, whole in self.cut.step.slices.items():
            if part in self.runners[index].parts.inputs:
                self.put(index, part, _one_of(self.whole(whole), microbatch), microbatch)

    def _take(self, index: int, call: Call, slot: Slot, last: bool) -> jax.Array:
        runner = self.runners[index]
        own = call.tag.part.per_microbatch and slot.value in self.cut.varying
        held = self.held(index, call.microbatch if own else ONCE)
        dies = runner.parts.last_reader[slot] == call.tag and (own or last)
        return held.pop(slot) if dies and (own or slot not in runner.results) else held[slot]

    def _deliver(self, replica: int, value: Value, array: jax.Array, microbatch: int) -> None:
        first = replica * self.n_stages
        for index in range(first, first + self.n_stages):
            if value in self.runners[index].parts.inputs:
                self.put(index, value, array, microbatch)

    def _send_sums(self, slots: Sequence[Slot]) -> None:
        for slot in slots:
            stage = self.cut.maker[slot.value]
            if slot in self.runners[stage].results:
                self._deliver(0, self.cut.step.sums[slot.value], self.held(stage)[slot], ONCE)

    def finish_loop(self) -> None:
        """Brings together what replicas added up, and what every microbatch kept."""
        if self.n_replicas > 1:
            for stage, runner in enumerate(self.runners[: self.n_stages]):
                for slot in runner.sums:
                    self.held(stage)[slot] = self._over_replicas(stage, slot)
                self._send_sums(runner.sums)
        for part, rows in self.stacked.items():
            stage = self.cut.maker[part]
            place = slot_sharding(self.runners[stage].parts.outputs[part], self.runners[stage].mesh)
            stack = _stacked([send(rows[k], place) for k in sorted(rows)], place)
            self._deliver(0, self.cut.step.stacks[part], stack, ONCE)

    def _over_replicas(self, stage: int, slot: Slot) -> jax.Array:
        place = slot_sharding(slot, self.runners[stage].mesh)
        each = [self.held(i)[slot] for i in range(stage, len(self.runners), self.n_stages)]
        combined = on(place, COMBINE[self.cut.step.monoids[slot.value]], each[0])
        return functools.reduce(lambda a, b: combined(a, send(b, place)), each)

    def shift(self, shift: Shift) -> None:
        """Moves what a stage keeps for a microbatch."""
        held, mesh = self.held(shift.stage, shift.microbatch), self.meshes[shift.device]
        for slot, array in held.items():
            held[slot] = send(array, slot_sharding(slot, mesh))
        for device in self.kept:
            self.kept[device].discard((shift.stage, shift.microbatch))
        self._count(shift.device, shift.stage, shift.microbatch)

    def _count(self, device: int, index: int, microbatch: int) -> None:
        if microbatch != ONCE:
            here = self.kept.setdefault(device, set())
            (here.add if self.held(index, microbatch) else here.discard)((index, microbatch))
            self.peak[device] = max(self.peak.get(device, 0), len(here))


def _one_of(whole: Any, microbatch: int) -> Any:
    """The slice of one microbatch, where the whole is."""
    if not isinstance(whole, jax.Array) or not isinstance(whole.sharding, NamedSharding):
        return _slice(None)(whole, np.int32(microbatch))
    place = NamedSharding(whole.sharding.mesh, PartitionSpec(*whole.sharding.spec[1:]))
    if not is_here(place):
        return absent(whole.shape[1:], whole.dtype, place)
    return _slice(place)(whole, np.int32(microbatch))


@functools.cache
def _slice(place: NamedSharding | None) -> Callable[[jax.Array, Any], jax.Array]:
    def one(whole: jax.Array, microbatch: Any) -> jax.Array:
        return lax.dynamic_index_in_dim(whole, microbatch, 0, keepdims=False)

    function = jax.jit(one, out_shardings=place)
    return function if place is None else one_at_a_time(place, function)


def _stacked(rows: Sequence[jax.Array], place: NamedSharding) -> jax.Array:
    """Rows on one place, as one array there."""
    stack = NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
    like = jax.ShapeDtypeStruct((len(rows), *rows[0].shape), rows[0].dtype)
    return on(stack, _stack, like)(*rows)


def _stack(*rows: jax.Array) -> jax.Array:
    return jnp.stack(rows)
