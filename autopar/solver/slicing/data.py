"""What slicing is asked, what it asks of a cost model, and what it answers. Frozen data, no JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from autopar.errors import ProblemError
from autopar.solver.schedule import family


@dataclass(frozen=True)
class Submesh:
    """A shape of devices that one stage may run on.

    Args:
        name: how plans call it, such as ``2x8``.
        n_devices: how many devices it takes.
    """

    name: str
    n_devices: int


@dataclass(frozen=True)
class StageCost:
    """What one stage costs; times of one microbatch unless said otherwise, bytes on each of its devices.

    Args:
        forward_s: forward pass; ``inf`` if the stage cannot run so.
        backward_s: the backward pass up to the gradients of its inputs, recomputation included.
        weight_s: the gradients of its weights.
        sync_s: once per step: gradient synchronisation, also of weights tied to another stage.
        optimizer_s: once per step: the update.
        state_bytes: parameters, optimizer state and accumulated gradients.
        activation_bytes_per_microbatch: what a forward saves for its backward.
        peak_extra_bytes: the most that is live besides, while a task runs.
        sent_bytes: to the next stage, per microbatch.
        replica_sync_s: once per step: adding the gradients of two copies of the stage (Chimera).
        left_bytes_per_microbatch: what the backward pass leaves for the gradients of weights, where these wait.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    sync_s: float = 0.0
    optimizer_s: float = 0.0
    state_bytes: float = 0.0
    activation_bytes_per_microbatch: float = 0.0
    peak_extra_bytes: float = 0.0
    sent_bytes: float = 0.0
    replica_sync_s: float = 0.0
    left_bytes_per_microbatch: float = 0.0


class StageCosts(Protocol):
    """A cost model. Layers are numbered from 0; stages are given by their first and last layer."""

    def cost(self, first_layer: int, last_layer: int, submesh: Submesh, microbatches: int, remat: str) -> StageCost:
        """What a stage costs on a submesh, when the batch has so many microbatches."""
        ...

    def transfer_s(self, boundary: int, sender: Submesh, receiver: Submesh, microbatches: int) -> float:
        """Seconds to send what crosses from layer ``boundary`` to the next one, for one microbatch."""
        ...


@dataclass(frozen=True)
class SlicingProblem:
    """Cut layers into stages, give each a submesh, choose microbatches, rematerialisation and schedule.

    Args:
        costs: the cost model.
        n_layers: layers of the model.
        n_devices: devices of the cluster; a slicing may leave some idle.
        submeshes: the shapes that stages may use.
        microbatches: the numbers of microbatches to try.
        schedules: names of schedules to try; a schedule that cannot take a pipeline is left out there.
        remats: the rematerialisation policies to try, each stage its own.
        chunks: virtual stages per device to try, where a schedule lets one choose.
        memory_bytes: of one device.

    Raises:
        ProblemError: something to choose from is empty, or a number makes no sense.
        ScheduleError: no schedule of that name.
    """

    costs: StageCosts
    n_layers: int
    n_devices: int
    submeshes: tuple[Submesh, ...]
    microbatches: tuple[int, ...]
    schedules: tuple[str, ...] = ("1f1b",)
    remats: tuple[str, ...] = ("none",)
    chunks: tuple[int, ...] = (2,)
    memory_bytes: float = math.inf

    def __post_init__(self) -> None:
        for name in ("submeshes", "microbatches", "schedules", "remats", "chunks"):
            if not getattr(self, name):
                raise ProblemError(f"{name} is empty", fix=f"pass at least one entry in {name}")
        sizes = (self.n_layers, self.n_devices, *self.microbatches, *self.chunks)
        if min(*sizes, *(submesh.n_devices for submesh in self.submeshes)) < 1:
            raise ProblemError(
                f"{self.n_layers} layers, {self.n_devices} devices, microbatches {self.microbatches}, chunks "
                f"{self.chunks} and submeshes {self.submeshes} must all be at least 1",
                fix="pass positive sizes",
            )
        for name in self.schedules:
            family(name)


@dataclass(frozen=True)
class StagePlan:
    """One stage and what is predicted of it.

    Args:
        first_layer: its first layer.
        last_layer: its last layer.
        submesh: where it runs.
        remat: its rematerialisation policy.
        device: its place in the pipeline, as in the schedule's placement; several stages may share one.
        busy_s: computation in a step.
        bubble_s: the rest of the step, without synchronisation and update, on its share of the device.
        peak_bytes: memory of each device there if all the stages that it holds were this one; where they differ, the
            state of one and the activations of another can be more together.
        sent_bytes: to the next stage in a step.
    """

    first_layer: int
    last_layer: int
    submesh: Submesh
    remat: str
    device: int
    busy_s: float
    bubble_s: float
    peak_bytes: float
    sent_bytes: float


@dataclass(frozen=True)
class Slicing:
    """The best slicing.

    Args:
        stages: in the order of the model.
        microbatches: slices of the batch.
        schedule: the name of the schedule.
        n_chunks: virtual stages per device of the pipeline.
        bottleneck_s: the busiest device's or link's part of the step.
        fill_s: filling and draining the pipeline, less what the busiest device hides.
        once_s: gradient synchronisation and update at the end, of the device where they last longest.
        runner_ups: the best of other schedules and microbatches, best first.
    """

    stages: tuple[StagePlan, ...]
    microbatches: int
    schedule: str
    n_chunks: int
    bottleneck_s: float
    fill_s: float
    once_s: float
    runner_ups: tuple[Slicing, ...] = ()

    @property
    def total_s(self) -> float:
        """The predicted step."""
        return self.bottleneck_s + self.fill_s + self.once_s

    @property
    def n_pipeline_devices(self) -> int:
        """Submeshes of the pipeline."""
        return len(self.stages) // self.n_chunks
