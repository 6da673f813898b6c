"""Every model x schedule x number of submeshes x submesh on 8 CPU devices: pipelines train as one device does.

    python -m benchmarks.pipelines [--models gpt moe] [--schedules 1f1b] [--submeshes 2 4] [--meshes data=2] [--steps 5]

One line per case: largest relative difference of the loss, largest distance of the parameters relative to how far they
went, the most activations that a device held and what the schedule allows.
"""

import argparse
import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import numpy as np

from autopar.api import Options, plan_prepared
from autopar.api.staging.prepare import prepare_stage
from autopar.cluster import Mesh
from autopar.ir.stages import Stage
from autopar.ir.trace import Traced, trace
from autopar.lowering.instructions import LocalProgram
from autopar.lowering.local_program import build_local_program
from autopar.lowering.pipeline.build import Compiled, compile_pipeline, submeshes
from autopar.lowering.pipeline.cut import Layout, cut_for
from autopar.solver.schedule import SCHEDULES, Schedule, make_schedule
from autopar.solver.schedule.data import ScheduleError
from benchmarks.cases import O0, make, slow_device

TEXT = {"layers": 2, "width": 32, "heads": 4, "vocab": 64, "seq": 16, "batch": 8, "optimizer": "sgd"}
IMAGE = {"layers": 2, "width": 32, "heads": 4, "image": 8, "batch": 8, "optimizer": "sgd"}
MODELS: dict[str, dict[str, Any]] = {"gpt": TEXT, "bert": TEXT, "vit": IMAGE, "moe": {**TEXT, "experts": 4}}
SUBMESHES = (2, 4)
MESHES = ("data=1", "data=2", "data=2,tensor=2")
MICROBATCHES = (4, 8)
"""The first that the schedule takes."""


@dataclass(frozen=True)
class Case:
    """One model under one schedule; ``mesh`` is that of each of ``n_submeshes``."""

    model: str
    schedule: str
    n_submeshes: int
    mesh: str

    def __str__(self) -> str:
        return f"{self.model}-{self.schedule}-{self.n_submeshes}x({self.mesh})"

    def tasks(self) -> Schedule:
        """The schedule."""
        for microbatches in MICROBATCHES[:-1]:
            with contextlib.suppress(ScheduleError):
                return make_schedule(self.schedule, self.n_submeshes, microbatches, None)
        return make_schedule(self.schedule, self.n_submeshes, MICROBATCHES[-1], None)


def cases() -> Iterator[Case]:
    """Every case that 8 devices have room for."""
    for model in MODELS:
        for schedule in SCHEDULES:
            for n_submeshes in SUBMESHES:
                for mesh in MESHES:
                    if n_submeshes * Mesh.parse(mesh).n_devices <= 8:
                        yield Case(model, schedule, n_submeshes, mesh)


def plan_stage(stage: Stage, mesh: Mesh, microbatches: int) -> LocalProgram:
    """The best local program of a stage on devices so slow that splitting a tiny stage pays."""
    cost = slow_device(str(mesh))
    prepared = prepare_stage(stage, cost, microbatches)
    return build_local_program(stage.program, plan_prepared(prepared, cost, Options(cost=cost)), cost)


def compiled_layout(
    traced: Traced,
    layout: Layout,
    plan: Callable[[Stage, Mesh, int], LocalProgram] = plan_stage,
    devices: Sequence[Any] | None = None,
) -> Compiled:
    """A traced step as a pipeline whose stages are planned one by one, compiled without optimisations."""
    schedule, stages = layout.schedule, cut_for(traced, layout)
    places = [layout.meshes[device] for device in schedule.placements[0]]
    programs = [plan(s, mesh, schedule.n_microbatches) for s, mesh in zip(stages.stages, places, strict=True)]
    meshes = submeshes(layout.meshes, devices)
    return compile_pipeline(traced, stages, programs, meshes, schedule, {"compiler_options": O0})


def build(step: Any, arguments: tuple[Any, ...], schedule: Schedule, *meshes: str) -> Compiled:
    """The pipeline on as many submeshes as the schedule wants; one mesh stands for all."""
    each = [Mesh.parse(mesh) for mesh in meshes]
    layout = Layout(schedule, tuple(each * schedule.n_devices if len(each) == 1 else each))
    return compiled_layout(trace(step, *arguments), layout)


@functools.cache
def made(model: str, n_stages: int) -> tuple[Any, ...]:
    """(step, state, batch) with a layer for each stage, two at least."""
    return make(model, **(MODELS[model] | {"layers": max(2, n_stages // 2)}))


@functools.cache
def on_one_device(model: str, n_stages: int, steps: int) -> tuple[tuple[Any, Any], ...]:
    """State and metrics after each step of ``jax.jit(step)``."""
    step, state, batch = made(model, n_stages)
    run, found = jax.jit(step, compiler_options=O0), []
    for _ in range(steps):
        state, metrics = run(state, batch)
        found.append((state, metrics))
    return tuple(found)


@dataclass(frozen=True)
class Outcome:
    """How a pipeline compares with one device.

    Attributes:
        loss_error: the largest relative difference of a metric; of one that is 0, the difference.
        parameter_error: the largest distance of the parameters relative to the distance from where they began.
        held: the most activations that each device held at one time.
        allowed: the most that the schedule lets it hold.
    """

    loss_error: float
    parameter_error: float
    held: tuple[int, ...]
    allowed: tuple[int, ...]


def outcome(case: Case, steps: int) -> Outcome:
    """Trains a case beside one device."""
    schedule = case.tasks()
    step, state, batch = made(case.model, schedule.n_stages)
    compiled, start = build(step, (state, batch), schedule, case.mesh), state.params
    loss_error = parameter_error = 0.0
    for expected, reference in on_one_device(case.model, schedule.n_stages, steps):
        state, metrics = compiled(state, batch)
        pairs = ((float(metrics[key]), float(value)) for key, value in reference.items())
        errors = (abs(found - value) / (abs(value) or 1.0) for found, value in pairs)
        loss_error = max(loss_error, *errors)
        went = distance(expected.params, start)
        parameter_error = max(parameter_error, distance(state.params, expected.params) / went)
    return Outcome(loss_error, parameter_error, tuple(compiled.peaks), tuple(schedule.in_flight_bounds))


def distance(a: Any, b: Any) -> float:
    """Euclidean distance of two pytrees."""
    pairs: Sequence[tuple[Any, Any]] = list(zip(*map(jax.tree.leaves, (a, b)), strict=True))
    return float(np.sqrt(sum(np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in pairs)))


def main() -> None:
    """Prints one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--submeshes", nargs="+", type=int, default=list(SUBMESHES))
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--steps", type=int, default=5)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:  # cases share most of their programs
        jax.config.update("jax_compilation_cache_dir", kept)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        print(f"{'case':44} {'loss error':>10} {'parameters':>10}  {'held / allowed':32} {'seconds':>8}", flush=True)
        for case in cases():
            chosen = case.schedule in wanted.schedules and case.n_submeshes in wanted.submeshes
            if case.model in wanted.models and case.mesh in wanted.meshes and chosen:
                start = time.perf_counter()
                found = outcome(case, wanted.steps)
                held = f"{' '.join(map(str, found.held))} / {' '.join(map(str, found.allowed))}"
                seconds = time.perf_counter() - start
                errors = f"{found.loss_error:10.1e} {found.parameter_error:10.1e}"
                print(f"{case!s:44} {errors}  {held:32} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
