"""Rows for reductions, scans along a dimension, windows and sorting."""

import jax
import jax.numpy as jnp
from jax import lax

from cases import f32, of

IMAGE = f32(4, 8, 8, 2)


def window(init, combine, padding="VALID"):
    return lambda x: lax.reduce_window(x, init, combine, (1, 2, 2, 1), (1, 2, 2, 1), padding)


def pooled(x):
    return window(-jnp.inf, lax.max)(x)


def largest_with_index(x):
    def combine(a, b):
        larger = a[0] > b[0]
        return lax.select(larger, a[0], b[0]), lax.select(larger, a[1], b[1])

    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return lax.reduce((x, index), (-jnp.inf, 0), combine, (1,))


CASES = {
    "reduce_sum": (lambda x: x.sum(1), f32(4, 8, 2)),
    "reduce_sum: all": (jnp.sum, f32(4, 8)),
    "reduce_sum: integers": (lambda x: x.sum(0), of(jnp.int32, 4, 8)),
    "reduce_max": (lambda x: x.max(1), f32(4, 8)),
    "reduce_max: integers": (lambda x: x.max(1), of(jnp.int32, 4, 8)),
    "reduce_min": (lambda x: x.min(0), f32(4, 8)),
    "reduce_and": (lambda x: x.all(1), of(jnp.bool_, 4, 8)),
    "reduce_or": (lambda x: x.any(1), of(jnp.bool_, 4, 8)),
    "reduce_and: bitwise": (lambda x: lax.reduce_and(x, (1,)), of(jnp.int32, 4, 8)),
    "reduce_or: bitwise": (lambda x: lax.reduce_or(x, (1,)), of(jnp.int32, 4, 8)),
    "reduce_xor": (lambda x: lax.reduce_xor(x, (1,)), of(jnp.int32, 4, 8)),
    "reduce_prod": (lambda x: x.prod(1), f32(4, 8)),
    "argmax": (lambda x: x.argmax(1), f32(4, 8)),
    "argmin": (lambda x: x.argmin(0), f32(4, 8)),
    "reduce": (largest_with_index, f32(4, 8)),
    "cumsum": (lambda x: lax.cumsum(x, 1), f32(4, 8)),
    "cumprod": (lambda x: lax.cumprod(x, 1), f32(4, 8)),
    "cummax": (lambda x: lax.cummax(x, 0), f32(4, 8)),
    "cummin": (lambda x: lax.cummin(x, 0), f32(4, 8)),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1, reverse=True), f32(4, 8)),
    "sort": (lambda x, y: lax.sort((x, y), dimension=0, num_keys=1), f32(4, 8), f32(4, 8)),
    "top_k": (lambda x: lax.top_k(x, 3), f32(4, 8)),
    "approx_top_k": (lambda x: lax.approx_max_k(x, 3), f32(4, 8)),
    "reduce_window_sum": (window(0.0, lax.add), IMAGE),
    "reduce_window_sum: padded": (window(0.0, lax.add, "SAME"), IMAGE),
    "reduce_window_max": (pooled, IMAGE),
    "reduce_window_min": (window(jnp.inf, lax.min), IMAGE),
    "reduce_window": (window(1.0, lax.mul), IMAGE),
    "select_and_scatter_add": (lambda x: jax.vjp(pooled, x)[1](pooled(x))[0], IMAGE),
    "select_and_gather_add": (lambda x, t: jax.jvp(pooled, (x,), (t,))[1], IMAGE, IMAGE),
}
