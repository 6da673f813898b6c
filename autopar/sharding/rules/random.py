"""Random keys and bits; what a shard draws equals, bit for bit, its part of what one device draws.

Threefry in its partitionable form (JAX's default) hashes the key with the row-major position of each element,
as a 64-bit count in two words (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A
shard therefore hashes the positions of its own elements in the whole array, and nothing else. Other
generators, and the older form, draw an array as one piece: there only an array of keys may be split, and only
where each key is hashed by itself.
"""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive

from autopar.compat import key_impl, threefry2x32_p
from autopar.sharding.factors import Layout, ShardingRule, letters, sizes_of
from autopar.sharding.registry import Shard, local_rule, sharding_rule
from autopar.sharding.rules.elementwise import Shape, elementwise_rule

Words = tuple[jax.Array, jax.Array]
"""A 64-bit unsigned number as two uint32 arrays, high word first."""

WORD = 1 << 32


def is_threefry(impl: Any) -> bool:
    """Whether a generator hashes each key by itself, with threefry."""
    return getattr(impl, "name", None) == "threefry2x32"


# --- keys ---------------------------------------------------------------------------------------------------


@sharding_rule("random_seed")
def random_seed(seeds: Any, *, impl: Any, **_: Any) -> ShardingRule | None:
    """A key for each seed."""
    return elementwise_rule((seeds,)) if is_threefry(impl) else None


@sharding_rule("random_fold_in")
def random_fold_in(keys: Any, data: Any, **_: Any) -> ShardingRule | None:
    """Keys and data broadcast."""
    return elementwise_rule((keys, data)) if is_threefry(key_impl(keys.dtype)) else None


@sharding_rule("random_clone")
def random_clone(keys: Any, **_: Any) -> ShardingRule:
    """The same keys."""
    return elementwise_rule((keys,))


def _words_of_keys(shape: Shape, impl: Any) -> tuple[Layout, Layout]:
    """Layouts of an array of keys and of the words that they consist of, in trailing whole dimensions."""
    keys = letters(shape)
    return keys, (*keys, *((),) * len(impl.key_shape))


@sharding_rule("random_wrap")
def random_wrap(words: Any, *, impl: Any, **_: Any) -> ShardingRule:
    """Keys from their words."""
    shape = words.shape[: len(words.shape) - len(impl.key_shape)]
    keys, whole = _words_of_keys(shape, impl)
    return ShardingRule((whole,), (keys,), sizes_of(keys, shape))


@sharding_rule("random_unwrap")
def random_unwrap(keys_aval: Any, **_: Any) -> ShardingRule:
    """Words of keys."""
    keys, whole = _words_of_keys(keys_aval.shape, key_impl(keys_aval.dtype))
    return ShardingRule((keys,), (whole,), sizes_of(keys, keys_aval.shape))


# --- bits and splits ----------------------------------------------------------------------------------------


@sharding_rule("random_bits", "random_split")
def random_bits(keys: Any, *, shape: Shape, **_: Any) -> ShardingRule | None:
    """``k -> k d``: every key draws an array; both may be split."""
    if not is_threefry(key_impl(keys.dtype)):
        return None
    partitionable = jax.config.jax_threefry_partitionable  # pyright: ignore[reportAttributeAccessIssue]
    drawn = letters(shape) if partitionable else ((),) * len(shape)
    operand = letters(keys.shape, "k")
    sizes = sizes_of(operand, keys.shape) | sizes_of(drawn, shape)
    return ShardingRule((operand,), ((*operand, *drawn),), sizes)


def multiply(index: jax.Array, stride: int) -> Words:
    """``index * stride`` as a 64-bit number; ``index`` is uint32 and ``0 <= stride < 2**64``.

    >>> [int(word) for word in multiply(jnp.uint32(4_000_000_000), 3)]
    [2, 3410065408]
    """
    high, low = divmod(stride, WORD)
    minor, major = index & 0xFFFF, index >> 16  # schoolbook multiplication in 16-bit digits
    low_minor, low_major = np.uint32(low & 0xFFFF), np.uint32(low >> 16)
    first, second = minor * low_minor, minor * low_major
    third, fourth = major * low_minor, major * low_major
    middle = (first >> 16) + (second & 0xFFFF) + (third & 0xFFFF)
    carried = fourth + (second >> 16) + (third >> 16) + (middle >> 16)
    return carried + index * np.uint32(high), index * np.uint32(low)


def add(x: Words, y: Words) -> Words:
    """The sum of two 64-bit numbers, modulo 2**64; they broadcast."""
    low = x[1] + y[1]
    return x[0] + y[0] + (low < y[1]).astype(jnp.uint32), low


def counts(shard: Shard, shape: Shape, n_key_dims: int) -> Words:
    """Row-major positions in the whole drawn array of the elements that this shard draws.

    Args:
        shard: the shard; its result has ``n_key_dims`` dimensions of keys, then those of the drawn array.
        shape: global shape of the drawn array.
        n_key_dims: rank of the array of keys.

    Returns:
        Two uint32 arrays of the drawn array's local shape.
    """
    local = shard.result_shapes[0][n_key_dims : n_key_dims + len(shape)]
    wide = math.prod(shape) > WORD
    total: Words = (jnp.zeros(local, jnp.uint32), jnp.zeros(local, jnp.uint32))
    for dim in range(len(local)):
        stride = math.prod(shape[dim + 1 :])
        index = shard.positions(n_key_dims + dim).astype(jnp.uint32)
        words = multiply(index, stride) if wide else (jnp.zeros_like(index), index * np.uint32(stride))
        high, low = (lax.broadcast_in_dim(word, local, (dim,)) for word in words)
        total = add(total, (high, low)) if wide else (total[0], total[1] + low)
    return total


def hashed(shard: Shard, keys: Any, shape: Shape) -> Words:
    """The two words that threefry makes of each key and each position of this shard."""
    high, low = counts(shard, shape, keys.ndim)

    def drawn(words: jax.Array) -> Words:
        first, second = threefry2x32_p.bind(words[0], words[1], high, low)  # scalar keys: the hash's loop carries them
        return first, second

    for _ in range(keys.ndim):
        drawn = jax.vmap(drawn)
    return drawn(jax.random.key_data(keys))


class RandomShard(Shard, Protocol):
    """A shard that also knows the primitive, to draw what is not split as one piece."""

    primitive: Primitive


def _draws_split(shard: Shard, n_key_dims: int) -> bool:
    return any(shard.count(factor) > 1 for dim in shard.rule.results[0][n_key_dims:] for factor in dim)


@local_rule("random_bits")
def local_random_bits(shard: RandomShard, keys: Any, *, bit_width: int, shape: Shape) -> list[Any]:
    """The bits at this shard's positions."""
    if not _draws_split(shard, keys.ndim):
        return [shard.primitive.bind(keys, bit_width=bit_width, shape=shape)]
    high, low = hashed(shard, keys, shape)
    dtype = jnp.dtype(f"uint{bit_width}")
    if bit_width == 64:
        return [high.astype(dtype) << dtype.type(32) | low.astype(dtype)]
    return [(high ^ low).astype(dtype)]


@local_rule("random_split")
def local_random_split(shard: RandomShard, keys: Any, *, shape: Shape) -> list[Any]:
    """The keys at this shard's positions."""
    if not _draws_split(shard, keys.ndim):
        return [shard.primitive.bind(keys, shape=shape)]
    words = jnp.stack(hashed(shard, keys, shape), axis=-1)
    return [jax.random.wrap_key_data(words, impl="threefry2x32")]
