"""The time axis of a program: what is hoisted, what loops run and keep, what runs once, and what is refused."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from autopar.errors import MicrobatchError
from autopar.ir.program import check
from autopar.ir.trace import Traced, trace
from autopar.lowering.jit import run_program
from autopar.lowering.time.microbatch import batch_arguments, batch_phases, split_step
from autopar.plan import Splitting
from autopar.sharding.time.phases import Phases
from models import gpt, moe, wide_resnet

BATCH, WIDTH, CLASSES = 16, 4, 512


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


PARAMS = {"w": normal(WIDTH, WIDTH)}
BATCH_ARRAYS = {"x": normal(BATCH, WIDTH), "y": jnp.arange(BATCH) % 3}


def trained(loss: Any) -> Any:
    def step(params: Any, batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def traced(step: Any, batch: Any = BATCH_ARRAYS) -> Traced:
    return trace(step, PARAMS, batch)


def phases(step: Any, allow: tuple[str, ...] = ()) -> Phases:
    return batch_phases(traced(step), Splitting(2, allow=allow))


QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiling well takes longer here than running badly."""


def results(split: Traced, batch: Any) -> list[Any]:
    arrays = [*jax.tree.leaves((PARAMS, batch)), *split.program.constants]
    return QUICKLY(lambda *arrays: run_program(split.program, arrays))(*arrays)


def assert_same(step: Any, splitting: Splitting, batch: Any = BATCH_ARRAYS, rtol: float = 2e-5) -> Traced:
    split = split_step(traced(step, batch), splitting)
    got = results(split, batch)
    for a, b in zip(jax.tree.leaves(QUICKLY(step)(PARAMS, batch)), got, strict=True):
        np.testing.assert_allclose(b, a, rtol=rtol, atol=1e-6)
    return split


def names(values: Any) -> set[str]:
    return {value.name for value, *_ in values}


@pytest.mark.parametrize("model", [gpt, moe], ids=["gpt", "moe"])
def test_a_language_model_takes_one_loop_and_keeps_nothing_but_totals(model):
    step, state, batch = model.make(abstract=True, layers=2, width=32, seq=16, batch=8)
    found = batch_phases(trace(step, state, batch), Splitting(4))
    (loop,) = found.loops
    n_parameters = len(jax.tree.leaves(state.params))
    assert not loop.stacks and names(loop.slices) == {"inputs", "targets"}
    assert n_parameters <= len(loop.totals) <= n_parameters + 5  # the loss, and terms of tied or nested sums
    assert {monoid for _, monoid in loop.totals} == {"sum"}
    kept = sum(value.nbytes for value, _ in loop.totals)
    assert kept < 1.1 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.params))
    assert len(found.hoisted) + len(loop.runs) + len(found.once) >= len(found.question.program.equations)


def test_a_masked_mean_counts_its_mask_before_the_loop():
    def loss(params: Any, batch: Any) -> Any:
        mask = batch["y"] > 0
        return jnp.sum(jnp.where(mask, jnp.sum(batch["x"] @ params["w"], -1), 0.0)) / jnp.sum(mask)

    found = phases(trained(loss))
    assert len(found.loops) == 1
    assert {"reduce_sum"} & {eqn.primitive.name for eqn in found.hoisted}
    assert_same(trained(loss), Splitting(4))


def large_weights(params: Any, batch: Any) -> Any:
    weights = jnp.max(jax.nn.one_hot(batch["y"], CLASSES) * batch["x"][:, :1], -1)
    return jnp.sum(jnp.sum((batch["x"] @ params["w"]) ** 2, -1) * weights) / (1.0 + jnp.sum(weights))


def test_a_total_of_what_is_too_large_to_be_whole_takes_a_short_loop_first():
    first, second = phases(trained(large_weights)).loops
    assert len(first.totals) == 1 and not any(run.equation.primitive.name == "dot_general" for run in first.runs)
    assert any(run.equation.primitive.name == "dot_general" for run in second.runs)
    assert_same(trained(large_weights), Splitting(4))


def centred(params: Any, batch: Any) -> Any:
    h = jnp.tanh(batch["x"] @ params["w"][:, :1])
    return jnp.mean(((h - h.mean(0)) @ params["w"][:1]) ** 3)


def widened(params: Any, batch: Any) -> Any:
    """The same with activations that are larger than the arguments."""
    h = jnp.tanh(batch["x"] @ jnp.tile(params["w"], (1, 8)))
    return jnp.mean((h - h.mean(0)) ** 3)


def test_statistics_of_the_batch_are_refused_by_name_and_line():
    with pytest.raises(MicrobatchError, match=r"reduce_sum of the whole batch") as caught:
        phases(trained(widened))
    assert "test_phases.py" in caught.value.where and "(widened)" in caught.value.where
    assert "ghost_batch_norm" in caught.value.fix


def test_small_activations_are_stacked_instead():
    found = phases(trained(centred))
    assert any(loop.stacks for loop in found.loops)
    assert_same(trained(centred), Splitting(2))


