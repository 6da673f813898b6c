"""The language model of gpt.py in Flax NNX: the step updates a model and an optimizer in place.

Here the state is the pair `(model, optimizer)` of NNX objects. Run the step under `nnx.jit`: it returns the
metrics only, and the caller's objects hold the new values:

    train_step, state, batch = make()
    metrics = nnx.jit(train_step)(state, batch)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models import data
from models.common import (
    JIT_ONCE,
    TransformerSettings,
    configure,
    make_optimizer,
    make_state_and_batch,
    token_loss,
)
from models.transformer import MLP_RATIO, causal_mask

State = tuple["GPT", nnx.Optimizer]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TransformerSettings):
    """`tied` uses the embedding table for the logits too."""

    tied: bool = True


class SelfAttention(nnx.Module):
    """Causal multi-head self-attention on (b, s, d)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        heads = (config.heads, config.width // config.heads)
        self.query, self.key, self.value = (
            nnx.LinearGeneral(config.width, heads, dtype=config.dtype, rngs=rngs) for _ in range(3)
        )
        self.out = nnx.LinearGeneral(heads, config.width, axis=(-2, -1), dtype=config.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        scores = jnp.einsum("bqhk,bthk->bhqt", query, key).astype(jnp.float32) / query.shape[-1] ** 0.5
        scores = jnp.where(causal_mask(x.shape[1]), scores, jnp.finfo(scores.dtype).min)
        weights = self.dropout(jax.nn.softmax(scores).astype(query.dtype))
        return self.out(jnp.einsum("bhqt,bthk->bqhk", weights, value))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both branches."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.ln_1 = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.attn = SelfAttention(config, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.up = nnx.Linear(config.width, MLP_RATIO * config.width, dtype=config.dtype, rngs=rngs)
        self.down = nnx.Linear(MLP_RATIO * config.width, config.width, dtype=config.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        x = x + self.dropout(self.attn(self.ln_1(x)))
        return x + self.dropout(self.down(jax.nn.gelu(self.up(self.ln_2(x)))))


class GPT(nnx.Module):
    """Tokens int32 (batch, seq) -> logits float32 (batch, seq, padded_vocab)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(config.padded_vocab, config.width, dtype=config.dtype, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.seq, config.width)))
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.ln_f = nnx.LayerNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.head = (
            None
            if config.tied
            else nnx.Linear(config.width, config.padded_vocab, use_bias=False, dtype=config.dtype, rngs=rngs)
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The logits of the token that follows each one."""
        x = self.embed(tokens)
        x = self.dropout(x + self.positions[...].astype(x.dtype))
        for layer in self.layers:
            x = layer(x)
        x = self.ln_f(x)
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return logits.astype(jnp.float32)


def init(config: Config, key: jax.Array) -> State:
    """The first model and optimizer; pure in `key`."""
    params_key, dropout_key = jax.random.split(key)
    model = GPT(config, rngs=nnx.Rngs(params=params_key, dropout=dropout_key))
    return model, nnx.Optimizer(model, make_optimizer(config), wrt=nnx.Param)


def train_step(state: State, batch: data.Batch) -> dict[str, jax.Array]:
    """One update of next-token prediction, in place."""
    model, optimizer = state

    def loss_fn(model: GPT) -> jax.Array:
        return token_loss(model(batch["inputs"]), batch["targets"]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads)
    return {"loss": loss}


def make(**settings: Any) -> tuple[Any, State, data.Batch]:
    """The train step, its state and a batch of text; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.next_token_batch, batch=config.batch, seq=config.seq, vocab=config.vocab)
    state, batch = make_state_and_batch(config, init, sample, jit=_jit_once, eval_shape=nnx.eval_shape)
    return train_step, state, batch


def _jit_once(function: Callable[[], Any]) -> Callable[[], Any]:
    """`common.JIT_ONCE` for a function that returns NNX objects."""
    return lambda: nnx.merge(*JIT_ONCE(lambda: nnx.split(function()))())
