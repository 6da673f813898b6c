"""What the solver minimises is what the lowered program costs; and any plan computes what the step computes."""

import jax
import numpy as np
import pytest
from arbitrary import dice_plan, v5e
from tiny_steps import STEPS

import autopar

MESHES = ("x=8", "data=2,tensor=4", "a=2,b=2,c=2")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", STEPS)
def test_the_solver_and_the_instructions_agree_on_the_price_of_any_plan(name, mesh):
    step, args = STEPS[name]
    plan, objective_s = dice_plan(step, args, v5e(mesh), seed=len(name))
    assert plan.prediction.serial_s == pytest.approx(objective_s, rel=1e-9)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["mlp", "scan", "cond"])
def test_the_objective_of_the_best_plan_is_its_predicted_step(name, mesh):
    step, args = STEPS[name]
    plan = autopar.plan(step, *args, mesh=mesh, hardware="v5e")
    assert plan.solution.proven_optimal
    assert plan.prediction.serial_s == pytest.approx(plan.solution.objective_s, rel=1e-9)


SLOW = ("nested", "remat", "clipped")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in STEPS])
def test_any_plan_computes_what_one_device_computes(name):
    step, args = STEPS[name]
    plan, _ = dice_plan(step, args, v5e("data=2,tensor=4"), seed=1 + len(name))
    expected = jax.jit(step)(*args)
    actual = autopar.compile(step, plan)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
