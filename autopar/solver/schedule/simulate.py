"""One event simulator for every schedule: durations and transfers in, timeline, bubbles and memory out."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

from autopar.solver.schedule.data import (
    BACKWARD,
    EVICT,
    FORWARD,
    MOVES,
    WEIGHT,
    Kind,
    Schedule,
    ScheduleError,
    Task,
    deadlock,
)
from autopar.solver.schedule.line import Dispatch, orders_apart

# A forward needs the room that an eviction before it makes; so does an eviction that of a load, on the partner.
ROOM_AFTER = {Kind.FORWARD: Kind.EVICT, Kind.EVICT: Kind.LOAD}

Seconds = tuple[float, ...]
Bytes = tuple[float, ...]


@dataclass(frozen=True)
class TaskCosts:
    """What the tasks of each virtual stage cost. Every tuple has one entry per stage, ``transfer_s`` one fewer.

    Args:
        forward_s: one microbatch's forward pass.
        backward_s: the input part of one microbatch's backward pass.
        weight_s: its weight part; a backward that is not split lasts ``backward_s + weight_s``.
        transfer_s: from stage s to s + 1 where these are on different devices, and back for the gradient.
        move_s: an eviction, or a load; 0 if empty.
        activation_bytes: saved by a forward until its backward; 0 if empty.
        kept_bytes: kept from the input part until the weight part; 0 if empty.
        state_bytes: held all the time, per replica; 0 if empty.
    """

    forward_s: Seconds
    backward_s: Seconds
    weight_s: Seconds
    transfer_s: Seconds = ()
    move_s: Seconds = ()
    activation_bytes: Bytes = ()
    kept_bytes: Bytes = ()
    state_bytes: Bytes = ()

    @staticmethod
    def uniform(n_stages: int, forward_s: float = 1.0, backward_s: float = 1.0, weight_s: float = 1.0) -> TaskCosts:
        """Equal stages, free transfers."""
        return TaskCosts((forward_s,) * n_stages, (backward_s,) * n_stages, (weight_s,) * n_stages)


@dataclass(frozen=True)
class Event:
    """A task on its device, or its transfer: from ``device`` to ``receiver`` (-1 for computation)."""

    task: Task
    device: int
    start_s: float
    end_s: float
    receiver: int = -1


@dataclass(frozen=True)
class Timeline:
    """What happened when.

    Args:
        schedule: what was run.
        tasks: computation, by end.
        transfers: transfers between devices, evictions and loads, by end.
        peak_in_flight: for each device, the most activations held at one time.
        peak_bytes: for each device, the most bytes held at one time.
    """

    schedule: Schedule
    tasks: tuple[Event, ...]
    transfers: tuple[Event, ...]
    peak_in_flight: tuple[int, ...]
    peak_bytes: tuple[float, ...]

    @cached_property
    def makespan_s(self) -> float:
        """From the first start to the end of the last task."""
        return max(event.end_s for event in self.tasks)

    @cached_property
    def busy_s(self) -> Seconds:
        """Seconds of computation on each device."""
        return tuple(sum(e.end_s - e.start_s for e in events) for events in self.by_device)

    @cached_property
    def span_s(self) -> Seconds:
        """Seconds from each device's first start to its last end: what zero bubble makes equal to ``busy_s``."""
        return tuple(events[-1].end_s - events[0].start_s for events in self.by_device)

    @property
    def bubble_fraction(self) -> float:
        """The share of all devices' time until the makespan in which they do not compute."""
        return 1.0 - sum(self.busy_s) / (self.schedule.n_devices * self.makespan_s)

    @cached_property
    def by_device(self) -> tuple[tuple[Event, ...], ...]:
        """Each device's computation, in order."""
        lists: list[list[Event]] = [[] for _ in range(self.schedule.n_devices)]
        for event in sorted(self.tasks, key=lambda e: (e.start_s, e.end_s)):
            lists[event.device].append(event)
        return tuple(map(tuple, lists))


