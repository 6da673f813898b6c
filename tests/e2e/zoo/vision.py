"""Convolutions of every kind, normalisation with running statistics, masked and contrastive images."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state

from tests.e2e.zoo.common import BATCH, WIDTH, ids, normal, trained

SIDE = 8


class Separable(nn.Module):
    """Depthwise and dilated convolutions with batch statistics, as in EfficientNet."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(WIDTH, (3, 3), strides=2, use_bias=False)(x)
        x = nn.swish(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        h = nn.Conv(2 * WIDTH, (1, 1))(x)
        h = nn.Conv(2 * WIDTH, (3, 3), feature_group_count=2 * WIDTH, kernel_dilation=2)(h)
        gate = nn.sigmoid(nn.Dense(2 * WIDTH)(h.mean((1, 2), keepdims=True)))
        h = nn.Conv(WIDTH, (1, 1))(nn.relu6(h * gate)) + x
        h = nn.max_pool(h, (2, 2), (2, 2)) + nn.avg_pool(h, (3, 3), (2, 2), padding="SAME")
        return nn.Dense(10)(h.reshape(h.shape[0], -1))


class WithStatistics(train_state.TrainState):
    """A TrainState with running statistics, a key and averaged parameters."""

    batch_stats: Any
    key: jax.Array
    ema: Any


def separable() -> tuple[Any, ...]:
    """A TrainState subclass: ``batch_stats``, a key folded with the step, an EMA of the parameters; mixup."""
    model, images = Separable(), normal(BATCH, SIDE, SIDE, 3)
    variables = model.init(jax.random.key(0), images)
    state = WithStatistics.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(optax.cosine_decay_schedule(0.1, 10), 0.9, True)),
        batch_stats=variables["batch_stats"],
        key=jax.random.PRNGKey(1),
        ema=variables["params"],
    )

    def step(state: WithStatistics, images: jax.Array, labels: jax.Array) -> Any:
        key = jax.random.fold_in(state.key, state.step)
        share = jax.random.beta(key, 1.0, 1.0)
        order = jax.random.permutation(key, BATCH)
        images = share * images + (1 - share) * images[order]
        targets = jax.nn.one_hot(labels, 10)
        targets = share * targets + (1 - share) * targets[order]

        def loss_fn(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, new = state.apply_fn(variables, images, mutable=["batch_stats"])
            return optax.softmax_cross_entropy(logits, targets).mean(), (new["batch_stats"], logits)

        (loss, (stats, logits)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        state = state.apply_gradients(grads=grads, batch_stats=stats)
        state = state.replace(ema=optax.incremental_update(state.params, state.ema, 0.01))
        return state, {"loss": loss, "accuracy": jnp.mean(logits.argmax(-1) == labels)}

    return step, state, images, ids(10, BATCH)


class Autoencoder(nn.Module):
    """Group norms, transposed convolutions, a nearest-neighbour and a bilinear resize."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(nn.GroupNorm(4)(nn.Conv(WIDTH, (3, 3), (2, 2))(x)))
        h = jax.image.resize(h, (h.shape[0], 8, 8, WIDTH), "nearest")
        h = nn.ConvTranspose(WIDTH, (4, 4), (2, 2))(nn.InstanceNorm()(h))
        h = jax.image.resize(nn.tanh(h), (h.shape[0], SIDE, SIDE, WIDTH), "bilinear")
        return nn.Conv(3, (3, 3), padding=[(1, 1), (1, 1)])(jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect"))[
            :, 1:-1, 1:-1
        ]


def autoencoder() -> tuple[Any, ...]:
    """An autoencoder under a Charbonnier loss."""
    model, images = Autoencoder(), normal(BATCH, SIDE, SIDE, 3)
    params = model.init(jax.random.key(0), images)["params"]

    def loss(params: Any, images: jax.Array) -> jax.Array:
        out = model.apply({"params": params}, images)
        assert isinstance(out, jax.Array)
        return jnp.mean(jnp.sqrt(jnp.square(out - images) + 1e-6))

    return trained(loss, params, images, optimizer=optax.adamw(1e-3))


def masked_autoencoder() -> tuple[Any, ...]:
    """Random masks by sorting noise, patches picked and put back with ``take_along_axis``."""
    n, kept = 16, 4
    params = {"embed": normal(12, WIDTH), "mask": normal(1, 1, WIDTH), "mix": normal(n, n), "head": normal(WIDTH, 12)}

    def loss(params: Any, images: jax.Array, key: jax.Array) -> jax.Array:
        patches = images.reshape(BATCH, 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(BATCH, n, 12)
        order = jnp.argsort(jax.random.uniform(key, (BATCH, n)), axis=1)
        back = jnp.argsort(order, axis=1)
        h = jnp.take_along_axis(patches @ params["embed"], order[:, :kept, None], 1)
        h = jnp.concatenate([h, jnp.tile(params["mask"], (BATCH, n - kept, 1))], 1)
        h = jnp.einsum("bnd,mn->bmd", jnp.take_along_axis(h, back[..., None], 1), params["mix"])
        hidden = (back >= kept).astype(jnp.float32)
        return jnp.sum(jnp.mean((h @ params["head"] - patches) ** 2, -1) * hidden) / jnp.sum(hidden)

    return trained(loss, params, normal(BATCH, SIDE, SIDE, 3), jax.random.key(3), optimizer=optax.lion(1e-2))


def contrastive() -> tuple[Any, ...]:
    """CLIP: two towers, all pairs, a learned temperature; and the sigmoid loss of SigLIP."""
    params = {
        "image": normal(24, WIDTH),
        "text": normal(16, WIDTH),
        "scale": jnp.float32(1.0),
        "bias": jnp.float32(-1.0),
    }

    def loss(params: Any, image: jax.Array, tokens: jax.Array) -> jax.Array:
        u, v = image.reshape(BATCH, -1) @ params["image"], params["text"][tokens].max(1)
        u, v = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (u, v))
        logits = u @ v.T * jnp.exp(params["scale"])
        labels = jnp.arange(BATCH)
        pairs = optax.softmax_cross_entropy_with_integer_labels
        clip = (pairs(logits, labels).mean() + pairs(logits.T, labels).mean()) / 2
        signs = 2 * jnp.eye(BATCH) - 1
        return clip - jnp.sum(jax.nn.log_sigmoid(signs * (logits + params["bias"]))) / BATCH

    return trained(loss, params, normal(BATCH, 8, 3), ids(16, BATCH, 6), optimizer=optax.lamb(1e-2))


class Objects(nnx.Module):
    """NNX with batch statistics and dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, WIDTH, (3, 3), use_bias=False, rngs=rngs)
        self.norm, self.drop = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.mean((1, 2))))


def objects() -> tuple[Any, ...]:
    """NNX objects updated in place: parameters, running statistics, the dropout stream, metrics, the optimizer."""
    model = Objects(nnx.Rngs(params=0, dropout=1))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    metrics = nnx.MultiMetric(loss=nnx.metrics.Average("loss"), accuracy=nnx.metrics.Accuracy())

    def step(state: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        model, optimizer, metrics = state

        def loss_fn(model: Objects) -> Any:
            logits = model(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits

        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        metrics.update(loss=loss, logits=logits, labels=labels)
        optimizer.update(model, grads)
        return loss

    return step, (model, optimizer, metrics), normal(BATCH, SIDE, SIDE, 3), ids(10, BATCH)


STEPS = {
    "separable convolutions": separable,
    "autoencoder": autoencoder,
    "masked autoencoder": masked_autoencoder,
    "contrastive": contrastive,
    "NNX objects": objects,
}