def test_allowed_to_recompute_the_layers_run_once_more_and_the_result_is_exact():
    found = phases(trained(widened), allow=("recompute",))
    contractions = [sum(run.equation.primitive.name == "dot_general" for run in loop.runs) for loop in found.loops]
    assert len(contractions) > 1 and all(contractions)
    assert_same(trained(widened), Splitting(4, allow=("recompute",)))


def test_ghost_batch_norm_takes_the_statistics_of_every_microbatch_and_says_so(caplog):
    step = trained(widened)
    with caplog.at_level(logging.WARNING):
        split = split_step(traced(step), Splitting(2, allow=("ghost_batch_norm",)))
    assert "takes its own statistics" in caplog.text and "test_phases.py" in caplog.text
    w, loss = results(split, BATCH_ARRAYS)
    parts = [step(PARAMS, jax.tree.map(lambda a, i=i: a[i::2], BATCH_ARRAYS)) for i in range(2)]
    np.testing.assert_allclose(loss, sum(value for _, value in parts) / 2, rtol=1e-5)
    np.testing.assert_allclose(w, sum(params["w"] for params, _ in parts) / 2, rtol=1e-5)


def test_a_residual_network_is_refused_and_goes_in_one_loop_with_ghost_batch_norm(caplog):
    step, state, batch = wide_resnet.make(abstract=True, batch=8)
    whole = trace(step, state, batch)
    with pytest.raises(MicrobatchError, match=r"norm_1/.* of the whole batch"):
        batch_phases(whole, Splitting(2))
    assert len(batch_phases(whole, Splitting(2, allow=("ghost_batch_norm",))).loops) == 1
    assert "normalization.py" in caplog.text


def test_what_mixes_large_values_of_examples_is_refused():
    def loss(params: Any, batch: Any) -> Any:
        h = jnp.tanh(batch["x"] @ jnp.tile(params["w"], (1, 8)))
        return jnp.mean(jnp.sort(h, 0) @ jnp.tile(params["w"], (8, 1)))

    with pytest.raises(MicrobatchError, match="sort"):
        phases(trained(loss))


def test_outputs_of_single_examples_are_stacked_and_come_back_in_order():
    def step(params: Any, batch: Any) -> Any:
        h = batch["x"] @ params["w"]
        return params, jnp.argmax(h, -1), h, h.reshape(-1), h.T

    (loop,) = phases(step).loops
    assert loop.stacks and not loop.totals
    assert_same(step, Splitting(4))


