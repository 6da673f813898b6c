"""The pipelines of the literature: a schedule, a preset inside each stage, and how devices are divided."""

from collections.abc import Callable
from dataclasses import dataclass

from autopar.cluster import Mesh
from autopar.errors import MeshError

SUBMESHES = 2
"""Submeshes of a preset where nobody says how many."""


@dataclass(frozen=True)
class PipelinePreset:
    """A pipeline of the literature.

    Attributes:
        schedule: the order of tasks.
        inner: the preset under which each stage is planned.
        submesh: the mesh of a stage on so many devices.
    """

    schedule: str
    inner: str
    submesh: Callable[[int], Mesh]


def outside(n_devices: int) -> Mesh:
    """Data parallelism over all devices of a stage."""
    return Mesh((("data", n_devices),))


def both(n_devices: int) -> Mesh:
    """Tensor parallelism inside, data parallelism outside, as square as it goes."""
    tensor = max(t for t in range(1, n_devices + 1) if n_devices % t == 0 and t * t <= max(n_devices, 2) * 2)
    return Mesh((("data", n_devices // tensor), ("tensor", tensor)))


PIPELINES: dict[str, PipelinePreset] = {
    # Huang et al. 2019: all forward passes, then all backward passes.
    "gpipe": PipelinePreset("gpipe", "dp", outside),
    # PipeDream-Flush (Narayanan et al. 2021): one forward, one backward, no more in flight than stages.
    "1f1b": PipelinePreset("1f1b", "dp", outside),
    # Narayanan et al. 2021b, section 2.2.2: several stages on each submesh.
    "interleaved": PipelinePreset("interleaved", "dp", outside),
    # Megatron-Turing NLG (Smith et al. 2022): pipeline between hosts, tensor inside, data outside.
    "3d": PipelinePreset("1f1b", "megatron", both),
}


def devices_each(n_devices: int, submeshes: int) -> int:
    """Devices of each submesh; raises MeshError where they cannot be shared out evenly."""
    if submeshes < 1 or n_devices % submeshes:
        raise MeshError(
            f"{n_devices} devices cannot be divided among {submeshes} submeshes",
            fix="give a number of stages that divides the devices, or the mesh of each submesh",
        )
    return n_devices // submeshes
