"""From a step to a program: names, inlining, constants, dead code, state, and what cannot be traced."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax import lax

from autopar.errors import TraceError
from autopar.ir.program import Constant, Equation, Program, Value, check
from autopar.ir.trace import Traced, trace


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def traced(step: Any, *args: Any) -> Traced:
    found = trace(step, *args)
    check(found.program)
    return found


def program(step: Any, *args: Any) -> Program:
    return traced(step, *args).program


def equations(part: Program) -> Iterator[Equation]:
    for eqn in part.equations:
        yield eqn
        for body in eqn.bodies:
            yield from equations(body)


def values(part: Program) -> Iterator[Value]:
    yield from part.inputs
    for eqn in part.equations:
        yield from eqn.outputs
        for body in eqn.bodies:
            yield from values(body)


def primitives(part: Program) -> list[str]:
    return [eqn.primitive.name for eqn in equations(part)]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, name="down")(nn.relu(nn.Dense(8, name="up")(x)))


def flax_step() -> tuple[Any, tuple[Any, ...]]:
    net = Net()

    def init(key: jax.Array) -> TrainState:
        params = net.init(key, jnp.zeros((1, 4)))["params"]
        return TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1, momentum=0.9))

    def step(state: TrainState, batch: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean((state.apply_fn({"params": params}, batch["x"]) - batch["y"]) ** 2)

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), {"loss": value}

    return step, (jax.eval_shape(init, jax.random.key(0)), {"x": f32(16, 4), "y": f32(16, 4)})


# -- names


def test_a_flax_step_reads_like_its_source(golden):
    step, args = flax_step()
    golden("ir.flax_step", str(program(step, *args)))


def test_names_are_the_same_at_every_trace():
    step, args = flax_step()
    assert str(program(step, *args)) == str(program(*flax_step()[:1], *flax_step()[1]))
    assert str(program(step, *args)) == str(program(jax.jit(step), *args))


def test_a_name_that_looks_numbered_stays_unique():
    def step(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.sin(x) + jnp.sin(2 * x), tree)

    tree = {"sin": f32(3), "sin:2": f32(3), "a/b": f32(2), "a": {"b": f32(2)}}
    names = [value.name for value in values(program(step, tree))]
    assert len(set(names)) == len(names)
    assert "sin:2" in names and "a/b" in names and "a/b:2" in names


# -- inlining


def custom_jvp() -> Any:
    @jax.custom_jvp
    def f(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (f(*primals), 3.0 * tangents[0]))
    return f


def custom_vjp() -> Any:
    @jax.custom_vjp
    def f(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (g * 5.0,))
    return f


CALLS = {
    "jit": jax.jit(jnp.sin),
    "jit in jit": jax.jit(lambda x: jax.jit(jnp.sin)(x)),
    "custom_jvp": custom_jvp(),
    "custom_vjp": custom_vjp(),
    "remat": jax.checkpoint(jnp.sin),
    "named call": jax.named_call(jnp.sin, name="sine"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_inlined_forward(name):
    assert primitives(program(lambda x: CALLS[name](x) * 2, f32(3))) == ["sin", "mul"]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_inlined_backward(name):
    names = set(primitives(program(jax.grad(lambda x: jnp.sum(CALLS[name](x))), f32(3))))
    assert names <= {"sin", "cos", "mul", "broadcast_in_dim", "optimization_barrier", "neg"}


def test_placement_of_a_single_device_step_is_dropped():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    def step(x: jax.Array) -> jax.Array:
        return lax.with_sharding_constraint(jax.device_put(jnp.sin(x)), place) * 2

    assert primitives(program(step, f32(8))) == ["sin", "mul"]


def test_rematerialised_blocks_start_behind_barriers_of_one_group():
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(lambda w, x: jnp.tanh(jnp.tanh(x @ w) @ w))(w, x))

    eqns = list(equations(program(jax.value_and_grad(loss), f32(4, 4), f32(8, 4))))
    barriers = [eqn for eqn in eqns if eqn.primitive.name == "optimization_barrier"]
    assert len({eqn.params["group"] for eqn in barriers}) == 1
    assert all(eqn.name.split(":")[0].endswith("recompute") for eqn in barriers)
    assert sum(eqn.primitive.name == "tanh" for eqn in eqns) >= 3


def test_loops_and_branches_keep_their_bodies():
    def step(x: jax.Array, n: jax.Array) -> Any:
        x, _ = lax.scan(lambda c, i: (jnp.sin(c) * i, None), x, jnp.arange(3.0))
        x = lax.while_loop(lambda c: jnp.sum(c) < 5, lambda c: jnp.cos(c) + 1, x)
        return lax.switch(n, [jnp.sin, jnp.cos, jnp.tanh], x)

    regions = [eqn for eqn in equations(program(step, f32(3), jax.ShapeDtypeStruct((), jnp.int32))) if eqn.bodies]
    assert [(eqn.primitive.name, len(eqn.bodies)) for eqn in regions] == [("scan", 1), ("while", 2), ("cond", 3)]


def test_of_an_implicit_solve_its_solver_stays():
    def step(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.linalg.solve(a, b) + jax.scipy.sparse.linalg.cg(lambda v: a @ v, b, maxiter=2)[0]

    found = primitives(program(step, f32(4, 4), f32(4)))
    assert {"lu", "triangular_solve", "while"} <= set(found)
    assert "custom_linear_solve" not in found


def test_what_changes_nothing_is_left_out():
    def step(x: jax.Array) -> Any:
        kept = lax.rev(x, (1,)), lax.transpose(x, (1, 0, 2)), x.reshape(2, 2), x.astype(jnp.int32), x[:, :1]
        same = lax.transpose(lax.reshape(lax.convert_element_type(x, x.dtype), x.shape), (0, 1, 2))
        return kept, jnp.sin(lax.concatenate([lax.slice(lax.rev(same, (0, 2)), (0, 0, 0), x.shape)], 0))

    found = program(step, f32(1, 4, 1))
    assert primitives(found) == ["rev", "transpose", "reshape", "convert_element_type", "slice", "sin"]
    assert found.equations[-1].inputs == found.inputs


def test_an_integer_that_python_typed_loses_that_at_its_conversion():
    """The next call takes it back, and must find the types of this one."""
    traced = trace(lambda n: lax.convert_element_type(n, jnp.int32), 1)
    assert [eqn.primitive.name for eqn in traced.program.equations] == ["convert_element_type"]


# -- constants and dead code

TABLE = np.random.default_rng(0).normal(size=(300, 7)).astype(np.float32)

CLOSED_OVER = {
    "plain": lambda x: x @ TABLE,
    "jit": jax.jit(lambda x: x @ TABLE),
    "scan": lambda x: lax.scan(lambda c, _: (c @ TABLE @ TABLE.T, None), x, None, length=2)[0],
    "cond": lambda x: lax.cond(x[0] > 0, lambda x: x @ TABLE, lambda x: 2 * (x @ TABLE), x),
    "while": lambda x: lax.while_loop(lambda c: c[0] < 5, lambda c: c @ TABLE @ TABLE.T, x),
    "jit in scan": lambda x: lax.scan(
        lambda c, _: (jax.jit(lambda c: c @ TABLE @ TABLE.T)(c), None), x, None, length=2
    )[0],
    "jit in a branch": lambda x: lax.cond(x[0] > 0, jax.jit(lambda x: x @ TABLE), lambda x: x[:7], x),
    "jit in cond in scan": lambda x: lax.scan(
        lambda c, i: (lax.cond(i > 0, jax.jit(lambda c: c @ TABLE @ TABLE.T), lambda c: c, c), None), x, jnp.arange(2)
    )[0],
    "remat": jax.checkpoint(lambda x: x @ TABLE),
    "gradient of remat": jax.grad(lambda x: jnp.sum(jnp.sin(jax.checkpoint(lambda x: jnp.sin(x @ TABLE))(x)))),
    "vmap": jax.vmap(lambda x: x * TABLE[:, 0], in_axes=0, out_axes=0, axis_size=300),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_arrays_that_a_step_closes_over_become_inputs(name):
    found = program(CLOSED_OVER[name], f32(300))
    assert len(found.arguments) == 1
    assert len(found.constants) >= 1
    assert all(value.name.startswith("constant") for value in found.inputs[1:])
    constants = [a for eqn in equations(found) for a in eqn.inputs if isinstance(a, Constant)]
    assert all(atom.aval.shape == () for atom in constants)
    names = [value.name for value in values(found)]
    assert len(set(names)) == len(names)


def test_dead_code_is_dropped_and_unused_arguments_stay():
    def step(x: jax.Array, unused: jax.Array) -> jax.Array:
        jnp.linalg.inv(jnp.outer(x, x))
        return jax.jit(lambda x: (jnp.sin(x), jnp.cos(x)))(x)[0]

    found = program(step, f32(3), f32(5))
    assert primitives(found) == ["sin"]
    assert [value.name for value in found.arguments] == ["arg0", "arg1"]


def test_tracing_makes_no_arrays():
    huge = {"w": f32(200_000, 100_000), "v": f32(100_000, 200_000)}  # 80 GB each
    step = jax.value_and_grad(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"]))
    assert program(step, huge, f32(1000, 200_000)).inputs[1].nbytes == 80_000_000_000


LEAVES = {
    "int": jax.ShapeDtypeStruct((3,), jnp.int8),
    "bool": jax.ShapeDtypeStruct((3,), jnp.bool_),
    "typed key": jax.eval_shape(jax.random.key, 0),
    "raw key": jax.eval_shape(jax.random.PRNGKey, 0),
    "keys": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4)),
    "rbg key": jax.eval_shape(lambda: jax.random.key(0, impl="rbg")),
    "bfloat16": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
    "python float": 0.5,
    "none": None,
}


@pytest.mark.parametrize("name", LEAVES)
def test_every_kind_of_leaf_passes_through(name):
    found = traced(
        lambda state, x: ({"leaf": state["leaf"], "x": state["x"] + x}, x), {"leaf": LEAVES[name], "x": f32(2)}, f32(2)
    )
    assert found.state == tuple((i, i) for i in range(len(found.program.outputs) - 1))


# -- state


def state_of(step: Any, *args: Any) -> dict[str, int]:
    found = traced(step, *args)
    return {found.program.inputs[i].name: o for i, o in found.state}


PARAMS = {"w": f32(4, 4), "b": f32(4)}


def test_a_train_state_is_found_whole():
    step, args = flax_step()
    names = state_of(step, *args)
    assert len(names) == len(jax.tree.leaves(args[0]))
    assert list(names.values()) == list(range(len(names)))


def test_separate_state_arguments_are_found_wherever_they_return():
    def step(params: Any, optimizer: Any, x: jax.Array) -> Any:
        new = jax.tree.map(lambda p: p * jnp.sum(x), params)
        return jnp.sum(x), (jax.tree.map(lambda o: o * 2, optimizer), new)

    assert state_of(step, PARAMS, (f32(2), jax.ShapeDtypeStruct((), jnp.int32)), f32(8)) == {
        "b": 3,
        "w": 4,
        "0": 1,
        "1": 2,
    }


def test_metrics_first_or_last_are_no_state():
    def last(state: Any, x: jax.Array) -> Any:
        return jax.tree.map(jnp.sin, state), {"loss": jnp.sum(x), "norm": jnp.max(x)}

    def first(state: Any, x: jax.Array) -> Any:
        return last(state, x)[::-1]

    assert state_of(last, PARAMS, f32(8)) == {"b": 0, "w": 1}
    assert state_of(first, PARAMS, f32(8)) == {"b": 2, "w": 3}


def test_an_average_of_the_parameters_is_state_of_its_own():
    def step(state: Any, x: jax.Array) -> Any:
        new = jax.tree.map(lambda p: p - jnp.sum(x), state["params"])
        return {"params": new, "ema": jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state["ema"], new)}

    assert state_of(step, {"params": PARAMS, "ema": PARAMS}, f32(8)) == {
        "ema/b": 0,
        "ema/w": 1,
        "params/b": 2,
        "params/w": 3,
    }


def test_what_returns_in_another_shape_is_no_state():
    def step(w: jax.Array, x: jax.Array) -> Any:
        return w @ w.T, jnp.tanh(x)[:4]

    assert state_of(step, f32(4, 5), f32(8, 4)) == {}


# -- what cannot be traced


def test_a_branch_on_a_value_is_refused_with_the_users_line():
    def step(x: jax.Array) -> jax.Array:
        if x > 0:  # the line that the error must name
            return x
        return -x

    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "must name" in text)
    with pytest.raises(TraceError, match="TracerBoolConversionError") as error:
        trace(step, f32())
    assert f"{Path(__file__).name}:{line}" in str(error.value)
    assert "static_argnums" in str(error.value)


REFUSED = {
    "text argument": (lambda x, name: x, (f32(2), "relu"), "str"),
    "text result": (lambda x: "loss", (f32(2),), "str"),
    "numpy": (lambda x: np.sin(np.asarray(x)), (f32(2),), "TracerArrayConversionError"),
    "shapes": (lambda x, y: x + y, (f32(2), f32(3)), "incompatible shapes"),
    "arguments": (lambda x: x, (f32(2), f32(3)), "positional argument"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_is_no_function_of_arrays_is_refused(name):
    step, args, text = REFUSED[name]
    with pytest.raises(TraceError, match=re.escape(text)):
        trace(step, *args)
