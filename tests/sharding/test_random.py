"""Random bits beyond the table of cases: 64-bit words and positions, the older threefry, other generators."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import autopar.sharding.rules  # noqa: F401  (fills the tables)
from autopar.lowering.local import run_local
from autopar.sharding.registry import SHARDING_RULES
from autopar.sharding.rules import random as rules
from autopar.sharding.strategies import strategies

WORDS = st.integers(0, 2**64 - 1)


def words(number: int) -> rules.Words:
    high, low = divmod(number, 2**32)
    return jnp.uint32(high), jnp.uint32(low)


def number(pair: rules.Words) -> int:
    return int(pair[0]) * 2**32 + int(pair[1])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), WORDS)
def test_a_position_times_a_stride_is_exact_in_64_bits(index, stride):
    assert number(rules.multiply(jnp.uint32(index), stride)) == index * stride % 2**64


@settings(max_examples=50, deadline=None)
@given(WORDS, WORDS)
def test_a_sum_of_positions_carries_into_the_high_word(x, y):
    assert number(rules.add(words(x), words(y))) == (x + y) % 2**64


@dataclass(frozen=True)
class Block:
    """A shard as far as ``counts`` looks at it: a local shape and where it starts."""

    result_shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    def positions(self, dim: int, result: int = 0) -> Any:
        return jnp.arange(self.result_shapes[result][dim], dtype=jnp.int32) + self.starts[dim]


@pytest.mark.parametrize("shape", [(4, 6, 8), (2**18, 2**10, 2**9), (2, 2**31 - 8, 3)], ids=str)
def test_positions_in_arrays_of_any_size_are_row_major(shape):
    local, starts = (2, 3, 2), tuple(size - part for size, part in zip(shape, (2, 3, 2), strict=True))
    block: Any = Block((local,), starts)
    high, low = rules.counts(block, shape, 0)
    index = np.indices(local, dtype=np.uint64) + np.array(starts, np.uint64).reshape(-1, 1, 1, 1)
    strides = np.array([shape[1] * shape[2], shape[2], 1], np.uint64).reshape(-1, 1, 1, 1)
    expected = (index * strides).sum(0, dtype=np.uint64)
    got = np.asarray(high).astype(np.uint64) << np.uint64(32) | np.asarray(low).astype(np.uint64)
    np.testing.assert_array_equal(got, expected)


def drawn_in_parts(key, shape, dtype, mesh):
    """Each strategy's bits, put together, next to what one device draws."""
    closed = jax.make_jaxpr(lambda k: jax.random.bits(k, shape, dtype))(key)
    (equation,) = closed.jaxpr.eqns
    rule = SHARDING_RULES["random_bits"](*(v.aval for v in equation.invars), **equation.params)
    assert rule is not None
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    for strategy in strategies(rule, sizes):
        spec = jax.sharding.PartitionSpec(*(dim or None for dim in strategy.outputs[0].dims))
        program = jax.shard_map(
            lambda k, s=strategy: run_local(equation.primitive, equation.params, rule, s, sizes, [k])[0],
            mesh=mesh,
            in_specs=jax.sharding.PartitionSpec(),
            out_specs=spec,
            check_vma=False,
        )
        yield strategy, np.asarray(jax.jit(program)(key)), np.asarray(jax.random.bits(key, shape, dtype))


def test_bits_of_64_equal_the_serial_ones(jax_mesh):
    with jax.enable_x64(True):
        for strategy, got, expected in drawn_in_parts(jax.random.key(3), (4, 8), jnp.uint64, jax_mesh(x=2, y=2)):
            np.testing.assert_array_equal(got, expected, err_msg=str(strategy))
            assert got.dtype == np.uint64


def test_without_partitionable_threefry_only_keys_are_split(jax_mesh):
    with jax.threefry_partitionable(False):
        found = list(drawn_in_parts(jax.random.key(3), (4, 8), jnp.uint32, jax_mesh(x=2)))
    assert [str(strategy) for strategy, *_ in found] == ["replicated"]
    np.testing.assert_array_equal(found[0][1], found[0][2])
    with jax.threefry_partitionable(False):
        aval = jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype)
        assert str(SHARDING_RULES["random_bits"](aval, shape=(4,), bit_width=32)) == "k0 -> k0 1"


@pytest.mark.parametrize("primitive", ["random_bits", "random_split", "random_fold_in"])
def test_generators_other_than_threefry_are_replicated(primitive):
    keys = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    operands = (keys, jax.ShapeDtypeStruct((), jnp.uint32))[: 1 + (primitive == "random_fold_in")]
    assert SHARDING_RULES[primitive](*operands, shape=(8,), bit_width=32) is None


def test_a_key_made_from_a_seed_by_another_generator_is_replicated():
    impl = jax.make_jaxpr(lambda s: jax.random.key(s, impl="rbg"))(0).jaxpr.eqns[0].params["impl"]
    assert SHARDING_RULES["random_seed"](jax.ShapeDtypeStruct((8,), jnp.int32), impl=impl) is None
