"""The shift by which the stages of a pipeline hand on what they made (``autopar.lowering.pipelined.shift``)."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from autopar.sharding.factors import ShardingRule, letters, sizes_of
from autopar.sharding.moves import Step
from autopar.sharding.registry import Shard, collectives, local_rule, sharding_rule
from autopar.sharding.strategies import Strategy
from autopar.spec import Sizes

STAGE = "stage"
"""The factor that is the dimension of the stages."""


@sharding_rule("stage_shift")
def stage_shift(x: Any, entering: Any, *flags: Any, reverse: bool) -> ShardingRule:
    """``s a, a -> s a``: what enters is whole along the stages; whoever holds the first one takes it."""
    one = letters(x.shape[1:])
    layout = ((STAGE,) if x.shape[0] > 1 else (), *one)
    sizes = sizes_of(one, x.shape[1:]) | {STAGE: x.shape[0]}
    return ShardingRule((layout, one, *((),) * len(flags)), (layout,), sizes)


@local_rule("stage_shift")
def local_stage_shift(shard: Shard, x: Any, entering: Any, *flags: Any, reverse: bool) -> list[Any]:
    """The stages of a device move by one; the last one's value goes to the next device."""
    axes, count = shard.axes(STAGE), shard.count(STAGE)
    edge = x[:1] if reverse else x[-1:]
    if axes:
        # Whatever leaves the last stage is needed at the first one only if it may go round again.
        ring = [(i, (i - 1 if reverse else i + 1) % count) for i in range(count)]
        open_end = [pair for pair in ring if flags or pair[1] != (count - 1 if reverse else 0)]
        edge = lax.ppermute(edge, axes, open_end)
    first = shard.index(STAGE) == (count - 1 if reverse else 0)
    takes = first & flags[0] if flags else first
    edge = jnp.where(takes, entering[None], edge)
    return [jnp.concatenate([x[1:], edge] if reverse else [edge, x[:-1]])]


@collectives("stage_shift")
def sent(result: Any, strategy: Strategy, sizes: Sizes) -> tuple[Step, ...]:
    """The value of one stage goes to the next device."""
    axes = strategy.axes_of(STAGE)
    if not axes:
        return ()
    local_stages = result.shape[0] // math.prod(sizes[axis] for axis in axes)
    nbytes = result.nbytes / strategy.outputs[0].shards(sizes) / local_stages
    return (Step("collective_permute", axes, nbytes=nbytes),)
