"""One plan in all processes: a search that runs out of time may end elsewhere in each of them."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax

from autopar.lowering.processes import agreed
from autopar.plan import PipelinePlan, Plan
from autopar.plan.pipeline_codec import decode

AnyPlan = TypeVar("AnyPlan", Plan, PipelinePlan)


def agreed_plan(plan: AnyPlan, devices: Sequence[Any] | None) -> AnyPlan:
    """The plan of the first process, in all that have one of its devices.

    Args:
        plan: this process's own.
        devices: those to run on, first those of the plan; None means those that JAX sees.
    """
    if not jax.distributed.is_initialized():
        return plan
    mine = (jax.devices() if devices is None else devices)[: _n_devices(plan)]
    if len({device.process_index for device in mine}) == 1:
        return plan
    text = plan.to_json()
    told = agreed(text, mine)
    return plan if told == text else decode(told, "the plan of the first process")  # type: ignore[return-value]


def _n_devices(plan: Plan | PipelinePlan) -> int:
    return plan.mesh.n_devices if isinstance(plan, Plan) else plan.n_devices
