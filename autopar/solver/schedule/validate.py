"""One check for every schedule: each task exactly once, no deadlock, no more held than claimed."""

from __future__ import annotations

from collections import Counter

from autopar.solver.schedule.data import BACKWARD, EVICT, FORWARD, LOAD, MOVES, Kind, Schedule, ScheduleError, Task


def validate(schedule: Schedule) -> None:
    """Checks what a runtime relies on.

    Every (stage, microbatch) has one forward and one backward, at most one weight part and one eviction with its
    load, each on the device that its placement says; run in the order of the lists, every task finds its inputs
    sooner or later; and no device ever holds more activations than ``in_flight_bounds`` claims.

    Raises:
        ScheduleError: names the first task or device at fault.
    """
    _check_tasks(schedule)
    _check_progress(schedule)
    for device, claimed in enumerate(schedule.in_flight_bounds):
        held = most_held(schedule, device)
        if held > claimed:
            raise ScheduleError(
                f"device {device} holds {held} activations, but schedule {schedule.name!r} claims {claimed}",
                where=_where(schedule),
                fix="correct the order or the claim",
            )


def most_held(schedule: Schedule, device: int) -> int:
    """The most activations on the device, its own and its partner's, whatever the times of the tasks."""
    own = _peak(schedule, device, (FORWARD, LOAD), evicted=-1)
    if not schedule.partners or schedule.partners[device] == device:
        return own
    return own + _peak(schedule, schedule.partners[device], (EVICT,), evicted=1)


def _peak(schedule: Schedule, device: int, takes: tuple[Kind, ...], evicted: int) -> int:
    """The peak of a count over a device's list: of what it holds, or (``evicted = 1``) of what its partner keeps."""
    held = peak = 0
    for task in schedule.tasks[device]:
        if task.kind in takes:
            held += 1
        elif evicted > 0:
            held -= task.kind is LOAD
        else:
            held -= task.kind is EVICT or task.kind is _last_kind(schedule, task)
        peak = max(peak, held)
    return peak


def _last_kind(schedule: Schedule, task: Task) -> Kind:
    """The task after which the activation is not needed any more."""
    return Kind.WEIGHT if schedule.is_split(task) else Kind.BACKWARD


def _check_tasks(schedule: Schedule) -> None:
    counts = Counter(task for order in schedule.tasks for task in order)
    for stage in range(schedule.n_stages):
        for microbatch in range(schedule.n_microbatches):
            for kind in (FORWARD, BACKWARD):
                task = Task(stage, microbatch, kind)
                if counts[task] != 1:
                    raise ScheduleError(
                        f"{task} occurs {counts[task]} times", where=_where(schedule), fix="list it once"
                    )
    for device, order in enumerate(schedule.tasks):
        for task in order:
            _check_task(schedule, device, task, counts)


def _check_task(schedule: Schedule, device: int, task: Task, counts: Counter[Task]) -> None:
    inside = 0 <= task.stage < schedule.n_stages and 0 <= task.microbatch < schedule.n_microbatches
    if not inside:
        raise ScheduleError(f"{task} is outside of the pipeline", where=_where(schedule), fix="remove it")
    if counts[task] != 1:
        raise ScheduleError(f"{task} occurs {counts[task]} times", where=_where(schedule), fix="list it once")
    if schedule.device_of(task) != device:
        raise ScheduleError(
            f"{task} is listed on device {device}, but placed on {schedule.device_of(task)}",
            where=_where(schedule),
            fix="list it where its stage is placed",
        )
    pair = {EVICT: LOAD, LOAD: EVICT}.get(task.kind)
    if pair and (not schedule.partners or counts[Task(task.stage, task.microbatch, pair)] != 1):
        raise ScheduleError(
            f"{task} has no partner device or no task {pair} to match", where=_where(schedule), fix="add it"
        )


def _check_progress(schedule: Schedule) -> None:
    done: set[Task] = set()
    heads = [0] * schedule.n_devices
    moved = True
    while moved:
        moved = False
        for device, order in enumerate(schedule.tasks):
            while heads[device] < len(order) and ready(schedule, order[heads[device]], done):
                done.add(order[heads[device]])
                heads[device] += 1
                moved = True
    stuck = [order[head] for order, head in zip(schedule.tasks, heads, strict=True) if head < len(order)]
    if stuck:
        raise ScheduleError(
            f"deadlock: {', '.join(map(str, stuck))} wait for tasks that come later",
            where=_where(schedule),
            fix="move the tasks that they need before them",
        )


def ready(schedule: Schedule, task: Task, done: set[Task]) -> bool:
    """Whether all that the task reads is there, on its own device."""
    if any(needed not in done for needed in schedule.dependencies(task)):
        return False
    evicted = Task(task.stage, task.microbatch, EVICT)
    back = Task(task.stage, task.microbatch, LOAD)
    return task.kind in (FORWARD, *MOVES) or evicted not in done or back in done


def _where(schedule: Schedule) -> str:
    s = schedule.pipeline
    return f"schedule {schedule.name!r} with p={s.p}, m={s.m}, v={s.v}"
