"""Layers are equal in work and narrow in between; the backward pass follows by dataflow alone."""

import functools
import importlib
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cost import flops_of
from autopar.ir import layers as under_test
from autopar.ir.body import Body
from autopar.ir.layers import LayerError, Layers, cluster_layers, layer_boundary
from autopar.ir.program import Equation
from autopar.ir.step import Step
from autopar.ir.trace import trace
from autopar.lowering.pipeline.cut import microbatched
from autopar.plan import Splitting

BATCH, WIDTH = 8, 16


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def trained(loss: Callable[..., Any]) -> Callable[..., Any]:
    def step(params: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def body_of(step: Callable[..., Any], *arguments: Any) -> Step:
    return microbatched(trace(step, *arguments), Splitting(microbatches=2))


@functools.cache
def transformer(model: str, **settings: Any) -> Step:
    tiny = {"layers": 4, "width": 16, "heads": 2, "vocab": 64, "seq": 8, "batch": BATCH, "abstract": True}
    return body_of(*importlib.import_module(f"models.{model}").make(**tiny, **settings))


def deep(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - y) ** 2)


DEEP = ({f"w{i}": f32(WIDTH, WIDTH) for i in range(4)}, f32(BATCH, WIDTH), f32(BATCH, WIDTH))


def of_layer(found: Layers, layer: int, *, forward: bool) -> list[Equation]:
    return [eqn for eqn, at in found.of.items() if at == layer and (eqn in found.forward) == forward]


def block_of(eqn: Equation) -> set[str]:
    """The transformer blocks whose parameters an equation multiplies."""
    return {
        part for v in eqn.operands if v.name.startswith("params/") for part in v.name.split("/") if part[:2] == "h_"
    }


@pytest.mark.parametrize("model", ["gpt", "moe"])
def test_the_blocks_of_a_transformer_become_its_layers(model: str) -> None:
    step = transformer(model)
    found = cluster_layers(step.body, 4, flops_of)
    for forward in (True, False):
        blocks = [{b for eqn in of_layer(found, i, forward=forward) for b in block_of(eqn)} for i in range(4)]
        if model == "gpt":
            assert blocks == [{"h_0"}, {"h_1"}, {"h_2"}, {"h_3"}]
        else:  # the experts of a block outweigh its attention, so that blocks are cut inside
            assert [max(row) for row in blocks] == sorted(max(row) for row in blocks)


def test_a_recomputed_block_stays_in_the_layer_of_its_parameters() -> None:
    step = transformer("gpt", remat=True)
    found = cluster_layers(step.body, 4, flops_of)
    copies = {v: v.name for v in step.body.origin if v.shape}
    for eqn, layer in found.of.items():
        if eqn.primitive.name == "dot_general" and eqn not in found.forward:
            names = [step.body.origin[v].name for v in eqn.operands if v in copies]
            blocks = {part for name in names for part in name.split("/") if part[:2] == "h_"}
            assert blocks <= {f"h_{layer}"}


@pytest.mark.parametrize("remat", [False, True])
def test_values_flow_up_in_the_forward_pass_and_down_in_the_backward_pass(remat: bool) -> None:
    found = cluster_layers((step := transformer("gpt", remat=remat)).body, 3, flops_of)
    made = {value: eqn for eqn in step.body.program.equations if eqn in found.of for value in eqn.outputs}
    for eqn, layer in found.of.items():
        for maker in (made[value] for value in eqn.operands if value in made):
            if eqn in found.forward:
                assert maker in found.forward and found.of[maker] <= layer
            elif maker not in found.forward:
                assert found.of[maker] >= layer


def test_the_forward_pass_is_what_the_loss_needs() -> None:
    step = body_of(trained(deep), *DEEP)
    found = cluster_layers(step.body, 2, flops_of)
    forward = [eqn.primitive.name for eqn in step.body.program.equations if eqn in found.forward]
    assert forward == ["dot_general", "tanh"] * 4 + ["sub", "integer_pow", "reduce_sum"]


