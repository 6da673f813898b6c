"""The Python surface: ``parallelize``, ``plan`` and ``compile``. Thin; the work is done in planner and lowering."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

from autopar.api.explaining import explain
from autopar.api.pipelining import PipelineStep, pipeline, plan_stages
from autopar.api.planning import (
    Options,
    argument_shardings,
    detect_hardware,
    equation_seconds,
    plan_prepared,
    plan_traced,
    prediction,
    traced_in_time,
)
from autopar.api.running import ParallelStep, Settings, check_fits
from autopar.api.splitting import AUTO
from autopar.ir.arguments import adapt
from autopar.plan import PipelinePlan, Plan

__all__ = [
    "AUTO",
    "Options",
    "ParallelStep",
    "PipelineStep",
    "Settings",
    "argument_shardings",
    "check_fits",
    "compile",
    "detect_hardware",
    "equation_seconds",
    "explain",
    "parallelize",
    "pipeline",
    "plan",
    "plan_prepared",
    "plan_stages",
    "plan_traced",
    "prediction",
    "traced_in_time",
]


def plan(step: Callable[..., Any], *args: Any, static_argnums: Sequence[int] = (), **options: Any) -> Plan:
    """The best plan for ``step(*args)``; shapes suffice, nothing runs and no device is touched.

    Args:
        step: a train step: a pure function of pytrees, or one that updates Flax NNX objects.
        *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.
        static_argnums: arguments that are hashable Python values.
        **options: see ``Options``.

    Raises:
        TraceError, MeshError, PinError, PresetError, HardwareError, InfeasibleError: see their texts.
    """
    adapted = adapt(step, args, static_argnums)
    return plan_traced(*traced_in_time(adapted), Options(**options))


@overload
def compile(step: Callable[..., Any], plan: Plan, **settings: Any) -> ParallelStep: ...


@overload
def compile(step: Callable[..., Any], plan: PipelinePlan, **settings: Any) -> PipelineStep: ...


def compile(step: Callable[..., Any], plan: Plan | PipelinePlan, **settings: Any) -> ParallelStep | PipelineStep:
    """A callable that runs ``step`` under a plan.

    Args:
        step: the step that the plan was made for.
        plan: the plan, for one mesh or of a pipeline.
        **settings: those of ``Settings``, or of ``Pipeline`` that are no part of the plan.

    Raises:
        PlanError: at the first call, if the plan was made for another program.
        MeshError: there are fewer devices than the plan's mesh needs.
    """
    if isinstance(plan, PipelinePlan):
        return pipeline(step, plan=plan, **settings)
    return ParallelStep(step, Options(mesh=plan.mesh), Settings(plan=plan, **settings))


_SETTINGS = ("plan", "donate", "static_argnums", "devices", "cache_dir", "lower")


def parallelize(step: Callable[..., Any] | None = None, **options: Any) -> Any:
    """Decorates a single-device train step so that it runs on every device.

    Args:
        step: the step; omitted when options are given: ``@parallelize(mesh="data=2,tensor=4")``.
        **options: those of ``Options`` and ``Settings``.
    """
    if step is None:
        return functools.partial(parallelize, **options)
    settings = {name: options.pop(name) for name in _SETTINGS if name in options}
    return ParallelStep(step, Options(**options), Settings(**settings))
