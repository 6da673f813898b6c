"""Primitives that move elements without computing: broadcasts, reshapes, slices, concatenations, iota.

All are linear, so that a partial sum passes through them.
"""

import math
from itertools import pairwise
from typing import Any

from jax import lax

from autopar.sharding.factors import Dim, Layout, ShardingRule, letters, sizes_of
from autopar.sharding.registry import Shard, local_rule, sharding_rule
from autopar.sharding.rules.elementwise import Groups, Shape, summable


def linear_in(avals: tuple[Any, ...], *operands: int) -> Groups:
    """One group of operands, or none where their dtype has no sum."""
    return (operands,) if operands and all(summable(avals[i].dtype) for i in operands) else ()


def only(layout: Layout, kept: tuple[bool, ...]) -> Layout:
    """The layout with the dimensions that are not ``kept`` made whole."""
    return tuple(dim if keep else () for dim, keep in zip(layout, kept, strict=True))


# --- broadcast_in_dim, iota ---------------------------------------------------------------------------------


@sharding_rule("broadcast_in_dim")
def broadcast_in_dim(x: Any, *_: Any, shape: Shape, broadcast_dimensions: Shape, **__: Any) -> ShardingRule:
    """``a -> b a``: new and stretched dimensions have factors of their own, which the operand lacks."""
    result = letters(shape)
    operand = tuple(result[dim] if size > 1 else () for size, dim in zip(x.shape, broadcast_dimensions, strict=True))
    return ShardingRule((operand,), (result,), sizes_of(result, shape), linear=linear_in((x,), 0))


@local_rule("broadcast_in_dim")
def local_broadcast_in_dim(shard: Shard, x: Any, *, broadcast_dimensions: Shape, **_: Any) -> list[Any]:
    """Broadcasts to the local shape."""
    return [lax.broadcast_in_dim(x, shard.result_shapes[0], broadcast_dimensions)]


@sharding_rule("iota")
def iota(*, shape: Shape, **_: Any) -> ShardingRule:
    """No operand: any dimension may be split."""
    return ShardingRule((), (letters(shape),), sizes_of(letters(shape), shape))


@local_rule("iota")
def local_iota(shard: Shard, *, dtype: Any, dimension: int, **_: Any) -> list[Any]:
    """This shard's positions; in integers, so that narrow floats round as in the whole iota."""
    counts = lax.broadcast_in_dim(shard.positions(dimension), shard.result_shapes[0], (dimension,))
    return [lax.convert_element_type(counts, dtype)]


# --- reshape ------------------------------------------------------------------------------------------------


