"""One equation on one iteration's parts: its primitive's local rule, with the loop's counter for the shard's index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive

from autopar.sharding.factors import ShardingRule
from autopar.sharding.time.timing import Cut, Inside


@dataclass(frozen=True)
class TimeShard:
    """What a local rule may ask: the registry's protocol ``Shard``, in iteration ``time`` of a loop.

    Attributes:
        primitive: of the equation.
        inside: how time splits it.
        steps: iterations of the loop.
        time: the iteration (traced int32).
        operand_shapes, result_shapes: of the parts.
    """

    primitive: Primitive
    inside: Inside
    steps: int
    time: Any
    operand_shapes: tuple[tuple[int, ...], ...]
    result_shapes: tuple[tuple[int, ...], ...]

    @property
    def rule(self) -> ShardingRule:
        """The sharding rule."""
        return self.inside.rule

    def count(self, factor: str) -> int:
        """Into how many parts time cuts ``factor``."""
        return self.steps if factor == self.inside.factor else 1

    def index(self, factor: str) -> Any:
        """Which part of ``factor`` this iteration computes."""
        return self.time if factor == self.inside.factor else jnp.int32(0)

    def axes(self, factor: str) -> tuple[str, ...]:
        """None: the parts are one after the other on every device."""
        return ()

    def positions(self, dim: int, result: int = 0) -> Any:
        """Where each element of dimension ``dim`` of a result stands in the whole."""
        here = lax.iota(jnp.int32, self.result_shapes[result][dim])
        cut = self.inside.cut(self.rule.results[result])
        return here if cut is None or cut.dim != dim else _global(here, cut, self.steps, self.time)

    def locate(self, operand: int, dim: int, position: Any) -> Any:
        """Where the element at ``position`` of the whole stands in this part of an operand; -1 if it does not."""
        cut = self.inside.cut(self.rule.operands[operand])
        if cut is None or cut.dim != dim:
            return position
        block, within = position // cut.inner, position % cut.inner
        local = block // self.steps * cut.inner + within
        return jnp.where((position >= 0) & (block % self.steps == self.time), local, -1)

    def offset(self, dim: int, result: int = 0) -> Any:
        """Where a contiguous block starts: time makes none, so that only uncut dimensions may ask."""
        cut = self.inside.cut(self.rule.results[result])
        assert cut is None or cut.dim != dim, f"{self.primitive.name} wants contiguous blocks"
        return jnp.int32(0)

    def operand_offset(self, operand: int, dim: int) -> Any:
        """The same for an operand."""
        cut = self.inside.cut(self.rule.operands[operand])
        assert cut is None or cut.dim != dim, f"{self.primitive.name} wants contiguous blocks"
        return jnp.int32(0)


def _global(here: Any, cut: Cut, steps: int, time: Any) -> Any:
    block, within = here // cut.inner, here % cut.inner
    return (block * steps + time) * cut.inner + within


def take_parts(whole: Any, cut: Cut, steps: int) -> Any:
    """All parts of a value, stacked along a new first dimension."""
    shape, dim = whole.shape, cut.dim
    outer = shape[dim] // (steps * cut.inner)
    apart = whole.reshape(*shape[:dim], outer, steps, cut.inner, *shape[dim + 1 :])
    front = jnp.moveaxis(apart, dim + 1, 0)
    return front.reshape(steps, *shape[:dim], outer * cut.inner, *shape[dim + 1 :])


def join_parts(parts: Any, cut: Cut) -> Any:
    """The whole value, from its parts stacked along the first dimension."""
    steps, shape, dim = parts.shape[0], parts.shape[1:], cut.dim
    outer = shape[dim] // cut.inner
    apart = parts.reshape(steps, *shape[:dim], outer, cut.inner, *shape[dim + 1 :])
    back = jnp.moveaxis(apart, 0, dim + 1)
    return back.reshape(*shape[:dim], outer * steps * cut.inner, *shape[dim + 1 :])


def part_shape(shape: Sequence[int], cut: Cut | None, steps: int) -> tuple[int, ...]:
    """The shape of one part."""
    if cut is None:
        return tuple(shape)
    return tuple(n // steps if i == cut.dim else n for i, n in enumerate(shape))
