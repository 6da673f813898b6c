"""autopar: from a single-device JAX train step to the best parallel program for a mesh of devices.

The public names are loaded on first use, so that plans can be read and problems solved without JAX.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.api import compile, parallelize, plan
    from autopar.cluster import Mesh
    from autopar.errors import AutoparError
    from autopar.plan import Plan
    from autopar.sharding.factors import ShardingRule
    from autopar.sharding.registry import local_rule, sharding_rule
    from autopar.spec import Spec

__version__ = "0.1.0"

_HOMES = {
    "compile": "autopar.api",
    "parallelize": "autopar.api",
    "plan": "autopar.api",
    "Mesh": "autopar.cluster",
    "AutoparError": "autopar.errors",
    "Plan": "autopar.plan",
    "ShardingRule": "autopar.sharding.factors",
    "local_rule": "autopar.sharding.registry",
    "sharding_rule": "autopar.sharding.registry",
    "Spec": "autopar.spec",
}

__all__ = [
    "AutoparError",
    "Mesh",
    "Plan",
    "ShardingRule",
    "Spec",
    "compile",
    "local_rule",
    "parallelize",
    "plan",
    "sharding_rule",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autopar' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
