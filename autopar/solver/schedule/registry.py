"""The table of schedules by name. A new one is one function that returns task lists, and one row of the tests.

@schedule("1f1b", in_flight=lambda s, i: min(s.m, s.p - i))
def one_forward_one_backward(s: Pipeline) -> list[Order]: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autopar.solver.schedule.data import Order, Pipeline, Schedule, ScheduleError

Placements = tuple[tuple[int, ...], ...]
Rule = Callable[[Pipeline], list[Order]]
# Seconds of F, B and W, as floats or arrays.
Fill = Callable[[Pipeline, Any, Any, Any], Any]


def whole_pass(_: Pipeline, f: Any, b: Any, w: Any) -> Any:
    """The forward and the whole backward pass of one microbatch."""
    return f + b + w


def line(s: Pipeline) -> Placements:
    """Stage i on device i."""
    return (tuple(range(s.p)),)


def accepts(_: Pipeline) -> str:
    """No complaint."""
    return ""


@dataclass(frozen=True)
class Traits:
    """How schedules differ besides their order.

    Args:
        placements: the device of each virtual stage, one row per replica of the weights.
        requires: what is wrong with a pipeline, or an empty string.
        chunks: virtual stages per device; the default where the user may choose.
        any_chunks: whether the user may choose.
        uniform: whether a device holds several stages, or what others evict: all submeshes must be alike then.
        splits_backward: whether backward is split in input and weight parts.
        evicts: whether devices keep activations for each other.
        slowest: how many stages' worth of filling and draining is hidden.
        exposed: transfers per microbatch and stage that devices wait for, less the weight part where backward is
            split: as few microbatches are under way as suffice without transfers.
    """

    placements: Callable[[Pipeline], Placements] = line
    requires: Callable[[Pipeline], str] = accepts
    chunks: int = 1
    any_chunks: bool = False
    uniform: bool = False
    splits_backward: bool = False
    evicts: bool = False
    slowest: int = 1
    exposed: float = 0.0


@dataclass(frozen=True)
class Family:
    """Everything known about the schedules of one name.

    Args:
        name: how users and plans call it.
        rule: returns the tasks of each device, in order.
        in_flight: ``(pipeline, device)`` to the most activations held there.
        fill: ``(pipeline, tF, tB, tW)`` of one virtual stage to the seconds ``g`` by which it delays the others:
            the papers' bubble formulas. A step whose stages are alike lasts
            ``m * v * (tF + tB + tW) + (p - slowest) * g``. Takes floats or arrays.
        traits: the rest.
    """

    name: str
    rule: Rule
    in_flight: Callable[[Pipeline, int], int]
    fill: Fill
    traits: Traits

    def pipeline(self, p: int, m: int, v: int | None = None) -> Pipeline:
        """The sizes, with the usual number of virtual stages per device unless given."""
        return Pipeline(p, m, self.traits.chunks if v is None else v)

    def complaint(self, s: Pipeline) -> str:
        """Why this pipeline cannot have this schedule; empty if it can."""
        if not self.traits.any_chunks and s.v != self.traits.chunks:
            return f"v={s.v} virtual stages per device: it has {self.traits.chunks}"
        return self.traits.requires(s)


SCHEDULES: dict[str, Family] = {}

TRAITS = Traits()


def schedule(
    name: str, *, in_flight: Callable[[Pipeline, int], int], fill: Fill = whole_pass, traits: Traits = TRAITS
) -> Callable[[Rule], Rule]:
    """Enters a schedule in the table."""

    def register(rule: Rule) -> Rule:
        SCHEDULES[name] = Family(name, rule, in_flight, fill, traits)
        return rule

    return register


def family(name: str) -> Family:
    """The entry of that name.

    Raises:
        ScheduleError: there is none.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"no schedule is called {name!r}", fix=f"choose one of {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]


def make_schedule(name: str, n_devices: int, n_microbatches: int, n_chunks: int | None = None) -> Schedule:
    """The schedule of that name for a pipeline.

    Args:
        name: a key of ``SCHEDULES``.
        n_devices: devices (submeshes) of the pipeline.
        n_microbatches: slices of the batch.
        n_chunks: virtual stages per device; the schedule's usual number unless given.

    Raises:
        ScheduleError: no such schedule, or it cannot take this pipeline.

    >>> [str(task) for task in make_schedule("1f1b", 2, 2).tasks[1][:2]]
    ['F(stage 1, microbatch 0)', 'B(stage 1, microbatch 0)']
    """
    found = family(name)
    s = found.pipeline(n_devices, n_microbatches, n_chunks)
    complaint = found.complaint(s)
    if complaint:
        raise ScheduleError(
            f"schedule {name!r} cannot run {complaint}",
            where=f"p={s.p} devices, m={s.m} microbatches, v={s.v} virtual stages per device",
            fix="choose other sizes or another schedule",
        )
    placements = found.traits.placements(s)
    return Schedule(
        name=name,
        pipeline=s,
        placements=placements,
        replica_of=tuple(microbatch % len(placements) for microbatch in range(s.m)),
        tasks=tuple(tuple(order) for order in found.rule(s)),
        in_flight_bounds=tuple(found.in_flight(s, device) for device in range(s.p)),
        partners=tuple(range(s.p))[::-1] if found.traits.evicts else (),
    )
