"""Runs reshardings: the collectives of a path between two specs, inside ``jax.shard_map``."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from autopar.lowering.hlo import TOGETHER
from autopar.sharding.moves import Step
from autopar.spec import Sizes


def execute(steps: Sequence[Step], x: jax.Array, sizes: Sizes, repeat: int = 0) -> jax.Array:
    """The local value after ``steps``, on every device of a ``shard_map`` over the mesh.

    Args:
        steps: the moves of a resharding, in order.
        x: the local value: an array of any type, or typed PRNG keys (moved, never combined).
        sizes: devices per mesh axis.
        repeat: how often the same was done to the same value before. It is done with that many dimensions of
            size 1 in front: XLA merges collectives that are equal (on CPU even across barriers, which it drops
            before it looks for equal instructions a second time), but not ones of different shapes.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        # The words of a key are one more dimension, after those that the steps name.
        words = execute(steps, jax.random.key_data(x), sizes, repeat)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(x))
    if jnp.issubdtype(x.dtype, jnp.complexfloating) and any(step.kind in _SUMS for step in steps):
        # XLA aborts where it folds a sum of complex constants, so that their parts are summed instead.
        parts = execute(steps, jnp.stack([x.real, x.imag], -1), sizes, repeat)
        return lax.complex(parts[..., 0], parts[..., 1])
    x = x.reshape((1,) * repeat + x.shape)
    for step in steps:
        x = _EXECUTE[step.kind](x, _shifted(step, repeat), sizes)
    return x.reshape(x.shape[repeat:])


def execute_together(steps: Sequence[Step], blocks: Sequence[jax.Array], sizes: Sizes) -> list[jax.Array]:
    """The local values after one step each, sent as one array: all_gathers or reduce_scatters over the same axes.

    All_reduces over the same axes are put side by side: XLA makes one of them (AllReduceCombiner).

    Args:
        steps: one for each value, alike but for their dimensions and bytes.
        blocks: the local values, of one type.
        sizes: devices per mesh axis.
    """
    if steps[0].kind == "all_reduce":
        return [_all_reduce(x, step, sizes) for x, step in zip(blocks, steps, strict=True)]
    axes, size = steps[0].axes, math.prod(sizes[axis] for axis in steps[0].axes)
    gathers = steps[0].kind == "all_gather"
    # A whole value is its blocks along the dimension of the step: (devices, elements of a block).
    parts = [x.reshape(1, -1) if gathers else _in_blocks(x, _dim(s), size) for x, s in zip(blocks, steps, strict=True)]
    shapes = [x.shape if gathers else _cut(x.shape, _dim(s), size) for x, s in zip(blocks, steps, strict=True)]
    joined = jnp.concatenate(parts, axis=1)
    with jax.named_scope(f"{TOGETHER}{len(steps)}"):
        sent = lax.all_gather(joined, axes, tiled=True) if gathers else lax.psum_scatter(joined, axes, tiled=True)
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))
    found = [sent[:, end - math.prod(shape) : end].reshape(-1, *shape) for end, shape in zip(ends, shapes, strict=True)]
    return [_whole(x, _dim(step)) if gathers else x[0] for x, step in zip(found, steps, strict=True)]


def _cut(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], shape[dim] // size, *shape[dim + 1 :])


def _in_blocks(x: jax.Array, dim: int, size: int) -> jax.Array:
    """A value as (blocks along a dimension, elements of one)."""
    block = _cut(x.shape, dim, size)
    return jnp.moveaxis(x.reshape(*x.shape[:dim], size, *block[dim:]), dim, 0).reshape(size, -1)


def _whole(blocks: jax.Array, dim: int) -> jax.Array:
    """A value from its blocks along a dimension, which are counted along the first."""
    shape = blocks.shape[1:]
    return jnp.moveaxis(blocks, 0, dim).reshape(*shape[:dim], -1, *shape[dim + 1 :])


_SUMS = ("all_reduce", "reduce_scatter")


def _shifted(step: Step, dims: int) -> Step:
    """The step on a value with ``dims`` dimensions more in front."""
    if not dims:
        return step
    dim, from_dim = (None if at is None else at + dims for at in (step.dim, step.from_dim))
    return replace(step, dim=dim, from_dim=from_dim)


def _all_gather(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    return lax.all_gather(x, step.axes, axis=_dim(step), tiled=True)


def _reduce_scatter(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    return lax.psum_scatter(x, step.axes, scatter_dimension=_dim(step), tiled=True)


def _all_to_all(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    assert step.from_dim is not None, step
    return lax.all_to_all(x, step.axes, split_axis=_dim(step), concat_axis=step.from_dim, tiled=True)


def _collective_permute(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    return lax.ppermute(x, step.axes, step.permutation)


def _slice(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    block = x.shape[_dim(step)] // math.prod(sizes[axis] for axis in step.axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(step.axes) * block, block, _dim(step))


def _mask(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    return jnp.where(lax.axis_index(step.axes) == 0, x, jnp.zeros_like(x))


def _all_reduce(x: jax.Array, step: Step, sizes: Sizes) -> jax.Array:
    if step.monoid in ("and", "or"):
        return _combine_bits(x, step)
    combine = {"sum": lax.psum, "max": lax.pmax, "min": lax.pmin}[step.monoid]
    return combine(x, step.axes)


def _combine_bits(x: jax.Array, step: Step) -> jax.Array:
    """Truth values combine as bytes, by min and max; no collective combines bits: gather integers."""
    if x.dtype == jnp.bool_:
        combine = {"and": lax.pmin, "or": lax.pmax}[step.monoid]
        return combine(x.astype(jnp.uint8), step.axes).astype(jnp.bool_)
    combine = {"and": lax.bitwise_and, "or": lax.bitwise_or}[step.monoid]
    neutral = jnp.array(-1 if step.monoid == "and" else 0).astype(x.dtype)
    return lax.reduce(lax.all_gather(x, step.axes), neutral, combine, (0,))


def _dim(step: Step) -> int:
    assert step.dim is not None, step
    return step.dim


_EXECUTE: dict[str, Callable[[jax.Array, Step, Sizes], jax.Array]] = {
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "collective_permute": _collective_permute,
    "slice": _slice,
    "mask": _mask,
    "all_reduce": _all_reduce,
}
