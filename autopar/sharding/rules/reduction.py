"""Reductions, scans along a dimension, windows and sorting.

A factor that a sum, maximum, minimum, conjunction or disjunction reduces may be split: it leaves partial
results. Everything else here needs the dimension it works along whole, and splits the others.
"""

from typing import Any

import jax.numpy as jnp

from autopar.sharding.factors import Layout, ShardingRule, letters, sizes_of
from autopar.sharding.registry import sharding_rule
from autopar.sharding.rules.elementwise import Groups, Shape, summable

MONOIDS = {
    "reduce_sum": "sum",
    "reduce_max": "max",
    "reduce_min": "min",
    "reduce_and": "and",
    "reduce_or": "or",
}


def whole_along(shape: Shape, dims: tuple[int, ...]) -> Layout:
    """One factor per dimension, none for ``dims``."""
    return tuple(() if i in dims else factor for i, factor in enumerate(letters(shape)))


def dropped(layout: Layout, dims: tuple[int, ...]) -> Layout:
    """The layout without ``dims``."""
    return tuple(factor for i, factor in enumerate(layout) if i not in dims)


def sum_group(x: Any) -> Groups:
    """A partial first operand passes through, where its dtype has a sum."""
    return ((0,),) if summable(x.dtype) else ()


def along(x: Any, dims: tuple[int, ...], n_operands: int = 1, n_results: int = 1) -> ShardingRule:
    """Operands and results of ``x``'s rank, which are whole along ``dims`` and alike along the others."""
    layout = whole_along(x.shape, dims)
    return ShardingRule((layout,) * n_operands, (layout,) * n_results, sizes_of(layout, x.shape))


def _reduction(monoid: str) -> Any:
    def rule(x: Any, *, axes: tuple[int, ...], **_: Any) -> ShardingRule:
        bitwise = monoid in ("and", "or") and not jnp.issubdtype(x.dtype, jnp.bool_)
        operand = whole_along(x.shape, axes) if bitwise else letters(x.shape)
        reduced = {name: monoid for i in axes for name in operand[i]}
        linear = sum_group(x) if monoid == "sum" else ()
        return ShardingRule((operand,), (dropped(operand, axes),), sizes_of(operand, x.shape), reduced, linear)

    return rule


for _name, _monoid in MONOIDS.items():
    sharding_rule(_name)(_reduction(_monoid))


@sharding_rule("reduce_prod", "reduce_xor", "argmax", "argmin")
def reduce_whole(x: Any, *, axes: tuple[int, ...], **_: Any) -> ShardingRule:
    """Reductions whose parts no collective combines: the reduced dimensions are whole."""
    operand = whole_along(x.shape, axes)
    return ShardingRule((operand,), (dropped(operand, axes),), sizes_of(operand, x.shape))


@sharding_rule("reduce")
def reduce(*avals: Any, dimensions: tuple[int, ...], **_: Any) -> ShardingRule:
    """A user's own reduction of several operands, with as many initial values."""
    n = len(avals) // 2
    operand = whole_along(avals[0].shape, dimensions)
    layouts = (operand,) * n + ((),) * n
    return ShardingRule(layouts, (dropped(operand, dimensions),) * n, sizes_of(operand, avals[0].shape))


# --- along a dimension --------------------------------------------------------------------------------------


@sharding_rule("cumlogsumexp", "cummax", "cummin", "cumprod")
def cumulative(x: Any, *, axis: int, **_: Any) -> ShardingRule:
    """Whole along the axis of accumulation."""
    return along(x, (axis,))


@sharding_rule("cumsum")
def cumsum(x: Any, *, axis: int, **_: Any) -> ShardingRule:
    """A running sum is linear."""
    layout = whole_along(x.shape, (axis,))
    return ShardingRule((layout,), (layout,), sizes_of(layout, x.shape), linear=sum_group(x))


@sharding_rule("sort")
def sort(*avals: Any, dimension: int, **_: Any) -> ShardingRule:
    """Keys and values are sorted together, along one whole dimension."""
    return along(avals[0], (dimension,), len(avals), len(avals))


@sharding_rule("top_k")
def top_k(x: Any, *, axis: int = -1, **_: Any) -> ShardingRule:
    """Values and indices, along one whole axis."""
    return along(x, (axis % len(x.shape),), n_results=2)


@sharding_rule("approx_top_k")
def approx_top_k(x: Any, *, reduction_dimension: int, **_: Any) -> ShardingRule:
    """Values and indices, along one whole dimension."""
    return along(x, (reduction_dimension % len(x.shape),), n_results=2)


# --- windows ------------------------------------------------------------------------------------------------


def windowed(params: dict[str, Any]) -> tuple[int, ...]:
    """The dimensions along which a window does anything; along the others it is one element, unmoved."""
    rank = len(params["window_dimensions"])
    plain = {"window_dimensions": 1, "window_strides": 1, "base_dilation": 1, "window_dilation": 1}
    return tuple(
        i
        for i in range(rank)
        if any(params.get(name, (1,) * rank)[i] != value for name, value in plain.items())
        or tuple(params["padding"][i]) != (0, 0)
    )


@sharding_rule("reduce_window_max", "reduce_window_min")
def reduce_window(x: Any, **params: Any) -> ShardingRule:
    """Whole along the dimensions that the window spans."""
    layout = whole_along(x.shape, windowed(params))
    return ShardingRule((layout,), (layout,), sizes_of(layout, x.shape))


@sharding_rule("reduce_window_sum")
def reduce_window_sum(x: Any, **params: Any) -> ShardingRule:
    """A sum over windows is linear."""
    layout = whole_along(x.shape, windowed(params))
    return ShardingRule((layout,), (layout,), sizes_of(layout, x.shape), linear=sum_group(x))


@sharding_rule("reduce_window")
def reduce_window_general(*avals: Any, **params: Any) -> ShardingRule:
    """A user's own reduction over windows, of several operands with as many initial values."""
    n = len(avals) // 2
    layout = whole_along(avals[0].shape, windowed(params))
    return ShardingRule((layout,) * n + ((),) * n, (layout,) * n, sizes_of(layout, avals[0].shape))


@sharding_rule("select_and_scatter_add", "select_and_gather_add")
def select_and_scatter_add(x: Any, operand: Any, **params: Any) -> ShardingRule:
    """Derivatives of a maximum over windows: linear in the cotangent or tangent, which comes first."""
    layout = whole_along(operand.shape, windowed(params))
    sizes = sizes_of(layout, operand.shape)
    return ShardingRule((layout, layout), (layout,), sizes, linear=sum_group(x))
