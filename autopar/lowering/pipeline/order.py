"""In which order a pipeline dispatches its pieces: one line, the same in every process."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from autopar.ir.stages import Part, Tag
from autopar.lowering.pipeline.compile import StageRunner
from autopar.lowering.pipeline.step import ONCE, Call, Sending, Shift
from autopar.solver.schedule import Kind, Schedule, Task
from autopar.solver.schedule.data import MOVES

PARTS = {Kind.FORWARD: Part.FORWARD, Kind.BACKWARD: Part.BACKWARD, Kind.WEIGHT: Part.WEIGHTS}
"""What a task of a schedule runs."""


@dataclass(frozen=True)
class Calls:
    """What a step dispatches, in order.

    Attributes:
        prologue: before the loop.
        tasks: in the loop; the call of a task or of a send with whether it is the last of its piece.
        update: after it.
    """

    prologue: tuple[Call, ...]
    tasks: tuple[tuple[Call | Sending | Shift, bool], ...]
    update: tuple[Call, ...]


@dataclass(frozen=True)
class Dispatch:
    """A task that is started (or an eviction, or a load), or whose results are sent."""

    task: Task
    sends: bool


def order_calls(runners: Sequence[StageRunner], schedule: Schedule) -> Calls:
    """Prologues, tasks and updates in an order that runs no piece before what it reads."""
    tasks: list[Call | Sending | Shift] = []
    for dispatch in dispatch_order(schedule):
        task = dispatch.task
        replica = schedule.replica_of[task.microbatch]
        device = schedule.device_of(task)
        if task.kind in MOVES:
            keeper = schedule.partners[device] if task.kind is Kind.EVICT else device
            tasks.append(Shift(task.stage, task.microbatch, keeper))
            continue
        tags = [Tag(PARTS[task.kind])]
        if task.kind is Kind.BACKWARD and not schedule.is_split(task):
            tags.append(Tag(Part.WEIGHTS))
        present = [tag for tag in tags if tag in runners[task.stage].pieces]
        calls = [Call(task.stage, tag, task.microbatch, replica) for tag in present]
        tasks += [Sending(call) for call in calls] if dispatch.sends else calls
    last = {(call.stage, call.tag): call for call in tasks if isinstance(call, Call)}
    final = set(last.values())
    marked = tuple((item, (item.call if isinstance(item, Sending) else item) in final) for item in tasks)
    return Calls(_rounds(runners, Part.PROLOGUE), marked, _rounds(runners, Part.UPDATE))


def _rounds(runners: Sequence[StageRunner], part: Part) -> tuple[Call, ...]:
    found = [(tag, runner.replica, runner.stage) for runner in runners for tag in runner.pieces if tag.part == part]
    return tuple(Call(stage, tag, ONCE, replica) for tag, replica, stage in sorted(found))


def dispatch_order(schedule: Schedule) -> list[Dispatch]:
    """All tasks and sends in one line: each device's tasks in its order, none before what it reads has been sent.

    A device runs what it is given in order, and what passes between processes holds both ends until both have come to
    it. So a send waits while its receiver computes and its sender has more to do. All passes are taken to last as long.
    """
    line = _Line(schedule, [list(reversed(order)) for order in schedule.tasks], [0.0] * schedule.n_devices)
    found = []
    while dispatch := line.take():
        found.append(dispatch)
    assert not any(line.waiting), f"schedule {schedule.name} waits for itself"
    return found


@dataclass
class _Line:
    """What is still to be dispatched, and when each device is done with what was.

    Attributes:
        waiting: the tasks of each device, the next one last.
        free_s: when each device is done.
        known: which results each device has.
        unsent: results with their sender and receiver.
    """

    schedule: Schedule
    waiting: list[list[Task]]
    free_s: list[float]
    known: set[tuple[Task, int]] = field(default_factory=set)
    unsent: list[tuple[Task, int, int]] = field(default_factory=list)

    def take(self) -> Dispatch | None:
        """Whatever can begin first; of equals a send, that others may go on."""
        sends = [(self._free_s(*ends), k) for k, (_, *ends) in enumerate(self.unsent)]
        starts = [(self._free_s(*self._ends(row[-1])), k) for k, row in enumerate(self.waiting) if self._is_ready(k)]
        if sends and (not starts or min(sends)[0] <= min(starts)[0]):
            return self._send(min(sends)[1])
        return self._start(min(starts)[1]) if starts else None

    def _free_s(self, *devices: int) -> float:
        return max(self.free_s[device] for device in devices)

    def _ends(self, task: Task) -> tuple[int, ...]:
        """The devices that a task holds."""
        device = self.schedule.device_of(task)
        return (device, self.schedule.partners[device]) if task.kind in MOVES else (device,)

    def _is_ready(self, device: int) -> bool:
        row = self.waiting[device]
        return bool(row) and all((other, device) in self.known for other in self.schedule.dependencies(row[-1]))

    def _send(self, k: int) -> Dispatch:
        task, sender, receiver = self.unsent.pop(k)
        self.free_s[sender] = self.free_s[receiver] = self._free_s(sender, receiver)
        self.known.add((task, receiver))
        return Dispatch(task, True)

    def _start(self, device: int) -> Dispatch:
        task = self.waiting[device].pop()
        ends = self._ends(task)
        for end in ends:
            self.free_s[end] = self._free_s(*ends) + _passes(task, self.schedule)
        self.known.add((task, device))
        if task.kind not in MOVES:
            receiver = self.schedule.reader_of(task)
            self.unsent.append((task, device, device if receiver is None else receiver))
        return Dispatch(task, False)


def _passes(task: Task, schedule: Schedule) -> int:
    """How many passes of a microbatch a task runs: a backward task that is not split runs two."""
    if task.kind in MOVES:
        return 0
    return 1 + (task.kind is Kind.BACKWARD and not schedule.is_split(task))
