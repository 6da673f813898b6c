"""The models in microbatches take the step that they take on the whole batch, dropout and accumulation included."""

import functools
import importlib
from typing import Any

import jax
import pytest

import autopar
from autopar.ir.trace import trace
from autopar.lowering.jit import run_program
from autopar.lowering.time.microbatch import split_step
from autopar.plan import Splitting
from tests.closeness import assert_close

QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
TINY = {"batch": 8, "width": 16, "heads": 2, "optimizer": "sgd"}
TEXT = {**TINY, "layers": 1, "vocab": 32, "seq": 8}

MODELS: dict[str, dict[str, Any]] = {
    "gpt": {**TEXT, "dropout": 0.2, "accumulate": 2, "clip_norm": 0.1},
    "bert": TEXT,
    "vit": {**TINY, "layers": 1},
    "moe": {**TEXT, "layers": 2, "experts": 4},
}


@functools.cache
def made(name: str) -> Any:
    return importlib.import_module(f"models.{name}").make(**MODELS[name])


@functools.cache
def expected(name: str) -> Any:
    step, state, batch = made(name)
    return QUICKLY(step)(state, batch)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_microbatches_takes_the_same_step(name):
    step, state, batch = made(name)
    program = split_step(trace(step, state, batch), Splitting(4)).program
    leaves = [*jax.tree.leaves((state, batch)), *program.constants]
    assert_close(QUICKLY(lambda *arrays: run_program(program, arrays))(*leaves), jax.tree.leaves(expected(name)))


def test_microbatches_on_a_mesh_take_the_same_step():
    step, state, batch = made("gpt")
    parallel = autopar.parallelize(step, mesh="data=2,tensor=2", hardware="v5e", microbatches=2, donate=False)
    assert parallel.plan(state, batch).microbatches == 2
    assert_close(parallel(state, batch), expected("gpt"))
