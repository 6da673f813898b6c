"""Schedules in which a device holds several stages: interleaved, the V shape, waves, two directions."""

from __future__ import annotations

from typing import Any

import numpy as np

from autopar.solver.schedule.data import BACKWARD, FORWARD, WEIGHT, Kind, Order, Pipeline, Task
from autopar.solver.schedule.list_order import list_order
from autopar.solver.schedule.registry import Placements, Traits, schedule


def loop(s: Pipeline) -> Placements:
    """Stages go round the devices: 0 1 2 0 1 2."""
    return (tuple(range(s.p)) * s.v,)


def zigzag(s: Pipeline) -> Placements:
    """Stages go to and fro: 0 1 2 2 1 0, so that no transfer is needed at a turn."""
    there, back = tuple(range(s.p)), tuple(range(s.p))[::-1]
    return (sum(((there, back)[turn % 2] for turn in range(s.v)), ()),)


def two_ways(s: Pipeline) -> Placements:
    """Two replicas of the weights, one placed in each direction."""
    return (tuple(range(s.p)), tuple(range(s.p))[::-1])


def _whole_rounds(s: Pipeline) -> str:
    return f"m={s.m} microbatches: not a multiple of p={s.p}" if s.m % s.p else ""


def _several_chunks(s: Pipeline) -> str:
    if s.v < 2:
        return "v=1 virtual stage per device: use 1f1b"
    return _whole_rounds(s)


@schedule(
    "interleaved",
    in_flight=lambda s, i: min(s.m * s.v, 2 * (s.p - i - 1) + (s.v - 1) * s.p + 1),
    traits=Traits(placements=loop, requires=_several_chunks, chunks=2, any_chunks=True, uniform=True),
)
def interleaved(s: Pipeline) -> list[Order]:
    """1F1B over v stages per device, p microbatches at a time. Narayanan et al. 2021: bubble (p-1)/(vm+p-1)."""
    return [_interleaved(s, i) for i in range(s.p)]


def _interleaved(s: Pipeline, i: int) -> Order:
    def nth(k: int, kind: Kind) -> Task:
        turn, within = divmod(k, s.p * s.v)
        chunk, microbatch = divmod(within, s.p)
        if kind is BACKWARD:
            chunk = s.v - 1 - chunk
        return Task(chunk * s.p + i, turn * s.p + microbatch, kind)

    total = s.m * s.v
    warm = min(2 * (s.p - i - 1) + (s.v - 1) * s.p, total)
    order = [nth(k, FORWARD) for k in range(warm)]
    for k in range(total):
        if warm + k < total:
            order.append(nth(warm + k, FORWARD))
        order.append(nth(k, BACKWARD))
    return order


