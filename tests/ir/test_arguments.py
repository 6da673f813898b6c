"""NNX objects as arguments: the caller's objects change as under ``nnx.jit``; static arguments."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import autopar
from autopar.ir.arguments import adapt
from autopar.ir.trace import trace


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.down = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


def train_step(model: Net, optimizer: nnx.Optimizer, batch: Any) -> jax.Array:
    def loss(model: Net) -> jax.Array:
        return jnp.mean((model(batch["x"]) - batch["y"]) ** 2)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def objects() -> tuple[Net, nnx.Optimizer, dict[str, jax.Array]]:
    model = Net(nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param), {"x": x, "y": 2 * x}


def plain(tree: Any) -> list[np.ndarray]:
    """The arrays of a pytree, keys as their words."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf) for leaf in jax.tree.leaves(tree)]


def test_updates_are_visible_in_the_callers_objects_as_under_nnx_jit():
    step = autopar.parallelize(train_step, mesh="data=2,tensor=2", hardware="v5e")
    model, optimizer, batch = objects()
    other_model, other_optimizer, _ = objects()
    before = plain(nnx.state(model))
    for _ in range(2):
        loss = step(model, optimizer, batch)
        expected = nnx.jit(train_step)(other_model, other_optimizer, batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    found, wanted = nnx.state((model, optimizer)), nnx.state((other_model, other_optimizer))
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(plain(found), plain(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert model.norm.mean[...].tolist() != [0.0] * 8
    counts = [int(net.dropout.rngs.count[...]) for net in (model, other_model) if net.dropout.rngs is not None]
    assert counts[0] == counts[1] > 0
    assert any((a != b).any() for a, b in zip(before, plain(nnx.state(model)), strict=True))


def test_every_variable_of_the_objects_is_state():
    adapted = adapt(train_step, objects())
    found = trace(adapted.function, *adapted.arguments)
    names = [value.name for value in found.program.arguments]
    state = {names[i] for i, _ in found.state}
    assert state == {name for name in names if name not in ("x", "y")}
    assert any("up/kernel" in name for name in state)


def test_shapes_of_objects_suffice_to_plan():
    model, optimizer, batch = nnx.eval_shape(objects)
    plan = autopar.plan(train_step, model, optimizer, batch, mesh="data=8", hardware="v5e", preset="dp")
    assert {c.kind for c in plan.prediction.collectives} == {"all_reduce"}


def test_objects_inside_pytrees_and_keywords_are_found():
    def step(tree: dict[str, Any], *, model: Net) -> jax.Array:
        tree["count"][...] += 1
        return jnp.sum(model.up(tree["x"]))

    class Count(nnx.Variable): ...

    model, _, batch = objects()
    count = Count(jnp.int32(0))
    parallel = autopar.parallelize(step, mesh="data=2")
    for _ in range(2):
        result = parallel({"count": count, "x": batch["x"]}, model=model)
    np.testing.assert_allclose(result, jnp.sum(model.up(batch["x"])), rtol=1e-5, atol=1e-5)
    assert int(count[...]) == 2


def test_a_static_argument_chooses_the_program():
    def step(x: jax.Array, kind: str, power: int) -> jax.Array:
        return getattr(jnp, kind)(x) ** power

    args = (jnp.arange(3.0), "sin", 2)
    adapted = adapt(step, args, static_argnums=(1, -1))
    assert adapted.key == ((1, "sin"), (2, 2))
    assert len(adapted.arguments) == 1
    np.testing.assert_allclose(adapted.function(*adapted.arguments), jnp.sin(args[0]) ** 2)
    assert adapt(step, (args[0], "cos", 2), (1, 2)).key != adapted.key


@pytest.mark.parametrize("keywords", [{}, {"y": 3.0}, {"y": 3.0, "z": 1.0}])
def test_keyword_arguments_are_one_more_argument(keywords):
    adapted = adapt(lambda x, y=1.0, z=0.0: x * y + z, (2.0,), (), keywords)
    assert len(adapted.arguments) == 1 + bool(keywords)
    assert adapted.function(*adapted.arguments) == 2.0 * keywords.get("y", 1.0) + keywords.get("z", 0.0)
