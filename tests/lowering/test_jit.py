"""The jit target: XLA partitions, the numbers stay."""

import jax
import numpy as np

import autopar
from models import mlp


def test_a_plan_lowered_to_jit_with_constraints_equals_one_device() -> None:
    step, state, batch = mlp.make(layers=2, width=32, batch=16)
    parallel = autopar.parallelize(step, mesh="data=2,tensor=4", lower="jit", donate=False)
    reference = jax.jit(step)
    ours, theirs = state, state
    for _ in range(3):
        ours, ours_metrics = parallel(ours, batch)
        theirs, metrics = reference(theirs, batch)
        np.testing.assert_allclose(ours_metrics["loss"], metrics["loss"], rtol=1e-5)
