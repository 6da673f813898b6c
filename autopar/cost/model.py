"""Prices in seconds: the interface that planner and resharding use, and its roofline implementation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from autopar.cluster import Cluster, Device, Link, Mesh

COLLECTIVES = ("all_gather", "all_reduce", "reduce_scatter", "all_to_all", "collective_permute")


@dataclass(frozen=True)
class LocalCall:
    """An equation at the shapes that one device computes, ready to be timed (``autopar.cost.measured``).

    Attributes:
        signature: primitive, parameters, operand shapes and dtypes as text: what a timing is filed under.
        operands: shape and dtype name of each operand.
        run: computes it.
    """

    signature: str
    operands: tuple[tuple[tuple[int, ...], str], ...]
    run: Callable[..., Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Work:
    """What one device does for one equation.

    Attributes:
        primitive: its name.
        flops: floating-point operations on this device.
        nbytes: bytes that cross the device's memory, with fusion taken into account.
        dtype: name of the operands' dtype, which picks the peak.
        call: the equation itself, for cost models that measure; None where that is not wanted.
    """

    primitive: str
    flops: float
    nbytes: float
    dtype: str
    call: LocalCall | None = None


class CostModel(Protocol):
    """Prices, in seconds on one device. Implementations are frozen and hashable; their calls are cheap."""

    @property
    def mesh(self) -> Mesh:
        """The mesh whose axes ``collective_s`` knows."""
        ...

    @property
    def memory_bytes(self) -> float:
        """The memory of one device, in bytes."""
        ...

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        """Seconds of one collective over ``axes``.

        ``nbytes`` is per device, that of the larger of input and output: all_gather its output,
        reduce_scatter its input, all_reduce, all_to_all and collective_permute the buffer.
        """
        ...

    def compute_s(self, work: Work) -> float:
        """Seconds of one equation."""
        ...

    def memory_s(self, nbytes: float) -> float:
        """Seconds to move ``nbytes`` through device memory."""
        ...


@dataclass(frozen=True)
class Level:
    """A group of ``size`` devices that talk over one kind of link; a collective is a sequence of levels."""

    size: int
    link: Link
    ring: bool

    @property
    def alpha_s(self) -> float:
        """Latency of a pass: a ring takes size - 1 steps, a switch log2(size) (NCCL's trees)."""
        return self.link.alpha_s * (self.size - 1 if self.ring else math.ceil(math.log2(self.size)))

    def gather_s(self, nbytes: float) -> float:
        """All-gather to ``nbytes`` per device, or reduce-scatter from it.

        Each device receives all but its own part. Source: Thakur, Rabenseifner, Gropp, "Optimization of
        Collective Communication Operations in MPICH", 2005.
        """
        return self.alpha_s + nbytes * (self.size - 1) / self.size / self.link.bandwidth_Bps

    def all_to_all_s(self, nbytes: float) -> float:
        """Each device exchanges its part of ``nbytes`` with every other.

        On a ring or line the cut through its middle binds: size/2 devices each send half their buffer across,
        nbytes * size / 4 in all (Austin et al., "How to Scale Your Model", chapter 3).
        """
        share = (self.size - 1) / self.size
        passes = max(share, self.size / 4) if self.ring else share
        return self.alpha_s + nbytes * passes / self.link.bandwidth_Bps

    def permute_s(self, nbytes: float) -> float:
        """Each device sends ``nbytes`` to one other."""
        return self.link.alpha_s + nbytes / self.link.bandwidth_Bps


@dataclass(frozen=True)
class RooflineCost:
    """Roofline computation and alpha-beta collectives from a cluster's data.

    Devices fill the mesh in row-major order, so that the last axes lie inside a domain of fast links. A
    collective over several axes, or over an axis that spans domains, is hierarchical: innermost level first,
    one level after another. (A TPU may use the links of several axes at once; this is not counted on.)
    """

    cluster: Cluster
    mesh: Mesh

    @property
    def memory_bytes(self) -> float:
        """The memory of one device, in bytes."""
        return self.cluster.device.memory_bytes

    def compute_s(self, work: Work) -> float:
        """Roofline: the larger of arithmetic and memory time (Williams, Waterman, Patterson, 2009)."""
        reached = self._reached_flops.get(work.dtype)
        if reached is None:
            device = self.cluster.device
            reached = self._reached_flops[work.dtype] = device.peak(work.dtype) * device.flops_efficiency
        return max(work.flops / reached, self.memory_s(work.nbytes))

    @cached_property
    def _reached_flops(self) -> dict[str, float]:
        """Operations per second by dtype, for the dtypes met so far."""
        return {}

    def memory_s(self, nbytes: float) -> float:
        """Seconds to move ``nbytes`` through device memory."""
        device = self.cluster.device
        return nbytes / (device.memory_Bps * device.memory_efficiency)

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        """Seconds of one collective over ``axes``; free when their sizes are all 1.

        Raises:
            KeyError: an unknown kind.
            ValueError: an axis that the mesh does not have.
        """
        line = self._lines.get((kind, axes))
        if line is None:
            fixed_s = self._levelled_s(kind, 0.0, axes)
            s_per_byte = (self._levelled_s(kind, _MANY_BYTES, axes) - fixed_s) / _MANY_BYTES
            line = self._lines[kind, axes] = (fixed_s, s_per_byte)
        return line[0] + nbytes * line[1]

    @cached_property
    def _lines(self) -> dict[tuple[str, tuple[str, ...]], tuple[float, float]]:
        """The collectives priced so far: every price is a constant plus a multiple of the bytes."""
        return {}

    def _levelled_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        spanned = sorted(axes, key=self.mesh.names.index, reverse=True)
        levels = [replace(level, link=level.link.of(kind)) for name in spanned for level in self._levels[name]]
        if kind in ("all_gather", "reduce_scatter"):
            return _hierarchical_s(levels, nbytes)
        if kind == "all_reduce":
            return 2 * _hierarchical_s(levels, nbytes)
        if kind == "all_to_all":
            return sum(level.all_to_all_s(nbytes) for level in levels)
        if kind == "collective_permute":
            return max((level.permute_s(nbytes) for level in levels), default=0.0)
        raise KeyError(kind)

    @cached_property
    def _levels(self) -> dict[str, tuple[Level, ...]]:
        """For each axis its levels, innermost first: inside a domain, then between domains."""
        levels, stride = {}, 1
        for name, size in self.mesh.axes[::-1]:
            inner = self._inside_domain(size, stride)
            fast = Level(inner, self.cluster.link, ring=self.cluster.topology == "torus")
            slow = Level(size // inner, self.cluster.network, ring=False)
            levels[name] = tuple(level for level in (fast, slow) if level.size > 1)
            stride *= size
        return levels

    def _inside_domain(self, size: int, stride: int) -> int:
        """How many neighbours along an axis share a domain: the largest divisor whose blocks tile it."""
        domain = self.cluster.domain_devices
        if self.mesh.n_devices <= domain:
            return size
        return max(n for n in range(1, size + 1) if size % n == 0 and (n == 1 or domain % (stride * n) == 0))


_MANY_BYTES = 1e15


def _hierarchical_s(levels: list[Level], nbytes: float) -> float:
    """Reduce-scatter from, or all-gather to, ``nbytes``: each level leaves 1/size of it to the next."""
    total_s = 0.0
    for level in levels:
        total_s += level.gather_s(nbytes)
        nbytes /= level.size
    return total_s


def device_of(cost: CostModel) -> Device | None:
    """The device that a cost model prices; None for one that knows no hardware."""
    cluster = getattr(getattr(cost, "inner", cost), "cluster", None)
    return cluster.device if isinstance(cluster, Cluster) else None


def rounds_products(cost: CostModel) -> bool:
    """Whether the devices of a cost model take float32 operands of products as bfloat16; False if it has none."""
    device = device_of(cost)
    return device is not None and device.rounds_products


def overlaps(cost: CostModel) -> bool:
    """Whether the devices of a cost model compute while they send; False if it has none."""
    device = device_of(cost)
    return device is not None and device.overlaps


def on_chip_bytes(cost: CostModel) -> float:
    """Memory on the chip that holds temporaries besides ``memory_bytes``; 0 for a cost model without hardware."""
    device = device_of(cost)
    return 0.0 if device is None else device.on_chip_bytes
