"""Pipelines on 8 CPU devices: every schedule trains the models as one device does, and holds what it says."""

import functools
import importlib
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from autopar.api import Options, plan_prepared
from autopar.api.staging.prepare import prepare_stage
from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.ir.stages import Stage
from autopar.ir.trace import trace
from autopar.lowering.local_program import LocalProgram, build_local_program
from autopar.lowering.pipeline.build import Compiled, Layout, build_pipeline
from autopar.solver.schedule import Schedule, make_schedule

O0 = {"xla_backend_optimization_level": 0}
TEXT = {"layers": 2, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 8, "optimizer": "sgd"}
IMAGE = {"layers": 2, "width": 32, "heads": 4, "image": 8, "batch": 8, "optimizer": "sgd"}
MODELS: dict[str, dict[str, Any]] = {"gpt": TEXT, "bert": TEXT, "vit": IMAGE, "moe": {**TEXT, "experts": 4}}
STEPS = 3


def plan_stage(stage: Stage, mesh: Mesh, microbatches: int) -> LocalProgram:
    """The best local program of a stage on devices so slow that splitting a tiny stage pays."""
    cluster = hardware("v5e")
    device = replace(cluster.device, peak_flops=(("float32", 1e9),), memory_Bps=1e8)
    cost = RooflineCost(replace(cluster, device=device, link=replace(cluster.link, alpha_s=1e-7)), mesh)
    prepared = prepare_stage(stage, cost, microbatches)
    return build_local_program(stage.program, plan_prepared(prepared, cost, Options(cost=cost)), cost)


def pipeline(step: Any, arguments: tuple[Any, ...], schedule: Schedule, *meshes: str) -> Compiled:
    """The pipeline on as many submeshes as the schedule wants; one mesh stands for all."""
    each = [Mesh.parse(mesh) for mesh in meshes]
    layout = Layout(schedule, tuple(each * schedule.n_devices if len(each) == 1 else each))
    return build_pipeline(trace(step, *arguments), layout, plan_stage, settings={"compiler_options": O0})


@functools.cache
def made(model: str) -> tuple[Any, ...]:
    return importlib.import_module(f"models.{model}").make(**MODELS[model])


@functools.cache
def on_one_device(model: str) -> list[tuple[Any, Any]]:
    """State and metrics after each step."""
    step, state, batch = made(model)
    run, found = jax.jit(step, compiler_options=O0), []
    for _ in range(STEPS):
        state, metrics = run(state, batch)
        found.append((state, metrics))
    return found


def distance(a: Any, b: Any) -> float:
    return float(
        np.sqrt(
            sum(
                np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
            )
        )
    )


def table() -> list[Any]:
    default = {
        ("gpt", "1f1b", 2, "data=2"),
    }
    rows = []
    for model in MODELS:
        for schedule in ("gpipe", "1f1b", "zb_h1", "interleaved"):
            for p in (2, 4):
                for mesh in ("data=1", "data=2", "data=2,tensor=2"):
                    row = (model, schedule, p, mesh)
                    if p * Mesh.parse(mesh).n_devices <= 8:
                        marks = () if row in default else pytest.mark.slow
                        rows.append(pytest.param(*row, marks=marks, id="-".join(map(str, row))))
    return rows


@pytest.mark.parametrize(("model", "name", "p", "mesh"), table())
def test_a_pipeline_trains_as_one_device_does(model: str, name: str, p: int, mesh: str) -> None:
    step, state, batch = made(model)
    schedule = make_schedule(name, p, 4, 2 if name == "interleaved" and p == 2 else None)
    compiled = pipeline(step, (state, batch), schedule, mesh)
    start = state.params
    for expected, reference in on_one_device(model):
        state, metrics = compiled(state, batch)
        for key in reference:
            assert float(metrics[key]) == pytest.approx(float(reference[key]), rel=1e-5, abs=1e-7)
        assert distance(state.params, expected.params) <= 1e-4 * distance(expected.params, start)
    assert all(held <= most for held, most in zip(compiled.peaks, schedule.in_flight_bounds, strict=True))
