"""Train steps of a few equations, one for each thing that a step may contain. ``STEPS[name] = (step, arguments)``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BATCH, WIDTH, HIDDEN = 16, 8, 16


def normal(*shape: int) -> jax.Array:
    """Float32 numbers that depend on the shape alone."""
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32) * 0.3


def trained(loss: Any) -> Any:
    """The step that takes one gradient step on ``loss(params, *batch)``."""

    def step(params: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def mlp(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    h = jax.nn.relu(x @ params["w1"] + params["b1"])
    return jnp.mean((h @ params["w2"] + params["b2"] - y) ** 2)


def scanned(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    def layer(h: jax.Array, p: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return jnp.tanh(h @ p[0] + p[1]), jnp.sum(h)

    h, sums = lax.scan(layer, x, (params["w"], params["b"]))
    return jnp.mean((h - y) ** 2) + 1e-3 * jnp.sum(sums)


def rematerialised(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    @jax.checkpoint
    def block(h: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(h @ w) @ w.T)

    return jnp.mean((block(block(x, params["w1"]), params["w2"]) - y) ** 2)


def branching(params: Any, x: jax.Array, n: jax.Array) -> jax.Array:
    h = lax.cond(n > 0, lambda h: jnp.tanh(h @ params["w"]), lambda h: h * 2.0, x)
    return jnp.mean(h**2)


def nested(params: Any, x: jax.Array, n: jax.Array) -> jax.Array:
    def outer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        def inner(h: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
            turn = lambda h: jnp.tanh(h @ w + jnp.arange(WIDTH) * 0.1)  # noqa: E731
            return lax.cond(i > n, turn, lambda h: h * jnp.full((BATCH, WIDTH), 0.5), h), None

        h, _ = lax.scan(inner, h, jnp.arange(3))
        return h, h

    h, all_h = lax.scan(outer, x, params["w"])
    return jnp.mean(h**2) + jnp.mean(all_h)


def looping(params: Any, x: jax.Array, n: jax.Array) -> Any:
    """A while loop: replicated, but its surroundings need not be."""

    def body(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return state[0] + 1, jnp.tanh(state[1] @ params["w"])

    _, h = lax.while_loop(lambda state: state[0] < n, body, (jnp.int32(0), x))
    return {"w": params["w"] - 0.1 * (x.T @ h)}, jnp.mean(h)


def free_operands(params: Any, x: jax.Array, n: jax.Array) -> Any:
    """Values that depend on no argument enter the branches of a cond and of a switch."""
    mask = jnp.broadcast_to(jnp.arange(WIDTH) * 0.1, (BATCH, WIDTH))
    h = lax.cond(n > 0, lambda m, h: jnp.tanh((h + m) @ params["w"]), lambda m, h: h * m, mask, x)
    branches = [lambda a: a * 2, lambda a: a + mask, lambda a: jnp.cumsum(a, 0)]
    h = lax.switch(n, branches, h)
    return {"w": params["w"] - 0.1 * (x.T @ h)}, jnp.mean(h)


def implicit(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """``linalg.solve`` and conjugate gradients are custom_linear_solve, with a while loop inside the latter."""
    a = x.T @ x + jnp.eye(WIDTH)
    w = jnp.linalg.solve(a, x.T @ y)
    v, _ = jax.scipy.sparse.linalg.cg(lambda v: a @ v, x.T @ y[:, 0], maxiter=3)
    return {"w": params["w"] * 0.9 + 0.1 * w}, jnp.mean((x @ w - y) ** 2) + v.sum()


TABLE = np.random.default_rng(3).normal(size=(WIDTH, WIDTH)).astype(np.float32) * 0.3


def closing_over(params: Any, x: jax.Array, n: jax.Array) -> jax.Array:
    """Arrays that nested functions close over become operands of the regions around them."""
    table = jax.jit(lambda h: h @ TABLE)

    def layer(h: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        h = lax.cond(jnp.sum(h) > n, lambda h: jnp.tanh(table(h) @ w), lambda h: h * TABLE[0], h)
        return table(h), None

    return jnp.mean(lax.scan(layer, x, params["w"])[0] ** 2)


def clipped(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """A global norm ties every gradient to every other."""
    value, gradients = jax.value_and_grad(mlp)(params, x, y)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda p, g: p - 0.1 * g / jnp.maximum(norm, 1.0), params, gradients), value


_MLP = {"w1": normal(WIDTH, HIDDEN), "b1": normal(HIDDEN), "w2": normal(HIDDEN, WIDTH), "b2": normal(WIDTH)}
_X, _Y, _W = normal(BATCH, WIDTH), normal(BATCH, WIDTH), {"w": normal(WIDTH, WIDTH)}

STEPS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "mlp": (trained(mlp), (_MLP, _X, _Y)),
    "clipped": (clipped, (_MLP, _X, _Y)),
    "scan": (trained(scanned), ({"w": normal(3, WIDTH, WIDTH), "b": normal(3, WIDTH)}, _X, _Y)),
    "remat": (trained(rematerialised), ({"w1": normal(WIDTH, HIDDEN), "w2": normal(WIDTH, HIDDEN)}, _X, _Y)),
    "cond": (trained(branching), (_W, _X, jnp.int32(1))),
    "nested": (trained(nested), ({"w": normal(2, WIDTH, WIDTH)}, _X, jnp.int32(1))),
    "while": (looping, (_W, _X, jnp.int32(3))),
    "free operands": (free_operands, (_W, _X, jnp.int32(1))),
    "closing over": (trained(closing_over), ({"w": normal(2, WIDTH, WIDTH)}, _X, jnp.int32(-3))),
    "linear solve": (implicit, ({"w": normal(WIDTH, WIDTH)}, _X, _Y)),
}
