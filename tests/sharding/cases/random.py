"""Rows for random keys and bits."""

import jax
import jax.numpy as jnp

KEY = jax.eval_shape(lambda: jax.random.key(0)).dtype


def keys(*shape):
    return jax.ShapeDtypeStruct(shape, KEY)


def u32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


CASES = {
    "random_bits": (lambda k: jax.random.bits(k, (4, 8)), keys()),
    "random_bits: 8 bits": (lambda k: jax.random.bits(k, (4, 8), "uint8"), keys()),
    "random_bits: 16 bits": (lambda k: jax.random.bits(k, (4, 8), "uint16"), keys()),
    "random_bits: one for each key": (jax.vmap(jax.random.bits), keys(8)),
    "random_bits: an array of keys": (jax.vmap(lambda k: jax.random.bits(k, (2, 8))), keys(4)),
    "random_bits: odd sizes": (lambda k: jax.random.bits(k, (3, 8, 5)), keys()),
    "random_split": (lambda k: jax.random.split(k, (4, 2)), keys()),
    "random_split: an array of keys": (jax.vmap(lambda k: jax.random.split(k, 4)), keys(8)),
    "random_seed": (jax.vmap(jax.random.key), jax.ShapeDtypeStruct((8,), jnp.int32)),
    "random_fold_in": (jax.vmap(jax.random.fold_in, (0, 0)), keys(8), u32(8)),
    "random_fold_in: one key, several data": (jax.vmap(jax.random.fold_in, (None, 0)), keys(), u32(8)),
    "random_wrap": (jax.random.wrap_key_data, u32(8, 2)),
    "random_unwrap": (jax.random.key_data, keys(4, 8)),
    "random_clone": (jax.random.clone, keys(8)),
}
