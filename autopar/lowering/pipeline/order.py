"""In which order a pipeline dispatches its pieces: one line, the same in every process."""

from collections.abc import Sequence
from dataclasses import dataclass

from autopar.ir.stages import Part, Tag
from autopar.lowering.pipeline.compile import StageRunner
from autopar.lowering.pipeline.step import ONCE, Call, Sending, Shift
from autopar.solver.schedule import Kind, Schedule, dispatch_order
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


def order_calls(runners: Sequence[StageRunner], schedule: Schedule) -> Calls:
    """Prologues, tasks and updates in an order that runs no piece before what it reads."""
    tasks: list[Call | Sending | Shift] = []
    for dispatch in dispatch_order(schedule):
        task = dispatch.task
        replica = schedule.replica_of[task.microbatch]
        if task.kind in MOVES:
            tasks.append(Shift(task.stage, task.microbatch, dispatch.ends(schedule)[-1]))
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
