"""Samplers, adversaries, codebooks, rendering."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.e2e.zoo.common import BATCH, WIDTH, ids, normal, trained


def mlp(params: Any, x: jax.Array) -> jax.Array:
    """Two layers."""
    return jnp.tanh(x @ params["up"] + params["bias"]) @ params["down"]


def mlp_params(inside: int, outside: int) -> dict[str, jax.Array]:
    """Parameters of ``mlp``."""
    return {"up": normal(inside, 16), "bias": normal(16), "down": normal(16, outside)}


def diffusion() -> tuple[Any, ...]:
    """Noise schedules read by a random step, Fourier features, and a sampler in a while loop for a metric."""
    betas = jnp.linspace(1e-4, 0.02, 50)
    alphas = jnp.cumprod(1 - betas)
    tx = optax.adam(1e-2)
    params = mlp_params(WIDTH + 8, WIDTH)

    def denoise(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
        angles = t[:, None] * jnp.exp(-jnp.arange(4.0))
        return mlp(params, jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], -1))

    def step(state: Any, x: jax.Array, key: jax.Array) -> Any:
        time_key, noise_key = jax.random.split(key)
        t = jax.random.randint(time_key, (BATCH,), 0, 50)
        noise = jax.random.normal(noise_key, x.shape)

        def loss_fn(params: Any) -> jax.Array:
            share = alphas[t][:, None]
            noisy = jnp.sqrt(share) * x + jnp.sqrt(1 - share) * noise
            return jnp.mean((denoise(params, noisy, t.astype(jnp.float32)) - noise) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state["params"])
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)

        def sample(carry: Any) -> Any:
            i, z = carry
            return i - 1, z - betas[i] * denoise(params, z, jnp.full((BATCH,), i, jnp.float32))

        _, drawn = lax.while_loop(lambda carry: carry[0] >= 45, sample, (jnp.int32(49), noise))
        drawn = lax.fori_loop(
            0, 3, lambda i, z: z - 0.01 * denoise(params, z, jnp.full((BATCH,), i, jnp.float32)), drawn
        )
        return {"params": params, "opt": opt}, {"loss": loss, "drawn": jnp.mean(drawn**2)}

    return step, {"params": params, "opt": tx.init(params)}, normal(BATCH, WIDTH), jax.random.key(0)


def adversaries() -> tuple[Any, ...]:
    """WGAN-GP: two networks with an optimizer each, a gradient inside a gradient, critics in a scan."""
    tx = optax.adam(1e-2, b1=0.0)
    params = {"maker": mlp_params(WIDTH, WIDTH), "critic": mlp_params(WIDTH, 1)}

    def criticise(critic: Any, maker: Any, real: jax.Array, key: jax.Array) -> jax.Array:
        fake = mlp(maker, jax.random.normal(key, real.shape))
        between = fake + jax.random.uniform(key, (BATCH, 1)) * (real - fake)
        slope = jax.vmap(jax.grad(lambda x: mlp(critic, x)[0]))(between)
        penalty = jnp.mean((jnp.linalg.norm(slope, axis=-1) - 1) ** 2)
        return jnp.mean(mlp(critic, fake)) - jnp.mean(mlp(critic, real)) + 10 * penalty

    def step(state: Any, real: jax.Array, key: jax.Array) -> Any:
        params, opt = state

        def train_critic(carry: Any, key: jax.Array) -> Any:
            critic, opt = carry
            loss, grads = jax.value_and_grad(criticise)(critic, params["maker"], real, key)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(critic, updates), opt), loss

        carry, losses = lax.scan(train_critic, (params["critic"], opt["critic"]), jax.random.split(key, 2))
        critic, critic_opt = carry
        score = lambda maker: -jnp.mean(mlp(critic, mlp(maker, jax.random.normal(key, real.shape))))  # noqa: E731
        loss, grads = jax.value_and_grad(score)(params["maker"])
        updates, maker_opt = tx.update(grads, opt["maker"])
        maker = optax.apply_updates(params["maker"], updates)
        state = {"maker": maker, "critic": critic}, {"maker": maker_opt, "critic": critic_opt}
        return state, {"loss": loss, "critic": losses.mean()}

    return (
        step,
        (params, jax.tree.map(tx.init, params, is_leaf=lambda x: "up" in x)),
        normal(BATCH, WIDTH),
        jax.random.key(1),
    )


def codebook() -> tuple[Any, ...]:
    """VQ-VAE: nearest codes by ``argmin``, a straight-through estimator, the codebook as an average of what it gets."""
    params = {"encode": normal(24, WIDTH), "decode": normal(WIDTH, 24)}

    def step(state: Any, x: jax.Array) -> Any:
        codes = state["codes"]

        def loss_fn(params: Any) -> Any:
            z = x @ params["encode"]
            distance = jnp.sum(z**2, 1, keepdims=True) - 2 * z @ codes.T + jnp.sum(codes**2, 1)
            nearest = jnp.argmin(distance, 1)
            quantised = codes[nearest]
            out = z + lax.stop_gradient(quantised - z)
            loss = jnp.mean((out @ params["decode"] - x) ** 2) + 0.25 * jnp.mean((z - quantised) ** 2)
            return loss, (z, nearest)

        (loss, (z, nearest)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
        hot = jax.nn.one_hot(nearest, 32)
        count = 0.9 * state["count"] + 0.1 * hot.sum(0)
        total = 0.9 * state["total"] + 0.1 * hot.T @ z
        usage = hot.mean(0)
        perplexity = jnp.exp(-jnp.sum(usage * jnp.log(usage + 1e-10)))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], grads)
        state = {"params": params, "codes": total / (count[:, None] + 1e-5), "count": count, "total": total}
        return state, {"loss": loss, "perplexity": perplexity}

    codes = normal(32, WIDTH)
    return step, {"params": params, "codes": codes, "count": jnp.ones(32), "total": codes}, normal(64, 24)


def radiance_field() -> tuple[Any, ...]:
    """NeRF: positional encodings, samples drawn from a histogram (``searchsorted``), compositing by ``cumprod``."""
    n = 8

    def render(params: Any, origins: jax.Array, directions: jax.Array, depths: jax.Array) -> Any:
        points = origins[:, None] + directions[:, None] * depths[..., None]
        waves = points[..., None] * 2.0 ** jnp.arange(4)
        encoded = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], -1).reshape(*points.shape[:-1], -1)
        raw = mlp(params, encoded)
        spacing = jnp.diff(depths, axis=1, append=depths[:, -1:] + 1)
        alpha = 1 - jnp.exp(-jax.nn.softplus(raw[..., 3]) * spacing)
        passed = jnp.cumprod(1 - alpha + 1e-10, 1)
        weights = alpha * jnp.concatenate([jnp.ones_like(passed[:, :1]), passed[:, :-1]], 1)
        return jnp.sum(weights[..., None] * jax.nn.sigmoid(raw[..., :3]), 1), weights

    def loss(params: Any, origins: jax.Array, directions: jax.Array, colours: jax.Array, key: jax.Array) -> jax.Array:
        depths = jnp.sort(2 + 4 * jax.random.uniform(key, (BATCH, n)), 1)
        coarse, weights = render(params, origins, directions, depths)
        cdf = jnp.cumsum(weights / (weights.sum(1, keepdims=True) + 1e-5), 1)
        drawn = jax.random.uniform(jax.random.fold_in(key, 1), (BATCH, n))
        at = jax.vmap(lambda c, u: jnp.searchsorted(c, u, side="right"))(lax.stop_gradient(cdf), drawn)
        finer = jnp.take_along_axis(depths, jnp.clip(at, 0, n - 1), 1) + 0.1 * drawn
        fine, _ = render(params, origins, directions, jnp.sort(jnp.concatenate([depths, finer], 1), 1))
        return jnp.mean((coarse - colours) ** 2) + jnp.mean((fine - colours) ** 2)

    rays = normal(BATCH, 3), normal(BATCH, 3) + 1, jax.nn.sigmoid(normal(BATCH, 3))
    return trained(loss, mlp_params(24, 4), *rays, jax.random.key(4), optimizer=optax.adam(1e-2))


def recommender() -> tuple[Any, ...]:
    """DLRM: several embedding tables, bags summed by segment, pairwise products, sampled negatives."""
    tables = {f"table_{i}": normal(16 * (i + 1), WIDTH) for i in range(3)}
    params = {**tables, "dense": normal(4, WIDTH), "top": normal(6 + WIDTH, 1)}
    rows, columns = jnp.triu_indices(4, 1)

    def loss(params: Any, dense: jax.Array, features: jax.Array, bag: jax.Array, clicks: jax.Array) -> jax.Array:
        bottom = dense @ params["dense"]
        one = [params[f"table_{i}"][features[:, i] % (16 * (i + 1))] for i in range(2)]
        many = jax.ops.segment_sum(params["table_2"][bag.reshape(-1)], jnp.repeat(jnp.arange(BATCH), 4), BATCH)
        stacked = jnp.stack([bottom, *one, many], 1)
        crossed = jnp.einsum("bfd,bgd->bfg", stacked, stacked)[:, rows, columns]
        logits = (jnp.concatenate([bottom, crossed], 1) @ params["top"])[:, 0]
        return optax.sigmoid_binary_cross_entropy(logits, clicks).mean()

    clicks = ids(2, BATCH).astype(jnp.float32)
    batch = normal(BATCH, 4), ids(1000, BATCH, 2), ids(48, BATCH, 4), clicks
    return trained(loss, params, *batch, optimizer=optax.adagrad(0.1))


STEPS = {
    "diffusion with a sampler": diffusion,
    "adversaries": adversaries,
    "codebook": codebook,
    "radiance field": radiance_field,
    "recommender": recommender,
}
