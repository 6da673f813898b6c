"""The event simulator's view of a slicing: the same stages, task by task, device by device."""

from __future__ import annotations

from itertools import pairwise

from autopar.solver.schedule import TaskCosts, Timeline, make_schedule, simulate
from autopar.solver.slicing.data import Slicing, SlicingProblem, StageCost


def timeline(problem: SlicingProblem, slicing: Slicing, *, overlap: bool = True) -> Timeline:
    """Runs the microbatches of a slicing; synchronisation and update come after it.

    Args:
        problem: what was sliced.
        slicing: the slicing, or one of its runner-ups.
        overlap: whether devices compute while they send.
    """
    m, stages, costs = slicing.microbatches, slicing.stages, _costs(problem, slicing)
    schedule = make_schedule(slicing.schedule, slicing.n_pipeline_devices, m, slicing.n_chunks)
    task_costs = TaskCosts(
        forward_s=tuple(cost.forward_s for cost in costs),
        backward_s=tuple(cost.backward_s for cost in costs),
        weight_s=tuple(cost.weight_s for cost in costs),
        transfer_s=tuple(
            problem.costs.transfer_s(one.last_layer, one.submesh, other.submesh, m) for one, other in pairwise(stages)
        ),
        activation_bytes=tuple(cost.activation_bytes_per_microbatch for cost in costs),
        kept_bytes=tuple(cost.left_bytes_per_microbatch for cost in costs),
        state_bytes=tuple(cost.state_bytes for cost in costs),
    )
    return simulate(schedule, task_costs, overlap=overlap)


def simulated_step_s(problem: SlicingProblem, slicing: Slicing, *, overlap: bool = True) -> float:
    """The step by simulation: every device synchronises and updates as soon as its own tasks are done.

    Finer than ``Slicing.total_s``, which prices a device that holds several stages as if all were like its worst,
    and lets synchronisation begin when the last device is done: use it to choose between runner-ups.
    """
    run = timeline(problem, slicing, overlap=overlap)
    schedule = run.schedule
    copies = len(schedule.placements) > 1
    once_s = [c.sync_s + c.optimizer_s + copies * c.replica_sync_s for c in _costs(problem, slicing)]
    return max(
        events[-1].end_s + sum(once_s[stage] for stage in schedule.stages_of(device))
        for device, events in enumerate(run.by_device)
    )


def _costs(problem: SlicingProblem, slicing: Slicing) -> list[StageCost]:
    m = slicing.microbatches
    return [problem.costs.cost(s.first_layer, s.last_layer, s.submesh, m, s.remat) for s in slicing.stages]
