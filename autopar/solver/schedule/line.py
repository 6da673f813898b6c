"""In which order a pipeline starts its tasks and sends their results: one line for all of its devices."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from autopar.solver.schedule.data import MOVES, Kind, Schedule, Task, deadlock


@dataclass(frozen=True)
class Dispatch:
    """A task that is started (or an eviction, or a load), or whose results are sent."""

    task: Task
    sends: bool = False

    def ends(self, schedule: Schedule) -> tuple[int, ...]:
        """The devices that it takes: for what passes between two, the giver and the taker."""
        device = schedule.device_of(self.task)
        if self.sends:
            reader = schedule.reader_of(self.task)
            return (device,) if reader in (device, None) else (device, reader)
        if self.task.kind in MOVES:
            partner = schedule.partners[device]
            return (device, partner) if self.task.kind is Kind.EVICT else (partner, device)
        return (device,)


def dispatch_order(schedule: Schedule) -> list[Dispatch]:
    """All tasks and sends in one line: each device's tasks in its order, none before what it reads has been sent.

    A device runs what it is given in order, and what passes between processes holds both ends until both have come to
    it. So a send waits while its receiver computes and its sender has more to do. All passes are taken to last as long.

    Raises:
        ScheduleError: a deadlock.
    """
    line = _Line(schedule, [list(reversed(order)) for order in schedule.tasks], [0.0] * schedule.n_devices)
    found = []
    while dispatch := line.take():
        found.append(dispatch)
    if any(line.waiting):
        raise deadlock(schedule.name)
    return found


def orders_apart(schedule: Schedule, apart: Collection[tuple[int, int]]) -> tuple[tuple[Dispatch, ...], ...]:
    """What each device comes to, in order: its tasks, and what passes between it and one that is ``apart`` from it.

    Args:
        schedule: the tasks.
        apart: (giver, taker) pairs of devices that are in different processes.
    """
    orders: list[list[Dispatch]] = [[] for _ in range(schedule.n_devices)]
    line = dispatch_order(schedule) if apart else [Dispatch(task) for order in schedule.tasks for task in order]
    for dispatch in line:
        ends = dispatch.ends(schedule)
        if ends in apart:
            for end in ends:
                orders[end].append(dispatch)
        elif not dispatch.sends:
            orders[schedule.device_of(dispatch.task)].append(dispatch)
    return tuple(map(tuple, orders))


@dataclass
class _Line:
    """What is still to be dispatched, and when each device is done with what was.

    Attributes:
        waiting: the tasks of each device, the next one last.
        free_s: when each device is done.
        known: which results each device has.
        unsent: results that were made.
    """

    schedule: Schedule
    waiting: list[list[Task]]
    free_s: list[float]
    known: set[tuple[Task, int]] = field(default_factory=set)
    unsent: list[Dispatch] = field(default_factory=list)

    def take(self) -> Dispatch | None:
        """Whatever can begin first; of equals a send, that others may go on."""
        sends = [(self._free_s(dispatch), k) for k, dispatch in enumerate(self.unsent)]
        starts = [(self._free_s(Dispatch(row[-1])), k) for k, row in enumerate(self.waiting) if self._is_ready(k)]
        if sends and (not starts or min(sends)[0] <= min(starts)[0]):
            return self._send(min(sends)[1])
        return self._start(min(starts)[1]) if starts else None

    def _free_s(self, dispatch: Dispatch) -> float:
        return max(self.free_s[end] for end in dispatch.ends(self.schedule))

    def _is_ready(self, device: int) -> bool:
        row = self.waiting[device]
        return bool(row) and all((other, device) in self.known for other in self.schedule.dependencies(row[-1]))

    def _send(self, k: int) -> Dispatch:
        dispatch = self.unsent.pop(k)
        self._hold(dispatch, 0)
        self.known.add((dispatch.task, dispatch.ends(self.schedule)[-1]))
        return dispatch

    def _start(self, device: int) -> Dispatch:
        dispatch = Dispatch(self.waiting[device].pop())
        self._hold(dispatch, _passes(dispatch.task, self.schedule))
        self.known.add((dispatch.task, device))
        if dispatch.task.kind not in MOVES:
            self.unsent.append(Dispatch(dispatch.task, sends=True))
        return dispatch

    def _hold(self, dispatch: Dispatch, passes: int) -> None:
        until_s = self._free_s(dispatch) + passes
        for end in dispatch.ends(self.schedule):
            self.free_s[end] = until_s


def _passes(task: Task, schedule: Schedule) -> int:
    """How many passes of a microbatch a task runs: a backward task that is not split runs two."""
    if task.kind in MOVES:
        return 0
    return 1 + (task.kind is Kind.BACKWARD and not schedule.is_split(task))
