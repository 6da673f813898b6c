"""Which layers a stage runs on which microbatch at which tick: GPipe order, and the circular (interleaved) one.

GPipe (Huang et al. 2019; as one program, Xu et al. 2021, GSPMD section 3.3): stage s holds consecutive layers and has
microbatch t - s at tick t. Circular: what leaves the last stage enters the first again until it has been through all
rounds; the microbatches go round in groups of as many as there are stages, so that none waits.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax


@dataclass(frozen=True)
class Order:
    """A pipeline of one scan over layers; the methods take traced or plain numbers.

    Attributes:
        stages: p.
        microbatches: m; a multiple of p where there are several rounds.
        rounds: v, how often a microbatch goes through all stages.
        layers: of the scan, p * v * k.
        reverse: whether the scan runs from the last layer to the first; ticks, stages and rounds then do, too.
    """

    stages: int
    microbatches: int
    rounds: int
    layers: int
    reverse: bool

    @property
    def tasks(self) -> int:
        """What each stage does: v * m."""
        return self.rounds * self.microbatches

    @property
    def ticks(self) -> int:
        """From the first microbatch's start to the last one's end: v * m + p - 1."""
        return self.tasks + self.stages - 1

    @property
    def depth(self) -> int:
        """Layers of a stage in one round."""
        return self.layers // (self.stages * self.rounds)

    @property
    def entry(self) -> int:
        """The stage that takes in microbatches."""
        return self.stages - 1 if self.reverse else 0

    @property
    def exit(self) -> int:
        """The stage that puts them out."""
        return 0 if self.reverse else self.stages - 1

    def task(self, tick: Any, stage: Any) -> Any:
        """The task of a stage at a tick; in a bubble the one before or after it, so that it computes with real data."""
        return jnp.clip(tick - stage, 0, self.tasks - 1)

    def busy(self, tick: Any, stage: Any) -> Any:
        """Whether the stage is not in a bubble."""
        return (tick >= stage) & (tick - stage < self.tasks)

    def microbatch(self, task: Any) -> Any:
        """Of a task."""
        if self.rounds == 1:
            return task
        return task // (self.stages * self.rounds) * self.stages + task % self.stages

    def round(self, task: Any) -> Any:
        """Of a task."""
        return task // self.stages % self.rounds

    def enters(self, task: Any) -> Any:
        """Whether the entry stage takes in a new microbatch with this task."""
        return self.round(task) == (self.rounds - 1 if self.reverse else 0)

    def by_round(self, tasks: Any) -> Any:
        """Values by task, (v * m, ...), as (m, v, ...)."""
        if self.rounds == 1:
            return tasks[:, None]
        groups = tasks.reshape(-1, self.rounds, self.stages, *tasks.shape[1:])
        return jnp.moveaxis(groups, 1, 2).reshape(self.microbatches, self.rounds, *tasks.shape[1:])

    def leaving(self, ticks: Any) -> Any:
        """What leaves the pipeline, by microbatch, of the results of all stages by tick, (T, p, ...)."""
        real = lax.slice_in_dim(ticks, self.exit, self.exit + self.tasks)
        last = self.by_round(real)[:, 0 if self.reverse else -1]
        here = lax.broadcasted_iota(jnp.int32, last.shape, 1) == self.exit
        return _total(jnp.where(here, last, jnp.zeros_like(last)))

    def by_layer(self, ticks: Any) -> Any:
        """What the layers of all stages made, by tick, (T, k, p, ...), as microbatches of whole scans, (m, L, ...)."""
        stages = [self.by_round(ticks[s : s + self.tasks, :, s]) for s in range(self.stages)]
        return jnp.stack(stages, 2).reshape(self.microbatches, self.layers, *ticks.shape[3:])

    def by_stage(self, layers: Any) -> Any:
        """Values by layer, (L, ...), as those of each round by layer and stage, (v, k, p, ...)."""
        apart = layers.reshape(self.rounds, self.stages, self.depth, *layers.shape[1:])
        return jnp.swapaxes(apart, 1, 2)

    def from_stages(self, rounds: Any) -> Any:
        """The inverse of ``by_stage``."""
        return jnp.swapaxes(rounds, 1, 2).reshape(self.layers, *rounds.shape[3:])


def _total(x: Any) -> Any:
    """The sum over dimension 1, in the dtype that the terms have: all but one are zero."""
    if x.dtype == jnp.bool_:
        return lax.reduce(x, False, lax.bitwise_or, (1,))
    return lax.reduce(x, jnp.zeros((), x.dtype), lax.add, (1,))
