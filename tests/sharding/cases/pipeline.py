"""Cases of the rule of a pipeline's shift."""

import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct

from autopar.lowering.pipelined.shift import shift


def f32(*shape: int) -> ShapeDtypeStruct:
    return ShapeDtypeStruct(shape, jnp.float32)


CASES = {
    "stage_shift": (shift, f32(8, 4, 6), f32(4, 6)),
    "stage_shift: from each stage to the one before": (lambda x, y: shift(x, y, reverse=True), f32(8, 4), f32(4)),
    "stage_shift: a ring": (lambda x, y, flag: shift(x, y, flag), f32(4, 8), f32(8), np.array(False)),
    "stage_shift: a ring that takes in": (
        lambda x, y, flag: shift(x, y, flag, reverse=True),
        f32(4, 8),
        f32(8),
        np.array(True),
    ),
}
