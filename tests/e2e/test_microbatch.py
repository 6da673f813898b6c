"""Steps in microbatches, planned and run on eight CPU devices: exact, with gradients reduced when the plan says."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.errors import PlanError
from autopar.lowering.audit import audit
from autopar.plan import Plan, Splitting

QUICKLY = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def assert_close(got: Any, want: Any, rtol: float = 2e-5) -> None:
    """Equal up to rounding of the largest element of each leaf."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=rtol * max(1e-2, np.abs(b).max(initial=0.0)), rtol=0)


WIDTH, ROWS = 64, 4096


def regression(params: Any, batch: Any) -> Any:
    def loss(params: Any) -> Any:
        h = jnp.tanh(batch["x"] @ params["up"])
        return jnp.mean((h @ params["down"] - batch["x"]) ** 2)

    value, gradients = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


def regression_arguments() -> Any:
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"up": normal(WIDTH, 4 * WIDTH), "down": normal(4 * WIDTH, WIDTH)}, {"x": normal(ROWS, WIDTH)}


def planned(**options: Any) -> Any:
    """The regression, its plan, and what the compiler made of it."""
    parallel = autopar.parallelize(regression, **{"mesh": "data=4", "hardware": "v5p", "donate": False} | options)
    args = regression_arguments()
    compiled = parallel.compiled(*args)
    shapes = [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in compiled.local.inputs]
    return parallel, compiled.plan, audit(compiled.function.lower(*shapes).compile(), compiled.plan.mesh)


def reductions(collectives: Any) -> dict[tuple[str, ...], int]:
    counts: dict[tuple[str, ...], int] = {}
    for one in collectives:
        if one.kind in ("all_reduce", "reduce_scatter"):
            counts[one.kind, *one.axes] = counts.get((one.kind, *one.axes), 0) + one.count
    return counts


def test_gradients_stay_partial_in_the_loop_and_are_reduced_once_after_it():
    _, plan, built = planned(microbatches=4, preset="dp")
    totals = {name: spec for name, spec in plan.values.items() if name.endswith("/so_far")}
    assert len(totals) == 3 and all(spec.partial == {"data"} for spec in totals.values())
    assert reductions(built.collectives) == reductions(plan.prediction.collectives)
    assert sum(reductions(built.collectives).values()) == 3  # two gradients and the loss


def test_pinned_totals_are_scattered_in_every_microbatch():
    _, plan, built = planned(
        microbatches=4, pins=(("up|down", ","), ("^tanh$", "data,"), ("dot_general.*/so_far", "data,"))
    )
    assert reductions(built.collectives) == reductions(plan.prediction.collectives)
    assert reductions(built.collectives)["reduce_scatter", "data"] == 2 * 4


def test_the_default_is_one_microbatch_where_memory_does_not_bind():
    _, plan, _ = planned(microbatches="auto")
    assert plan.microbatches == 1


def test_microbatches_are_chosen_so_that_the_step_fits():
    _, whole, _ = planned(preset="dp", hardware="a100")
    limit_gb = 0.7 * whole.prediction.peak_bytes / 1e9
    parallel, plan, _ = planned(preset="dp", hardware="a100", microbatches="auto", memory_gb=limit_gb)
    assert plan.microbatches > 1 and plan.prediction.peak_bytes <= limit_gb * 1e9
    args = regression_arguments()
    assert_close(parallel(*args), QUICKLY(regression)(*args))


def test_a_saved_plan_brings_its_microbatches_and_chunks(tmp_path):
    options = {"microbatches": 2, "chunk": {"dot_general[1]": 2}, "mesh": "data=2"}
    _, plan, _ = planned(**options)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.splitting == plan.splitting == Splitting(2, (("dot_general", 1, 2),))
    args = regression_arguments()
    assert_close(autopar.compile(regression, loaded, donate=False)(*args), QUICKLY(regression)(*args))
    params, batch = args
    odd = {"x": batch["x"][:4095]}
    with pytest.raises(PlanError, match="2 microbatches do not divide the batch of 4095"):
        autopar.compile(regression, loaded)(params, odd)


def test_a_literal_is_added_once_where_a_loss_is_partial():
    """``loss + 1`` is not ``loss + 4`` on four devices."""

    def step(params: Any, batch: Any) -> Any:
        return params, jnp.mean((batch["x"] @ params["up"]) ** 2) + 1.0

    args = regression_arguments()
    parallel = autopar.parallelize(
        step, mesh="data=4", hardware="v5e", pins=(("^x$", "data,"), ("up", ",")), donate=False
    )
    assert_close(parallel(*args), QUICKLY(step)(*args))


@pytest.mark.parametrize("options", [{"microbatches": 8}, {"chunk": {"dot_general[1]": 8}}], ids=["batch", "hidden"])
def test_peak_memory_falls_as_predicted(options):
    _, whole, built_whole = planned(hardware="a100", preset="dp")
    _, split, built_split = planned(hardware="a100", preset="dp", **options)
    assert split.prediction.peak_bytes < 0.5 * whole.prediction.peak_bytes
    assert built_split.peak_bytes < 0.5 * built_whole.peak_bytes
    once = {("all_reduce", "data"): 3}
    assert reductions(built_split.collectives) == reductions(split.prediction.collectives) == once
    assert split.prediction.flops == pytest.approx(built_split.flops, rel=0.1)
