"""Scans over layers and time, attention variants, routing, decoding losses."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.e2e.zoo.common import BATCH, WIDTH, ids, normal, trained

SEQ, VOCAB, HEADS = 8, 16, 4


class Block(nn.Module):
    """A pre-norm transformer block as the body of a scan over layers."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        h = nn.RMSNorm()(x)
        attention = nn.MultiHeadDotProductAttention(HEADS, dropout_rate=0.1, deterministic=False, use_bias=False)
        x = x + attention(h, mask=mask)
        h = nn.Dense(2 * WIDTH, use_bias=False)(nn.LayerNorm(use_bias=False)(x))
        return x + nn.Dense(WIDTH)(nn.Dropout(0.1, deterministic=False)(nn.gelu(h))), None


class Scanned(nn.Module):
    """Layers in one scan, each rematerialised under a policy."""

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(VOCAB, WIDTH)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.1), (SEQ, WIDTH))
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(Block, prevent_cse=False, policy=policy)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=2,
        )
        x, _ = stack()(x, nn.make_causal_mask(tokens))
        return embed.attend(x)


def scanned_layers() -> tuple[Any, ...]:
    """``nn.scan`` over ``nn.remat``, tied embeddings, dropout, a summed loss divided by a count of valid tokens."""
    model, tokens = Scanned(), ids(VOCAB, BATCH, SEQ)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = model.init(rngs, tokens)["params"]

    def loss(params: Any, tokens: jax.Array, valid: jax.Array, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens, rngs={"dropout": key})
        assert isinstance(logits, jax.Array)
        labels = optax.smooth_labels(jax.nn.one_hot(jnp.roll(tokens, -1, 1), VOCAB), 0.1)
        losses = optax.softmax_cross_entropy(logits, labels)
        return jnp.sum(losses * valid) / jnp.maximum(jnp.sum(valid), 1)

    valid = (ids(4, BATCH, SEQ) > 0).astype(jnp.float32)
    return trained(loss, params, tokens, valid, jax.random.key(2), optimizer=optax.adamw(1e-2))


def lstm() -> tuple[Any, ...]:
    """A bidirectional ``nn.RNN`` over padded sequences, read at the last valid position."""
    model = nn.Bidirectional(nn.RNN(nn.LSTMCell(WIDTH)), nn.RNN(nn.GRUCell(WIDTH)))
    x, lengths, labels = normal(BATCH, SEQ, WIDTH), ids(SEQ, BATCH) + 1, ids(4, BATCH)
    params = {
        "rnn": model.init(jax.random.key(0), x, seq_lengths=lengths)["params"],
        "head": normal(2 * WIDTH, 4),
    }

    def loss(params: Any, x: jax.Array, lengths: jax.Array, labels: jax.Array) -> jax.Array:
        h = model.apply({"params": params["rnn"]}, x, seq_lengths=lengths)
        assert isinstance(h, jax.Array)
        last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], 1)[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(last @ params["head"], labels).mean()

    return trained(loss, params, x, lengths, labels, optimizer=optax.chain(optax.clip(0.5), optax.rmsprop(1e-2)))


def state_space() -> tuple[Any, ...]:
    """A diagonal linear recurrence with complex states by ``associative_scan``, as in S5 and LRU."""
    params = {"nu": normal(WIDTH), "theta": normal(WIDTH), "b": normal(WIDTH, WIDTH, 2), "c": normal(WIDTH, WIDTH, 2)}

    def combine(a: Any, b: Any) -> Any:
        return a[0] * b[0], b[0] * a[1] + b[1]

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        decay = jnp.exp(-jnp.exp(params["nu"]) + 1j * params["theta"])
        b, c = (lax.complex(params[k][..., 0], params[k][..., 1]) for k in "bc")
        driven = jnp.einsum("bti,io->bto", x.astype(jnp.complex64), b)
        _, h = lax.associative_scan(combine, (jnp.broadcast_to(decay, driven.shape), driven), axis=1)
        return jnp.mean((jnp.einsum("bti,io->bto", h, c).real - y) ** 2)

    return trained(loss, params, normal(BATCH, SEQ, WIDTH), normal(BATCH, SEQ, WIDTH), optimizer=optax.adam(1e-2))


def window_attention() -> tuple[Any, ...]:
    """Shifted windows (rolls, reshapes to six dimensions), a relative-position bias read by a table of indices."""
    side, window = 8, 4
    params = {"qkv": normal(WIDTH, 3, HEADS, 2), "out": normal(HEADS, 2, WIDTH), "bias": normal(HEADS, 2 * window - 1)}
    offsets = jnp.arange(window)[:, None] - jnp.arange(window)[None, :] + window - 1

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        shifted = jnp.roll(x, (-2, -2), (1, 2))
        cut = shifted.reshape(-1, side // window, window, side // window, window, WIDTH)
        q, k, v = jnp.einsum("bxiyjd,dthe->tbxyhije", cut, params["qkv"])
        logits = jnp.einsum("bxyhije,bxyhmje->bxyhjim", q, k)
        weights = jax.nn.softmax(logits + params["bias"][:, offsets][None, None, None, :, None])
        out = jnp.einsum("bxyhjim,bxyhmje,hed->bxiyjd", weights, v, params["out"])
        return jnp.mean((jnp.roll(out.reshape(x.shape), (2, 2), (1, 2)) + x - y) ** 2)

    shape = (BATCH // 2, side, side, WIDTH)
    return trained(loss, params, normal(*shape), normal(*shape) + 1)


def rotary_grouped_attention() -> tuple[Any, ...]:
    """Rotary positions, grouped queries, soft caps, a sliding window, query chunks under ``lax.map``."""
    params = {"q": normal(WIDTH, 4, 4), "k": normal(WIDTH, 2, 4), "v": normal(WIDTH, 2, 4), "o": normal(4, 4, WIDTH)}

    def rotate(x: jax.Array) -> jax.Array:
        angles = jnp.arange(SEQ)[:, None] / 100.0 ** (jnp.arange(2) / 2)
        low, high = jnp.split(x, 2, -1)
        sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, params[name]) for name in "qkv")
        q, k = rotate(q), rotate(k)
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)

        def chunk(start: jax.Array) -> jax.Array:
            rows = start + jnp.arange(4)
            logits = jnp.einsum("bqhe,bkhe->bhqk", lax.dynamic_slice_in_dim(q, start, 4, 1), k)
            seen = (rows[:, None] >= jnp.arange(SEQ)) & (rows[:, None] - jnp.arange(SEQ) < 3)
            weights = jax.nn.softmax(jnp.where(seen, 5 * jnp.tanh(logits / 5), -1e9))
            return jnp.einsum("bhqk,bkhe->bqhe", weights, v)

        chunks = lax.map(chunk, jnp.arange(0, SEQ, 4))
        h = jnp.moveaxis(chunks, 0, 1).reshape(BATCH, SEQ, 4, 4)
        return jnp.mean((jnp.einsum("bthe,hed->btd", h, params["o"]) - y) ** 2)

    return trained(loss, params, normal(BATCH, SEQ, WIDTH), normal(BATCH, SEQ, WIDTH) + 1)


