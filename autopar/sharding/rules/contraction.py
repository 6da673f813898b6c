"""Contractions: ``dot_general`` with any dimension numbers, and the ragged products of expert layers.

Factors are named as in ``b m k, b k n -> b m n``: ``b`` batch, ``m`` free in the left operand, ``n`` free in
the right one, ``k`` contracted, each with its number.
"""

from typing import Any

import jax.numpy as jnp

from autopar.sharding.factors import Dim, Layout, ShardingRule
from autopar.sharding.registry import sharding_rule

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


def _product(lhs: Any, rhs: Any, contracting: Pairs, batch: Pairs) -> tuple[Layout, Layout, dict[str, int]]:
    """Layouts of both operands, every dimension named, and the sizes of the factors."""
    left = _layout(lhs.shape, "m", ("b", batch[0]), ("k", contracting[0]))
    right = _layout(rhs.shape, "n", ("b", batch[1]), ("k", contracting[1]))
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


@sharding_rule("dot_general")
def dot_general(lhs: Any, rhs: Any, *, dimension_numbers: tuple[Pairs, Pairs], **_: Any) -> ShardingRule:
    """``b m k, b k n -> b m n`` with ``k`` summed; linear in each operand."""
    left, right, sizes = _product(lhs, rhs, *dimension_numbers)
    batch = tuple((f"b{i}",) for i in range(len(dimension_numbers[1][0])))
    whole = {name for name, size in sizes.items() if size == 1}
    result = (*batch, *_of(left, "m"), *_of(right, "n"))
    boolean = lhs.dtype == jnp.bool_ and rhs.dtype == jnp.bool_
    return ShardingRule(
        operands=(_without(left, whole), _without(right, whole)),
        results=(_without(result, whole),),
        sizes={name: size for name, size in sizes.items() if size > 1},
        reduce={
            name: "or" if boolean else "sum"
            for name, size in sizes.items()
            if name.startswith("k") and size > 1
        },
        linear=() if boolean else ((0,), (1,)),
    )
