"""Rows for the convolution rule."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def conv(strides=(1, 1), padding: Any = "SAME", numbers=("NHWC", "HWIO", "NHWC"), **params):
    return lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=numbers, **params)


def kernel_gradient(of):
    """The gradient by the kernel, from the input and the gradient of the result."""
    return lambda x, w, g: jax.vjp(lambda w: of(x, w), w)[1](g)


def input_gradient(of):
    return lambda x, w, g: jax.vjp(lambda x: of(x, w), x)[1](g)


POINTWISE, DEPTHWISE, GROUPED = (
    conv(padding="VALID"),
    conv(feature_group_count=8),
    conv(feature_group_count=4),
)

CASES = {
    f"conv_general_dilated: {name}": row
    for name, row in {
        "images": (conv(), f32(8, 6, 6, 4), f32(3, 3, 4, 8)),
        "strides": (conv((2, 2)), f32(8, 6, 6, 4), f32(3, 3, 4, 8)),
        "channels first": (conv(numbers=("NCHW", "OIHW", "NCHW")), f32(8, 4, 6, 6), f32(8, 4, 3, 3)),
        "dilated": (conv(rhs_dilation=(2, 2)), f32(8, 6, 6, 4), f32(3, 3, 4, 8)),
        "transposed": (conv(padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)), f32(8, 3, 3, 4), f32(2, 2, 4, 8)),
        "one dimension": (conv((1,), numbers=("NWC", "WIO", "NWC")), f32(8, 16, 4), f32(3, 4, 8)),
        "no spatial dimension": (conv((), numbers=("NC", "IO", "NC"), padding=()), f32(8, 4), f32(4, 8)),
        "kernel gradient": (kernel_gradient(conv()), f32(8, 6, 6, 4), f32(3, 3, 4, 8), f32(8, 6, 6, 8)),
        "input gradient": (input_gradient(conv((2, 2))), f32(8, 6, 6, 4), f32(3, 3, 4, 8), f32(8, 3, 3, 8)),
        "pointwise": (POINTWISE, f32(8, 8, 4, 4), f32(1, 1, 4, 8)),
        "pointwise, strided": (conv((2, 2), "VALID"), f32(8, 8, 4, 4), f32(1, 1, 4, 8)),
        "pointwise kernel gradient": (
            kernel_gradient(POINTWISE),
            f32(8, 8, 4, 4),
            f32(1, 1, 4, 8),
            f32(8, 8, 4, 8),
        ),
        "pointwise input gradient": (
            input_gradient(POINTWISE),
            f32(8, 8, 4, 4),
            f32(1, 1, 4, 8),
            f32(8, 8, 4, 8),
        ),
        "patches": (conv((4, 4), "VALID"), f32(8, 16, 16, 4), f32(4, 4, 4, 8)),
        "patches kernel gradient": (
            kernel_gradient(conv((4, 4), "VALID")),
            f32(8, 16, 16, 4),
            f32(4, 4, 4, 8),
            f32(8, 4, 4, 8),
        ),
        "groups": (GROUPED, f32(8, 6, 6, 16), f32(3, 3, 4, 16)),
        "groups kernel gradient": (
            kernel_gradient(GROUPED),
            f32(8, 6, 6, 16),
            f32(3, 3, 4, 16),
            f32(8, 6, 6, 16),
        ),
        "groups input gradient": (
            input_gradient(GROUPED),
            f32(8, 6, 6, 16),
            f32(3, 3, 4, 16),
            f32(8, 6, 6, 16),
        ),
        "depthwise": (DEPTHWISE, f32(8, 6, 6, 8), f32(3, 3, 1, 8)),
        "depthwise kernel gradient": (
            kernel_gradient(DEPTHWISE),
            f32(8, 6, 6, 8),
            f32(3, 3, 1, 8),
            f32(8, 6, 6, 8),
        ),
        "groups of the batch": (conv(batch_group_count=4), f32(16, 6, 6, 4), f32(3, 3, 4, 8)),
    }.items()
}
