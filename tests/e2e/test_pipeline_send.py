"""Arrays sent between submeshes arrive whole, as they are wanted, and nobody waits for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autopar.lowering.pipeline.send import send


def mesh(first: int, **axes: int) -> Mesh:
    n = int(np.prod(tuple(axes.values())))
    return Mesh(np.array(jax.devices()[first : first + n]).reshape(tuple(axes.values())), tuple(axes))


ONE, OTHER_ONE = mesh(0, data=1), mesh(4, data=1)
TWO, OTHER_TWO, FOUR = mesh(0, data=2), mesh(2, data=2), mesh(4, data=2, tensor=2)
PLACES = {
    "one": NamedSharding(ONE, P()),
    "other one": NamedSharding(OTHER_ONE, P()),
    "rows": NamedSharding(TWO, P("data")),
    "columns": NamedSharding(TWO, P(None, "data")),
    "other rows": NamedSharding(OTHER_TWO, P("data")),
    "other copies": NamedSharding(OTHER_TWO, P()),
    "grid": NamedSharding(FOUR, P("data", "tensor")),
    "both on rows": NamedSharding(FOUR, P(("tensor", "data"))),
}


@pytest.mark.parametrize("source", PLACES)
@pytest.mark.parametrize("target", PLACES)
def test_an_array_arrives_as_it_is_wanted(source: str, target: str) -> None:
    x = np.arange(32.0).reshape(8, 4)
    there = send(jax.device_put(x, PLACES[source]), PLACES[target])
    assert there.sharding == PLACES[target]
    np.testing.assert_array_equal(there, x)


def test_what_is_there_already_is_not_touched() -> None:
    x = jax.device_put(np.arange(4.0), PLACES["rows"])
    assert send(x, PLACES["rows"]) is x


SENDABLE = [lambda: np.arange(8.0), lambda: 3.0, lambda: jnp.arange(8), lambda: jax.random.key(1)]


@pytest.mark.parametrize("make", SENDABLE)
def test_anything_that_jax_takes_can_be_sent(make: Callable[[], Any]) -> None:
    place = NamedSharding(FOUR, P())
    assert send(make(), place).sharding == place


def slow(x: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(x @ x), x)


@pytest.mark.parametrize("target", ["other rows", "grid", "other one"])
def test_sending_does_not_wait_for_what_makes_the_array(target: str) -> None:
    made = jax.jit(jax.vmap(slow), out_shardings=PLACES["rows"])
    x = jax.device_put(np.ones((2, 256, 256), np.float32), PLACES["rows"])
    place = NamedSharding(PLACES[target].mesh, P("data"))
    send(made(x), place).block_until_ready()  # compiled now
    assert not send(made(x), place).is_ready()  # type: ignore[attr-defined]
