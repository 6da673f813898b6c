"""The line in which a pipeline is dispatched: nothing is read before it is sent, and no schedule loses its overlap."""

from collections import Counter
from dataclasses import replace

import pytest

from autopar.lowering.pipeline.order import Dispatch, dispatch_order
from autopar.solver.schedule import SCHEDULES, Kind, Schedule, Task, TaskCosts, make_schedule, simulate
from autopar.solver.schedule.data import MOVES

CASES = [(name, p, m) for name in SCHEDULES for p, m in ((2, 4), (4, 8), (4, 16))]


def ends_of(task: Task, schedule: Schedule) -> set[int]:
    """The device that makes a result, and the one that reads it next."""
    stage = {Kind.FORWARD: task.stage + 1, Kind.BACKWARD: task.stage - 1}.get(task.kind, task.stage)
    reader = replace(task, stage=stage if 0 <= stage < schedule.n_stages else task.stage)
    return {schedule.device_of(task), schedule.device_of(reader)}


@pytest.mark.parametrize(("name", "p", "m"), CASES)
def test_tasks_come_in_the_order_of_their_device_and_after_what_they_read_was_sent(name: str, p: int, m: int) -> None:
    schedule = make_schedule(name, p, m)
    line = dispatch_order(schedule)
    started = [dispatch.task for dispatch in line if not dispatch.sends]
    for device, order in enumerate(schedule.tasks):
        assert tuple(task for task in started if schedule.device_of(task) == device) == tuple(order)
    sent = Counter(dispatch.task for dispatch in line if dispatch.sends)
    assert sent == Counter(task for task in started if task.kind not in MOVES)
    seen: set[Dispatch] = set()
    for dispatch in line:
        task, device = dispatch.task, schedule.device_of(dispatch.task)
        wanted = {task} if dispatch.sends else schedule.dependencies(task)
        for other in wanted:
            here = dispatch.sends or (schedule.device_of(other) == device and other.stage == task.stage)
            assert Dispatch(other, not here) in seen
        seen.add(dispatch)


@pytest.mark.parametrize(("name", "p", "m"), CASES)
def test_sends_that_hold_both_ends_cost_next_to_no_time(name: str, p: int, m: int) -> None:
    """Sent as soon as they were made, results of 1f1b held up a step of 33 passes for 48."""
    schedule = make_schedule(name, p, m)
    free_s = [0.0] * p
    for dispatch in dispatch_order(schedule):
        task = dispatch.task
        if dispatch.sends:
            ends = ends_of(task, schedule)
            for device in ends:
                free_s[device] = max(free_s[end] for end in ends)
        elif task.kind not in MOVES:
            whole = task.kind is Kind.BACKWARD and (task.stage, task.microbatch) not in schedule.split
            free_s[schedule.device_of(task)] += 1.0 + whole
    alone = simulate(schedule, TaskCosts.uniform(schedule.n_stages)).makespan_s
    assert alone <= max(free_s) <= 1.07 * alone
