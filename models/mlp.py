"""A multi-layer perceptron that reads handwritten digits."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import data
from models.common import Settings, TrainState, configure, init_state, make_state_and_batch, token_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """`layers` hidden layers of `width`, on images of 8 x 8 pixels."""

    batch: int = 64
    layers: int = 2
    width: int = 512


class MLP(nn.Module):
    """Images float32 (batch, 8, 8, 1) -> logits float32 (batch, 16)."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the class of each image."""
        cfg = self.config
        x = images.reshape(images.shape[0], -1).astype(cfg.dtype)
        for layer in range(cfg.layers):
            x = nn.relu(nn.Dense(cfg.width, dtype=cfg.dtype, name=f"dense_{layer}")(x))
            x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        return nn.Dense(data.CLASSES, dtype=cfg.dtype, name="head")(x).astype(jnp.float32)


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(MLP, config, key, jnp.zeros((1, data.DIGIT_PIXELS, data.DIGIT_PIXELS, 1)))


def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of digit classification."""

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, batch["images"], train=True, rngs={"dropout": state.step_key()})
        return token_loss(logits, batch["labels"]).mean(), logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    accuracy = jnp.mean(logits.argmax(-1) == batch["labels"])
    return state.apply_gradients(grads=grads), {"loss": loss, "accuracy": accuracy}


def make(**settings: Any) -> tuple[Any, TrainState, data.Batch]:
    """The train step, its state and a batch of digits; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.digit_batch, batch=config.batch)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
