"""A GPT language model in Flax linen (Radford et al. 2019): pre-norm, learned positions, tied embeddings."""

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
    """`tied` uses the embedding table for the logits too; `remat` recomputes blocks in the backward pass."""

    tied: bool = True
    remat: bool = False


class GPT(nn.Module):
    """Tokens int32 (batch, seq) -> logits float32 (batch, seq, padded_vocab)."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """The logits of the token that follows each one."""
        cfg = self.config
        embed = nn.Embed(cfg.padded_vocab, cfg.width, dtype=cfg.dtype, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.02), (cfg.seq, cfg.width))
        x = embed(tokens) + positions.astype(cfg.dtype)
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        block = nn.remat(Block, static_argnums=(2,)) if cfg.remat else Block
        for layer in range(cfg.layers):
            x = block(cfg.heads, True, cfg.dropout, cfg.dtype, name=f"h_{layer}")(x, train)
        x = nn.LayerNorm(dtype=cfg.dtype, name="ln_f")(x)
        if cfg.tied:
            return embed.attend(x).astype(jnp.float32)
        return nn.Dense(cfg.padded_vocab, use_bias=False, dtype=cfg.dtype, name="head")(x).astype(jnp.float32)


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(GPT, config, key, jnp.zeros((1, config.seq), jnp.int32))


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