def _rounds(s: Pipeline, f: Any, b: Any, w: Any) -> Any:
    """Rounds of p microbatches follow one another without a gap where tF = tB, else with gaps of the difference."""
    gap = abs(b + w - f)
    return (f + b + w + gap) / 2 + (s.m // s.p - 1) * gap


def _even_waves(s: Pipeline) -> str:
    if s.v % 2:
        return f"v={s.v} virtual stages per device: a wave goes there and back, so v is even"
    return _whole_rounds(s)


@schedule(
    "wave",
    in_flight=lambda s, i: s.v * s.p - (s.p - 1 - i),
    fill=lambda s, f, b, w: 2.0 * _rounds(s, f, b, w),
    traits=Traits(placements=zigzag, requires=_even_waves, chunks=2, any_chunks=True, uniform=True, exposed=2.0),
)
def wave(s: Pipeline) -> list[Order]:
    """Stages to and fro in v/2 waves. Liu et al. 2023 (Hanayo): Chimera's bubble or less, one copy of the weights.

    With tF = tB the bubble is ``(p-1)/(vm+p-1)`` where p divides m, the least that any order can have: the last
    device starts ``p-1`` forwards late and the first ends as much later.
    """
    return list_order(s, zigzag(s), most_live=s.p)


def _even_pairs(s: Pipeline) -> str:
    if s.p % 2:
        return f"p={s.p} devices: two directions need an even number"
    return _whole_rounds(s)


@schedule(
    "chimera",
    in_flight=lambda s, i: s.p // 2 + 1 + min(i, s.p - 1 - i),
    fill=_rounds,
    traits=Traits(placements=two_ways, requires=_even_pairs, uniform=True, slowest=2, exposed=2.0),
)
def chimera(s: Pipeline) -> list[Order]:
    """Two pipelines through the same devices in opposite directions. Li and Hoefler 2021: bubble (p-2)/(2m+p-2).

    The formula is for tF = tB and p dividing m. Even microbatches run through replica 0, odd ones through 1.
    """
    return list_order(s, two_ways(s), most_live=s.p // 2)


def _two_per_stage(s: Pipeline) -> str:
    return f"m={s.m} microbatches: it needs at least 2p={2 * s.p}" if s.m < 2 * s.p else ""


def _fill_v(_: Pipeline, f: Any, b: Any, w: Any) -> Any:
    """Exact where tB <= tF <= 2tB; at most tB - tF too much in all where tB > tF."""
    return np.maximum(f, b) + b - np.minimum(b, w)


@schedule(
    "dualpipe_v",
    in_flight=lambda s, i: 2 * s.p + 1,
    fill=_fill_v,
    traits=Traits(placements=zigzag, requires=_two_per_stage, chunks=2, uniform=True, splits_backward=True),
)
def dualpipe_v(s: Pipeline) -> list[Order]:
    """DualPipe folded to a V (DeepSeek 2025): 2p+1 activations of a stage held, bubble (p-1)(tF+tB-tW).

    Their formula ``(PP/2-1)(F&B + B - 3W)`` has PP = 2p stages, B the whole backward and F&B a forward and a
    backward fused to one task; here these two are tasks of their own, and the forward's result leaves before
    the backward ends, which makes the bubble smaller. Steps as in their code: forwards down and up the V, split
    backwards while the pipeline fills, whole ones in the main part, split ones again while it drains.
    """
    return [_DualPipeV(s, i).order() for i in range(s.p)]


class _DualPipeV:
    """Emits one device's tasks; arm 0 of the V is stage i, arm 1 is stage 2p-1-i."""

    def __init__(self, s: Pipeline, i: int) -> None:
        self.s, self.i = s, i
        self.stages = (i, 2 * s.p - 1 - i)
        self.done = {FORWARD: [0, 0], BACKWARD: [0, 0]}
        self.late: Order = []
        self.tasks: Order = []

    def forward(self, arm: int) -> None:
        self._next(FORWARD, arm)

    def backward(self, arm: int, split: bool = False) -> None:
        task = self._next(BACKWARD, arm)
        if split:
            self.late.append(Task(task.stage, task.microbatch, WEIGHT))

    def weight(self) -> None:
        self.tasks.append(self.late.pop(0))

    def _next(self, kind: Kind, arm: int) -> Task:
        task = Task(self.stages[arm], self.done[kind][arm], kind)
        self.done[kind][arm] += 1
        self.tasks.append(task)
        return task

    def order(self) -> Order:
        p, m, i = self.s.p, self.s.m, self.i
        for _ in range(2 * (p - i - 1)):
            self.forward(0)
        for _ in range(i + 1):
            self.forward(0)
            self.forward(1)
        for _ in range(p - i - 1):
            self.backward(1, split=True)
            self.weight()
            self.forward(1)
        for _ in range(m - 2 * p + i + 1):
            self.forward(0)
            self.backward(1)
            self.forward(1)
            self.backward(0)
        for _ in range(p - i - 1):
            self.backward(1)
            self.forward(1)
            self.backward(0)
        self._drain()
        return self.tasks

    def _drain(self) -> None:
        i, rest = self.i, self.s.p - self.i - 1
        half = (i + 1) // 2
        for k in range(i + 1):
            self.backward(1, split=k > half or (k == half and i % 2 == 1))
            self.backward(0, split=k >= half)
        for _ in range(rest):
            self.weight()
            self.backward(0, split=True)
        while self.late:
            self.weight()
