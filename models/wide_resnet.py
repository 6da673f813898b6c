"""A wide residual network in Flax linen (Zagoruyko & Komodakis 2016) on handwritten digits, with batch norm.

The running statistics of batch norm are part of the state: the step returns them updated.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import data
from models.common import Settings, TrainState, configure, init_state, make_state_and_batch, token_loss

STAGES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """`layers` residual blocks in each of three stages, of `width`, 2 x `width` and 4 x `width` channels.

    A WRN-28-10 is `layers=4 width=160 image=32`.
    """

    batch: int = 32
    layers: int = 1
    width: int = 32
    image: int = 16


class ResidualBlock(nn.Module):
    """Norm, relu, conv, dropout, norm, relu, conv, added to the input (projected where its shape changes)."""

    channels: int
    stride: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, h, w, c) -> (b, h / stride, w / stride, channels)."""
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
        strides = (self.stride, self.stride)
        active = nn.relu(norm(name="norm_1")(x))
        shortcut = x
        if x.shape[-1] != self.channels:
            shortcut = conv(self.channels, (1, 1), strides, name="project")(active)
        y = conv(self.channels, (3, 3), strides, name="conv_1")(active)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return shortcut + conv(self.channels, (3, 3), name="conv_2")(nn.relu(norm(name="norm_2")(y)))


class WideResNet(nn.Module):
    """Images float32 (batch, image, image, 1) -> logits float32 (batch, 16)."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the class of each image."""
        cfg = self.config
        x = nn.Conv(16, (3, 3), use_bias=False, dtype=cfg.dtype, name="stem")(images)
        for stage in range(STAGES):
            for layer in range(cfg.layers):
                stride = 2 if stage > 0 and layer == 0 else 1
                block = ResidualBlock(
                    cfg.width * 2**stage, stride, cfg.dropout, cfg.dtype, name=f"stage_{stage}_{layer}"
                )
                x = block(x, train)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=cfg.dtype, name="norm_f")
        x = nn.relu(norm(x)).mean(axis=(1, 2))
        return nn.Dense(data.CLASSES, dtype=cfg.dtype, name="head")(x).astype(jnp.float32)


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(WideResNet, config, key, jnp.zeros((1, config.image, config.image, 1)))


def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of digit classification, and of the running statistics."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        rngs = {"dropout": state.step_key()}
        logits, updates = state.apply_fn(variables, batch["images"], train=True, rngs=rngs, mutable=["batch_stats"])
        return token_loss(logits, batch["labels"]).mean(), (logits, updates["batch_stats"])

    (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    accuracy = jnp.mean(logits.argmax(-1) == batch["labels"])
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), {"loss": loss, "accuracy": accuracy}


def make(**settings: Any) -> tuple[Any, TrainState, data.Batch]:
    """The train step, its state and a batch of digits; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.digit_batch, batch=config.batch, image=config.image)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
