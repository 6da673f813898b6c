"""The pre-norm transformer block of gpt, bert, vit and moe (Vaswani et al. 2017; Radford et al. 2019).

Shapes: b batch, s sequence, d width, h heads, k width of a head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

MLP_RATIO = 4


class SelfAttention(nn.Module):
    """Multi-head self-attention on (b, s, d); a causal one lets a token see itself and what came before."""

    heads: int
    causal: bool
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        head_width = x.shape[-1] // self.heads
        query, key, value = (
            nn.DenseGeneral((self.heads, head_width), dtype=self.dtype, name=name)(x)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhk,bthk->bhqt", query, key).astype(jnp.float32) / head_width**0.5
        if self.causal:
            scores = jnp.where(causal_mask(x.shape[1]), scores, jnp.finfo(scores.dtype).min)
        weights = nn.softmax(scores).astype(self.dtype)
        weights = nn.Dropout(self.dropout)(weights, deterministic=not train)
        mixed = jnp.einsum("bhqt,bthk->bqhk", weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out")(mixed)


class FeedForward(nn.Module):
    """Two matmuls with a GELU between them, hidden width 4 d."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        hidden = nn.gelu(nn.Dense(MLP_RATIO * x.shape[-1], dtype=self.dtype, name="up")(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="down")(hidden)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on both branches."""

    heads: int
    causal: bool
    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """(b, s, d) -> (b, s, d)."""
        attention = SelfAttention(self.heads, self.causal, self.dropout, self.dtype, name="attn")
        branch = attention(nn.LayerNorm(dtype=self.dtype, name="ln_1")(x), train=train)
        x = x + nn.Dropout(self.dropout)(branch, deterministic=not train)
        branch = FeedForward(self.dtype, name="mlp")(nn.LayerNorm(dtype=self.dtype, name="ln_2")(x))
        return x + nn.Dropout(self.dropout)(branch, deterministic=not train)


def causal_mask(seq: int) -> jax.Array:
    """True where query q may see token t <= q: bool (seq, seq)."""
    position = jnp.arange(seq)
    return position[:, None] >= position[None, :]
