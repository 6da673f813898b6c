"""A Llama language model in Flax linen (Touvron et al. 2023; Grattafiori et al. 2024).

RMS norm, rotary positions, grouped-query attention, SwiGLU and an untied head.

`layers=32 width=4096 heads=32 kv_heads=8 vocab=128256 seq=8192` has the shape of Llama 3 8B.
Shapes: b batch, s sequence, d width, n key-value heads, m query heads of each, k width of a head.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import data
from models.common import (
    TrainState,
    TransformerSettings,
    check_divides,
    configure,
    init_state,
    make_state_and_batch,
    token_loss,
)
from models.transformer import causal_mask

ROTARY_BASE = 500_000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TransformerSettings):
    """`kv_heads` key-value heads (at most `heads`); `hidden` is 3.5 x width by default.

    `remat` recomputes each block in the backward pass.
    """

    dropout: float = 0.0
    heads: int = 16
    kv_heads: int = 8
    hidden: int | None = None
    remat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("kv_heads", self.groups, "heads", self.heads)
        check_divides("2 x heads", 2 * self.heads, "width", self.width)

    @property
    def groups(self) -> int:
        """n, the number of key-value heads."""
        return min(self.kv_heads, self.heads)

    @property
    def hidden_width(self) -> int:
        """The width inside the feed-forward half, 14,336 for a width of 4,096."""
        return 7 * self.width // 2 if self.hidden is None else self.hidden


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions (Ainslie et al. 2023; Su et al. 2021)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        cfg = self.config
        head_width = cfg.width // cfg.heads
        dense = functools.partial(nn.DenseGeneral, use_bias=False, dtype=cfg.dtype)
        query = rotate(dense((cfg.groups, cfg.heads // cfg.groups, head_width), name="query")(x))
        key = rotate(dense((cfg.groups, head_width), name="key")(x))
        value = dense((cfg.groups, head_width), name="value")(x)
        scores = jnp.einsum("bqnmk,btnk->bnmqt", query, key).astype(jnp.float32) / head_width**0.5
        scores = jnp.where(causal_mask(x.shape[1]), scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bnmqt,btnk->bqnmk", nn.softmax(scores).astype(cfg.dtype), value)
        return dense(cfg.width, axis=(-3, -2, -1), name="out")(mixed)


def rotate(x: jax.Array) -> jax.Array:
    """Turn each pair of features of x (b, s, ..., k) by an angle that grows with its position s."""
    seq, head_width = x.shape[1], x.shape[-1]
    frequencies = ROTARY_BASE ** (-jnp.arange(0, head_width, 2) / head_width)
    angles = jnp.arange(seq)[:, None] * frequencies
    angles = angles.reshape(seq, *(1,) * (x.ndim - 3), head_width // 2)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


class SwiGLU(nn.Module):
    """silu(gate(x)) * up(x), projected down (Shazeer 2020)."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        cfg = self.config
        dense = functools.partial(nn.Dense, use_bias=False, dtype=cfg.dtype)
        hidden = nn.silu(dense(cfg.hidden_width, name="gate")(x)) * dense(cfg.hidden_width, name="up")(x)
        return dense(cfg.width, name="down")(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        cfg = self.config
        branch = Attention(cfg, name="attn")(nn.RMSNorm(dtype=cfg.dtype, name="norm_1")(x))
        x = x + nn.Dropout(cfg.dropout)(branch, deterministic=not train)
        branch = SwiGLU(cfg, name="mlp")(nn.RMSNorm(dtype=cfg.dtype, name="norm_2")(x))
        return x + nn.Dropout(cfg.dropout)(branch, deterministic=not train)


class Llama(nn.Module):
    """Tokens int32 (batch, seq) -> logits float32 (batch, seq, padded_vocab)."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the token that follows each one."""
        cfg = self.config
        x = nn.Embed(cfg.padded_vocab, cfg.width, dtype=cfg.dtype, name="embed")(tokens)
        block = nn.remat(Block, static_argnums=(2,)) if cfg.remat else Block
        for layer in range(cfg.layers):
            x = block(cfg, name=f"h_{layer}")(x, train)
        x = nn.RMSNorm(dtype=cfg.dtype, name="norm_f")(x)
        return nn.Dense(cfg.padded_vocab, use_bias=False, dtype=cfg.dtype, name="head")(x).astype(jnp.float32)


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(Llama, config, key, jnp.zeros((1, config.seq), jnp.int32))


def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of next-token prediction."""

    def loss_fn(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, batch["inputs"], train=True, rngs={"dropout": state.step_key()})
        return token_loss(logits, batch["targets"]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def make(**settings: Any) -> tuple[Any, TrainState, data.Batch]:
    """The train step, its state and a batch of text; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.next_token_batch, batch=config.batch, seq=config.seq, vocab=config.vocab)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
