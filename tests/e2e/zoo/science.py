"""Linear algebra, Fourier transforms, graphs, reinforcement learning, derivatives of derivatives."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from tests.e2e.zoo.common import BATCH, WIDTH, ids, normal, trained


def spectral() -> tuple[Any, ...]:
    """A Fourier neural operator: products with complex weights of the low modes of a real transform."""
    params = {
        "lift": normal(1, WIDTH),
        "modes": normal(WIDTH, WIDTH, 4, 2),
        "skip": normal(WIDTH, WIDTH),
        "head": normal(WIDTH, 1),
    }

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        h = x[..., None] @ params["lift"]
        modes = lax.complex(params["modes"][..., 0], params["modes"][..., 1])
        low = jnp.einsum("bki,iok->bko", jnp.fft.rfft(h, axis=1)[:, :4], modes)
        full = jnp.zeros((x.shape[0], 9, WIDTH), jnp.complex64).at[:, :4].set(low)
        h = jax.nn.gelu(jnp.fft.irfft(full, n=16, axis=1) + h @ params["skip"])
        energy = jnp.abs(jnp.fft.fft2(h)) ** 2
        return jnp.mean(((h @ params["head"])[..., 0] - y) ** 2) + 1e-6 * energy.mean()

    return trained(loss, params, normal(BATCH, 16), normal(BATCH, 16) + 1)


def graph() -> tuple[Any, ...]:
    """Message passing: gathers along edges, segment sums, maxima and a softmax over each node's edges."""
    nodes, edges = 32, 64
    params = {
        "message": normal(2 * WIDTH, WIDTH),
        "attend": normal(WIDTH),
        "update": normal(3 * WIDTH, WIDTH),
        "head": normal(WIDTH, 4),
    }

    def loss(params: Any, x: jax.Array, senders: jax.Array, receivers: jax.Array, labels: jax.Array) -> jax.Array:
        for _ in range(2):
            m = jnp.tanh(jnp.concatenate([x[senders], x[receivers]], 1) @ params["message"])
            score = jax.nn.leaky_relu(m @ params["attend"])
            top = jax.ops.segment_max(score, receivers, nodes)
            weight = jnp.exp(score - jnp.where(jnp.isfinite(top), top, 0)[receivers])
            weight /= jax.ops.segment_sum(weight, receivers, nodes)[receivers] + 1e-9
            pooled = jax.ops.segment_sum(m * weight[:, None], receivers, nodes)
            most = jnp.zeros((nodes, WIDTH)).at[receivers].max(m)
            x = jnp.concatenate([x, pooled, most], 1) @ params["update"]
        degree = jnp.bincount(receivers, length=nodes)
        losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], labels)
        return jnp.sum(losses * (degree > 0)) / jnp.sum(degree > 0)

    batch = normal(nodes, WIDTH), ids(nodes, edges), ids(nodes - 1, edges), ids(4, nodes)
    return trained(loss, params, *batch)


