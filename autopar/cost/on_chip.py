"""Which temporaries a TPU's compiler keeps in the memory on the chip (VMEM), so that they need no other.

XLA's memory space assignment (xla/service/memory_space_assignment) goes through the buffers by what they gain, and
gives each a place on the chip from its maker to its last reader if one is free all that time and no wait between two
uses is longer than ``WAIT`` copies of the whole memory on the chip (``CostAnalysisPrefetchIntervalPicker``). What waits
longer, as activations do from the forward to the backward pass of a large model, is written to the device's memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from autopar.cost.model import CostModel, device_of

WAIT = 8.0
"""The compiler's ``xla_vf_vmem_max_overlap_to_mem_size_async_copy_ratio``, as it prints it for v5e, v5p and v6e."""


@dataclass(frozen=True)
class Chip:
    """The memory on the chip.

    Attributes:
        nbytes: what holds temporaries.
        wait_s: the longest time that one may wait there for its next use.
    """

    nbytes: float
    wait_s: float


@dataclass(frozen=True)
class Stay:
    """A temporary.

    Attributes:
        nbytes: its size.
        uses: the equations that make and read it, ascending, at least one.
    """

    nbytes: float
    uses: tuple[int, ...]


def chip_of(cost: CostModel) -> Chip | None:
    """The memory on the chip of the device that a cost model prices; None where there is none."""
    device = device_of(cost)
    if device is None or not device.on_chip_bytes:
        return None
    return Chip(device.on_chip_bytes, WAIT * device.on_chip_bytes / device.memory_Bps)


def placed_on_chip(stays: Sequence[Stay], ends_s: Sequence[float], chip: Chip) -> list[bool]:
    """For each temporary whether it lives on the chip.

    Args:
        stays: the temporaries.
        ends_s: for each equation the seconds from the start of the step to its end.
        chip: the memory on the chip.
    """
    used = np.zeros(len(ends_s))
    placed = [False] * len(stays)
    # The gain is proportional to the bytes and counts per root of the bytes: larger ones come first.
    for at in sorted(range(len(stays)), key=lambda at: -stays[at].nbytes):
        stay = stays[at]
        waits = (ends_s[later] - ends_s[use] for use, later in pairwise(stay.uses))
        span = slice(stay.uses[0], stay.uses[-1] + 1)
        if max(waits, default=0.0) < chip.wait_s and used[span].max() + stay.nbytes <= chip.nbytes:
            used[span] += stay.nbytes
            placed[at] = True
    return placed