def test_microbatches_are_every_mth_example_so_that_a_sharded_batch_stays_where_it_is():
    def step(params: Any, batch: Any) -> Any:
        return params, jnp.sum(batch["x"] @ params["w"])

    program = split_step(traced(step), Splitting(2)).program
    reshapes = [eqn for eqn in program.equations if eqn.primitive.name == "reshape"]
    assert {eqn.outputs[0].shape for eqn in reshapes} >= {(BATCH // 2, 2, 1, WIDTH)}


def test_random_bits_and_positions_are_those_of_the_whole_batch():
    def step(params: Any, batch: Any) -> Any:
        keep = jax.random.bernoulli(jax.random.key(0), 0.5, (BATCH, WIDTH))
        keys = jax.random.split(jax.random.key(1), BATCH)
        noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
        h = jnp.where(keep, batch["x"] @ params["w"], 0.0) + noise + jnp.arange(BATCH)[:, None]
        return params, h, jnp.where(keep, h, 0.0).reshape(2, BATCH // 2, WIDTH)

    split = assert_same(step, Splitting(4))
    (loop,) = (eqn for eqn in split.program.equations if eqn.primitive.name == "scan")
    drawn = [v.shape for eqn in loop.bodies[0].equations for v in eqn.outputs if eqn.primitive.name == "threefry2x32"]
    assert drawn and all(shape[0] == BATCH // 4 for shape in drawn)


def test_narrow_gradients_are_summed_in_float32():
    def loss(params: Any, batch: Any) -> Any:
        h = batch["x"].astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)
        return jnp.mean(h.astype(jnp.float32) ** 2)

    (loop,) = (
        eqn for eqn in split_step(traced(trained(loss)), Splitting(4)).program.equations if eqn.primitive.name == "scan"
    )
    assert {value.dtype for value in loop.outputs} == {np.dtype("float32")}
    assert_same(trained(loss), Splitting(4), rtol=1e-2)


def test_a_tied_weight_has_one_total():
    def loss(params: Any, batch: Any) -> Any:
        embedded = jnp.take(params["w"], batch["y"], axis=0)
        return jax.nn.logsumexp(jnp.tanh(embedded) @ params["w"].T, -1).mean()

    (loop,) = phases(trained(loss)).loops
    assert sorted(value.shape for value, _ in loop.totals) == [(), (WIDTH, WIDTH)]
    assert_same(trained(loss), Splitting(2))


def test_names_and_source_lines_survive():
    step = trained(large_weights)
    before, after = traced(step), split_step(traced(step), Splitting(2))
    check(after.program)
    loops = [eqn for eqn in after.program.equations if eqn.primitive.name == "scan"]
    known = {eqn.name for eqn in before.program.equations}
    inside = [eqn for loop in loops for eqn in loop.bodies[0].equations]
    products = [eqn for eqn in inside if eqn.primitive.name == "dot_general"]
    assert products and all(eqn.name in known and eqn.source for eqn in products)


REFUSED = {
    "3 microbatches do not divide the batch of 16": Splitting(3),
    "no argument matches 'nothing'": Splitting(2, batch="nothing"),
    r"no value of the step matches 'nothing' and has a dimension 0": Splitting(chunk=(("nothing", 0, 2),)),
    r"3 chunks do not divide dimension 0 of dot_general": Splitting(chunk=(("dot_general", 0, 3),)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_asked_is_refused(message):
    with pytest.raises(MicrobatchError, match=message):
        split_step(traced(trained(centred)), REFUSED[message])


def test_a_step_without_a_batch_is_refused():
    whole = trace(lambda params: jax.tree.map(lambda p: p * 2, params), PARAMS)
    with pytest.raises(MicrobatchError, match="the step has no batch"):
        batch_arguments(whole)


def test_the_batch_is_what_most_arguments_start_with_or_what_a_pattern_names():
    args = ({"x": normal(8, 2), "m": normal(8), "table": normal(3, 3)}, jax.random.key(0))
    whole = trace(lambda w, batch, key: (w, jnp.sum(batch["x"]) + w), jnp.float32(1.0), *args)
    assert [v.name for v in batch_arguments(whole)] == ["m", "x"]
    assert [v.name for v in batch_arguments(whole, "table")] == ["table"]


def head(params: Any, batch: Any) -> Any:
    logits = jnp.tanh(batch["x"] @ params["w"]) @ jnp.tile(params["w"], (1, CLASSES // WIDTH))
    picked = jnp.take_along_axis(logits, batch["y"][:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


@pytest.mark.parametrize("dim", [0, 1], ids=["tokens", "vocabulary"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_chunked_cross_entropy_never_makes_the_logits(dim, microbatches):
    split = assert_same(trained(head), Splitting(microbatches, chunk=(("dot_general:2", dim, 4),)))

    def shapes(program: Any) -> Any:
        for eqn in program.equations:
            yield from (v.shape for v in eqn.outputs)
            for body in eqn.bodies:
                yield from shapes(body)

    assert (BATCH // microbatches, CLASSES) not in set(shapes(split.program))


def layers(body: Any) -> Any:
    return lambda w, x: lax.scan(lambda h, v: (body(h, v), jnp.sum(h)), x, jnp.stack([w, 0.5 * w, w.T]))


def dropping(h: Any, w: Any) -> Any:
    keep = jax.random.bernoulli(jax.random.key(0), 0.8, h.shape)
    return jnp.where(keep, jnp.tanh(h @ w), 0.0) + jnp.arange(BATCH)[:, None] * 0.01


def skipping(h: Any, w: Any) -> Any:
    return lax.cond(w[0, 1] > 0, lambda h: jnp.tanh(h @ w), lambda h: h * 2.0, h)


def recurrent(w: Any, x: Any) -> Any:
    columns = jnp.moveaxis(x[:, :, None] * jnp.ones(WIDTH), 1, 0)
    return lax.scan(lambda h, v: (jnp.tanh(h @ w + v), h.sum(-1)), jnp.zeros((BATCH, WIDTH)), columns)


REGIONS = {
    "layers": layers(lambda h, w: jnp.tanh(h @ w)),
    "rematerialised layers": layers(jax.checkpoint(lambda h, w: jnp.tanh(jnp.tanh(h @ w) @ w))),
    "layers with dropout": layers(dropping),
    "layers with branches": layers(skipping),
    "recurrence": recurrent,
    "branch": lambda w, x: (lax.cond(w[0, 0] > 0, lambda x: jnp.tanh(x @ w), lambda x: jnp.zeros_like(x), x), x),
}


@pytest.mark.parametrize("region", REGIONS)
def test_scans_and_branches_run_on_parts_inside_the_loop(region):
    def loss(params: Any, batch: Any) -> Any:
        h, rest = REGIONS[region](params["w"], batch["x"])
        return jnp.mean(h**2) + 1e-2 * jnp.sum(rest)

    (loop,) = phases(trained(loss)).loops
    assert {"scan", "cond"} & {run.equation.primitive.name for run in loop.runs}
    assert_same(trained(loss), Splitting(4))


def test_a_scan_whose_layers_mix_the_examples_is_refused():
    def loss(params: Any, batch: Any) -> Any:
        return jnp.mean(layers(lambda h, w: jnp.tanh(h @ w) - h.mean(0))(params["w"], batch["x"])[0])

    with pytest.raises(MicrobatchError, match=r"scan \(scan\) needs all of x at once"):
        phases(trained(loss))
