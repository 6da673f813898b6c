"""Small training programs, some of which break the rules of a TARGET."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import mlir

import autopar
from autopar.sharding.factors import parse


def train_step(params, batch):
    def loss_fn(params):
        return jnp.mean((batch["x"] @ params["kernel"] + params["bias"] - batch["y"]) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def make(width: int = 16, batch: int = 16):
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (width, 8)), "bias": jnp.zeros(8)}
    return train_step, params, {"x": jax.random.normal(key, (batch, width)), "y": jnp.ones((batch, 8))}


def make_two():
    return make()[:2]


def make_list():
    return list(make())


def make_branching():
    step, params, batch = make()
    return (lambda p, b: step(p, b) if b["x"].sum() > 0 else (p, 0.0)), params, batch


backwards_p = Primitive("backwards")
backwards_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(backwards_p, mlir.lower_fun(lambda x: x[::-1], multiple_results=False))


def make_wrong():
    """A step on a primitive whose rule is wrong: a device cannot turn its rows around on its own."""

    @autopar.sharding_rule("backwards")
    def backwards(x):
        return parse("r c -> r c", r=x.shape[0], c=x.shape[1])

    def step(params, batch):
        return params, jnp.sum(backwards_p.bind(batch["x"])[0] * params)

    batch = {"x": jnp.arange(64.0).reshape(16, 4)}
    return step, jnp.ones(4), batch


def make_nnx():
    """The same regression with NNX objects that the step updates in place; it returns metrics only."""
    _, _, batch = make()
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

    def step(state, batch):
        model, optimizer = state
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(batch["x"]) - batch["y"]) ** 2))(model)
        optimizer.update(model, grads)
        return {"loss": loss}

    return step, (model, optimizer), batch


def make_lossless():
    step, params, batch = make()
    return (lambda p, b: step(p, b)[0]), params, batch


not_callable = 3
