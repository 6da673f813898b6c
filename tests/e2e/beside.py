"""Pipelines of a model beside the same steps on one device."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.cases import O0, make
from benchmarks.pipelines import distance

made = functools.cache(make)
"""(step, state, batch) of a model with some settings, made once."""


def trained(train: Callable[..., Any], state: Any, batch: Any, steps: int) -> tuple[list[float], Any]:
    """The loss of each step, and the parameters after the last."""
    losses = []
    for _ in range(steps):
        state, metrics = train(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state.params


@functools.cache
def on_one_device(steps: int, model: str, **settings: Any) -> tuple[list[float], Any]:
    """The same of ``jax.jit(step)``."""
    step, state, batch = made(model, **settings)
    return trained(jax.jit(step, compiler_options=O0), state, batch, steps)


def assert_trains_as_one_device_does(train: Callable[..., Any], steps: int, model: str, **settings: Any) -> None:
    """Losses are equal up to rounding, and parameters up to a ten-thousandth of the way they went."""
    _, state, batch = made(model, **settings)
    losses, params = trained(train, state, batch, steps)
    expected, expected_params = on_one_device(steps, model, **settings)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert distance(params, expected_params) <= 1e-4 * distance(expected_params, state.params)