def policy() -> tuple[Any, ...]:
    """PPO: advantages by a reverse scan, epochs of shuffled minibatches as nested scans, gathered log-probabilities."""
    steps, actors = 8, 8
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2))
    params = {"pi": normal(WIDTH, 4), "v": normal(WIDTH)}

    def advantages(values: jax.Array, rewards: jax.Array, done: jax.Array) -> jax.Array:
        def back(carry: jax.Array, x: Any) -> Any:
            value, following, reward, end = x
            carry = reward + 0.99 * following * (1 - end) - value + 0.9 * (1 - end) * carry
            return carry, carry

        following = jnp.concatenate([values[1:], jnp.zeros((1, actors))])
        return lax.scan(back, jnp.zeros(actors), (values, following, rewards, done), reverse=True)[1]

    def loss_fn(params: Any, seen: jax.Array, action: jax.Array, old: jax.Array, gain: jax.Array) -> jax.Array:
        log_probs = jax.nn.log_softmax(seen @ params["pi"])
        taken = jnp.take_along_axis(log_probs, action[:, None], 1)[:, 0]
        ratio = jnp.exp(taken - old)
        gain_n = (gain - gain.mean()) / (gain.std() + 1e-8)
        clipped = jnp.minimum(ratio * gain_n, jnp.clip(ratio, 0.8, 1.2) * gain_n)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, -1)
        return -clipped.mean() + jnp.mean((seen @ params["v"] - gain) ** 2) - 0.01 * entropy.mean()

    def step(state: Any, seen: jax.Array, rewards: jax.Array, done: jax.Array, key: jax.Array) -> Any:
        params = state[0]
        action = jax.random.categorical(key, seen @ params["pi"])
        old = jnp.take_along_axis(jax.nn.log_softmax(seen @ params["pi"]), action[..., None], -1)[..., 0]
        gains = advantages(seen @ params["v"], rewards, done)
        flat = [x.reshape(steps * actors, *x.shape[2:]) for x in (seen, action, old, gains)]

        def minibatch(state: Any, rows: jax.Array) -> Any:
            params, opt = state
            loss, grads = jax.value_and_grad(loss_fn)(params, *(x[rows] for x in flat))
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), loss

        def epoch(state: Any, key: jax.Array) -> Any:
            return lax.scan(minibatch, state, jax.random.permutation(key, steps * actors).reshape(4, 16))

        state, losses = lax.scan(epoch, state, jax.random.split(key, 2))
        return state, {"loss": losses.mean(), "return": rewards.sum(0).mean()}

    done = (ids(5, steps, actors) == 0).astype(jnp.float32)
    return (
        step,
        (params, tx.init(params)),
        normal(steps, actors, WIDTH),
        normal(steps, actors) + 1,
        done,
        jax.random.key(5),
    )


def preconditioned() -> tuple[Any, ...]:
    """Shampoo with ``eigh``, a projection by ``svd`` under a cond (GaLore), an orthogonal update by ``qr``."""

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        loss, g = jax.value_and_grad(lambda w: jnp.mean((x @ w - y) ** 2))(state["w"])
        left, right = state["left"] + g @ g.T, state["right"] + g.T @ g

        def root(m: jax.Array) -> jax.Array:
            values, vectors = jnp.linalg.eigh(m + 1e-3 * jnp.eye(m.shape[0]))
            return (vectors * values**-0.25) @ vectors.T

        renew = lambda: jnp.linalg.svd(g, full_matrices=False)[0][:, :4]  # noqa: E731
        basis = lax.cond(state["count"] % 2 == 0, renew, lambda: state["basis"])
        basis = basis * jnp.sign(basis[:1])
        update = 0.5 * root(left) @ g @ root(right) + 0.1 * basis @ (basis.T @ g)
        q, r = jnp.linalg.qr(state["w"] - 0.1 * update)
        state = {
            "w": q * jnp.sign(jnp.diag(r)),
            "left": left,
            "right": right,
            "basis": basis,
            "count": state["count"] + 1,
        }
        return state, {"loss": loss}

    start = {"w": jnp.linalg.qr(normal(WIDTH, WIDTH))[0], "left": jnp.eye(WIDTH), "right": jnp.eye(WIDTH)}
    return (
        step,
        start | {"basis": jnp.eye(WIDTH)[:, :4], "count": jnp.int32(0)},
        normal(BATCH, WIDTH),
        normal(BATCH, WIDTH),
    )