def sorted_experts() -> tuple[Any, ...]:
    """Tokens sorted by the expert that ``top_k`` picks, one ragged product, and sorted back."""
    n_experts, tokens = 4, BATCH * SEQ
    params = {
        "router": normal(WIDTH, n_experts),
        "up": normal(n_experts, WIDTH, 16),
        "down": normal(n_experts, 16, WIDTH),
    }

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        flat = x.reshape(tokens, WIDTH)
        weights, chosen = lax.top_k(jax.nn.softmax(flat @ params["router"]), 2)
        order = jnp.argsort(chosen.reshape(-1))
        sizes = jnp.bincount(chosen.reshape(-1), length=n_experts)
        inputs = flat[order // 2]
        h = lax.ragged_dot(jax.nn.silu(lax.ragged_dot(inputs, params["up"], sizes)), params["down"], sizes)
        back = h[jnp.argsort(order)].reshape(tokens, 2, WIDTH)
        out = jnp.einsum("tkd,tk->td", back, weights / weights.sum(-1, keepdims=True))
        return jnp.mean((out.reshape(x.shape) - y) ** 2)

    return trained(loss, params, normal(BATCH, SEQ, WIDTH), normal(BATCH, SEQ, WIDTH) + 1)


def transducer() -> tuple[Any, ...]:
    """Connectionist temporal classification: a scan over log-probabilities with paddings; a convolutional front end."""
    params = {"kernel": normal(3, WIDTH, WIDTH), "head": normal(WIDTH, VOCAB)}

    def loss(params: Any, x: jax.Array, labels: jax.Array, paddings: jax.Array) -> jax.Array:
        h = lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        logits = jax.nn.relu(h) @ params["head"]
        return optax.ctc_loss(logits, jnp.zeros(logits.shape[:2]), labels, paddings).mean()

    paddings = (jnp.arange(4) >= ids(3, BATCH)[:, None] + 2).astype(jnp.float32)
    return trained(loss, params, normal(BATCH, 16, WIDTH), ids(VOCAB - 1, BATCH, 4) + 1, paddings)


STEPS = {
    "scan over rematerialised layers": scanned_layers,
    "bidirectional LSTM": lstm,
    "state space": state_space,
    "window attention": window_attention,
    "rotary grouped attention in chunks": rotary_grouped_attention,
    "experts by sorting": sorted_experts,
    "CTC": transducer,
}
