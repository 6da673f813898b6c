"""Rows for the contraction rules."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ragged(contracting, batch, ragged_dimension, group_dimensions):
    numbers = lax.RaggedDotDimensionNumbers((contracting, batch), [ragged_dimension], group_dimensions)
    return lambda x, w, sizes: lax.ragged_dot_general(x, w, sizes, numbers)


def counts(*sizes):
    return np.array(sizes, np.int32)


ROWS = ragged(((1,), (1,)), ((), ()), 0, [0])
KERNEL_GRADIENT = ragged(((0,), (0,)), ((), ()), 0, [])

CASES = {
    "dot_general: a matrix product": (lambda x, w: x @ w, f32(8, 16), f32(16, 24)),
    "dot_general: attention scores": (
        lambda q, k: lax.dot_general(q, k, (((3,), (3,)), ((0, 2), (0, 2)))),
        f32(4, 8, 2, 16),
        f32(4, 8, 2, 16),
    ),
    "dot_general: two contracted dimensions": (
        lambda x, g: lax.dot_general(x, g, (((0, 1), (0, 1)), ((), ()))),
        f32(4, 8, 2),
        f32(4, 8, 6),
    ),
    "dot_general: contracted dimensions in another order": (
        lambda x, g: lax.dot_general(x, g, (((2, 0), (0, 1)), ((1,), (2,)))),
        f32(4, 8, 2),
        f32(2, 4, 8),
    ),
    "dot_general: dimensions of one element": (
        lambda x, g: lax.dot_general(x, g, (((1,), (0,)), ((), ()))),
        f32(8, 1),
        f32(1, 1),
    ),
    "dot_general: half operands": (
        lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ()))),
        jax.ShapeDtypeStruct((8, 16), jnp.bfloat16),
        jax.ShapeDtypeStruct((16, 8), jnp.bfloat16),
    ),
    "dot_general: byte operands, wider result": (
        lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32),
        jax.ShapeDtypeStruct((8, 16), jnp.int8),
        jax.ShapeDtypeStruct((16, 8), jnp.int8),
    ),
    "dot_general: integers": (
        lambda x, w: x @ w,
        jax.ShapeDtypeStruct((8, 16), jnp.int32),
        jax.ShapeDtypeStruct((16, 8), jnp.int32),
    ),
    "dot_general: booleans": (
        lambda x, w: x @ w,
        jax.ShapeDtypeStruct((8, 16), jnp.bool_),
        jax.ShapeDtypeStruct((16, 8), jnp.bool_),
    ),
    "ragged_dot_general: experts": (ROWS, f32(24, 8), f32(4, 8, 16), counts(3, 9, 0, 12)),
    "ragged_dot_general: experts, rows left over": (ROWS, f32(24, 8), f32(4, 8, 16), counts(3, 5, 1, 7)),
    "ragged_dot_general: experts, more than the rows": (
        ROWS,
        f32(24, 8),
        f32(4, 8, 16),
        counts(13, 15, 1, 7),
    ),
    "ragged_dot_general: one row": (ROWS, f32(1, 8), f32(4, 8, 16), counts(0, 0, 1, 0)),
    "ragged_dot_general: kernel gradient": (
        KERNEL_GRADIENT,
        f32(24, 8),
        f32(24, 16),
        counts(3, 9, 0, 7),
    ),
    "ragged_dot_general: a batch": (
        ragged(((2,), (2,)), ((0,), (1,)), 1, [0]),
        f32(4, 8, 2),
        f32(4, 4, 2, 8),
        counts(3, 1, 0, 4),
    ),
    "ragged_dot_general: a batch with group sizes of its own": (
        ragged(((2,), (2,)), ((0,), (1,)), 1, [0]),
        f32(4, 8, 2),
        f32(2, 4, 2, 8),
        np.stack([counts(3, 5), counts(1, 2), counts(0, 8), counts(8, 0)]),
    ),
    "ragged_dot_general: the batch is ragged": (
        ragged(((2,), (1,)), ((0,), (0,)), 0, []),
        f32(4, 8, 2),
        f32(4, 2, 8),
        counts(3, 1),
    ),
}
