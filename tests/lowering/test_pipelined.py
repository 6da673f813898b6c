"""Scans over layers as pipelines, against the scans themselves on one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from autopar.errors import MicrobatchError
from autopar.ir.program import Program
from autopar.ir.trace import Traced, trace
from autopar.lowering.jit import run_program
from autopar.lowering.pipelined.order import Order
from autopar.lowering.pipelined.step import Pipelining, pipelined_step
from autopar.lowering.time.microbatch import batch_arguments

QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
WIDTH, BATCH = 4, 8

Layer = Callable[..., Any]


def plain(carry: Any, w: Any, batch: Any) -> Any:
    return jnp.tanh(carry @ w["a"]) + carry, None


def two_streams(carry: Any, w: Any, batch: Any) -> Any:
    x, y = carry
    return (x + jnp.tanh(y @ w["a"]), y * jnp.sin(x) @ w["b"]), None


def sums_of_the_batch(carry: Any, w: Any, batch: Any) -> Any:
    x, total = carry
    x = x + jax.nn.gelu(x @ w["a"])
    return (x, total + 0.1 * jnp.sum(jnp.abs(x))), jnp.sum(x, 0)


def dropout_with_a_key_from_layer_to_layer(carry: Any, w: Any, batch: Any) -> Any:
    x, key, number = carry
    key, now = jax.random.split(key)
    keep = jax.random.bernoulli(jax.random.fold_in(now, number), 0.7, x.shape)
    return (jnp.where(keep, x @ w["a"] / 0.7, 0) + x, key, number + 1), None


def a_mask_of_each_example(carry: Any, w: Any, batch: Any) -> Any:
    return carry + jnp.where(batch["x"] > 0, carry @ w["a"], carry), carry.mean(1)


def another_layer_every_second_time(carry: Any, w: Any, batch: Any) -> Any:
    x, number = carry
    x = jax.lax.cond(number % 2 == 0, lambda x: jnp.tanh(x @ w["a"]), lambda x: x + w["b"][0], x)
    return (x, number + 1), None


def a_recurrence_in_the_layer(carry: Any, w: Any, batch: Any) -> Any:
    def inner(h: Any, x: Any) -> Any:
        h = jnp.tanh(h + x[:, None] * w["b"][0])
        return h, h.sum(1)

    h, ys = jax.lax.scan(inner, jnp.zeros_like(carry), carry.T)
    return carry + h @ w["a"] + ys.T, None


def weights_that_all_layers_share(carry: Any, w: Any, batch: Any) -> Any:
    return carry + jnp.tanh(carry @ batch["shared"]) @ w["a"], None


def rematerialised(carry: Any, w: Any, batch: Any) -> Any:
    return jax.checkpoint(lambda x: jnp.sin(jnp.tanh(x @ w["a"]) @ w["b"]) + x)(carry), None


def undefined_at_zero(carry: Any, w: Any, batch: Any) -> Any:
    x = carry @ w["a"]
    return x / jnp.sqrt(jnp.sum(x**2, -1, keepdims=True)), None


START: dict[Layer, Callable[[Any], Any]] = {
    plain: lambda x: x,
    two_streams: lambda x: (x, jnp.cos(x)),
    sums_of_the_batch: lambda x: (x, jnp.float32(1.0)),
    dropout_with_a_key_from_layer_to_layer: lambda x: (x, jax.random.key(3), 0),
    a_mask_of_each_example: lambda x: x,
    another_layer_every_second_time: lambda x: (x, 0),
    a_recurrence_in_the_layer: lambda x: x,
    weights_that_all_layers_share: lambda x: x,
    rematerialised: lambda x: x,
    undefined_at_zero: lambda x: x,
}
LAYERS = tuple(START)


def step_of(layer: Layer) -> Callable[..., Any]:
    """A step of gradient descent; everything that the layers make is in the loss."""

    def step(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            start = START[layer](batch["x"] @ params["in"])
            known = batch | {"shared": params["in"]}
            body = lambda carry, w: layer(carry, w, known)  # noqa: E731
            carry, ys = jax.lax.scan(body, start, params["layers"])
            floats = [x for x in jax.tree.leaves((carry, ys)) if jnp.issubdtype(x.dtype, jnp.inexact)]
            return sum(jnp.mean(x**2) for x in floats)

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def arguments(layers: int) -> Any:
    rng = np.random.default_rng(layers)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)  # noqa: E731
    stacked = {name: normal(layers, WIDTH, WIDTH) for name in "ab"}
    return {"in": normal(WIDTH, WIDTH), "layers": stacked}, {"x": normal(BATCH, WIDTH)}


def piped(traced: Traced, stages: int, microbatches: int, rounds: int = 1) -> Program:
    return pipelined_step(traced, batch_arguments(traced), Pipelining(stages, microbatches, rounds)).program


def assert_equal_to_the_scan(layer: Layer, layers: int, *numbers: int) -> None:
    args = arguments(layers)
    traced = trace(step_of(layer), *args)
    program = piped(traced, *numbers)
    got = QUICKLY(lambda *leaves: run_program(program, leaves))(*jax.tree.leaves(args), *program.constants)
    want = jax.tree.leaves(QUICKLY(step_of(layer))(*args))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize(
    ("layer", "rounds"),
    [
        pytest.param(layer, rounds, marks=[pytest.mark.slow] if (i + rounds) % 2 else [])
        for i, layer in enumerate(LAYERS)
        for rounds in (1, 2)
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_pipeline_computes_what_the_scan_did(layer: Layer, rounds: int):
    assert_equal_to_the_scan(layer, 4, 2, 4, rounds)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_number_of_stages_microbatches_and_rounds_is_exact(data: st.DataObject):
    stages, rounds, depth = (data.draw(st.sampled_from(row)) for row in ((1, 2, 3, 4), (1, 2, 3), (1, 2)))
    divisors = [m for m in (1, 2, 4, 8) if rounds == 1 or m % stages == 0]
    if not divisors:
        return
    layer = data.draw(st.sampled_from(LAYERS))
    assert_equal_to_the_scan(layer, stages * rounds * depth, stages, data.draw(st.sampled_from(divisors)), rounds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("stages", "microbatches", "rounds"), [(4, 8, 1), (4, 3, 1), (2, 4, 3), (3, 6, 2)])
def test_every_microbatch_meets_every_layer_once_and_in_order(stages, microbatches, rounds, reverse):
    order = Order(stages, microbatches, rounds, stages * rounds, reverse)
    done: dict[int, list[int]] = {}
    ticks = range(order.ticks)
    for tick in reversed(ticks) if reverse else ticks:
        for stage in range(stages):
            if order.busy(np.array(tick), np.array(stage)):
                task = int(order.task(tick, stage))
                layer = int(order.round(task)) * stages + stage
                done.setdefault(int(order.microbatch(task)), []).append(layer)
    layers = list(range(stages * rounds))
    assert done == dict.fromkeys(range(microbatches), layers[::-1] if reverse else layers)


def test_equations_keep_their_names_and_the_residuals_stay_as_the_ticks_made_them():
    traced = trace(step_of(plain), *arguments(4))
    program = piped(traced, 2, 4)
    loops = [eqn for eqn in program.equations if eqn.primitive.name == "scan"]
    assert [eqn.params["reverse"] for eqn in loops] == [False, True]
    forward, backward = loops
    stacked = set(forward.outputs[forward.params["num_carry"] :])
    assert stacked & set(backward.inputs), "the backward loop reads what the forward loop made, tick by tick"
    names = {
        value.name
        for eqn in traced.program.equations
        if eqn.bodies
        for e in eqn.bodies[0].equations
        for value in e.outputs
    }
    inside = {value.name for eqn in loops for value in values(eqn.bodies[0])}
    assert names <= inside


def values(program: Program) -> list[Any]:
    return [
        *(value for eqn in program.equations for value in eqn.outputs),
        *(value for eqn in program.equations for body in eqn.bodies for value in values(body)),
    ]


def batch_statistics(carry: Any, w: Any, batch: Any) -> Any:
    x = carry @ w["a"]
    return jnp.tanh((x - x.mean(0)) / (x.std(0) + 1e-3)), None


START[batch_statistics] = lambda x: x


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((3, 4), "3 stages do not divide the 4 layers of scan"),
        ((2, 3), "3 microbatches do not divide the batch of 8"),
        ((2, 2, 4), "2 stages in 4 rounds do not divide the 4 layers"),
        ((4, 2, 2), "2 rounds of 4 stages need a multiple of 4 microbatches"),
    ],
    ids=str,
)
def test_numbers_that_do_not_divide_are_refused(numbers: tuple[int, ...], message: str):
    with pytest.raises(MicrobatchError, match=message):
        piped(trace(step_of(plain), *arguments(4)), *numbers)


def test_layers_that_mix_the_batch_are_refused_by_name():
    with pytest.raises(MicrobatchError, match=r"reduce_sum|div|sub"):
        piped(trace(step_of(batch_statistics), *arguments(4)), 2, 4)


def a_fading_sum(carry: Any, w: Any, batch: Any) -> Any:
    x, total = carry
    x = jnp.tanh(x @ w["a"])
    return (x, 0.5 * total + jnp.sum(x)), None


def running_sums(carry: Any, w: Any, batch: Any) -> Any:
    x, total = carry
    x = jnp.tanh(x @ w["a"])
    total += jnp.sum(x)
    return (x, total), total


START |= dict.fromkeys((a_fading_sum, running_sums), lambda x: (x, jnp.float32(0)))


@pytest.mark.parametrize("layer", [a_fading_sum, running_sums], ids=lambda layer: layer.__name__)
def test_totals_that_stages_cannot_add_up_apart_are_refused(layer: Layer):
    with pytest.raises(MicrobatchError, match=r"carry 1 of scan.*more than added to"):
        piped(trace(step_of(layer), *arguments(4)), 2, 4)


def test_a_step_without_layers_is_refused():
    def step(params: Any, batch: Any) -> Any:
        return jax.tree.map(lambda p: p * batch["x"].sum(), params)

    with pytest.raises(MicrobatchError, match="no scan over layers"):
        piped(trace(step, *arguments(4)), 2, 4)


def test_masks_that_depend_on_nothing_are_made_for_each_microbatch():
    def step(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            below = jnp.broadcast_to(jnp.tril(jnp.ones((WIDTH, WIDTH)))[None], (BATCH, WIDTH, WIDTH)) > 0
            layer = lambda x, w: (jnp.where(below, x[:, None] @ w["a"], 0.0).sum(1) + x, None)  # noqa: E731
            return jnp.mean(jax.lax.scan(layer, batch["x"] @ params["in"], params["layers"])[0] ** 2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params)), 0.0

    args = arguments(4)
    traced = trace(step, *args)
    program = piped(traced, 2, 4)
    whole = [v for v in values(program) if len(v.shape) > 2 and BATCH in v.shape]
    assert not whole, "no mask of the whole batch, which ticks would take their parts of"
    got = QUICKLY(lambda *leaves: run_program(program, leaves))(*jax.tree.leaves(args), *program.constants)
    for a, b in zip(got, jax.tree.leaves(QUICKLY(step)(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_decoder_that_reads_an_encoder_is_two_pipelines():
    def step(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            encode = lambda x, w: (x + jnp.tanh(x @ w["a"]), x.mean(1))  # noqa: E731
            memory, means = jax.lax.scan(encode, batch["x"] @ params["in"], params["layers"])
            decode = lambda x, w: (x + jnp.tanh(x * memory @ w["b"]), None)  # noqa: E731
            out, _ = jax.lax.scan(decode, jnp.cos(memory), params["layers"])
            return jnp.mean(out**2) + jnp.mean(means[1:] * means[:-1])

        value, gradients = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    args = arguments(4)
    traced = trace(step, *args)
    program = piped(traced, 2, 4)
    assert sum(eqn.primitive.name == "scan" for eqn in program.equations) == 4
    got = QUICKLY(lambda *leaves: run_program(program, leaves))(*jax.tree.leaves(args), *program.constants)
    for a, b in zip(got, jax.tree.leaves(QUICKLY(step)(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