def blocks(old: Shape, new: Shape) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The smallest groups of consecutive old and new dimensions of equal product, unit dimensions left out.

    >>> blocks((2, 3, 1, 8), (6, 4, 2))
    [((0, 1), (0,)), ((3,), (1, 2))]
    """
    left = [i for i, size in enumerate(old) if size != 1]
    right = [i for i, size in enumerate(new) if size != 1]
    found, i, j = [], 0, 0
    while i < len(left):
        first_i, first_j = i, j
        product, target = old[left[i]], new[right[j]]
        i, j = i + 1, j + 1
        while product != target:
            if product < target:
                product, i = product * old[left[i]], i + 1
            else:
                target, j = target * new[right[j]], j + 1
        found.append((tuple(left[first_i:i]), tuple(right[first_j:j])))
    return found


def refinement(old: Shape, new: Shape) -> Shape | None:
    """The coarsest sizes, major first, of which each old and new size is a product of consecutive ones.

    >>> refinement((8, 12), (16, 6)), refinement((4, 6), (6, 4))
    ((8, 2, 6), None)
    """
    cuts = {math.prod(shape[i:]) for shape in (old, new) for i in range(len(shape) + 1)}
    ordered = sorted(cuts, reverse=True)
    if any(major % minor for major, minor in pairwise(ordered)):
        return None
    return tuple(major // minor for major, minor in pairwise(ordered))


def _grouped(names: list[str], factor_sizes: Shape, shape: Shape) -> list[Dim]:
    """Consecutive factors dealt out to the dimensions of ``shape``."""
    dims, position = [], 0
    for size in shape:
        start, product = position, 1
        while product < size:
            product, position = product * factor_sizes[position], position + 1
        dims.append(tuple(names[start:position]))
    return dims


@sharding_rule("reshape")
def reshape(x: Any, *_: Any, new_sizes: Shape, dimensions: Any = None, **__: Any) -> ShardingRule | None:
    """``(a b) -> a b``: dimensions split and merge; those of a block without common factors are whole."""
    if 0 in x.shape:
        return None
    order = range(len(x.shape)) if dimensions is None else dimensions  # the operand is transposed first
    shape = tuple(x.shape[i] for i in order)
    operand: list[Dim] = [()] * len(x.shape)
    result: list[Dim] = [()] * len(new_sizes)
    sizes: dict[str, int] = {}
    for old_dims, new_dims in blocks(shape, new_sizes):
        old, new = tuple(shape[i] for i in old_dims), tuple(new_sizes[i] for i in new_dims)
        factors = refinement(old, new)
        if factors is None:
            continue
        names = [f"d{len(sizes) + i}" for i in range(len(factors))]
        sizes |= dict(zip(names, factors, strict=True))
        for i, dim in zip(old_dims, _grouped(names, factors, old), strict=True):
            operand[order[i]] = dim
        for i, dim in zip(new_dims, _grouped(names, factors, new), strict=True):
            result[i] = dim
    return ShardingRule((tuple(operand),), (tuple(result),), sizes, linear=linear_in((x,), 0))


@local_rule("reshape")
def local_reshape(shard: Shard, x: Any, *, dimensions: Shape | None = None, **_: Any) -> list[Any]:
    """Reshapes to the local shape."""
    return [lax.reshape(x, shard.result_shapes[0], dimensions)]


# --- dimensions permuted, added, dropped, reversed ----------------------------------------------------------


@sharding_rule("transpose")
def transpose(x: Any, *, permutation: Shape, **_: Any) -> ShardingRule:
    """``a b -> b a``."""
    operand = letters(x.shape)
    result = tuple(operand[i] for i in permutation)
    return ShardingRule((operand,), (result,), sizes_of(operand, x.shape), linear=linear_in((x,), 0))


@sharding_rule("squeeze")
def squeeze(x: Any, *, dimensions: Shape, **_: Any) -> ShardingRule:
    """``a 1 b -> a b``."""
    operand = letters(x.shape)
    result = tuple(dim for i, dim in enumerate(operand) if i not in dimensions)
    return ShardingRule((operand,), (result,), sizes_of(operand, x.shape), linear=linear_in((x,), 0))


@sharding_rule("rev")
def rev(x: Any, *, dimensions: Shape, **_: Any) -> ShardingRule:
    """Reversed dimensions are whole: their blocks would have to trade places."""
    layout = only(letters(x.shape), tuple(i not in dimensions for i in range(len(x.shape))))
    return ShardingRule((layout,), (layout,), sizes_of(layout, x.shape), linear=linear_in((x,), 0))


# --- parts of dimensions ------------------------------------------------------------------------------------


@sharding_rule("slice")
def slice_(x: Any, *, start_indices: Shape, limit_indices: Shape, strides: Shape | None, **_: Any) -> ShardingRule:
    """Dimensions taken whole pass; others are whole."""
    steps = strides or (1,) * len(x.shape)
    taken = zip(start_indices, limit_indices, steps, x.shape, strict=True)
    kept = tuple(start == 0 and limit == size and step == 1 for start, limit, step, size in taken)
    layout = only(letters(x.shape), kept)
    return ShardingRule((layout,), (layout,), sizes_of(layout, x.shape), linear=linear_in((x,), 0))


@local_rule("slice")
def local_slice(shard: Shard, x: Any, *, start_indices: Shape, strides: Shape | None, **params: Any) -> list[Any]:
    """Split dimensions end at their local size."""
    limits = tuple(
        size if dim else limit
        for dim, size, limit in zip(shard.rule.operands[0], x.shape, params["limit_indices"], strict=True)
    )
    return [lax.slice(x, start_indices, limits, strides)]


@sharding_rule("dynamic_slice")
def dynamic_slice(x: Any, *starts: Any, slice_sizes: Shape) -> ShardingRule:
    """Dimensions taken whole pass (JAX clamps their start to 0); others are whole."""
    kept = tuple(size == part for size, part in zip(x.shape, slice_sizes, strict=True))
    layout = only(letters(x.shape), kept)
    operands = (layout, *((),) * len(starts))
    return ShardingRule(operands, (layout,), sizes_of(layout, x.shape), linear=linear_in((x,), 0))


@local_rule("dynamic_slice")
def local_dynamic_slice(shard: Shard, x: Any, *starts: Any, **_: Any) -> list[Any]:
    """Slices of the local size; a split dimension is taken whole, from 0."""
    return [lax.dynamic_slice_p.bind(x, *starts, slice_sizes=shard.result_shapes[0])]


@sharding_rule("dynamic_update_slice")
def dynamic_update_slice(x: Any, update: Any, *starts: Any, **_: Any) -> ShardingRule:
    """Dimensions that the update covers pass; others are whole."""
    kept = tuple(size == part for size, part in zip(x.shape, update.shape, strict=True))
    layout = only(letters(x.shape), kept)
    operands = (layout, layout, *((),) * len(starts))
    sizes = sizes_of(layout, x.shape)
    return ShardingRule(operands, (layout,), sizes, linear=linear_in((x, update), 0, 1))


@sharding_rule("pad")
def pad(x: Any, value: Any, *, padding_config: tuple[Shape, ...]) -> ShardingRule:
    """Unpadded dimensions pass; linear in operand and padding value together."""
    layout = only(letters(x.shape), tuple(tuple(config) == (0, 0, 0) for config in padding_config))
    sizes = sizes_of(layout, x.shape)
    return ShardingRule((layout, ()), (layout,), sizes, linear=linear_in((x, value), 0, 1))


@sharding_rule("concatenate")
def concatenate(*avals: Any, dimension: int) -> ShardingRule:
    """Whole along the dimension that grows."""
    shape = avals[0].shape
    layout = only(letters(shape), tuple(i != dimension for i in range(len(shape))))
    operands = (layout,) * len(avals)
    return ShardingRule(operands, (layout,), sizes_of(layout, shape), linear=linear_in(avals, *range(len(avals))))


@sharding_rule("split")
def split(x: Any, *, sizes: Shape, axis: int) -> ShardingRule:
    """Whole along the axis that is cut."""
    layout = only(letters(x.shape), tuple(i != axis for i in range(len(x.shape))))
    results = (layout,) * len(sizes)
    return ShardingRule((layout,), results, sizes_of(layout, x.shape), linear=linear_in((x,), 0))


@sharding_rule("stack")
def stack(*avals: Any, axis: int) -> ShardingRule:
    """``a, a -> 1 a``: the new axis is whole."""
    layout = letters(avals[0].shape)
    result = (*layout[:axis], (), *layout[axis:])
    sizes = sizes_of(layout, avals[0].shape)
    return ShardingRule((layout,) * len(avals), (result,), sizes, linear=linear_in(avals, *range(len(avals))))


@sharding_rule("unstack")
def unstack(x: Any, *, axis: int) -> ShardingRule:
    """``1 a -> a, a``: the axis that goes is whole."""
    layout = only(letters(x.shape), tuple(i != axis for i in range(len(x.shape))))
    result = (*layout[:axis], *layout[axis + 1 :])
    sizes = sizes_of(layout, x.shape)
    return ShardingRule((layout,), (result,) * x.shape[axis], sizes, linear=linear_in((x,), 0))


@sharding_rule("tile")
def tile(x: Any, *, reps: Shape) -> ShardingRule:
    """``a -> (r a)``: copies are the major factor."""
    operand = letters(x.shape)
    sizes = sizes_of(operand, x.shape) | {f"r{i}": int(n) for i, n in enumerate(reps) if n > 1}
    result = tuple((f"r{i}", *dim) if reps[i] > 1 else dim for i, dim in enumerate(operand))
    return ShardingRule((operand,), (result,), sizes, linear=linear_in((x,), 0))


@local_rule("tile")
def local_tile(shard: Shard, x: Any, **_: Any) -> list[Any]:
    """As many copies as the local result holds."""
    pairs = zip(shard.result_shapes[0], x.shape, strict=True)
    return [lax.tile(x, tuple(result // size for result, size in pairs))]
