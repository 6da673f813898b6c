"""An equation on one device: its primitive's local rule, or the primitive itself on the local operands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax import lax
from jax.extend.core import Primitive

from autopar.compat import result_shapes
from autopar.sharding.factors import Layout, ShardingRule
from autopar.sharding.registry import LOCAL_RULES
from autopar.sharding.strategies import Strategy
from autopar.spec import Sizes

Params = Mapping[str, Any]


@dataclass(frozen=True)
class LocalShard:
    """What a local rule may ask: the registry's protocol ``Shard``, inside ``jax.shard_map``.

    Attributes:
        primitive, params: the equation, with its global parameters.
        rule, strategy, sizes: how it is split, on which mesh.
        operands: the local operands.
    """

    primitive: Primitive
    params: Params
    rule: ShardingRule
    strategy: Strategy
    sizes: Sizes
    operands: tuple[Any, ...]

    @cached_property
    def operand_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Local shapes of the operands."""
        return tuple(tuple(x.shape) for x in self.operands)

    @cached_property
    def result_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Local shapes of the results: those of the global equation, cut by the strategy."""
        avals = [
            jax.ShapeDtypeStruct(self._scaled(x.shape, layout), x.dtype)
            for x, layout in zip(self.operands, self.rule.operands, strict=True)
        ]
        whole = result_shapes(self.primitive, avals, self.params)
        pairs = zip(whole, self.strategy.outputs, strict=True)
        return tuple(spec.local_shape(shape, self.sizes) for shape, spec in pairs)

    def _scaled(self, shape: Sequence[int], layout: Layout) -> tuple[int, ...]:
        return tuple(n * math.prod(map(self.count, dim)) for n, dim in zip(shape, layout, strict=True))

    def count(self, factor: str) -> int:
        """Into how many parts the strategy cuts ``factor`` (1: not split)."""
        return math.prod(self.sizes[axis] for axis in self.strategy.axes_of(factor))

    def index(self, factor: str) -> Any:
        """Which part of ``factor`` this device computes: a traced int32 scalar, 0 where it is not split."""
        axes = self.strategy.axes_of(factor)
        return lax.axis_index(axes) if axes else jax.numpy.int32(0)

    def axes(self, factor: str) -> tuple[str, ...]:
        """The axes that split ``factor``."""
        return self.strategy.axes_of(factor)

    def offset(self, dim: int, result: int = 0) -> Any:
        """Where this device's block of dimension ``dim`` of a result starts in the whole (traced int32)."""
        return self._start(self.rule.results[result][dim])

    def operand_offset(self, operand: int, dim: int) -> Any:
        """The same for dimension ``dim`` of an operand."""
        return self._start(self.rule.operands[operand][dim])

    def positions(self, dim: int, result: int = 0) -> Any:
        """Where each element of dimension ``dim`` of a result stands in the whole (traced int32 vector)."""
        return lax.iota(jax.numpy.int32, self.result_shapes[result][dim]) + self.offset(dim, result)

    def locate(self, operand: int, dim: int, position: Any) -> Any:
        """Where a position of the whole stands in this device's block of an operand; outside it if elsewhere."""
        return position - self.operand_offset(operand, dim)

    def _start(self, factors: tuple[str, ...]) -> Any:
        start, stride = jax.numpy.int32(0), 1
        for factor in reversed(factors):  # minor first: the stride of a factor is the product of those below it
            if self.count(factor) > 1:
                start += self.index(factor) * (stride * self.rule.sizes[factor] // self.count(factor))
            stride *= self.rule.sizes[factor]
        return start


def without_shardings(params: Params) -> dict[str, Any]:
    """The parameters without the explicit shardings that JAX keeps in some: a local program has none."""
    return {name: None if name in ("sharding", "out_sharding") else value for name, value in params.items()}


def run_local(
    primitive: Primitive,
    params: Params,
    rule: ShardingRule,
    strategy: Strategy,
    sizes: Sizes,
    operands: Sequence[Any],
) -> list[Any]:
    """Runs one equation on this device's blocks, inside ``jax.shard_map`` over the axes of ``sizes``.

    Args:
        primitive: the equation's primitive.
        params: its parameters in the global program.
        rule: its sharding rule.
        strategy: how it is split.
        sizes: devices per mesh axis.
        operands: local operands, laid out as ``strategy.inputs`` says.

    Returns:
        The local results, laid out as ``strategy.outputs`` says (partial ones not yet combined).
    """
    params = without_shardings(params)
    local = LOCAL_RULES.get(primitive.name)
    if local is not None:
        shard = LocalShard(primitive, params, rule, strategy, sizes, tuple(operands))
        return list(local(shard, *operands, **params))
    results = primitive.bind(*operands, **params)
    return list(results) if primitive.multiple_results else [results]
