"""Chunks of named dimensions: the cross-entropy of models in parts of the vocabulary, exact and in less memory."""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.errors import MicrobatchError
from autopar.ir.trace import trace
from autopar.lowering.audit import audit
from autopar.lowering.time.indices import findable_in_parts

TEXT = {"layers": 1, "width": 64, "heads": 4, "vocab": 8192, "seq": 64, "batch": 16}


@functools.cache
def made(model: str) -> Any:
    return importlib.import_module(f"models.{model}").make(**TEXT)


def chunked(model: str, **options: Any) -> Any:
    step, *arguments = made(model)
    parallel = autopar.parallelize(step, mesh="data=2", hardware="a100", preset="dp", donate=False, **options)
    return parallel, parallel.plan(*arguments).prediction.peak_bytes


@functools.cache
def compiled_bytes(model: str, vocab: int) -> int:
    parallel, _ = chunked(model, chunk={"vocab": vocab} if vocab else {})
    compiled = parallel.compiled(*made(model)[1:])
    shapes = [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in compiled.local.inputs]
    return audit(compiled.function.lower(*shapes).compile(), compiled.plan.mesh).peak_bytes


@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_a_chunked_vocabulary_is_exact_and_takes_less_memory(model: str) -> None:
    whole = chunked(model)[1]
    parallel, peak_bytes = chunked(model, chunk={"vocab": 8})
    assert peak_bytes < 0.6 * whole
    assert compiled_bytes(model, 8) < 0.6 * compiled_bytes(model, 0)
    step, state, batch = made(model)
    _, expected = jax.jit(step)(state, batch)
    _, found = parallel(state, batch)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5)


def test_chunks_of_microbatches() -> None:
    step, state, batch = made("bert")
    parallel, _ = chunked("bert", chunk={"vocab": 4}, microbatches=2, allow="recompute")
    np.testing.assert_allclose(parallel(state, batch)[1]["loss"], jax.jit(step)(state, batch)[1]["loss"], rtol=1e-5)


@pytest.mark.parametrize("find", [jnp.argmax, jnp.argmin])
def test_an_extreme_is_found_where_jax_finds_it(find: Any) -> None:
    rows = [[1.0, 3.0, 3.0], [np.nan, 5.0, np.nan], [-np.inf, -np.inf, -np.inf], [2.0, np.inf, np.nan]]
    for x in (jnp.array(rows), jnp.array([[3, 1, 3], [0, 0, 0]])):
        program = findable_in_parts(trace(lambda x: find(x, axis=1), x).program)
        assert not {"argmax", "argmin"} & {eqn.primitive.name for eqn in program.equations}
        found = autopar.parallelize(lambda x: find(x, axis=1), mesh="data=1", chunk={".*reduce_m.*[0]": 1})(x)
        np.testing.assert_array_equal(found, find(x, axis=1))


def test_a_step_without_that_dimension_says_so() -> None:
    with pytest.raises(MicrobatchError, match="no dimension 'vocab'"):
        autopar.plan(lambda w, x: (w, (w * x).sum()), jnp.ones(4), jnp.ones(4), mesh="data=1", chunk={"vocab": 2})
