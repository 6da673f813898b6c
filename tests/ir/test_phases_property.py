"""Random losses in microbatches: equal to the whole batch, or refused by name; never silently different."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from jax import lax

from autopar.errors import MicrobatchError
from autopar.ir.trace import trace
from autopar.lowering.jit import run_program
from autopar.lowering.time.microbatch import split_step
from autopar.plan import Splitting

BATCH, WIDTH = 8, 3
QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiling well takes longer here than running badly."""

# Per-example layers: (params, x (b, d), scalar parameter) -> (b, d); those below the line need the whole batch.
LAYERS: dict[str, Any] = {
    "linear": lambda w, x, s: x @ w,
    "tanh": lambda w, x, s: jnp.tanh(x * s),
    "softmax": lambda w, x, s: jax.nn.softmax(x, axis=-1),
    "attend": lambda w, x, s: jnp.einsum("bd,bde->be", x, x[:, :, None] * x[:, None, :]),
    "dropout": lambda w, x, s: jnp.where(jax.random.bernoulli(jax.random.key(3), 0.7, x.shape), x, 0.0) / 0.7,
    "position": lambda w, x, s: x + jnp.arange(x.shape[0])[:, None] * 0.1,
    "row": lambda w, x, s: x + w[jnp.argmax(x, -1)],
    "merge": lambda w, x, s: jnp.tanh(x.reshape(-1)).reshape(x.shape) @ w,
    "narrow": lambda w, x, s: (x.astype(jnp.bfloat16) * 2).astype(jnp.float32),
    "scan": lambda w, x, s: lax.scan(lambda h, v: (jnp.tanh(h @ v), None), x, jnp.stack([w, w.T]))[0],
    "remat": lambda w, x, s: jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x),
    "cond": lambda w, x, s: lax.cond(s > 0, lambda x: x @ w, lambda x: x * 2.0, x),
    # --
    "centre": lambda w, x, s: x - x.mean(0),
    "batch norm": lambda w, x, s: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-2),
    "running sum": lambda w, x, s: jnp.cumsum(x, 0) * 0.1,
    "neighbours": lambda w, x, s: x + jnp.roll(x, 1, 0) * 0.5,
    "mix": lambda w, x, s: jax.nn.softmax(x @ x.T) @ x,
    "sorted": lambda w, x, s: jnp.sort(x, 0) + x,
}

# From examples (b, d), their mask (b,) and weights (b,) to a scalar.
LOSSES: dict[str, Any] = {
    "sum": lambda x, m, v: jnp.sum(x**2),
    "mean": lambda x, m, v: jnp.mean(x**2),
    "weighted": lambda x, m, v: jnp.sum(x.sum(-1) * v) / jnp.sum(v),
    "masked": lambda x, m, v: jnp.sum(jnp.where(m[:, None], x**2, 0.0)) / jnp.maximum(jnp.sum(m), 1),
    "root": lambda x, m, v: jnp.sqrt(jnp.mean(x**2) + 1.0),
    "maximum": lambda x, m, v: jnp.max(x) - jnp.min(x**2),
    "log sum exp": lambda x, m, v: jax.nn.logsumexp(x),
    "product": lambda x, m, v: jnp.mean(x) * jnp.mean(x**2 * v[:, None]),
    "variance": lambda x, m, v: jnp.var(x),
    "histogram": lambda x, m, v: jnp.sum(jnp.zeros(4).at[jnp.argmax(x, -1)].add(v) ** 2) + jnp.mean(x),
    "normalised": lambda x, m, v: jnp.mean(x / (1.0 + jnp.sum(v))),
    "plus": lambda x, m, v: jnp.mean(x) + 3.0,
}

METRICS: dict[str, Any] = {
    "none": lambda x, m, v: 0.0,
    "per example": lambda x, m, v: (x.sum(-1), jnp.argmax(x, -1)),
    "accuracy": lambda x, m, v: jnp.mean(jnp.argmax(x, -1) == 1),
    "any and all": lambda x, m, v: (jnp.any(x > 0), jnp.all(x > 0, 0)),
    "largest": lambda x, m, v: lax.top_k(x.sum(-1), 2)[0],
    "difference": lambda x, m, v: x.sum(-1) - x.sum(-1).mean(),
    "moments": lambda x, m, v: (x.T @ x, jnp.sum(m)),
    "median": lambda x, m, v: jnp.median(x, 0),
}


def step_of(layers: tuple[str, ...], loss: str, metric: str) -> Any:
    def step(params: Any, batch: Any) -> Any:
        def forward(params: Any) -> Any:
            x = batch["x"]
            for i, name in enumerate(layers):
                x = LAYERS[name](params["w"][i], x, params["s"])
            return LOSSES[loss](x, batch["m"], batch["v"]), METRICS[metric](x, batch["m"], batch["v"])

        (value, metrics), gradients = jax.value_and_grad(forward, has_aux=True)(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients)))
        clipped = jax.tree.map(lambda g: g / jnp.maximum(1.0, norm), gradients)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, clipped), value, metrics

    return step


def arguments(n_layers: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"w": normal(n_layers, WIDTH, WIDTH), "s": jnp.float32(0.7)}
    batch = {"x": normal(BATCH, WIDTH), "m": jnp.asarray(rng.random(BATCH) < 0.6), "v": normal(BATCH) ** 2}
    return params, batch


def outcome(layers: tuple[str, ...], loss: str, metric: str, splitting: Splitting) -> str:
    """Compares; returns "equal" or "refused"."""
    step, args = step_of(layers, loss, metric), arguments(len(layers))
    traced = trace(step, *args)
    try:
        program = split_step(traced, splitting).program
    except MicrobatchError:
        return "refused"
    got = QUICKLY(lambda *arrays: run_program(program, arrays))(*jax.tree.leaves(args), *program.constants)
    want = jax.tree.leaves(QUICKLY(step)(*args))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=3e-4, atol=2e-5)
    return "equal"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=3).map(tuple),
    loss=st.sampled_from(sorted(LOSSES)),
    metric=st.sampled_from(sorted(METRICS)),
    microbatches=st.sampled_from([2, 4]),
    allow=st.sampled_from([(), ("recompute",)]),
)
def test_a_random_step_in_microbatches_is_exact_or_refused(layers, loss, metric, microbatches, allow):
    event(outcome(layers, loss, metric, Splitting(microbatches, allow=allow)))


PER_EXAMPLE = list(LAYERS)[: list(LAYERS).index("centre")]


@pytest.mark.parametrize("layer", PER_EXAMPLE)
def test_layers_of_single_examples_are_never_refused(layer):
    assert outcome((layer,), "mean", "none", Splitting(2)) == "equal"
