"""Orders by list scheduling: every device always runs what is ready, in slots of equal length."""

from __future__ import annotations

from collections import deque

from autopar.solver.schedule.data import BACKWARD, FORWARD, Order, Pipeline, Task
from autopar.solver.schedule.registry import Placements


def list_order(s: Pipeline, placements: Placements, most_live: int) -> list[Order]:
    """Forwards and backwards in the order in which they run when each takes one slot.

    Of what is ready a device takes a backward first, then what lies deepest in the model, then the earliest
    microbatch. A replica takes in a microbatch when fewer than ``most_live`` of its own are under way: all that
    is taken in can finish, whatever the order, so there is no deadlock.

    Args:
        s: the pipeline; microbatch k runs through replica ``k % len(placements)``.
        placements: the device of each stage, one row per replica.
        most_live: microbatches under way in one replica.
    """
    n_stages, n_replicas = len(placements[0]), len(placements)
    waiting = [deque(range(replica, s.m, n_replicas)) for replica in range(n_replicas)]
    ready: list[set[Task]] = [set() for _ in range(s.p)]

    def add(stage: int, microbatch: int, kind) -> None:
        ready[placements[microbatch % n_replicas][stage]].add(Task(stage, microbatch, kind))

    for queue in waiting:
        for _ in range(min(most_live, len(queue))):
            add(0, queue.popleft(), FORWARD)
    orders: list[Order] = [[] for _ in range(s.p)]
    while any(ready):
        slot = [min(tasks, key=_urgency) for tasks in ready if tasks]
        for task in slot:
            device = placements[task.microbatch % n_replicas][task.stage]
            ready[device].remove(task)
            orders[device].append(task)
        for task in slot:
            queue = waiting[task.microbatch % n_replicas]
            if task.kind is FORWARD and task.stage + 1 < n_stages:
                add(task.stage + 1, task.microbatch, FORWARD)
            elif task.kind is FORWARD:
                add(task.stage, task.microbatch, BACKWARD)
            elif task.stage:
                add(task.stage - 1, task.microbatch, BACKWARD)
            elif queue:
                add(0, queue.popleft(), FORWARD)
    return orders


def _urgency(task: Task) -> tuple[bool, int, int]:
    return task.kind is FORWARD, -task.stage, task.microbatch
