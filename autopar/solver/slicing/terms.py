"""The terms of a step: what a stage adds to the busiest device, to filling the pipeline, and to memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.solver.schedule import Family, Pipeline
from autopar.solver.slicing.tables import Tables


@dataclass(frozen=True, eq=False)
class Terms:
    """Prices of all stages under one schedule, for pipelines of ``least.p`` to ``most.p`` devices.

    A step lasts ``max_k (work_k + wait_k) + sum_k (fill_k + travel_k) + max_k once_k``: the busiest stage runs m
    microbatches; filling and draining the pipeline adds every stage's ``g`` but that of the busiest itself
    (``Family.fill``) and the transfers; gradients are synchronised and parameters updated at the end. With v
    virtual stages per device, stage k stands for all v of its device. Where terms depend on p they are the
    least over the range: a bound.

    Args:
        family: the schedule.
        least: the shortest pipeline of the range.
        most: the longest one.
        tables: the costs.
    """

    family: Family
    least: Pipeline
    most: Pipeline
    tables: Tables

    @property
    def passes(self) -> int:
        """Stages that a device runs in a step: microbatches times virtual stages."""
        return self.least.m * self.least.v

    @property
    def held(self) -> int:
        """Stages whose weights a device holds."""
        return self.least.v * len(self.family.traits.placements(self.least))

    def _fill_range_s(self) -> tuple[np.ndarray, np.ndarray]:
        stage = self.tables.stage
        f, b, w = (np.where(np.isfinite(stage["forward_s"]), stage[n], 0.0) for n in TIMES)
        ends = [np.maximum(self.family.fill(s, f, b, w), 0.0) for s in (self.least, self.most)]
        return np.minimum(*ends), np.maximum(*ends)

    def fill_s(self) -> np.ndarray:
        """Shape ``(r, c, layers, layers)``: each stage's part of filling and draining."""
        return self._fill_range_s()[0] / self.least.v

    def work_s(self) -> np.ndarray:
        """The same shape: what a device computes in a step, all its stages like this one, but the hidden fill."""
        times = sum(self.tables.stage[name] for name in TIMES)
        return self.passes * times - self.family.traits.slowest * self._fill_range_s()[1]

    def once_s(self) -> np.ndarray:
        """The same shape: what a device does once per step, all its stages like this one."""
        stage = self.tables.stage
        copies_s = stage["replica_sync_s"] if self.held > self.least.v else 0.0
        return self.held * (stage["sync_s"] + stage["optimizer_s"] + copies_s)

    def wait_s(self, transfer_s: np.ndarray | float, weight_s: np.ndarray | float) -> np.ndarray | float:
        """What a device waits in a step for transfers to its next stage that the schedule does not hide."""
        traits = self.family.traits
        slack_s = weight_s if traits.splits_backward else 0.0
        return (self.passes - 1) * np.maximum(traits.exposed * transfer_s - slack_s, 0.0)

    def link_s(self, transfer_s: np.ndarray | float) -> np.ndarray | float:
        """How long a link is busy in a step, beyond the transfers that fill and drain the pipeline."""
        return (self.passes - 1) * transfer_s

    def travel_s(self, transfer_s: np.ndarray | float) -> np.ndarray | float:
        """What a transfer, and that of the gradient back, adds to filling and draining."""
        return 2.0 * transfer_s / self.least.v

    def in_flight(self, from_end: int) -> int:
        """The fewest activations that the ``from_end``-th last device holds, over the range of pipelines."""
        m, v = self.least.m, self.least.v
        lengths = range(max(self.least.p, from_end), self.most.p + 1)
        return min(self.family.in_flight(Pipeline(p, m, v), p - from_end) for p in lengths)

    def in_flight_on(self, device: int) -> int:
        """What a device of the shortest pipeline of the range holds."""
        return self.family.in_flight(self.least, device)

    def peak_bytes(self, in_flight: int) -> np.ndarray:
        """Memory of a device that holds so many activations, if all its stages were this one.

        Where backward is split, any of them may be what a rematerialised forward pass leaves for the weight part.
        """
        stage = self.tables.stage
        each = stage["activation_bytes_per_microbatch"]
        if self.family.traits.splits_backward:
            each = np.maximum(each, stage["left_bytes_per_microbatch"])
        return self.held * stage["state_bytes"] + in_flight * each + stage["peak_extra_bytes"]


TIMES = ("forward_s", "backward_s", "weight_s")
