"""A denoising diffusion U-Net in Flax linen (Ho et al. 2020) on handwritten digits.

The step draws a time and a noise for each image, and learns to predict the noise (algorithm 1 of the paper).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import data
from models.common import Settings, TrainState, check_divides, configure, init_state, make_state_and_batch
from models.transformer import SelfAttention

STAGES = 3
NORM_GROUPS = 8
TIMES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """`layers` residual blocks in each of three stages, of `width`, 2 x `width` and 4 x `width` channels.

    The lowest stage ends in self-attention with `heads` heads. Images have `image` pixels a side.
    """

    layers: int = 1
    width: int = 32
    heads: int = 8
    image: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("heads", self.heads, "4 x width", 4 * self.width)
        check_divides("norm groups", NORM_GROUPS, "width", self.width)


class ResidualBlock(nn.Module):
    """Norm, silu, conv, plus the time, norm, silu, dropout, conv, added to the (projected) input."""

    channels: int
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array, train: bool) -> jax.Array:
        """(b, h, w, c) and the time's features (b, t) -> (b, h, w, channels)."""
        norm = functools.partial(nn.GroupNorm, NORM_GROUPS, dtype=self.dtype)
        conv = functools.partial(nn.Conv, self.channels, dtype=self.dtype)
        y = conv((3, 3), name="conv_1")(nn.silu(norm(name="norm_1")(x)))
        y = y + nn.Dense(self.channels, dtype=self.dtype, name="time")(nn.silu(time))[:, None, None, :]
        y = nn.Dropout(self.dropout)(nn.silu(norm(name="norm_2")(y)), deterministic=not train)
        shortcut = x if x.shape[-1] == self.channels else conv((1, 1), name="project")(x)
        return shortcut + conv((3, 3), name="conv_2")(y)


class UNet(nn.Module):
    """Noisy images float32 (batch, image, image, 1) and times float32 (batch,) -> noise like the images."""

    config: Config

    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array, *, train: bool) -> jax.Array:
        """The noise that was added."""
        cfg = self.config
        time = nn.Dense(4 * cfg.width, dtype=cfg.dtype, name="time_1")(time_features(times, cfg.width))
        time = nn.Dense(4 * cfg.width, dtype=cfg.dtype, name="time_2")(nn.silu(time))
        block = functools.partial(ResidualBlock, dropout=cfg.dropout, dtype=cfg.dtype)
        x = nn.Conv(cfg.width, (3, 3), dtype=cfg.dtype, name="stem")(images)
        skips = []
        for stage in range(STAGES):
            for layer in range(cfg.layers):
                x = block(cfg.width * 2**stage, name=f"down_{stage}_{layer}")(x, time, train)
            skips.append(x)
            if stage < STAGES - 1:
                x = nn.Conv(x.shape[-1], (3, 3), (2, 2), dtype=cfg.dtype, name=f"shrink_{stage}")(x)
        x = self.attend(x, train)
        for stage in reversed(range(STAGES)):
            x = jnp.concatenate([x, skips[stage]], axis=-1)
            for layer in range(cfg.layers):
                x = block(cfg.width * 2**stage, name=f"up_{stage}_{layer}")(x, time, train)
            if stage > 0:
                x = nn.Conv(x.shape[-1], (3, 3), dtype=cfg.dtype, name=f"grow_{stage}")(twice_as_large(x))
        x = nn.silu(nn.GroupNorm(NORM_GROUPS, dtype=cfg.dtype, name="norm_f")(x))
        return nn.Conv(1, (3, 3), dtype=cfg.dtype, name="out")(x).astype(jnp.float32)

    def attend(self, x: jax.Array, train: bool) -> jax.Array:
        """Self-attention between all pixels of x (b, h, w, c), added to x."""
        cfg = self.config
        pixels = nn.GroupNorm(NORM_GROUPS, dtype=cfg.dtype, name="norm_attn")(x)
        pixels = pixels.reshape(x.shape[0], -1, x.shape[-1])
        attention = SelfAttention(cfg.heads, False, cfg.dropout, cfg.dtype, name="attn")
        return x + attention(pixels, train=train).reshape(x.shape)


def time_features(times: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of the times (batch,) at `width` / 2 frequencies: float32 (batch, width)."""
    frequencies = 10_000.0 ** (-jnp.arange(width // 2) / (width // 2))
    angles = times[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def twice_as_large(x: jax.Array) -> jax.Array:
    """(b, h, w, c) -> (b, 2 h, 2 w, c), every pixel four times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def noised(images: jax.Array, times: jax.Array, noise: jax.Array) -> jax.Array:
    """The images after `times` of 1,000 steps of diffusion on the linear schedule from 1e-4 to 0.02."""
    kept = jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, TIMES))[times][:, None, None, None]
    return jnp.sqrt(kept) * images + jnp.sqrt(1 - kept) * noise


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(UNet, config, key, jnp.zeros((1, config.image, config.image, 1)), jnp.zeros((1,)))


def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of noise prediction."""
    dropout_key, time_key, noise_key = jax.random.split(state.step_key(), 3)
    images = 2 * batch["images"] - 1
    times = jax.random.randint(time_key, images.shape[:1], 0, TIMES)
    noise = jax.random.normal(noise_key, images.shape)

    def loss_fn(params: Any) -> jax.Array:
        inputs = noised(images, times, noise), times.astype(jnp.float32)
        predicted = state.apply_fn({"params": params}, *inputs, train=True, rngs={"dropout": dropout_key})
        return jnp.mean((predicted - noise) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def make(**settings: Any) -> tuple[Any, TrainState, data.Batch]:
    """The train step, its state and a batch of digits; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.digit_batch, batch=config.batch, image=config.image)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
