"""A vision transformer in Flax linen (Dosovitskiy et al. 2020) on handwritten digits, with mean pooling.

Mean pooling instead of a class token keeps the number of patches a power of two (Beyer et al. 2022).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import data
from models.common import (
    Settings,
    TrainState,
    check_divides,
    configure,
    init_state,
    make_state_and_batch,
    token_loss,
)
from models.transformer import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """`image` and `patch` are pixels a side; the sequence has (image / patch)^2 patches."""

    layers: int = 2
    width: int = 256
    heads: int = 8
    image: int = 32
    patch: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("heads", self.heads, "width", self.width)
        check_divides("patch", self.patch, "image", self.image)


class ViT(nn.Module):
    """Images float32 (batch, image, image, 1) -> logits float32 (batch, 16)."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the class of each image."""
        cfg = self.config
        x = nn.Dense(cfg.width, dtype=cfg.dtype, name="embed")(patches(images, cfg.patch))
        positions = self.param("positions", nn.initializers.normal(0.02), (x.shape[1], cfg.width))
        x = nn.Dropout(cfg.dropout)(x + positions.astype(cfg.dtype), deterministic=not train)
        for layer in range(cfg.layers):
            x = Block(cfg.heads, False, cfg.dropout, cfg.dtype, name=f"h_{layer}")(x, train)
        x = nn.LayerNorm(dtype=cfg.dtype, name="ln_f")(x).mean(axis=1)
        return nn.Dense(data.CLASSES, dtype=cfg.dtype, name="head")(x).astype(jnp.float32)


def patches(images: jax.Array, patch: int) -> jax.Array:
    """(batch, (h p), (w p), c) -> (batch, (h w), (p p c))."""
    batch, rows, columns, channels = images.shape
    tiles = images.reshape(batch, rows // patch, patch, columns // patch, patch, channels)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(ViT, config, key, jnp.zeros((1, config.image, config.image, 1)))


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
    sample = functools.partial(data.digit_batch, batch=config.batch, image=config.image)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