def gaussian_process() -> tuple[Any, ...]:
    """The marginal likelihood of a Gaussian process: Cholesky, triangular solves, log-determinants, an inverse."""
    params = {"scale": jnp.float32(0.3), "noise": jnp.float32(0.1), "mix": normal(WIDTH, WIDTH)}

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        z = x @ (jnp.eye(WIDTH) + params["mix"])
        distance = jnp.sum((z[:, None] - z[None]) ** 2, -1)
        gram = jnp.exp(-distance / (2 * jnp.exp(params["scale"]))) + jnp.exp(params["noise"]) * jnp.eye(BATCH)
        factor = jnp.linalg.cholesky(gram)
        alpha = jax.scipy.linalg.cho_solve((factor, True), y)
        fit = 0.5 * y @ alpha + jnp.sum(jnp.log(jnp.diag(factor)))
        inverse = jnp.linalg.inv(jnp.eye(WIDTH) + params["mix"] @ params["mix"].T)
        return fit + jnp.trace(inverse) + jnp.linalg.slogdet(gram)[1] * 0.1 + jnp.linalg.det(gram[:3, :3])

    return trained(loss, params, normal(BATCH, WIDTH), normal(BATCH), optimizer=optax.adam(1e-2))


def forces() -> tuple[Any, ...]:
    """An interatomic potential: energies, forces as their gradients, pairs within a cutoff; differentiated twice."""
    params = {"species": normal(4, WIDTH), "radial": normal(6, WIDTH), "head": normal(WIDTH)}

    def energy(params: Any, positions: jax.Array, species: jax.Array) -> jax.Array:
        gap = positions[:, None] - positions[None] + 10 * jnp.eye(8)[..., None]
        distance = jnp.sqrt(jnp.sum(gap**2, -1))
        basis = jnp.exp(-((distance[..., None] - jnp.linspace(0, 3, 6)) ** 2))
        cutoff = jnp.where(distance < 4, 0.5 * (jnp.cos(jnp.pi * distance / 4) + 1), 0)
        messages = jnp.einsum("ijr,rd,jd,ij->id", basis, params["radial"], params["species"][species], cutoff)
        return jnp.sum(jax.nn.softplus(messages) @ params["head"])

    def loss(params: Any, positions: jax.Array, species: jax.Array, energies: jax.Array, pulls: jax.Array) -> jax.Array:
        values, slopes = jax.vmap(jax.value_and_grad(energy, 1), (None, 0, 0))(params, positions, species)
        return jnp.mean((values - energies) ** 2) + jnp.mean((slopes + pulls) ** 2)

    batch = 3 * normal(BATCH, 8, 3), ids(4, BATCH, 8), normal(BATCH), normal(BATCH, 8, 3)
    return trained(loss, params, *batch, optimizer=optax.amsgrad(1e-2))


def physics_informed() -> tuple[Any, ...]:
    """A residual with second derivatives (``jacfwd`` of ``jacrev``), a Hessian-vector product, meta-learning steps."""
    params = {"up": normal(2, 16), "bias": normal(16), "down": normal(16)}

    def u(params: Any, z: jax.Array) -> jax.Array:
        return jnp.tanh(z @ params["up"] + params["bias"]) @ params["down"]

    def residual(params: Any, z: jax.Array) -> jax.Array:
        hessian = jax.jacfwd(jax.jacrev(u, 1), 1)(params, z)
        return hessian[0, 0] - jax.grad(u, 1)(params, z)[1]

    def loss(params: Any, points: jax.Array, edge: jax.Array) -> jax.Array:
        inside = lambda p: jnp.mean(jax.vmap(residual, (None, 0))(p, points) ** 2)  # noqa: E731

        def adapt(p: Any, _: None) -> Any:
            return jax.tree.map(lambda a, g: a - 0.1 * g, p, jax.grad(inside)(p)), None

        adapted, _ = lax.scan(adapt, params, None, length=2)
        _, curvature = jax.jvp(jax.grad(inside), (params,), (params,))
        boundary = jnp.mean((jax.vmap(u, (None, 0))(adapted, edge) - jnp.sin(edge[:, 0])) ** 2)
        return inside(adapted) + boundary + 1e-3 * optax.tree.norm(curvature)

    return trained(loss, params, normal(BATCH, 2), normal(WIDTH, 2), optimizer=optax.adam(1e-2))


