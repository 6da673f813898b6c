"""What published train steps are made of, on eight CPU devices: equal to one device, under the best plan or any."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.ir.arguments import adapt
from autopar.plan import Plan
from benchmarks.cases import O0, slow_device
from tests.e2e.zoo import STEPS
from tests.planner.arbitrary import dice_plan

MESH = "data=2,tensor=4"
N_STEPS = 2

QUICK = {
    "CTC",
    "accumulation",
    "adafactor",
    "codebook",
    "custom gradients",
    "equilibrium",
    "experts by sorting",
    "masked autoencoder",
    "mixed precision",
    "rotary grouped attention in chunks",
    "several optimizers",
    "state space",
    "two gradients",
    "window attention",
}
"""What the default run takes: some seconds each, most of them XLA's."""

TABLE = [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in STEPS]

ROUNDING = {"mixed precision": 1e-2}
"""Relative difference that is rounding, where it is not that of float32."""

REPLICATED = {
    "diffusion with a sampler": {"while"},
    "draws": {"random_gamma", "while"},
    "equilibrium": {"while"},
    "quasi-Newton": {"while"},
}
"""Primitives that every device runs whole; nothing else may be."""


def run(call: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
    """What every step returns, on the host."""
    state, *batch = arguments
    found = []
    for _ in range(N_STEPS):
        state, metrics = call(state, *batch)
        found.append(jax.device_get((state, metrics)))
    return found


def numbers(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def differences(found: Any, expected: Any, rtol: float) -> list[str]:
    """The leaves that are not equal up to rounding."""
    rows = []
    for (path, actual), wanted in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        a, b = numbers(actual), numbers(wanted)
        assert a.shape == b.shape and a.dtype == b.dtype, path
        if not np.allclose(a, b, rtol=rtol, atol=rtol / 100, equal_nan=True):
            rows.append(f"{jax.tree_util.keystr(path)}: {np.max(np.abs(a.astype(np.float64) - b)):.3g}")
    return rows


def assert_equals_one_device(name: str, step: Any, arguments: list[Any], plan: Plan) -> None:
    """The plan's program, made from the text of the plan, and ``jax.jit`` of the step return the same."""
    pure = adapt(step, arguments)
    expected = run(jax.jit(pure.function, compiler_options=O0), pure.arguments)
    compiled = autopar.compile(step, Plan.from_json(plan.to_json())).compiled(*arguments)
    shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in compiled.traced.program.inputs]
    executable = compiled.function.lower(*shapes).compile(compiler_options=O0)

    def call(*arguments: Any) -> Any:
        results = executable(*compiled.place(jax.tree.leaves(arguments)), *compiled.constants)
        return jax.tree.unflatten(compiled.traced.out_tree, results)

    found = run(call, pure.arguments)
    assert differences(found, expected, ROUNDING.get(name, 1e-3)) == []


@pytest.mark.parametrize("name", TABLE)
def test_a_step_under_its_best_plan_equals_one_device(name: str) -> None:
    step, *arguments = STEPS[name]()
    plan = autopar.plan(step, *arguments, cost=slow_device(MESH))
    assert plan.prediction.collectives
    assert {primitive for primitive, _ in plan.solution.replicated_primitives} == REPLICATED.get(name, set())
    assert_equals_one_device(name, step, arguments, plan)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_under_any_plan_equals_one_device(name: str) -> None:
    step, *arguments = STEPS[name]()
    pure = adapt(step, arguments)
    plan, _ = dice_plan(pure.function, pure.arguments, slow_device(MESH), seed=len(name))
    assert_equals_one_device(name, step, arguments, plan)
