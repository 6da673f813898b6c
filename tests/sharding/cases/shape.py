"""Rows for the primitives that move elements."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from cases import f32, of

CASES = {
    "broadcast_in_dim": (lambda x: lax.broadcast_in_dim(x, (2, 8, 4), (1, 2)), f32(8, 4)),
    "broadcast_in_dim: stretch": (lambda x: lax.broadcast_in_dim(x, (4, 8), (0, 1)), f32(4, 1)),
    "broadcast_in_dim: scalar": (lambda x: lax.broadcast_in_dim(x, (4, 8), ()), f32()),
    "iota": (lambda: lax.broadcasted_iota(jnp.int32, (4, 8), 1),),
    "iota: other dimension": (lambda: lax.broadcasted_iota(jnp.float32, (4, 8), 0),),
    "iota: rounded": (lambda: lax.iota(jnp.bfloat16, 1024),),
    "iota: bytes that wrap": (lambda: lax.iota(jnp.uint8, 512),),
    "reshape": (lambda x: x.reshape(8, 4, 6), f32(8, 24)),
    "reshape: merge": (lambda x: x.reshape(64, 6), f32(8, 8, 6)),
    "reshape: minor factors of a split major one": (lambda x: x.reshape(16, 3), f32(2, 8, 3)),
    "reshape: unit dimensions": (lambda x: x.reshape(8, 1, 4, 1), f32(1, 8, 4)),
    "reshape: to a scalar": (lambda x: x.reshape(()), f32(1, 1)),
    "reshape: refine": (lambda x: x.reshape(16, 4), f32(8, 8)),
    "reshape: no common factors": (lambda x: x.reshape(6, 4, 8), f32(4, 6, 8)),
    "reshape: transposed first": (lambda x: lax.reshape(x, (16, 8), (2, 0, 1)), f32(8, 8, 2)),
    "reshape: booleans": (lambda x: x.reshape(2, 16), of(jnp.bool_, 4, 8)),
    "transpose": (lambda x: lax.transpose(x, (2, 0, 1)), f32(4, 8, 2)),
    "squeeze": (lambda x: lax.squeeze(x, (1,)), f32(4, 1, 8)),
    "rev": (lambda x: lax.rev(x, (0,)), f32(4, 8)),
    "slice": (lambda x: lax.slice(x, (0, 2), (8, 6)), f32(8, 8)),
    "slice: strides": (lambda x: lax.slice(x, (0, 0, 0), (4, 8, 8), (2, 1, 1)), f32(4, 8, 8)),
    "dynamic_slice": (lambda x, i: lax.dynamic_slice(x, (i, 0), (4, 8)), f32(8, 8), np.int32(3)),
    "dynamic_slice: clamped": (lambda x, i: lax.dynamic_slice(x, (i, i), (4, 8)), f32(8, 8), np.int32(7)),
    "dynamic_update_slice": (
        lambda x, u, i: lax.dynamic_update_slice(x, u, (0, i)),
        f32(8, 8),
        f32(8, 4),
        np.int32(3),
    ),
    "pad": (lambda x, v: lax.pad(x, v, ((0, 0, 0), (1, 2, 1))), f32(8, 4), f32()),
    "pad: cropped": (lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, -1, 0))), f32(8, 4)),
    "concatenate": (lambda x, y: lax.concatenate((x, y), 1), f32(4, 8), f32(4, 4)),
    "concatenate: booleans": (lambda x: lax.concatenate((x, x), 0), of(jnp.bool_, 4, 8)),
    "split": (lambda x: lax.split(x, (2, 6), 1), f32(4, 8)),
    "stack": (lambda x, y: jnp.stack((x, y), 1), f32(4, 8), f32(4, 8)),
    "unstack": (jnp.unstack, f32(2, 4, 8)),
    "tile": (lambda x: jnp.tile(x, (4, 1, 2)), f32(2, 8, 2)),
}
