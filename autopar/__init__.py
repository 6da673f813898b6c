"""autopar: from a single-device JAX train step to the best parallel program for a mesh of devices.

The public names are loaded on first use, so that plans can be read and problems solved without JAX.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from autopar.plan import PipelinePlan, Plan, load_plan

if TYPE_CHECKING:
    from autopar.api import compile, explain, parallelize
    from autopar.api.pipelining import pipeline, plan_stages
    from autopar.cluster import Mesh
    from autopar.errors import AutoparError
    from autopar.lowering.morph import morph
    from autopar.planner.diff import diff
    from autopar.sharding.factors import ShardingRule
    from autopar.sharding.registry import local_rule, sharding_rule
    from autopar.spec import Spec

__version__ = "0.1.0"

_HOMES = {
    "compile": "autopar.api",
    "diff": "autopar.planner.diff",
    "explain": "autopar.api",
    "morph": "autopar.lowering.morph",
    "parallelize": "autopar.api",
    "pipeline": "autopar.api.pipelining",
    "plan_stages": "autopar.api.pipelining",
    "Mesh": "autopar.cluster",
    "AutoparError": "autopar.errors",
    "ShardingRule": "autopar.sharding.factors",
    "local_rule": "autopar.sharding.registry",
    "sharding_rule": "autopar.sharding.registry",
    "Spec": "autopar.spec",
}

__all__ = [
    "AutoparError",
    "Mesh",
    "PipelinePlan",
    "Plan",
    "ShardingRule",
    "Spec",
    "compile",
    "diff",
    "explain",
    "load_plan",
    "local_rule",
    "morph",
    "parallelize",
    "pipeline",
    "plan",
    "plan_stages",
    "sharding_rule",
]


def plan(step: Callable[..., Any], *args: Any, **options: Any) -> Plan:
    """The best plan for ``step(*args)``: see ``autopar.api.plan``.

    Written out here because the module ``autopar.plan``, once imported, would hide a name loaded on first use.
    """
    from autopar import api

    return api.plan(step, *args, **options)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
