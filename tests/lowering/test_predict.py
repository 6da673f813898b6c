"""What a local program is predicted to need: memory in the device and on the chip, scatters in turn."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.cluster import Mesh
from autopar.cost import CostModel, RooflineCost, hardware
from autopar.lowering import predict
from autopar.lowering.instructions import LocalProgram, Move, Run
from autopar.lowering.spmd import device_mesh, lower
from autopar.lowering.turns import in_turn
from models import gpt

MESH = Mesh.parse("data=4")
LAYERS, WIDTH, BATCH = 4, 64, 256


def step(params: list[Any], x: Any) -> Any:
    def loss(params: list[Any]) -> Any:
        h = x
        for w in params:
            h = jnp.tanh(h @ w)
        return jnp.sum(h**2)

    return [w - 0.1 * g for w, g in zip(params, jax.grad(loss)(params), strict=True)]


ARGS = ([np.eye(WIDTH, dtype=np.float32) * (i + 1) for i in range(LAYERS)], np.ones((BATCH, WIDTH), np.float32))


def v5e(on_chip_bytes: float) -> CostModel:
    cluster = hardware("v5e")
    device = dataclasses.replace(cluster.device, on_chip_bytes=on_chip_bytes)
    return RooflineCost(dataclasses.replace(cluster, device=device), MESH)


def local_program(preset: str, fn: Any, args: Any, mesh: str = "data=4") -> LocalProgram:
    return autopar.parallelize(fn, mesh=mesh, hardware="v5e", preset=preset).compiled(*args).local


@functools.cache
def layers(preset: str) -> LocalProgram:
    return local_program(preset, step, ARGS)


def arguments_bytes(local: LocalProgram) -> float:
    return sum(predict.local_bytes(slot, local) for slot in local.inputs)


def test_temporaries_that_fit_the_chip_need_no_other_memory():
    local = layers("dp")
    found = predict.memory(local, v5e(2**27))
    assert found.peak_bytes == arguments_bytes(local)
    assert found.on_chip_bytes > LAYERS * BATCH // 4 * WIDTH * 2


def test_without_memory_on_the_chip_all_temporaries_are_in_the_device():
    local = layers("dp")
    found = predict.memory(local, v5e(0))
    assert found.on_chip_bytes == 0
    assert found.peak_bytes == predict.peak(predict.live_buffers(local, rounds_products=True))[0]


def test_more_memory_on_the_chip_never_needs_more_of_the_other():
    local = layers("zero3")
    peaks = [predict.memory(local, v5e(2.0**k)).peak_bytes for k in (10, 14, 16, 18, 27)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > peaks[-1]


def test_a_donated_argument_whose_new_value_a_collective_brings_is_copied_unless_it_comes_transposed():
    local, pairs = layers("zero2"), [(i, i) for i in range(LAYERS)]
    gathers = [i for i in local.instructions if isinstance(i, Move) and i.target in local.outputs]
    straight = [move for move in gathers if move.resharding.steps[-1].dim == 0]
    assert len(gathers) == LAYERS and 0 < len(straight) < LAYERS
    tiny = v5e(1.0)
    copied_bytes = predict.memory(local, tiny, pairs).peak_bytes - predict.memory(local, tiny).peak_bytes
    assert copied_bytes == pytest.approx(predict.PACKING * len(straight) * WIDTH * WIDTH * 4)


def waits(local: LocalProgram) -> list[Run]:
    return [i for i in local.instructions if isinstance(i, Run) and i.after is not None]


def test_every_gradient_that_is_scattered_waits_for_the_one_before():
    ordered = in_turn(layers("zero3"))
    waiting = waits(ordered)
    assert [run.equation.primitive.name for run in waiting] == ["dot_general"] * (LAYERS - 1)
    assert len({run.after for run in waiting}) == LAYERS - 1
    for run in waiting:
        moves = [i for i in ordered.instructions if isinstance(i, Move) and i.target is run.after]
        assert ordered.instructions.index(moves[0]) < ordered.instructions.index(run)


def test_a_program_that_scatters_nothing_is_as_it_was():
    assert not waits(in_turn(layers("dp")))


def test_the_product_behind_a_pick_for_the_loss_alone_waits_for_it():
    def pick(w: Any, at: Any) -> Any:
        logits = jnp.ones((32, WIDTH)) @ w
        picked = jnp.take_along_axis(logits, at[:, None], 1)
        return jnp.sum(jax.nn.logsumexp(logits, 1) - picked[:, 0])

    local = local_program("dp", jax.value_and_grad(pick), (ARGS[0][0], np.zeros(32, np.int32)))
    (waiting,) = waits(in_turn(local))
    makers = {slot: i for i in local.instructions if isinstance(i, Run) for slot in i.outputs}
    assert waiting.after is not None and makers[waiting.after].equation.primitive.name == "gather"
    assert waiting.equation.primitive.name == "dot_general"


def test_waiting_changes_no_result():
    local = layers("zero3")
    flat = jax.tree.leaves(ARGS)
    plain, ordered = (lower(one, device_mesh(MESH))(*flat) for one in (local, in_turn(local)))
    for one, other in zip(plain, ordered, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_gradient_counts_until_the_equation_that_waits_for_its_scatter():
    local = layers("zero3")
    stops = {(b.name, b.start): b.stop for b in predict.live_buffers(local)}
    later = {(b.name, b.start): b.stop for b in predict.live_buffers(in_turn(local))}
    prolonged = [name for name, start in stops if later[name, start] > stops[name, start]]
    assert len(prolonged) == LAYERS - 1 and all("dot_general" in name for name in prolonged)


def test_what_is_sent_again_waits_for_what_was_computed_since_lest_the_compiler_merge_the_two():
    made = gpt.make(abstract=True, layers=2, width=64, heads=8, seq=16, vocab=64, batch=16, remat=True)
    local = local_program("zero3", made[0], made[1:])
    again = [i for i in local.instructions if isinstance(i, Move) and i.repeat]
    makers = {slot: at for at, i in enumerate(local.instructions) if isinstance(i, Run) for slot in i.outputs}
    assert len(again) >= 8
    for move in again:
        assert move.after is not None and makers[move.after] < local.instructions.index(move)


def test_a_value_is_not_kept_for_a_reduction_that_may_run_at_any_time():
    def fit(w: Any, x: Any) -> Any:
        logits = x @ w
        update = x.T @ jnp.tanh(logits)
        return w - update, jnp.argmax(logits, 1)

    local = local_program("", fit, (ARGS[0][0], ARGS[1]), "data=1")
    products = [i for i, run in enumerate(local.instructions) if isinstance(run, Run) and "dot" in run.equation.name]
    (logits,) = [b for b in predict.live_buffers(local) if b.uses and b.start == products[0]]
    assert logits.stop == products[1] + 1 < len(local.instructions)


def test_an_activation_is_computed_again_by_two_products_and_kept_for_three():
    def chain(w: Any, x: Any, n: int) -> Any:
        before = jnp.sin(x) @ w
        hidden = jnp.tanh(before)
        return [hidden @ (w + k) for k in range(n)], jnp.sin(before)

    for n, kept in ((2, False), (3, True)):
        local = local_program("", functools.partial(chain, n=n), (ARGS[0][0], ARGS[1]), "data=1")
        (run,) = [i for i in local.instructions if isinstance(i, Run) and i.equation.primitive.name == "tanh"]
        names = [b.name for b in predict.live_buffers(local, rounds_products=True)]
        assert (run.outputs[0].value.name in names) == kept


@pytest.mark.parametrize(("batched", "fuses"), [(True, True), (False, False)])
def test_a_scatter_of_one_element_per_row_is_a_selection_that_fuses(batched, fuses):
    def pick(x: Any, at: Any) -> Any:
        return jnp.sum(jnp.take_along_axis(x, at[:, None], 1) if batched else x[at])

    def gradient(x: Any, at: Any) -> Any:
        return jnp.sin(jax.grad(pick)(jnp.cos(x), at))

    local = local_program("dp", gradient, (np.ones((32, 64), np.float32), np.zeros(32, np.int32)))
    (scatter,) = [i for i in local.instructions if isinstance(i, Run) and i.equation.primitive.name == "scatter-add"]
    written = {b.name for b in predict.live_buffers(local)}
    assert (scatter.outputs[0].value.name not in written) == fuses
