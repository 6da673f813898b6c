"""Gathers and scatters: embedding lookups, log-likelihood picks, and their gradients.

An operand dimension of which each index takes one row (a vocabulary) can be split. A gather then looks up the
rows that the device holds, zero elsewhere, and is partial; a scatter drops the updates of rows that another
device holds. An index out of the *global* range does (clamped, filled, dropped) as in the whole equation.

Factors: ``r`` rows of the operand, ``w`` a window taken whole, ``b`` a batch dimension of the indices.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from autopar.sharding.factors import Dim, Layout, ShardingRule
from autopar.sharding.registry import Shard, local_rule, sharding_rule

CLIP, FILL_OR_DROP = lax.GatherScatterMode.CLIP, lax.GatherScatterMode.FILL_OR_DROP


def _layouts(
    operand: tuple[int, ...], indices: tuple[int, ...], windows: tuple[int, ...], numbers: Any
) -> tuple[list[Dim], list[Dim]]:
    """The layouts of operand and indices: what a gather and the scatter that transposes it have in common.

    Args:
        operand: its shape.
        indices: their shape; the last dimension is the index vector: a column per ``start_index_map``.
        windows: elements that one index takes along each operand dimension (``slice_sizes``).
        numbers: GatherDimensionNumbers.
    """
    batch: list[Dim] = [(f"b{i}",) if size > 1 else () for i, size in enumerate(indices[:-1])]
    batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    dims: list[Dim] = []
    for i, (size, window) in enumerate(zip(operand, windows, strict=True)):
        if i in batching:
            dims.append(batch[batching[i]])
        elif size == 1:
            dims.append(())
        elif window == size:
            dims.append((f"w{i}",))
        else:
            dims.append((f"r{i}",) if window == 1 and i in numbers.start_index_map else ())
    return dims, [*batch, ()]


def _window_dims(rank: int, numbers: Any) -> list[int]:
    """The operand dimensions that stand in the result of a gather (or the updates of a scatter), in order."""
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    return [i for i in range(rank) if i not in gone]


def _slices_layout(dims: list[Dim], index_dims: list[Dim], numbers: Any) -> Layout:
    """A gather's result, or a scatter's updates: windows at ``offset_dims``, batch elsewhere."""
    windows = iter(dims[i] for i in _window_dims(len(dims), numbers))
    batch = iter(index_dims[:-1])
    rank = len(index_dims) - 1 + len(numbers.offset_dims)
    dims_in_order = [next(windows) if i in numbers.offset_dims else next(batch) for i in range(rank)]
    return tuple(() if dim and dim[0].startswith("r") else dim for dim in dims_in_order)


def _sizes(dims: Sequence[Dim], shape: tuple[int, ...]) -> dict[str, int]:
    return {dim[0]: size for dim, size in zip(dims, shape, strict=False) if dim}


def _is_sum(dtype: Any) -> bool:
    """Whether arrays of ``dtype`` can be summed (not booleans, not keys)."""
    return bool(jnp.issubdtype(dtype, np.number))


def _wide(limits: Sequence[int]) -> Any:
    """The signed dtype that holds every position."""
    return jnp.int32 if max(limits) < 2**31 else jnp.int64


def _positions(indices: Any, limits: Sequence[int], mode: Any) -> list[Any]:
    """Each column of the indices as signed integers in ``[0, limit]``; -1 if out of range and not clamped.

    Compares in the dtype of the indices, so that a large unsigned or 64-bit index does not wrap into range.
    """
    wide = _wide(limits)
    columns = []
    for column, limit in enumerate(limits):
        index = indices[..., column]
        top = min(limit, int(jnp.iinfo(index.dtype).max))
        if mode != FILL_OR_DROP:  # a gather clamps what was promised in bounds, too
            columns.append(jnp.clip(index, 0, top).astype(wide))
        else:
            columns.append(jnp.where((index >= 0) & (index <= top), index.astype(wide), -1))
    return columns


def _split_columns(shard: Shard, index_map: Sequence[int]) -> dict[int, str]:
    """The columns of the index vector whose rows are split, with their factor."""
    factors = {column: dim[0] for column, d in enumerate(index_map) if (dim := shard.rule.operands[0][d])}
    return {c: name for c, name in factors.items() if name.startswith("r") and shard.count(name) > 1}


def _limits(shard: Shard, windows: Sequence[int], index_map: Sequence[int]) -> list[int]:
    """The last global position at which the window of each column still fits, from local windows."""
    shape, rows = shard.operand_shapes[0], _split_columns(shard, index_map)
    counts = [shard.count(rows[column]) if column in rows else 1 for column in range(len(index_map))]
    return [shape[d] * count - windows[d] for d, count in zip(index_map, counts, strict=True)]


# ---------------------------------------------------------------------------------------------------- gather


@sharding_rule("gather")
def gather(operand: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, **params: Any) -> ShardingRule:
    """Batch dimensions and whole windows pass through; rows are summed: one device holds each."""
    dims, index_dims = _layouts(operand.shape, indices.shape, slice_sizes, dimension_numbers)
    rows = [dim[0] for dim in dims if dim and dim[0].startswith("r")]
    numeric = _is_sum(operand.dtype)
    if not numeric and operand.dtype != jnp.bool_:
        dims, rows = [() if dim and dim[0] in rows else dim for dim in dims], []
    fill = params["fill_value"] if params["mode"] == FILL_OR_DROP else 0
    fills_alike = fill is not None and (fill == 0 or fill != fill)  # zero or nan, which sum to themselves
    return ShardingRule(
        operands=(tuple(dims), tuple(index_dims)),
        results=(_slices_layout(dims, index_dims, dimension_numbers),),
        sizes={**_sizes(dims, operand.shape), **_sizes(index_dims, indices.shape)},
        reduce=dict.fromkeys(rows, "sum" if numeric else "or"),
        linear=((0,),) if numeric and fills_alike else (),
    )


@local_rule("gather")
def local_gather(
    shard: Shard, operand: Any, indices: Any, *, dimension_numbers: Any, slice_sizes: Any, **params: Any
) -> list[Any]:
    """Rows that another device holds give zero; the first device fills what is out of range."""
    numbers, mode = dimension_numbers, params["mode"]
    windows = tuple(
        local if dim and dim[0].startswith("w") else size
        for local, dim, size in zip(operand.shape, shard.rule.operands[0], slice_sizes, strict=True)
    )
    bind = partial(lax.gather_p.bind, dimension_numbers=numbers, slice_sizes=windows)
    split = _split_columns(shard, numbers.start_index_map)
    if not split:
        return [bind(operand, indices, **params)]
    found: Any = True
    limits = _limits(shard, windows, numbers.start_index_map)
    if mode == FILL_OR_DROP:  # as JAX does before it compares (a scatter compares first)
        indices = indices.astype(_wide(limits))
    columns = _positions(indices, limits, mode)
    for column in split:
        dim, position = numbers.start_index_map[column], columns[column]
        local = shard.locate(0, dim, position)
        mine = (local >= 0) & (local < operand.shape[dim])
        found &= mine | (position < 0) & (shard.index(split[column]) == 0)
        columns[column] = jnp.where(mine, local, jnp.minimum(position, 0))
    params |= {"indices_are_sorted": False, "unique_indices": False}
    taken = bind(operand, jnp.stack(columns, axis=-1), **params)
    batch = [i for i in range(taken.ndim) if i not in numbers.offset_dims]
    return [jnp.where(lax.broadcast_in_dim(found, taken.shape, batch), taken, jnp.zeros_like(taken))]


# --------------------------------------------------------------------------------------------------- scatter


def _as_gather(numbers: Any) -> lax.GatherDimensionNumbers:
    """The dimension numbers of the gather that reads what this scatter writes."""
    return lax.GatherDimensionNumbers(
        offset_dims=numbers.update_window_dims,
        collapsed_slice_dims=numbers.inserted_window_dims,
        start_index_map=numbers.scatter_dims_to_operand_dims,
        operand_batching_dims=numbers.operand_batching_dims,
        start_indices_batching_dims=numbers.scatter_indices_batching_dims,
    )


def _windows(operand: Any, updates: Any, numbers: lax.GatherDimensionNumbers) -> tuple[int, ...]:
    """What one update covers along each operand dimension."""
    windows = [1] * operand.ndim
    for i, offset in zip(_window_dims(operand.ndim, numbers), numbers.offset_dims, strict=True):
        windows[i] = updates.shape[offset]
    return tuple(windows)


def _scatter_rule(operand: Any, indices: Any, updates: Any, numbers: Any) -> ShardingRule:
    """Rows, whole windows and batching dimensions pass through; no other batch dimension is split."""
    numbers = _as_gather(numbers)
    windows = _windows(operand, updates, numbers)
    dims, index_dims = _layouts(operand.shape, indices.shape, windows, numbers)
    return ShardingRule(
        operands=(tuple(dims), tuple(index_dims), _slices_layout(dims, index_dims, numbers)),
        results=(tuple(dims),),
        sizes={**_sizes(dims, operand.shape), **_sizes(index_dims, indices.shape)},
    )


def _updates_reduced(rule: ShardingRule, monoid: str) -> ShardingRule:
    """The batch dimensions of the updates that the result does not have are reduced."""
    kept = {name for dim in rule.results[0] for name in dim}
    return replace(rule, reduce={name: monoid for name in rule.sizes if name not in kept})


def _updates_whole(rule: ShardingRule) -> ShardingRule:
    """The batch dimensions of the updates that the result does not have are never split."""
    kept = {name for dim in rule.results[0] for name in dim}
    operands = tuple(tuple(dim if kept.issuperset(dim) else () for dim in layout) for layout in rule.operands)
    return replace(rule, operands=operands, sizes={n: size for n, size in rule.sizes.items() if n in kept})


@sharding_rule("scatter-add", "scatter-sub")
def scatter_add(operand: Any, indices: Any, updates: Any, *, dimension_numbers: Any, **_: Any) -> ShardingRule:
    """Each device adds its updates to its term of the operand; linear in operand and updates together."""
    rule = _scatter_rule(operand, indices, updates, dimension_numbers)
    if not _is_sum(operand.dtype):
        return _updates_whole(rule)
    return replace(_updates_reduced(rule, "sum"), accumulators=(0,), linear=((0, 2),))


def _extremum(
    monoid: str, operand: Any, indices: Any, updates: Any, *, dimension_numbers: Any, **_: Any
) -> ShardingRule:
    """Each device starts from the whole operand: an extremum may count it twice."""
    rule = _scatter_rule(operand, indices, updates, dimension_numbers)
    return _updates_reduced(rule, monoid) if _is_sum(operand.dtype) else _updates_whole(rule)


sharding_rule("scatter-max")(partial(_extremum, "max"))
sharding_rule("scatter-min")(partial(_extremum, "min"))


@sharding_rule("scatter", "scatter-mul")
def scatter(
    operand: Any, indices: Any, updates: Any, *, dimension_numbers: Any, unique_indices: bool, **params: Any
) -> ShardingRule:
    """Updates stay whole along the batch: the last one wins, or products would multiply the operand twice.

    Overwriting unique positions is linear in operand and updates together, multiplying is in the operand.
    """
    rule = _updates_whole(_scatter_rule(operand, indices, updates, dimension_numbers))
    if not _is_sum(operand.dtype):
        return rule
    if params["update_jaxpr"] is None:
        return replace(rule, linear=((0, 2),)) if unique_indices else rule
    names = [str(eqn.primitive) for eqn in params["update_jaxpr"].eqns]
    return replace(rule, linear=((0,),)) if names == ["mul"] else rule


def _scatter_sub(*operands: Any, update_jaxpr: Any, update_consts: Any, **params: Any) -> Any:
    del update_jaxpr, update_consts  # lax.scatter_sub makes its own; its primitive is not public
    return lax.scatter_sub(*operands, **params)


_BIND: dict[str, Callable[..., Any]] = {
    "scatter": lax.scatter_p.bind,
    "scatter-add": lax.scatter_add_p.bind,
    "scatter-sub": _scatter_sub,
    "scatter-mul": lax.scatter_mul_p.bind,
    "scatter-min": lax.scatter_min_p.bind,
    "scatter-max": lax.scatter_max_p.bind,
}


def _local_scatter(
    bind: Callable[..., Any], shard: Shard, operand: Any, indices: Any, updates: Any, **params: Any
) -> list[Any]:
    """Drops the updates of rows that another device holds."""
    numbers = _as_gather(params["dimension_numbers"])
    split = _split_columns(shard, numbers.start_index_map)
    if not split:
        return [bind(operand, indices, updates, **params)]
    windows = _windows(operand, updates, numbers)
    mode = CLIP if params["mode"] == CLIP else FILL_OR_DROP  # a scatter drops what was promised in bounds, too
    columns = _positions(indices, _limits(shard, windows, numbers.start_index_map), mode)
    for column in split:
        # unique positions stay unique, and those that fall outside this block are dropped
        columns[column] = shard.locate(0, numbers.start_index_map[column], columns[column])
    params |= {"mode": FILL_OR_DROP, "indices_are_sorted": False}
    return [bind(operand, jnp.stack(columns, axis=-1), updates, **params)]


for _name, _bind in _BIND.items():
    local_rule(_name)(partial(_local_scatter, _bind))
