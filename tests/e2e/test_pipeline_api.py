"""The decorator for pipelines: one line around a step, the same losses as on one device."""

import jax
import numpy as np
import pytest
from flax import nnx

import autopar
from autopar.errors import AutoparError
from models import gpt, gpt_nnx

TINY = {"layers": 2, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 8, "optimizer": "sgd"}


def test_a_decorated_step_trains_as_one_device_does():
    step, state, batch = gpt.make(**TINY)
    train = autopar.pipeline(step, submeshes=2, schedule="1f1b", microbatches=2, mesh="data=2")
    reference, expected, found = state, [], []
    for _ in range(2):
        reference, metrics = jax.jit(step)(reference, batch)
        expected.append(float(metrics["loss"]))
        state, metrics = train(state, batch)
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} <= {1, 2}
    homes = {frozenset(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)}
    assert len(set.union(*map(set, homes))) == 4


def test_nnx_objects_are_updated_in_place():
    (step, state, batch), (_, twin, _) = gpt_nnx.make(**TINY), gpt_nnx.make(**TINY)
    train, reference = autopar.pipeline(step, submeshes=2, schedule="gpipe", microbatches=2), nnx.jit(step)
    for _ in range(2):
        np.testing.assert_allclose(train(state, batch)["loss"], reference(twin, batch)["loss"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"schedule": "2f2b"}, "2f2b"),
        ({"schedule": "interleaved", "submeshes": 2, "microbatches": 3}, "interleaved"),
        ({"submeshes": 16, "microbatches": 16}, "devices"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(options, text):
    step, state, batch = gpt.make(**(TINY | {"batch": 48}))
    with pytest.raises(AutoparError, match=text):
        autopar.pipeline(step, **options)(state, batch)
