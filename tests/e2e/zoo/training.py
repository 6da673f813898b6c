"""Optimizers, accumulation, precision, and what a state may be made of."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.e2e.zoo.common import BATCH, WIDTH, ids, normal, trained

PARAMS = {
    "embed": normal(16, WIDTH),
    "block": {"kernel": normal(WIDTH, 16), "bias": normal(16), "scale": jnp.ones(16)},
    "head": normal(16, 16),
}


def classify(params: Any, tokens: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss that the optimizers below descend."""
    block = params["block"]
    h = jax.nn.gelu(params["embed"][tokens].mean(1) @ block["kernel"] + block["bias"]) * block["scale"]
    return optax.softmax_cross_entropy_with_integer_labels(h @ params["head"], labels).mean()


def descended(optimizer: optax.GradientTransformation) -> tuple[Any, ...]:
    """A step of an optimizer."""
    return trained(classify, PARAMS, ids(16, BATCH, 4), ids(16, BATCH), optimizer=optimizer)


def adafactor() -> tuple[Any, ...]:
    """State that is not shaped like the parameters."""
    return descended(optax.adafactor(1e-2, min_dim_size_to_factor=8, momentum=0.9))


def several() -> tuple[Any, ...]:
    """One optimizer for each kind of parameter, accumulated by MultiSteps (a cond), skipping what is not finite."""
    labels = {"embed": "slow", "block": {"kernel": "fast", "bias": "frozen", "scale": "fast"}, "head": "fast"}
    inner = optax.multi_transform(
        {"slow": optax.sgd(1e-2), "fast": optax.adamw(1e-2), "frozen": optax.set_to_zero()}, labels
    )
    accumulated = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), inner), 2)
    return descended(optax.apply_if_finite(accumulated.gradient_transformation(), 3))


def muon() -> tuple[Any, ...]:
    """Momentum orthogonalised by Newton-Schulz steps."""
    return descended(optax.contrib.muon(1e-2))


def lookahead() -> tuple[Any, ...]:
    """SAM-like: a second gradient where the first one points to."""

    def step(state: Any, *batch: Any) -> Any:
        params, momentum = state
        grads = jax.grad(classify)(params, *batch)
        norm = optax.tree.norm(grads)
        near = jax.tree.map(lambda p, g: p + 0.05 * g / norm, params, grads)
        loss, grads = jax.value_and_grad(classify)(near, *batch)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return (jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum), momentum), {"loss": loss}

    return step, (PARAMS, jax.tree.map(jnp.zeros_like, PARAMS)), ids(16, BATCH, 4), ids(16, BATCH)


def accumulated() -> tuple[Any, ...]:
    """Gradients summed over microbatches by a scan whose carry is the whole state, and by a ``fori_loop``."""

    def step(state: Any, tokens: jax.Array, labels: jax.Array) -> Any:
        micro = tokens.reshape(4, -1, tokens.shape[1]), labels.reshape(4, -1)

        def one(carry: Any, batch: Any) -> Any:
            state, total = carry
            loss, grads = jax.value_and_grad(classify)(state["params"], *batch)
            return ({**state, "seen": state["seen"] + 1}, jax.tree.map(jnp.add, total, grads)), loss

        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        (state, total), losses = lax.scan(one, (state, zeros), micro)

        def peeled(i: jax.Array, total: Any) -> Any:
            rows = [lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for x in micro]
            return jax.tree.map(jnp.add, total, jax.grad(classify)(state["params"], *rows))

        total = lax.fori_loop(1, 4, peeled, total)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, state["params"], total)
        return {**state, "params": params}, {"loss": losses.mean(), "seen": state["seen"]}

    return step, {"params": PARAMS, "seen": jnp.int32(0)}, ids(16, BATCH, 4), ids(16, BATCH)


class Scale(NamedTuple):
    """A loss scale and the good steps since it changed."""

    value: jax.Array
    good: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Everything:
    """A state of all that a pytree may hold: None, Python numbers, tuples, static fields, a named tuple, flags."""

    params: Any
    scale: Scale
    moments: Any
    count: int
    rate: float
    frozen: tuple[jax.Array, None]
    ready: jax.Array
    activation: str = field(metadata={"static": True}, default="tanh")


def mixed() -> tuple[Any, ...]:
    """bfloat16 copies of the weights, a dynamic loss scale, a step that is skipped when something overflows."""

    def step(state: Everything, x: jax.Array, y: jax.Array | None, options: dict[str, Any]) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
            h = getattr(jnp, state.activation)(x.astype(jnp.bfloat16) @ low["up"]) @ low["down"]
            error = h.astype(jnp.float32) - (x if y is None else y)
            return jnp.mean(error**2) * state.scale.value

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        grads = jax.tree.map(lambda g: g / state.scale.value, grads)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads)]))
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, state.moments, grads)
        params = jax.tree.map(lambda p, m: p - state.rate * m, state.params, moments)
        new, old = (params, moments), (state.params, state.moments)
        params, moments = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        grow = finite & (state.scale.good == options["period"])
        value = jnp.where(finite, jnp.where(grow, state.scale.value * 2, state.scale.value), state.scale.value / 2)
        scale = Scale(value, jnp.where(grow | ~finite, 0, state.scale.good + 1))
        state = replace(state, params=params, moments=moments, scale=scale, count=state.count + 1, ready=finite)
        return state, {"loss": loss / scale.value, "skipped": ~finite}

    params = {"up": normal(WIDTH, 16), "down": normal(16, WIDTH), "unused": None}
    state = Everything(
        params,
        Scale(jnp.float32(8), jnp.int32(0)),
        jax.tree.map(jnp.zeros_like, params),
        0,
        0.1,
        (jnp.ones(3), None),
        jnp.array(True),
    )
    return step, state, normal(BATCH, WIDTH), None, {"period": 1, "nothing": {}}


@jax.custom_vjp
def clipped(x: jax.Array) -> jax.Array:
    """The identity, whose gradient is clipped."""
    return x


clipped.defvjp(lambda x: (x, x), lambda x, g: (jnp.clip(g, -0.01, 0.01) * (jnp.abs(x) < 1),))


@jax.custom_jvp
def hard(x: jax.Array) -> jax.Array:
    """A hard sigmoid with a soft derivative."""
    return jnp.clip((x + 1) / 2, 0, 1).round()


hard.defjvp(lambda primals, tangents: (hard(*primals), tangents[0] * jax.nn.sigmoid(primals[0])))


def custom_gradients() -> tuple[Any, ...]:
    """``custom_vjp`` and ``custom_jvp``, a remat policy by names, ``vmap`` over an ensemble."""
    params = {"up": normal(4, WIDTH, 16), "down": normal(4, 16, WIDTH)}

    def member(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        def body(params: Any, x: jax.Array) -> jax.Array:
            h = checkpoint_name(hard(clipped(x) @ params["up"]), "hidden")
            return jnp.sin(h) @ params["down"]

        kept = jax.checkpoint_policies.save_only_these_names("hidden")
        return jnp.mean((jax.checkpoint(body, policy=kept)(params, x @ jnp.eye(WIDTH)) - y) ** 2)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.vmap(member, in_axes=(0, None, None))(params, x, y).sum()

    return trained(loss, params, normal(BATCH, WIDTH), normal(BATCH, WIDTH) + 1)


STEPS = {
    "adafactor": adafactor,
    "several optimizers": several,
    "muon": muon,
    "two gradients": lookahead,
    "accumulation": accumulated,
    "mixed precision": mixed,
    "custom gradients": custom_gradients,
}
