"""In which order a pipeline dispatches its pieces: one line, the same in every process."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.ir.stages import Part, Tag
from autopar.lowering.pipeline.compile import StageRunner
from autopar.lowering.pipeline.step import ONCE, Call, Shift
from autopar.solver.schedule import Kind, Schedule, Task
from autopar.solver.schedule.data import MOVES

PARTS = {Kind.FORWARD: Part.FORWARD, Kind.BACKWARD: Part.BACKWARD, Kind.WEIGHT: Part.WEIGHTS}
"""What a task of a schedule runs."""


@dataclass(frozen=True)
class Calls:
    """What a step dispatches, in order.

    Attributes:
        prologue: before the loop.
        tasks: in the loop, each with whether it is the last of its piece.
        update: after it.
    """

    prologue: tuple[Call, ...]
    tasks: tuple[tuple[Call | Shift, bool], ...]
    update: tuple[Call, ...]


def order_calls(runners: Sequence[StageRunner], schedule: Schedule) -> Calls:
    """Prologues, tasks and updates in an order that runs no piece before what it reads."""
    tasks: list[Call | Shift] = []
    for task in dispatch_order(schedule):
        replica = schedule.replica_of[task.microbatch]
        device = schedule.device_of(task)
        if task.kind in MOVES:
            keeper = schedule.partners[device] if task.kind is Kind.EVICT else device
            tasks.append(Shift(task.stage, task.microbatch, keeper))
        else:
            tags = [Tag(PARTS[task.kind])]
            if task.kind is Kind.BACKWARD and (task.stage, task.microbatch) not in schedule.split:
                tags.append(Tag(Part.WEIGHTS))
            present = [tag for tag in tags if tag in runners[task.stage].pieces]
            tasks += [Call(task.stage, tag, task.microbatch, replica) for tag in present]
    last = {(call.stage, call.tag): i for i, call in enumerate(tasks) if isinstance(call, Call)}
    marked = tuple((c, isinstance(c, Call) and last[c.stage, c.tag] == i) for i, c in enumerate(tasks))
    return Calls(_rounds(runners, Part.PROLOGUE), marked, _rounds(runners, Part.UPDATE))


def _rounds(runners: Sequence[StageRunner], part: Part) -> tuple[Call, ...]:
    found = [(tag, runner.replica, runner.stage) for runner in runners for tag in runner.pieces if tag.part == part]
    return tuple(Call(stage, tag, ONCE, replica) for tag, replica, stage in sorted(found))


def dispatch_order(schedule: Schedule) -> list[Task]:
    """All tasks in one line: each device's in its order, the devices in turn as what they wait for has been passed."""
    waiting = [list(reversed(order)) for order in schedule.tasks]
    done: set[Task] = set()
    found: list[Task] = []
    while any(waiting):
        ready = [row for row in waiting if row and done.issuperset(schedule.dependencies(row[-1]))]
        assert ready, f"schedule {schedule.name} waits for itself"
        found.extend(row.pop() for row in ready)
        done.update(found[-len(ready) :])
    return found
