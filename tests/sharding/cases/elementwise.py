"""Rows for the elementwise rules."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.random import threefry2x32_p

from cases import f32, of

UNARY = """
    abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf erf_inv erfc exp
    exp2 expm1 floor is_finite lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square
    stop_gradient tan tanh
"""
NEWER = ("log2", "one_minus_square")
"""Primitives that JAX 0.10 does without."""
BINARY = "add atan2 div eq ge gt le lt max min mul ne nextafter pow rem sub"
BITS = "shift_left shift_right_logical shift_right_arithmetic"


CASES = {
    # One rule serves them all; one dimension keeps the test short, and one strategy where a kernel is long.
    **{name: (getattr(lax, name), f32(2), f32(2)) for name in ("igamma", "igamma_grad_a", "igammac", "zeta")},
    **{name: (getattr(lax, name), f32(8)) for name in UNARY.split()},
    **{name: (getattr(lax, name), f32(8), f32(8)) for name in BINARY.split()},
    **{name: (getattr(lax, name), of(jnp.int32, 8), of(jnp.int32, 8)) for name in BITS.split()},
    **{name: (getattr(lax, f"bitwise_{name}"), of(jnp.int32, 8), of(jnp.int32, 8)) for name in ("and", "or", "xor")},
    "add: a scalar": (lambda x: x + 1, f32(4, 8)),
    "add: implicit broadcasts": (lax.add_p.bind, f32(4, 1), f32(1, 8)),
    "add_any": (jax.grad(lambda x: (x * x).sum()), f32(8)),
    "bitcast_convert_type": (lambda x: lax.bitcast_convert_type(x, jnp.int32), f32(4, 8)),
    "bitcast_convert_type: narrower": (lambda x: lax.bitcast_convert_type(x, jnp.int16), f32(4, 8)),
    "bitcast_convert_type: wider": (lambda x: lax.bitcast_convert_type(x, jnp.int32), of(jnp.int16, 4, 8, 2)),
    "clamp": (lax.clamp, f32(), f32(4, 8), f32()),
    "clz": (lax.clz, of(jnp.int32, 8)),
    "complex": (lax.complex, f32(4, 8), f32(4, 8)),
    "conj": (lax.conj, of(jnp.complex64, 4, 8)),
    "convert_element_type": (lambda x: x.astype(jnp.float32), of(jnp.bfloat16, 4, 8)),
    "convert_element_type: narrower": (lambda x: x.astype(jnp.bfloat16), f32(4, 8)),
    "convert_element_type: integers": (lambda x: x.astype(jnp.float32), of(jnp.int32, 4, 8)),
    "copy": (jnp.copy, f32(4, 8)),
    "device_put": (jax.device_put, f32(4, 8)),
    "div: integers": (lax.div, of(jnp.int32, 4, 8), np.int32(3)),
    "eq_to": (lax.eq_to_p.bind, f32(8), f32(8)),
    "imag": (lax.imag, of(jnp.complex64, 4, 8)),
    "integer_pow": (lambda x: lax.integer_pow(x, 3), f32(4, 8)),
    "le_to": (lax.le_to_p.bind, f32(8), f32(8)),
    "lt_to": (lax.lt_to_p.bind, f32(8), f32(8)),
    "mul: by a scalar": (lambda x: x * 3.0, f32(4, 8)),
    "mul: integers": (lax.mul, of(jnp.int32, 4, 8), of(jnp.int32, 4, 8)),
    "name": (lambda x: checkpoint_name(x, "activation"), f32(4, 8)),
    "newer: log2": (jnp.log2, f32(8)),
    "newer: one_minus_square": (jax.grad(lambda x: jnp.tanh(x).sum()), f32(8)),
    "not": (lax.bitwise_not, of(jnp.bool_, 4, 8)),
    "optimization_barrier": (lambda x, y: lax.optimization_barrier((x, y)), f32(4, 8), f32(4)),
    "optimization_barrier: booleans": (lambda x: lax.optimization_barrier((x, x > 0)), f32(4, 8)),
    "polygamma": (lax.polygamma, f32(2), f32(2)),
    "population_count": (lax.population_count, of(jnp.int32, 8)),
    "real": (lax.real, of(jnp.complex64, 4, 8)),
    "reduce_precision": (lambda x: lax.reduce_precision(x, 8, 7), f32(4, 8)),
    "regularized_incomplete_beta": (lax.betainc, f32(2), f32(2), f32(2)),
    "select_n": (lax.select_n, of(jnp.bool_, 4, 8), f32(4, 8), f32(4, 8)),
    "select_n: one choice for all": (lax.select_n, of(jnp.bool_), f32(4, 8), f32(4, 8)),
    "select_n: booleans": (lax.select_n, of(jnp.bool_, 8), of(jnp.bool_, 8), of(jnp.bool_, 8)),
    "softmax, with implicit broadcasts": (lambda x: jax.nn.softmax(x, axis=-1), f32(2, 4, 8)),
    "sub: implicit broadcast": (lax.sub_p.bind, f32(2, 4, 8), f32(2, 4, 1)),
    "threefry2x32": (lambda k, c: threefry2x32_p.bind(k, k, c, c), of(jnp.uint32), of(jnp.uint32, 4, 8)),
}
