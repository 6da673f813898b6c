"""What a schedule is: for every device of a pipeline, the order of its tasks. Plain data, no times."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cached_property

from autopar.errors import AutoparError


class ScheduleError(AutoparError, ValueError):
    """An unknown schedule, a pipeline that one cannot take, or task lists that contradict themselves."""


def deadlock(name: str) -> ScheduleError:
    """Says that the devices of a schedule wait for each other."""
    return ScheduleError(f"schedule {name!r} stops with a deadlock", fix="call validate(schedule), which says where")


class Kind(enum.StrEnum):
    """What a task does.

    ``BACKWARD`` is the whole backward pass of its stage and microbatch, unless the schedule has a ``WEIGHT``
    task for them too: then it makes the gradients of the stage's inputs only, and ``WEIGHT`` those of its
    weights. ``EVICT`` and ``LOAD`` move saved activations to the partner device and back (BPipe).
    """

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"
    EVICT = "E"
    LOAD = "L"


# Short names, for lists of tasks.
FORWARD, BACKWARD, WEIGHT, EVICT, LOAD = Kind
MOVES = (EVICT, LOAD)


@dataclass(frozen=True, order=True, slots=True)
class Task:
    """One piece of work.

    Args:
        stage: the virtual stage, numbered along the model: 0 has the first layers.
        microbatch: which slice of the batch.
        kind: what is done.
    """

    stage: int
    microbatch: int
    kind: Kind

    def __str__(self) -> str:
        return f"{self.kind}(stage {self.stage}, microbatch {self.microbatch})"


Order = list[Task]


@dataclass(frozen=True)
class Pipeline:
    """The sizes of a pipeline, named as in the papers.

    Args:
        p: devices (submeshes) of the pipeline.
        m: microbatches of a step.
        v: virtual stages per device.
    """

    p: int
    m: int
    v: int = 1

    def __post_init__(self) -> None:
        if min(self.p, self.m, self.v) < 1:
            raise ScheduleError(
                f"a pipeline of p={self.p} devices, m={self.m} microbatches, v={self.v} virtual stages",
                fix="pass sizes of at least 1",
            )

    @property
    def n_stages(self) -> int:
        """Virtual stages of the model."""
        return self.p * self.v


@dataclass(frozen=True)
class Schedule:
    """The tasks of every device in the order in which it runs them.

    Args:
        name: the schedule's name in the registry.
        pipeline: its sizes.
        placements: one row per replica of the weights: the device of each virtual stage.
        replica_of: for each microbatch, the replica that it runs through.
        tasks: for each device, its tasks in order.
        in_flight_bounds: for each device, how many activations (of one virtual stage and microbatch each) it
            holds at most: from the start of their forward to the end of their last backward task.
        partners: the device that keeps what each device evicts; empty where nothing is evicted.
    """

    name: str
    pipeline: Pipeline
    placements: tuple[tuple[int, ...], ...]
    replica_of: tuple[int, ...]
    tasks: tuple[tuple[Task, ...], ...]
    in_flight_bounds: tuple[int, ...]
    partners: tuple[int, ...] = ()

    @property
    def n_devices(self) -> int:
        """Devices of the pipeline."""
        return self.pipeline.p

    @property
    def n_stages(self) -> int:
        """Virtual stages of the model."""
        return len(self.placements[0])

    @property
    def n_microbatches(self) -> int:
        """Slices of the batch."""
        return self.pipeline.m

    @cached_property
    def split(self) -> frozenset[tuple[int, int]]:
        """The (stage, microbatch) pairs whose backward is split in an input and a weight part."""
        return frozenset((t.stage, t.microbatch) for order in self.tasks for t in order if t.kind is WEIGHT)

    def device_of(self, task: Task) -> int:
        """The device that runs the task."""
        return self.placements[self.replica_of[task.microbatch]][task.stage]

    def is_split(self, task: Task) -> bool:
        """Whether the backward pass of its stage and microbatch has a weight part of its own."""
        return (task.stage, task.microbatch) in self.split

    def reader_of(self, task: Task) -> int | None:
        """The device that reads first what a pass makes; None for what stays with its stage."""
        stage = {FORWARD: task.stage + 1, BACKWARD: task.stage - 1}.get(task.kind, -1)
        return self.placements[self.replica_of[task.microbatch]][stage] if 0 <= stage < self.n_stages else None

    def stages_of(self, device: int) -> tuple[int, ...]:
        """The virtual stages whose weights the device holds, once per replica."""
        return tuple(stage for row in self.placements for stage, where in enumerate(row) if where == device)

    def dependencies(self, task: Task) -> tuple[Task, ...]:
        """The tasks that must be done first, by data alone: not by the order on the device."""
        stage, microbatch = task.stage, task.microbatch
        own = Task(stage, microbatch, FORWARD)
        match task.kind:
            case Kind.FORWARD:
                return (Task(stage - 1, microbatch, FORWARD),) if stage else ()
            case Kind.BACKWARD:
                last = stage + 1 == self.n_stages
                return (own,) if last else (own, Task(stage + 1, microbatch, BACKWARD))
            case Kind.WEIGHT:
                return (Task(stage, microbatch, BACKWARD),)
            case Kind.EVICT:
                return (own,)
            case Kind.LOAD:
                return (Task(stage, microbatch, EVICT),)