def equilibrium() -> tuple[Any, ...]:
    """A deep equilibrium model: a while loop to the fixed point and another in its custom backward pass."""

    def layer(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tanh(z @ params["w"] * 0.3 + x)

    def iterate(function: Any, start: jax.Array) -> jax.Array:
        def going(carry: Any) -> jax.Array:
            i, old, new = carry
            return (i < 30) & (jnp.max(jnp.abs(new - old)) > 1e-6)

        return lax.while_loop(going, lambda c: (c[0] + 1, c[2], function(c[2])), (0, start, function(start)))[2]

    @jax.custom_vjp
    def fixed_point(params: Any, x: jax.Array) -> jax.Array:
        return iterate(lambda z: layer(params, z, x), jnp.zeros_like(x))

    def forward(params: Any, x: jax.Array) -> Any:
        z = fixed_point(params, x)
        return z, (params, x, z)

    def backward(saved: Any, g: jax.Array) -> Any:
        params, x, z = saved
        _, pull = jax.vjp(lambda z: layer(params, z, x), z)
        w = iterate(lambda w: g + pull(w)[0], g)
        return jax.vjp(lambda p, x: layer(p, z, x), params, x)[1](w)

    fixed_point.defvjp(forward, backward)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((fixed_point(params, x) - y) ** 2)

    return trained(loss, {"w": normal(WIDTH, WIDTH)}, normal(BATCH, WIDTH), normal(BATCH, WIDTH))


def draws() -> tuple[Any, ...]:
    """Every kind of random number, and order statistics: quantiles, medians, histograms, unique values."""
    params = {"w": normal(WIDTH, WIDTH)}

    def loss(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 8)
        h = x @ params["w"] + 0.1 * jax.random.truncated_normal(keys[0], -1, 1, x.shape)
        h = jnp.where(jax.random.bernoulli(keys[1], 0.9, x.shape), h, 0)
        h *= jax.random.gamma(keys[2], 2.0, (BATCH, 1)) + jax.random.laplace(keys[3], (1, WIDTH)) * 0.01
        picked = jax.random.choice(keys[4], BATCH, (4,), replace=False)
        spread = jnp.quantile(h, 0.9, axis=0) - jnp.median(h, axis=1).mean()
        counts, _ = jnp.histogram(lax.stop_gradient(h), 4, (-1, 1))
        kinds = jnp.unique(jnp.round(lax.stop_gradient(x[:, 0]) * 4), size=8, fill_value=0)
        many = jax.random.poisson(keys[5], 2.0, (BATCH,)).astype(jnp.float32)
        sphere = jax.random.normal(keys[6], (WIDTH,)) / 8 + jax.random.dirichlet(keys[7], jnp.ones(WIDTH))
        return (
            jnp.mean(h[picked] ** 2)
            + jnp.mean((spread - sphere) ** 2)
            + (counts * 0.01).sum()
            + kinds.mean()
            + many.mean()
        )

    return trained(loss, params, normal(BATCH, WIDTH), jax.random.key(6))


def quasi_newton() -> tuple[Any, ...]:
    """L-BFGS with a zoom line search: while loops that evaluate the loss, and conds inside them."""
    tx = optax.lbfgs(memory_size=3)
    w = {"w": normal(WIDTH, 4)}

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        params, opt = state
        value_fn = lambda p: jnp.mean((jnp.tanh(x @ p["w"]) - y) ** 2)  # noqa: E731
        value, grad = optax.value_and_grad_from_state(value_fn)(params, state=opt)
        updates, opt = tx.update(grad, opt, params, value=value, grad=grad, value_fn=value_fn)
        return (optax.apply_updates(params, updates), opt), {"loss": value}

    return step, (w, tx.init(w)), normal(BATCH, WIDTH), normal(BATCH, 4)


STEPS = {
    "spectral": spectral,
    "graph": graph,
    "policy": policy,
    "preconditioned": preconditioned,
    "Gaussian process": gaussian_process,
    "forces": forces,
    "physics informed": physics_informed,
    "equilibrium": equilibrium,
    "draws": draws,
    "quasi-Newton": quasi_newton,
}