def simulate(
    schedule: Schedule, costs: TaskCosts, *, overlap: bool = True, apart: Collection[tuple[int, int]] = ()
) -> Timeline:
    """Runs the schedule: every device in order, each task as soon as its inputs have arrived.

    Each ordered pair of devices is one channel that carries one transfer at a time, in the order in which they
    were made. With ``overlap`` devices compute meanwhile; else the sender waits until its transfer is over, and
    an eviction or load occupies the device. What passes between devices that are ``apart`` waits until both have come
    to it, in the order of ``dispatch_order``, and occupies both.

    Args:
        schedule: the tasks of each device.
        costs: of the tasks.
        overlap: whether devices compute while they send.
        apart: (giver, taker) pairs of devices that are in different processes.

    Raises:
        ScheduleError: costs for another number of stages, or a deadlock.
    """
    _check_costs(schedule, costs)
    run = _Run(schedule, costs, overlap, apart)
    run.start_all()
    while run.heap:
        run.step()
    if any(head < len(order) for head, order in zip(run.heads, run.orders, strict=True)):
        raise deadlock(schedule.name)
    peaks = [_peaks(changes) for changes in run.changes]
    return Timeline(
        schedule,
        tuple(run.tasks),
        tuple(run.transfers),
        tuple(number for number, _ in peaks),
        tuple(
            extra + sum(_at(costs.state_bytes, stage) for stage in schedule.stages_of(device))
            for device, (_, extra) in enumerate(peaks)
        ),
    )


def _check_costs(schedule: Schedule, costs: TaskCosts) -> None:
    n = schedule.n_stages
    times = (costs.forward_s, costs.backward_s, costs.weight_s)
    optional = (costs.move_s, costs.activation_bytes, costs.kept_bytes, costs.state_bytes)
    wrong = [row for row in times if len(row) != n] + [row for row in optional if len(row) not in (0, n)]
    if wrong or len(costs.transfer_s) not in (0, n - 1):
        raise ScheduleError(
            f"costs of another number of stages than the {n} of schedule {schedule.name!r}",
            fix="pass one entry per virtual stage, and one fewer in transfer_s",
        )


def _at(row: tuple[float, ...], index: int) -> float:
    return row[index] if row else 0.0


def _peaks(changes: list[tuple[float, bool, int, float]]) -> tuple[int, float]:
    """Most activations and most bytes; at equal times what is freed goes before what is taken."""
    number = most = 0
    held = most_bytes = 0.0
    for _, _, change, size in sorted(changes):
        number, held = number + change, held + size
        most, most_bytes = max(most, number), max(most_bytes, held)
    return most, most_bytes


