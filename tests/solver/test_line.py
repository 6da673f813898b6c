"""The line in which a pipeline is dispatched: nothing is read before it is sent, and no schedule loses its overlap."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from pipelines import priced_pipelines

from autopar.solver.schedule import (
    SCHEDULES,
    Dispatch,
    Kind,
    Schedule,
    Task,
    TaskCosts,
    dispatch_order,
    make_schedule,
    simulate,
)
from autopar.solver.schedule.data import MOVES

CASES = [(name, p, m) for name in SCHEDULES for p, m in ((2, 4), (4, 8), (4, 16))]


def ends_of(task: Task, schedule: Schedule) -> tuple[int, int]:
    """The device that makes a result, and the one that reads it next."""
    stage = {Kind.FORWARD: task.stage + 1, Kind.BACKWARD: task.stage - 1}.get(task.kind, task.stage)
    reader = replace(task, stage=stage if 0 <= stage < schedule.n_stages else task.stage)
    return schedule.device_of(task), schedule.device_of(reader)


def all_apart(schedule: Schedule) -> set[tuple[int, int]]:
    """Every device in a process of its own."""
    return set(itertools.permutations(range(schedule.n_devices), 2))


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
    costs = TaskCosts.uniform(schedule.n_stages)
    alone = simulate(schedule, costs).makespan_s
    assert alone <= simulate(schedule, costs, apart=all_apart(schedule)).makespan_s <= 1.07 * alone


def walked(schedule: Schedule, costs: TaskCosts) -> dict[Task, float]:
    """When each task ends if devices go along the line, one dispatch at a time, and each send takes both its ends."""
    free_s, ends_s = [0.0] * schedule.n_devices, {}
    for dispatch in dispatch_order(schedule):
        task, device = dispatch.task, schedule.device_of(dispatch.task)
        if dispatch.sends or task.kind in MOVES:
            ends = (device, schedule.partners[device]) if task.kind in MOVES else ends_of(task, schedule)
            if ends[0] != ends[1]:
                row, at = (costs.move_s, 0) if task.kind in MOVES else (costs.transfer_s, -(task.kind is Kind.BACKWARD))
                free_s[ends[0]] = free_s[ends[1]] = max(free_s[end] for end in ends) + row[task.stage + at]
            continue
        lasts = {"F": costs.forward_s, "B": costs.backward_s, "W": costs.weight_s}[task.kind][task.stage]
        if task.kind == "B" and not schedule.is_split(task):
            lasts += costs.weight_s[task.stage]
        ends_s[task] = free_s[device] = free_s[device] + lasts
    return ends_s


@settings(max_examples=100, deadline=None)
@given(priced_pipelines())
def test_between_processes_the_simulator_goes_along_the_line(priced: tuple[Schedule, TaskCosts]) -> None:
    schedule, costs = priced
    timeline = simulate(schedule, costs, apart=all_apart(schedule))
    assert {event.task: event.end_s for event in timeline.tasks} == pytest.approx(walked(schedule, costs))
    for transfer, task in itertools.product(timeline.transfers, timeline.tasks):
        apart = transfer.end_s <= task.start_s or task.end_s <= transfer.start_s
        assert apart or task.device not in (transfer.device, transfer.receiver)
    assert all(held <= most for held, most in zip(timeline.peak_in_flight, schedule.in_flight_bounds, strict=True))


def test_only_what_passes_between_processes_takes_both_ends() -> None:
    """Four devices in two processes: one of three boundaries holds up both of its sides."""
    schedule = make_schedule("1f1b", 4, 8)
    costs = replace(TaskCosts.uniform(4), transfer_s=(0.5, 0.5, 0.5))
    halves = {(i, j) for i, j in all_apart(schedule) if i // 2 != j // 2}
    inside, between, everywhere = (
        simulate(schedule, costs, apart=apart).makespan_s for apart in ((), halves, all_apart(schedule))
    )
    assert inside < between < everywhere
