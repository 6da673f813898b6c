"""A rematerialised block is recomputed in the program that the compiler gets, behind barriers.

XLA for CPU drops optimization barriers before it merges equal products, for ``jax.jit`` of the step as for us; the
compilers for TPU and GPU keep them. So these tests read what the compiler is given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import autopar

DEPTH = 3


def step_with(wrap: Any) -> Any:
    @wrap
    def block(h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(h @ w) @ w.T)

    def loss(params: jax.Array, x: jax.Array) -> jax.Array:
        for layer in range(DEPTH):
            x = block(x, params[layer])
        return jnp.mean(x**2)

    return lambda params, x: params - 0.1 * jax.grad(loss)(params, x)


def products_and_barriers(step: Any, args: tuple[Any, ...]) -> tuple[int, int]:
    program = autopar.parallelize(step, mesh="data=4", hardware="v5e", preset="dp").compiled(*args)
    shapes = [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in program.local.inputs]
    text = program.function.lower(*shapes).as_text()
    return text.count("stablehlo.dot_general"), text.count("stablehlo.optimization_barrier")


ARGS = (
    np.random.default_rng(0).normal(size=(DEPTH, 64, 128)).astype(np.float32) * 0.1,
    np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32),
)


def test_every_product_of_a_block_runs_again_behind_a_barrier():
    products, barriers = products_and_barriers(step_with(lambda f: f), ARGS)
    again, more_barriers = products_and_barriers(step_with(jax.checkpoint), ARGS)
    assert barriers == 0
    assert more_barriers == DEPTH
    assert again == products + 2 * DEPTH


def test_a_policy_that_saves_the_products_recomputes_none():
    saving = jax.checkpoint_policies.dots_saveable
    products, _ = products_and_barriers(step_with(lambda f: f), ARGS)
    kept, _ = products_and_barriers(step_with(lambda f: jax.checkpoint(f, policy=saving)), ARGS)
    assert kept == products


def test_a_block_that_may_be_merged_has_no_barrier():
    program = autopar.plan(
        step_with(lambda f: jax.checkpoint(f, prevent_cse=False)), *ARGS, mesh="data=4", hardware="v5e"
    )
    assert not any("recompute" in name for name in program.equations)