class _Run:
    """The state of one simulation. ``arrived`` has what is known where: (task, device)."""

    def __init__(self, schedule: Schedule, costs: TaskCosts, overlap: bool, apart: Collection[tuple[int, int]]) -> None:
        n = schedule.n_devices
        self.schedule, self.costs, self.overlap, self.apart = schedule, costs, overlap, apart
        self.orders = orders_apart(schedule, apart)
        self.heap: list[tuple[float, int, str, Task, int]] = []
        self.ticks = count()
        self.tasks: list[Event] = []
        self.transfers: list[Event] = []
        self.heads, self.busy = [0] * n, [False] * n
        self.under_way: Counter[tuple[int, Kind]] = Counter()
        self.channel_free_s: dict[tuple[int, int], float] = defaultdict(float)
        self.arrived: set[tuple[Task, int]] = set()
        self.changes: list[list[tuple[float, bool, int, float]]] = [[] for _ in range(n)]
        self.moved = {(t.stage, t.microbatch) for order in schedule.tasks for t in order if t.kind is EVICT}

    def start_all(self) -> None:
        for device in range(self.schedule.n_devices):
            self._start(device, 0.0)

    def step(self) -> None:
        now_s, _, what, task, device = heapq.heappop(self.heap)
        if what == "computed":
            self._finish(task, device, now_s)
        elif what == "arrived":
            self.arrived.add((task, device))
            self.under_way[device, task.kind] -= task.kind in MOVES
        elif what == "met":
            self.busy[device] = False
            self.arrived.add((task, device))
        else:
            self.busy[device] = False
        self._start(device, now_s)

    def _start(self, device: int, now_s: float) -> None:
        """Starts what the device can start now: moves until it meets a task, which occupies it."""
        order = self.orders[device]
        while not self.busy[device] and self.heads[device] < len(order):
            dispatch = order[self.heads[device]]
            task, ends = dispatch.task, dispatch.ends(self.schedule)
            if ends in self.apart:
                if all(self._is_at(dispatch, end) for end in ends):
                    self._meet(task, ends[0], ends[1], now_s)
                return
            if not self._is_ready(task, device):
                return
            self.heads[device] += 1
            if task.kind in MOVES:
                self._move(task, device, ends[0], ends[1], now_s)
                continue
            self.busy[device] = True
            end_s = now_s + self._duration_s(task)
            self.tasks.append(Event(task, device, now_s, end_s))
            self._push(end_s, "computed", task, device)
            if task.kind is FORWARD:
                self._change(device, now_s, +1, _at(self.costs.activation_bytes, task.stage))

    def _is_ready(self, task: Task, device: int) -> bool:
        room = ROOM_AFTER.get(task.kind)
        if room and self.under_way[device, room]:
            return False
        needed = self.schedule.dependencies(task)
        if task.kind in (BACKWARD, WEIGHT) and (task.stage, task.microbatch) in self.moved:
            needed += (replace(task, kind=Kind.LOAD),)
        return all((other, device) in self.arrived for other in needed)

    def _finish(self, task: Task, device: int, now_s: float) -> None:
        self.arrived.add((task, device))
        self.busy[device] = False
        activation, kept = (_at(row, task.stage) for row in (self.costs.activation_bytes, self.costs.kept_bytes))
        if task.kind is WEIGHT:
            self._change(device, now_s, -1, -kept)
        elif task.kind is BACKWARD:
            is_split = self.schedule.is_split(task)
            self._change(device, now_s, 0 if is_split else -1, kept - activation if is_split else -activation)
        receiver = self.schedule.reader_of(task)
        if receiver is not None and receiver != device and (device, receiver) not in self.apart:
            end_s = self._transfer(task, device, receiver, now_s)
            self._push(end_s, "arrived", task, receiver)
            self._hold(task, device, end_s)

    def _move(self, task: Task, device: int, giver: int, taker: int, now_s: float) -> None:
        end_s = self._transfer(task, giver, taker, now_s)
        self.under_way[device, task.kind] += 1
        self._push(end_s, "arrived", task, device)
        self._hold(task, device, end_s)

    def _is_at(self, dispatch: Dispatch, device: int) -> bool:
        """Whether a device has come to what passes between it and another."""
        order, head = self.orders[device], self.heads[device]
        return not self.busy[device] and head < len(order) and order[head] == dispatch

    def _meet(self, task: Task, giver: int, taker: int, now_s: float) -> None:
        """Passes something on while neither end does anything else."""
        end_s = self._transfer(task, giver, taker, now_s)
        for device in (giver, taker):
            self.heads[device] += 1
            self.busy[device] = True
            self._push(end_s, "met", task, device)

    def _transfer(self, task: Task, sender: int, receiver: int, now_s: float) -> float:
        """Sends when the channel is free, and returns the arrival; there is room for what moves from now on."""
        boundary = task.stage if task.kind is FORWARD else task.stage - 1
        move = task.kind in MOVES
        seconds = _at(self.costs.move_s, task.stage) if move else _at(self.costs.transfer_s, boundary)
        start_s = max(now_s, self.channel_free_s[sender, receiver])
        end_s = self.channel_free_s[sender, receiver] = start_s + seconds
        self.transfers.append(Event(task, sender, start_s, end_s, receiver))
        if move:
            size = _at(self.costs.activation_bytes, task.stage)
            self._change(receiver, now_s, +1, size)
            self._change(sender, end_s, -1, -size)
        return end_s

    def _hold(self, task: Task, device: int, until_s: float) -> None:
        if not self.overlap:
            self.busy[device] = True
            self._push(until_s, "free", task, device)

    def _duration_s(self, task: Task) -> float:
        forward_s, backward_s = self.costs.forward_s[task.stage], self.costs.backward_s[task.stage]
        weight_s = self.costs.weight_s[task.stage]
        if task.kind is BACKWARD and not self.schedule.is_split(task):
            return backward_s + weight_s
        return {FORWARD: forward_s, BACKWARD: backward_s, WEIGHT: weight_s}[task.kind]

    def _change(self, device: int, time_s: float, number: int, size: float) -> None:
        self.changes[device].append((time_s, number > 0, number, size))

    def _push(self, time_s: float, what: str, task: Task, device: int) -> None:
        heapq.heappush(self.heap, (time_s, next(self.ticks), what, task, device))
