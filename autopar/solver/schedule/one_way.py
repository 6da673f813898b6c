"""Schedules with one stage per device: GPipe, 1F1B and what grew from it.

``p`` devices, ``m`` microbatches, device ``i``; F, B and W are forward, backward (its input part where there is
a W) and the weight part.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np

from autopar.solver.schedule.data import BACKWARD, EVICT, FORWARD, LOAD, WEIGHT, Kind, Order, Pipeline, Task
from autopar.solver.schedule.registry import Traits, schedule


@schedule("gpipe", in_flight=lambda s, i: s.m)
def gpipe(s: Pipeline) -> list[Order]:
    """All forwards, then all backwards. Huang et al. 2019: bubble (p-1)/(m+p-1), m activations held."""
    return [_one_and_one(s, i, warm=s.m) for i in range(s.p)]


@schedule("1f1b", in_flight=lambda s, i: min(s.m, s.p - i), traits=Traits(exposed=2.0))
def one_forward_one_backward(s: Pipeline) -> list[Order]:
    """As few forwards ahead as keep every device busy. PipeDream-flush, DAPPLE: p-i activations held."""
    return [_one_and_one(s, i, warm=s.p - i) for i in range(s.p)]


@schedule("eager_1f1b", in_flight=lambda s, i: min(s.m, 2 * (s.p - i) - 1))
def eager_one_forward_one_backward(s: Pipeline) -> list[Order]:
    """1F1B with up to twice as many forwards ahead, which hides transfers. Zhuang et al. 2023 (AlpaComm)."""
    return [_one_and_one(s, i, warm=2 * (s.p - i) - 1) for i in range(s.p)]


def _fill_h1(s: Pipeline, f: Any, b: Any, w: Any) -> Any:
    """The paper's tF + tB - tW, where W is the shortest; the whole of F and B where p microbatches are not there."""
    return f + b - (np.minimum(np.minimum(f, b), w) if s.m >= s.p else 0)


@schedule(
    "zb_h1",
    in_flight=lambda s, i: min(s.m, s.p),
    fill=_fill_h1,
    traits=Traits(splits_backward=True, exposed=2.0),
)
def zero_bubble_h1(s: Pipeline) -> list[Order]:
    """1F1B whose late W fill the drain. Qi et al. 2024: bubble (p-1)(tF+tB-tW) in the memory of 1F1B."""
    return [_late_weights(s, i, warm=s.p - i, late=i) for i in range(s.p)]


def _fill_h2(s: Pipeline, f: Any, b: Any, w: Any) -> Any:
    """Devices start f after one another; nothing else is left unless B lasts longer than 2W or 2F."""
    return f + (np.maximum(b - 2 * np.minimum(f, w), 0) if s.m >= 2 * s.p - 1 else b)


@schedule(
    "zb_h2",
    in_flight=lambda s, i: min(s.m, 2 * s.p - 1),
    fill=_fill_h2,
    traits=Traits(splits_backward=True),
)
def zero_bubble_h2(s: Pipeline) -> list[Order]:
    """Forwards ahead until no device idles between its first and last task. Qi et al. 2024: (p-1)(tF+tB-2tW).

    That is zero where tF = tB = tW, if each device starts the next step when it is done with this one. Seen
    as one step, from the first task to the last one, the devices still start tF after one another.
    """
    return [_late_weights(s, i, warm=2 * (s.p - i) - 1, late=2 * i) for i in range(s.p)]


def _held_under_bpipe(s: Pipeline, i: int) -> int:
    """What device i holds: its own up to the cap, and what its partner ``p-1-i`` has beyond, one of it in exchange."""
    partner = min(s.m, i + 1)
    guests = partner - _cap(s) + 1 if partner > _cap(s) else 0
    return min(s.m, s.p - i, _cap(s)) + guests


def _cap(s: Pipeline) -> int:
    return (s.p + 2) // 2


@schedule("bpipe", in_flight=_held_under_bpipe, traits=Traits(uniform=True, evicts=True, exposed=2.0))
def bpipe(s: Pipeline) -> list[Order]:
    """1F1B whose early devices keep activations on the late ones. Kim et al. 2023: at most ceil((p+2)/2) held."""
    return [evicting(order, _cap(s)) for order in one_forward_one_backward(s)]


def evicting(order: Order, cap: int) -> Order:
    """The same order with moves to the partner and back, so that at most ``cap`` activations stay here.

    An activation that is not needed soon leaves right after its forward; the one that is needed first returns
    as soon as a backward has made room. Moves overlap with the tasks that follow them.

    Args:
        order: forwards and whole backwards, the backwards in the order of the forwards.
        cap: at least 2, or as many as ``order`` holds.
    """
    last_forward = max(index for index, task in enumerate(order) if task.kind is FORWARD)
    here, away, result = 0, deque[Task](), Order()
    for index, task in enumerate(order):
        result.append(task)
        if task.kind is FORWARD:
            here += 1
            if here == cap and index < last_forward and (away or order[index + 1].kind is FORWARD):
                here -= 1
                away.append(task)
                result.append(replace(task, kind=EVICT))
        else:
            here -= 1
            if away:
                here += 1
                result.append(replace(away.popleft(), kind=LOAD))
    return result


def _one_and_one(s: Pipeline, i: int, warm: int) -> Order:
    forwards, backwards = _tasks(s, i, FORWARD), _tasks(s, i, BACKWARD)
    order = forwards[:warm]
    for k, backward in enumerate(backwards):
        order += [backward, *forwards[warm + k : warm + k + 1]]
    return order


def _late_weights(s: Pipeline, i: int, warm: int, late: int) -> Order:
    """1F1B in which each W follows ``late`` microbatches after its B."""
    forwards, backwards, weights = _tasks(s, i, FORWARD), _tasks(s, i, BACKWARD), _tasks(s, i, WEIGHT)
    order = forwards[:warm]
    for k, backward in enumerate(backwards):
        order.append(backward)
        if k >= late:
            order.append(weights[k - late])
        order += forwards[warm + k : warm + k + 1]
    return order + weights[max(s.m - late, 0) :]


def _tasks(s: Pipeline, i: int, kind: Kind) -> Order:
    return [Task(i, k, kind) for k in range(s.m)]
