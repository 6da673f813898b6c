"""A decoder whose every other layer is a GShard mixture of experts (Lepikhin et al. 2020, algorithm 1).

Shapes: g groups, s tokens of a group, e experts, c capacity of an expert per group, d width, f hidden width.
"""

import dataclasses
import functools
import math
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
from models.transformer import MLP_RATIO, Block, SelfAttention

EXPERTS_PER_TOKEN = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(TransformerSettings):
    """`capacity` is a factor: an expert takes at most capacity x 2 x s / e tokens of a group of s.

    Tokens beyond that pass by the experts. `groups` splits the batch x seq tokens; by default each sequence
    is a group. `balance` weighs the load-balancing loss.
    """

    experts: int = 8
    capacity: float = 1.0
    groups: int | None = None
    balance: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_divides("groups", self.group_count, "batch x seq", self.batch * self.seq)

    @property
    def group_count(self) -> int:
        """The number of groups."""
        return self.batch if self.groups is None else self.groups

    @property
    def expert_tokens(self) -> int:
        """c, the tokens that an expert takes from each group."""
        group_tokens = self.batch * self.seq // self.group_count
        return min(group_tokens, math.ceil(self.capacity * EXPERTS_PER_TOKEN * group_tokens / self.experts))


class Experts(nn.Module):
    """Tokens (b, s, d) -> weighted outputs of their best two experts (b, s, d), load-balancing loss ()."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Route, dispatch, two matmuls per expert, combine."""
        cfg = self.config
        tokens = x.reshape(cfg.group_count, -1, cfg.width)
        logits = nn.Dense(cfg.experts, use_bias=False, name="router")(tokens.astype(jnp.float32))
        combine, balance = route(nn.softmax(logits), cfg.expert_tokens)
        combine = combine.astype(cfg.dtype)
        dispatch = (combine > 0).astype(cfg.dtype)
        initializer = nn.initializers.lecun_normal(batch_axis=0)
        up = self.param("up", initializer, (cfg.experts, cfg.width, MLP_RATIO * cfg.width)).astype(cfg.dtype)
        down = self.param("down", initializer, (cfg.experts, MLP_RATIO * cfg.width, cfg.width)).astype(cfg.dtype)
        inputs = jnp.einsum("gsec,gsd->egcd", dispatch, tokens)
        hidden = nn.gelu(jnp.einsum("egcd,edf->egcf", inputs, up))
        outputs = jnp.einsum("egcf,efd->egcd", hidden, down)
        return jnp.einsum("gsec,egcd->gsd", combine, outputs).reshape(x.shape), balance


def route(gates: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """GShard's algorithm 1, every second choice kept while there is room.

    Args:
        gates: the share of each expert, float32 (g, s, e), summing to one over e.
        capacity: the places of an expert in a group.

    Returns:
        the combine weights float32 (g, s, e, c), and the load-balancing loss (), one when the load is even.
    """
    experts = gates.shape[-1]
    first = jax.nn.one_hot(gates.argmax(-1), experts)
    second = jax.nn.one_hot(jnp.where(first > 0, -1.0, gates).argmax(-1), experts)
    balance = experts * jnp.mean(jnp.sum(first.mean(1) * gates.mean(1), axis=-1))
    first_gate, second_gate = (jnp.sum(gates * choice, axis=-1) for choice in (first, second))
    total = first_gate + second_gate
    first_place = _place(first, 0.0)
    second_place = _place(second, first.sum(1, keepdims=True))
    combine = _weights(first, first_place, first_gate / total, capacity)
    return combine + _weights(second, second_place, second_gate / total, capacity), balance


def _place(choice: jax.Array, taken: jax.Array | float) -> jax.Array:
    """The place of each token at its expert, first come first served, after those `taken`: int32 (g, s)."""
    before = jnp.cumsum(choice, axis=1) - choice + taken
    return jnp.sum(before * choice, axis=-1).astype(jnp.int32)


def _weights(choice: jax.Array, place: jax.Array, gate: jax.Array, capacity: int) -> jax.Array:
    """(g, s, e, c): the gate at the token's expert and place; a place beyond the capacity is no place."""
    places = jax.nn.one_hot(place, capacity)
    return jnp.einsum("gs,gse,gsc->gsec", gate, choice, places)


class ExpertBlock(nn.Module):
    """A transformer block with experts for its feed-forward half."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """(b, s, d) -> (b, s, d), and the load-balancing loss ()."""
        cfg = self.config
        attention = SelfAttention(cfg.heads, True, cfg.dropout, cfg.dtype, name="attn")
        branch = attention(nn.LayerNorm(dtype=cfg.dtype, name="ln_1")(x), train=train)
        x = x + nn.Dropout(cfg.dropout)(branch, deterministic=not train)
        branch, balance = Experts(cfg, name="experts")(nn.LayerNorm(dtype=cfg.dtype, name="ln_2")(x))
        return x + nn.Dropout(cfg.dropout)(branch, deterministic=not train), balance


class MoE(nn.Module):
    """Tokens int32 (batch, seq) -> logits float32 (batch, seq, padded_vocab), load-balancing loss ()."""

    config: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """The logits of the token that follows each one."""
        cfg = self.config
        embed = nn.Embed(cfg.padded_vocab, cfg.width, dtype=cfg.dtype, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.02), (cfg.seq, cfg.width))
        x = nn.Dropout(cfg.dropout)(embed(tokens) + positions.astype(cfg.dtype), deterministic=not train)
        balances = []
        for layer in range(cfg.layers):
            if layer % 2:
                x, balance = ExpertBlock(cfg, name=f"h_{layer}")(x, train)
                balances.append(balance)
            else:
                x = Block(cfg.heads, True, cfg.dropout, cfg.dtype, name=f"h_{layer}")(x, train)
        x = nn.LayerNorm(dtype=cfg.dtype, name="ln_f")(x)
        logits = embed.attend(x).astype(jnp.float32)
        return logits, cfg.balance * sum(balances, jnp.zeros(())) / max(len(balances), 1)


def init(config: Config, key: jax.Array) -> TrainState:
    """The first train state; pure in `key`."""
    return init_state(MoE, config, key, jnp.zeros((config.batch, config.seq), jnp.int32))


def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of next-token prediction; the loss is cross entropy plus weighted load-balancing loss."""

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        rngs = {"dropout": state.step_key()}
        logits, balance = state.apply_fn({"params": params}, batch["inputs"], train=True, rngs=rngs)
        cross_entropy = token_loss(logits, batch["targets"]).mean()
        return cross_entropy + balance, (cross_entropy, balance)

    (loss, (cross_entropy, balance)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    metrics = {"loss": loss, "cross_entropy": cross_entropy, "balance": balance}
    return state.apply_gradients(grads=grads), metrics


def make(**settings: Any) -> tuple[Any, TrainState, data.Batch]:
    """The train step, its state and a batch of text; `settings` are the fields of `Config`."""
    config = configure(Config, settings)
    sample = functools.partial(data.next_token_batch, batch=config.batch, seq=config.seq, vocab=config.vocab)
    state, batch = make_state_and_batch(config, init, sample)
    return train_step, state, batch
