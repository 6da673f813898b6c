"""Training under a plan, and the same steps on one device to compare with."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx

from autopar import api
from autopar.cli.console import progress
from autopar.cli.planning import devices_for
from autopar.errors import TargetError
from autopar.ir.arguments import has_objects
from autopar.plan import PipelinePlan, Plan
from autopar.targets import Target

TOLERANCE = 1e-4
"""Largest relative difference of losses between the plan and one device."""


@dataclass(frozen=True)
class Training:
    """What some steps gave.

    Attributes:
        loss: of each step.
        step_times_s: seconds of each step; the first one compiles.
        devices: the platform of each device that the plan ran on.
        reference_loss: the same on one device; empty without a check.
    """

    loss: tuple[float, ...]
    step_times_s: tuple[float, ...]
    devices: tuple[str, ...]
    reference_loss: tuple[float, ...] = field(default=())

    @property
    def step_time_s(self) -> float:
        """The median after the first step."""
        return statistics.median(self.step_times_s[1:] or self.step_times_s)

    @property
    def max_rel_error(self) -> float:
        """The largest relative difference from the reference."""
        pairs = zip(self.loss, self.reference_loss, strict=True)
        return max((abs(a - b) / max(abs(b), 1e-30) for a, b in pairs), default=0.0)


def train(target: Target, plan: Plan | PipelinePlan, steps: int, check: bool) -> Training:
    """Runs a plan on the target's state and batch; with ``check``, one device first."""
    with progress(f"making the state of {target.text}") as update:
        step, state, batch = target.real()
        reference: list[float] = []
        if check:
            update(f"{steps} steps on one device, to compare with")
            reference, _ = _losses(_serial(step, state), _copied(state), batch, steps)
        meshes = plan.meshes if isinstance(plan, PipelinePlan) else (plan.mesh,)
        update(f"compiling for mesh {', '.join(map(str, dict.fromkeys(meshes)))}")
        devices = devices_for(*meshes)
        parallel = api.compile(step, plan, devices=devices)
        losses, times_s = _losses(parallel, state, batch, steps, lambda i: update(f"step {i + 1} of {steps}"))
    return Training(tuple(losses), tuple(times_s), tuple(d.platform for d in devices), tuple(reference))


def _losses(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    steps: int,
    tell: Callable[[int], None] = lambda i: None,
) -> tuple[list[float], list[float]]:
    """Losses and seconds of steps on one batch."""
    losses, times_s = [], []
    for i in range(steps):
        tell(i)
        start = time.perf_counter()
        result = step(state, batch)
        jax.block_until_ready(jax.tree.leaves(result))
        times_s.append(time.perf_counter() - start)
        state, metrics = _parts(result, state)
        losses.append(_loss(metrics))
    return losses, times_s


def _parts(result: Any, state: Any) -> tuple[Any, Any]:
    """The next state and the metrics; a step that updates its objects in place returns only metrics."""
    if isinstance(result, tuple) and len(result) > 1:
        new_state, metrics, *_ = result
        if jax.tree.structure(new_state) == jax.tree.structure(state):
            return new_state, metrics
    return state, result


def _loss(metrics: Any) -> float:
    """The entry ``loss``, or the first scalar."""
    if isinstance(metrics, dict) and "loss" in metrics:
        return float(metrics["loss"])
    scalars = [leaf for leaf in jax.tree.leaves(metrics) if getattr(leaf, "shape", None) == ()]
    if not scalars:
        raise TargetError("the step returns no loss", fix="return (state, loss) or (state, {'loss': loss})")
    return float(scalars[0])


def _serial(step: Callable[..., Any], state: Any) -> Callable[..., Any]:
    """The step on one device, compiled by JAX alone."""
    return nnx.jit(step) if has_objects(state) else jax.jit(step)


def _copied(state: Any) -> Any:
    """A state whose updates leave the original alone."""
    return nnx.clone(state) if has_objects(state) else state


def losses_table(training: Training) -> Sequence[tuple[str, ...]]:
    """Rows of step, loss, and the loss on one device."""
    checked = training.reference_loss or (None,) * len(training.loss)
    return [
        (str(i), f"{loss:.6f}", "" if one is None else f"{one:.6f}")
        for i, (loss, one) in enumerate(zip(training.loss, checked, strict=True), 1)
    ]
