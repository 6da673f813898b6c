"""Rows for the indexing rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FILL, CLIP, PROMISED = (
    lax.GatherScatterMode.FILL_OR_DROP,
    lax.GatherScatterMode.CLIP,
    lax.GatherScatterMode.PROMISE_IN_BOUNDS,
)


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def whole(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def index(n: int, *shape: int, dtype: Any = np.int32, beyond: int = 0) -> np.ndarray:
    """Indices of ``n`` rows, with duplicates; ``beyond`` of them reach past each end."""
    low = 0 if np.issubdtype(dtype, np.unsignedinteger) else -beyond
    return np.random.default_rng(7).integers(low, n + beyond, shape).astype(dtype)


def lookup(mode, fill_value=None):
    """Rows ``table[i]`` for ``i`` of shape (..., 1)."""

    def look(table, i):
        batch = i.ndim - 1
        numbers = lax.GatherDimensionNumbers((batch,), (0,), (0,))
        return lax.gather(table, i, numbers, (1, table.shape[1]), mode=mode, fill_value=fill_value)

    return look


def add_rows(scatter, mode=FILL, **params):
    """``table[i] += rows``, the transpose of ``lookup``."""

    def add(table, i, rows):
        numbers = lax.ScatterDimensionNumbers((i.ndim - 1,), (0,), (0,))
        return scatter(table, i, rows, numbers, mode=mode, **params)

    return add


PICK = lax.GatherDimensionNumbers((), (2,), (2,), (0, 1), (0, 1))
UNPICK = lax.ScatterDimensionNumbers((), (2,), (2,), (0, 1), (0, 1))

GATHERS = {
    "gather: embedding lookup, promised": (lookup(PROMISED), f32(16, 8), index(16, 4, 8, 1)),
    "gather: embedding lookup, promised but out of range": (
        lookup(PROMISED),
        f32(16, 8),
        index(16, 4, 8, 1, beyond=5),
    ),
    "gather: embedding lookup, clipped": (lookup(CLIP), f32(16, 8), index(16, 4, 8, 1, beyond=5)),
    "gather: embedding lookup, filled with nan": (lookup(FILL), f32(16, 8), index(16, 4, 8, 1, beyond=5)),
    "gather: embedding lookup, filled with zero": (lookup(FILL, 0), f32(16, 8), index(16, 4, 8, 1, beyond=5)),
    "gather: embedding lookup, filled with three": (
        lookup(FILL, 3.0),
        f32(16, 8),
        index(16, 4, 8, 1, beyond=5),
    ),
    "gather: lookup of integers": (lookup(FILL), whole(jnp.int32, 16, 8), index(16, 8, 1, beyond=5)),
    "gather: lookup of bytes": (lookup(FILL), whole(jnp.uint8, 16, 8), index(16, 8, 1, beyond=5)),
    "gather: lookup of booleans": (lookup(FILL), whole(jnp.bool_, 16, 8), index(16, 8, 1, beyond=5)),
    "gather: lookup of random keys": (
        lookup(CLIP),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (16, 8))),
        index(16, 8, 1, beyond=5),
    ),
    "gather: lookup by unsigned indices": (
        lookup(FILL),
        f32(16, 8),
        index(16, 8, 1, dtype=np.uint32, beyond=5),
    ),
    "gather: lookup by byte indices, clipped": (
        lookup(CLIP),
        f32(16, 8),
        index(16, 8, 1, dtype=np.uint8, beyond=5),
    ),
    "gather: lookup by signed byte indices in a larger table": (
        lookup(FILL),
        f32(512, 2),
        index(100, 8, 1, dtype=np.int8, beyond=20),
    ),
    "gather: lookup by the largest indices": (
        lookup(CLIP),
        f32(16, 8),
        np.array([[0], [2**31 - 1], [-(2**31)], [15]], np.int32),
    ),
    "gather: lookup by the largest unsigned indices": (
        lookup(CLIP),
        f32(16, 8),
        np.array([[0], [2**32 - 1], [2**31], [15]], np.uint32),
    ),
    "gather: log-likelihood pick": (
        lambda x, i: lax.gather(x, i, PICK, (1, 1, 1), mode=FILL),
        f32(4, 8, 16),
        index(16, 4, 8, 1, beyond=3),
    ),
    "gather: row kept as a dimension of one element": (
        lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers((1, 2), (), (0,)), (1, 8), mode=FILL),
        f32(16, 8),
        index(16, 4, 1, beyond=3),
    ),
    "gather: two indexed dimensions": (
        lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers((0,), (0, 2), (2, 0)), (1, 4, 1), mode=FILL),
        f32(8, 4, 16),
        index(12, 8, 2, beyond=2),
    ),
    "gather: a window less than its dimension": (
        lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers((1, 2), (), (0,)), (3, 8), mode=CLIP),
        f32(16, 8),
        index(16, 4, 1, beyond=3),
    ),
    "gather: a window as large as its indexed dimension": (
        lambda x, i: lax.gather(x, i, lax.GatherDimensionNumbers((1,), (0,), (0, 1)), (1, 8), mode=FILL),
        f32(16, 8),
        np.array([[0, 0], [3, 1], [5, 0], [16, 0]], np.int32),
    ),
    "gather: sorted and unique": (
        lambda x, i: lax.gather(
            x,
            i,
            lax.GatherDimensionNumbers((1,), (0,), (0,)),
            (1, 8),
            mode=CLIP,
            indices_are_sorted=True,
            unique_indices=True,
        ),
        f32(16, 8),
        np.arange(0, 16, 2, dtype=np.int32)[:, None],
    ),
}

SCATTERS = {
    "scatter-add: gradient of an embedding": (
        add_rows(lax.scatter_add),
        f32(16, 8),
        index(16, 4, 8, 1, beyond=5),
        f32(4, 8, 8),
    ),
    "scatter-add: clipped": (
        add_rows(lax.scatter_add, CLIP),
        f32(16, 8),
        index(16, 4, 8, 1, beyond=5),
        f32(4, 8, 8),
    ),
    "scatter-add: promised": (
        add_rows(lax.scatter_add, PROMISED),
        f32(16, 8),
        index(16, 4, 8, 1),
        f32(4, 8, 8),
    ),
    "scatter-add: promised but out of range": (
        add_rows(lax.scatter_add, PROMISED),
        f32(16, 8),
        index(16, 4, 8, 1, beyond=5),
        f32(4, 8, 8),
    ),
    "scatter-add: gradient of a log-likelihood pick": (
        lambda x, i, u: lax.scatter_add(x, i, u, UNPICK, mode=FILL),
        f32(4, 8, 16),
        index(16, 4, 8, 1, beyond=3),
        f32(4, 8),
    ),
    "scatter-add: unsigned indices": (
        add_rows(lax.scatter_add),
        f32(16, 8),
        index(16, 8, 1, dtype=np.uint32, beyond=5),
        f32(8, 8),
    ),
    "scatter-add: the largest indices": (
        add_rows(lax.scatter_add),
        f32(16, 8),
        np.array([[0], [2**31 - 1], [-(2**31)], [15]], np.int32),
        f32(4, 8),
    ),
    "scatter-add: the largest indices, clipped": (
        add_rows(lax.scatter_add, CLIP),
        f32(16, 8),
        np.array([[0], [2**31 - 1], [-(2**31)], [15]], np.int32),
        f32(4, 8),
    ),
    "scatter-add: integers": (
        add_rows(lax.scatter_add),
        whole(jnp.int32, 16, 8),
        index(16, 8, 1, beyond=5),
        whole(jnp.int32, 8, 8),
    ),
    "scatter-add: a window less than its dimension": (
        lambda x, i, u: lax.scatter_add(x, i, u, lax.ScatterDimensionNumbers((1, 2), (), (0,)), mode=FILL),
        f32(16, 8),
        index(16, 4, 1, beyond=3),
        f32(4, 3, 8),
    ),
    "scatter-add: two indexed dimensions, clipped": (
        lambda x, i, u: lax.scatter_add(x, i, u, lax.ScatterDimensionNumbers((0,), (0, 2), (2, 0)), mode=CLIP),
        f32(8, 4, 16),
        index(12, 8, 2, beyond=2),
        f32(4, 8),
    ),
    "scatter-add: sorted and unique": (
        add_rows(lax.scatter_add, indices_are_sorted=True, unique_indices=True),
        f32(16, 8),
        np.arange(0, 16, 2, dtype=np.int32)[:, None],
        f32(8, 8),
    ),
    "scatter-sub": (add_rows(lax.scatter_sub), f32(16, 8), index(16, 8, 1, beyond=5), f32(8, 8)),
    "scatter-mul": (add_rows(lax.scatter_mul), f32(16, 8), index(16, 8, 1, beyond=5), f32(8, 8)),
    "scatter-max": (add_rows(lax.scatter_max), f32(16, 8), index(16, 8, 1, beyond=5), f32(8, 8)),
    "scatter-min": (add_rows(lax.scatter_min), f32(16, 8), index(16, 8, 1, beyond=5), f32(8, 8)),
    "scatter-max: booleans": (
        add_rows(lax.scatter_max),
        whole(jnp.bool_, 16, 8),
        index(16, 8, 1, beyond=5),
        whole(jnp.bool_, 8, 8),
    ),
    "scatter: overwrite, the last one wins": (
        add_rows(lax.scatter),
        f32(16, 8),
        index(16, 8, 1, beyond=5),
        f32(8, 8),
    ),
    "scatter: overwrite unique positions": (
        add_rows(lax.scatter, unique_indices=True),
        f32(16, 8),
        np.arange(0, 16, 2, dtype=np.int32)[:, None],
        f32(8, 8),
    ),
    "scatter: a function of the old value": (
        lambda x, i: lax.scatter_apply(
            x, i, jnp.sin, lax.ScatterDimensionNumbers((1,), (0,), (0,)), update_shape=(8, 8), mode=FILL
        ),
        f32(16, 8),
        index(16, 8, 1, beyond=5),
    ),
}

CASES = {**GATHERS, **SCATTERS}