def test_without_a_loss_the_forward_pass_ends_where_all_parameters_meet() -> None:
    step = body_of(lambda *arguments: trained(deep)(*arguments)[0], *DEEP)
    found = cluster_layers(step.body, 2, flops_of)
    forward = [eqn.primitive.name for eqn in step.body.program.equations if eqn in found.forward]
    assert forward == ["dot_general", "tanh"] * 3 + ["dot_general"]


def test_marks_say_where_layers_end_and_change_nothing() -> None:
    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        h = layer_boundary({"a": jnp.tanh(x @ params["w0"]), "b": x})
        h = jnp.tanh(layer_boundary(h["a"] @ params["w1"]) @ params["w2"] @ params["w3"])
        return jnp.mean((h - y) ** 2)

    found = cluster_layers(body_of(trained(loss), *DEEP).body, None, flops_of)
    assert found.n_layers == 3
    dots = [sum(e.primitive.name == "dot_general" for e in of_layer(found, i, forward=True)) for i in range(3)]
    assert dots == [1, 1, 2]

    def unmarked(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((jnp.tanh(jnp.tanh(x @ params["w0"]) @ params["w1"] @ params["w2"] @ params["w3"]) - y) ** 2)

    arguments = jax.tree.map(lambda s: jnp.full(s.shape, 0.1), DEEP)
    for a, b in zip(*(jax.tree.leaves(jax.jit(trained(f))(*arguments)) for f in (loss, unmarked)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_scan_over_layers_is_one_layer() -> None:
    def loss(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)
        return jnp.mean((h @ w[0] - y) ** 2)

    program = trace(loss, f32(4, WIDTH, WIDTH), f32(BATCH, WIDTH), f32(BATCH, WIDTH)).program
    _, *batch = program.inputs
    found = cluster_layers(Body(program, frozenset(batch), {}, frozenset(), {}), 2, flops_of)
    layers = {eqn.primitive.name: layer for eqn, layer in found.of.items()}
    assert (layers["scan"], layers["dot_general"]) == (0, 1)


def test_more_layers_than_equations_are_refused() -> None:
    with pytest.raises(LayerError, match="64 layers are asked for, the forward pass has"):
        cluster_layers(body_of(trained(deep), *DEEP).body, 64, flops_of)


def test_a_step_without_loss_or_common_turning_point_is_refused() -> None:
    def step(params: Any, x: jax.Array, y: jax.Array) -> Any:
        heads = [jnp.mean((x @ params[name] - y) ** 2) for name in sorted(params)]
        return jax.tree.map(lambda p, g: p - g, params, jax.grad(lambda p: deep(p, x, y))(params)), heads[:0]

    def apart(params: Any, x: jax.Array, y: jax.Array) -> Any:
        gradients = {name: jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(w) for name, w in params.items()}
        return jax.tree.map(lambda p, g: p - g, params, gradients)

    assert cluster_layers(body_of(step, *DEEP).body, 2, flops_of).n_layers == 2
    with pytest.raises(LayerError, match="forward and backward equations cannot be told apart"):
        cluster_layers(body_of(apart, *DEEP).body, 2, flops_of)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 50)), min_size=3, max_size=9),
    st.integers(2, 3),
)
def test_cuts_are_the_cheapest_of_all(equations: list[tuple[int, int]], n_layers: int) -> None:
    work = np.array([w for w, _ in equations], float)
    bytes_at = np.array([0, *(b for _, b in equations)], float)
    done = np.concatenate([[0], np.cumsum(work)]) / (work.sum() / n_layers)
    tolerance = 5.0

    def cost(cuts: tuple[int, ...]) -> float:
        ends = (0, *cuts, len(work))
        return sum((done[b] - done[a] - 1) ** 2 + bytes_at[a] for a, b in pairwise(ends))

    found = under_test._best_cuts(done, bytes_at, n_layers, tolerance)
    assert found is not None
    best = min(cost(cuts) for cuts in combinations(range(1, len(work)), n_layers - 1))
    assert cost(tuple(map(int, found))) == pytest.approx(best)
