"""Contractions: ``dot_general`` with any dimension numbers, and the ragged products of expert layers.

Factors are named as in ``b m k, b k n -> b m n``: ``b`` batch, ``m`` free in the left operand, ``n`` free in
the right one, ``k`` contracted, ``g`` groups of rows (experts), each with its number.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax

from autopar.sharding.factors import Dim, Layout, ShardingRule
from autopar.sharding.registry import Shard, local_rule, sharding_rule

Pairs = tuple[tuple[int, ...], tuple[int, ...]]


def _layout(shape: tuple[int, ...], free: str, *named: tuple[str, tuple[int, ...]]) -> Layout:
    """``named`` dimensions carry their name and position in the list, the others ``free`` and a count."""
    dims: list[Dim] = [()] * len(shape)
    for prefix, positions in named:
        for number, position in enumerate(positions):
            dims[position] = (f"{prefix}{number}",)
    rest = [position for position, dim in enumerate(dims) if not dim]
    for number, position in enumerate(rest):
        dims[position] = (f"{free}{number}",)
    return tuple(dims)


def _product(
    lhs: Any, rhs: Any, contracting: Pairs, batch: Pairs, groups: tuple[int, ...] = ()
) -> tuple[Layout, Layout, dict[str, int]]:
    """Layouts of both operands, every dimension named, and the sizes of the factors."""
    left = _layout(lhs.shape, "m", ("b", batch[0]), ("k", contracting[0]))
    right = _layout(rhs.shape, "n", ("b", batch[1]), ("k", contracting[1]), ("g", groups))
    sizes = {
        dim[0]: size
        for layout, shape in ((left, lhs.shape), (right, rhs.shape))
        for dim, size in zip(layout, shape, strict=True)
    }
    return left, right, sizes


def _of(layout: Layout, prefix: str) -> Layout:
    return tuple(dim for dim in layout if dim and dim[0].startswith(prefix))


def _without(layout: Layout, whole: set[str]) -> Layout:
    return tuple(() if dim and dim[0] in whole else dim for dim in layout)


def _rule(layouts: tuple[Layout, ...], result: Layout, sizes: dict[str, int], monoid: str) -> ShardingRule:
    """Drops the factors of one element; what the result does not have is reduced; bilinear if it is a sum."""

    def split(layout: Layout) -> Layout:
        return tuple(tuple(name for name in dim if sizes[name] > 1) for dim in layout)

    kept = {name for dim in result for name in dim}
    sizes_above_one = {name: size for name, size in sizes.items() if size > 1}
    return ShardingRule(
        operands=tuple(map(split, layouts)),
        results=(split(result),),
        sizes=sizes_above_one,
        reduce={name: monoid for name in sizes_above_one if name not in kept},
        linear=((0,), (1,)) if monoid == "sum" else (),
    )


@sharding_rule("dot_general")
def dot_general(lhs: Any, rhs: Any, *, dimension_numbers: tuple[Pairs, Pairs], **_: Any) -> ShardingRule:
    """``b m k, b k n -> b m n`` with ``k`` summed; linear in each operand."""
    left, right, sizes = _product(lhs, rhs, *dimension_numbers)
    batch = tuple((f"b{i}",) for i in range(len(dimension_numbers[1][0])))
    boolean = lhs.dtype == rhs.dtype == jnp.bool_
    return _rule((left, right), (*batch, *_of(left, "m"), *_of(right, "n")), sizes, "or" if boolean else "sum")


# ------------------------------------------------------------------------------------------- ragged products


def _ragged(lhs: Any, numbers: Any) -> tuple[int, str, tuple[int, ...]]:
    """The ragged dimension of ``lhs``, its kind (m, k or b), and the dimensions with group sizes each."""
    ((contracting, _), (batch, _)) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    free = tuple(i for i in range(lhs.ndim) if i not in (*contracting, *batch))
    if ragged in batch:
        return ragged, "b", batch[: batch.index(ragged)]
    kind, dims = ("k", contracting) if ragged in contracting else ("m", free)
    return ragged, kind, (*batch, *dims[: dims.index(ragged)])


@sharding_rule("ragged_dot_general")
def ragged_dot_general(
    lhs: Any, rhs: Any, group_sizes: Any, *, ragged_dot_dimension_numbers: Any, group_offset: Any, **_: Any
) -> ShardingRule | None:
    """``m k, g k n -> m n``, each row ``m`` in one group ``g``, or ``m k, k n -> g m n``, each ``k`` in one.

    Splitting the ragged dimension splits the groups with it. Splitting ``g`` is expert parallelism: each
    device computes the rows of its groups; in the first form the others are zero, to be summed.
    """
    if group_offset is not None:
        return None
    numbers = ragged_dot_dimension_numbers
    contracting, batch = numbers.dot_dimension_numbers
    ragged, kind, prefix = _ragged(lhs, numbers)
    left, right, sizes = _product(lhs, rhs, contracting, batch, numbers.rhs_group_dimensions)
    sizes["g0"] = group_sizes.shape[-1]
    groups: Layout = (("g0",),) if kind == "k" else ()
    names = tuple((f"b{i}",) for i in range(len(batch[0])))
    result = (*groups, *names, *_of(left, "m"), *_of(right, "n"))
    per_row = group_sizes.ndim > 1
    sizes_layout: Layout = (*(left[i] for i in prefix), ()) if per_row else ((),)
    if per_row or kind == "b":  # groups that differ from row to row, or that matter to no one, stay whole
        whole = {"g0", *left[ragged]}
        left, right, sizes_layout, result = (_without(v, whole) for v in (left, right, sizes_layout, result))
        sizes = {name: size for name, size in sizes.items() if name not in whole}
    return _rule((left, right, sizes_layout), result, sizes, "sum")


@local_rule("ragged_dot_general")
def local_ragged_dot_general(
    shard: Shard, lhs: Any, rhs: Any, group_sizes: Any, *, ragged_dot_dimension_numbers: Any, **params: Any
) -> list[Any]:
    """The groups cut to the rows that this device holds; its own groups are rolled to the front."""
    numbers = ragged_dot_dimension_numbers
    ragged, kind, outer = _ragged(lhs, numbers)
    bind = partial(lax.ragged_dot_general, ragged_dot_dimension_numbers=numbers, **params)
    if not shard.rule.operands[0][ragged] and "g0" not in shard.rule.sizes:
        return [bind(lhs, rhs, group_sizes)]
    ends = jnp.clip(jnp.cumsum(group_sizes) - shard.operand_offset(0, ragged), 0, lhs.shape[ragged])
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    n_groups = group_sizes.shape[0] // shard.count("g0")
    if n_groups == group_sizes.shape[0]:
        return [bind(lhs, rhs, ends - starts)]
    mine = shard.index("g0") * n_groups
    ends, starts = (lax.dynamic_slice_in_dim(v, mine, n_groups) for v in (ends, starts))
    lhs = jnp.roll(lhs, -starts[0], ragged)
    if kind == "k":
        contracted = numbers.dot_dimension_numbers[0]
        rhs = jnp.roll(rhs, -starts[0], contracted[1][contracted[0].index(ragged)])
        return [bind(lhs, rhs, ends - starts)]
    return [jnp.roll(bind(lhs, rhs, ends - starts), starts[0], axis=len(outer))]
