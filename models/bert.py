"""BERT's masked language modelling in Flax linen (Devlin et al. 2018), with pre-norm blocks, one segment."""

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
    configure,
    init_state,
    make_state_and_batch,
    token_loss,
)
from models.transformer import Block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TransformerSettings):
    """`vocab` holds the 256 bytes and the mask token."""


class BERT(nn.Module):
    """Tokens int32 (batch, seq) -> logits float32 (batch, seq, padded_vocab)."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the token that belongs at each position."""
        cfg = self.config
        embed = nn.Embed(cfg.padded_vocab, cfg.width, dtype=cfg.dtype, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.02), (cfg.seq, cfg.width))
        x = nn.LayerNorm(dtype=cfg.dtype, name="ln_embed")(embed(tokens) + positions.astype(cfg.dtype))
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        for layer in range(cfg.layers):
            x = Block(cfg.heads, False, cfg.dropout, cfg.dtype, name=f"h_{layer}")(x, train)
        x = nn.gelu(nn.Dense(cfg.width, dtype=cfg.dtype, name="transform")(x))
        x = nn.LayerNorm(dtype=cfg.dtype, name="ln_f")(x)
        bias = self.param("bias", nn.initializers.zeros, (cfg.padded_vocab,))
        return embed.attend(x).astype(jnp.float32) + bias


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(BERT, config, key, jnp.zeros((1, config.seq), jnp.int32))


def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; the loss is the mean over the chosen positions only."""
    weights = batch["weights"]
    total = jnp.maximum(weights.sum(), 1.0)

    def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = state.apply_fn({"params": params}, batch["inputs"], train=True, rngs={"dropout": state.step_key()})
        return (token_loss(logits, batch["targets"]) * weights).sum() / total, logits

    (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    correct = (logits.argmax(-1) == batch["targets"]) * weights
    return state.apply_gradients(grads=grads), {"loss": loss, "accuracy": correct.sum() / total}


def make(**settings: Any) -> tuple[Any, TrainState, data.Batch]:
    """The train step, its state and a batch of masked text; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.masked_batch, batch=config.batch, seq=config.seq, vocab=config.vocab)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
