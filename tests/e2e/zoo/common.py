"""What the steps share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH, WIDTH = 16, 8


def normal(*shape: int) -> jax.Array:
    """Float32 numbers that depend on the shape alone."""
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32) * 0.3


def ids(n: int, *shape: int) -> jax.Array:
    """Integers below ``n``."""
    return jnp.asarray(np.random.default_rng(n).integers(0, n, shape), jnp.int32)


def trained(
    loss: Callable[..., Any], params: Any, *batch: Any, optimizer: optax.GradientTransformation | None = None
) -> tuple[Any, ...]:
    """The step that descends ``loss(params, *batch)``, and its arguments."""
    tx = optimizer or optax.sgd(0.1, momentum=0.9)

    def step(state: Any, *batch: Any) -> Any:
        params, opt_state = state
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    return step, (params, tx.init(params)), *batch
