"""Hardware and its logical grid: meshes, devices, links and clusters. No JAX."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from autopar.errors import MeshError


@dataclass(frozen=True)
class Mesh:
    """A logical grid of devices with named axes, major axis first.

    >>> mesh = Mesh.parse("data=2,tensor=4")
    >>> mesh.n_devices, mesh.names, str(mesh)
    (8, ('data', 'tensor'), 'data=2,tensor=4')
    """

    axes: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.axes):
            raise MeshError(f"mesh {self} names an axis twice", fix="give every axis its own name")
        if not self.axes or any(size < 1 for _, size in self.axes):
            raise MeshError(
                f"mesh '{self}' needs at least one axis, each of size 1 or more",
                fix="write it as data=2,tensor=4",
            )

    @staticmethod
    def parse(text: str) -> "Mesh":
        """Reads ``data=2,tensor=4``; raises MeshError on anything else."""
        axes = []
        for part in text.split(","):
            name, _, size = part.partition("=")
            if not name.strip().isidentifier() or not size.strip().isdecimal():
                raise MeshError(f"mesh '{text}': '{part}' is not name=size", fix="write it as data=2,tensor=4")
            axes.append((name.strip(), int(size)))
        return Mesh(tuple(axes))

    @property
    def names(self) -> tuple[str, ...]:
        """The axis names, major first."""
        return tuple(name for name, _ in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The axis sizes, major first."""
        return tuple(size for _, size in self.axes)

    @property
    def sizes(self) -> dict[str, int]:
        """Devices per axis, by name."""
        return dict(self.axes)

    @property
    def n_devices(self) -> int:
        """How many devices the mesh holds."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes)


def mesh_candidates(n_devices: int, names: tuple[str, ...]) -> tuple[Mesh, ...]:
    """Every mesh of ``n_devices`` over the axes ``names``: all ordered factorisations, sizes of 1 included.

    >>> [str(mesh) for mesh in mesh_candidates(4, ("data", "tensor"))]
    ['data=1,tensor=4', 'data=2,tensor=2', 'data=4,tensor=1']
    """
    return tuple(Mesh(tuple(zip(names, shape, strict=True))) for shape in _shapes(n_devices, len(names)))


def _shapes(n_devices: int, rank: int) -> Iterator[tuple[int, ...]]:
    if rank == 1:
        yield (n_devices,)
        return
    for size in range(1, n_devices + 1):
        if n_devices % size == 0:
            yield from ((size, *rest) for rest in _shapes(n_devices // size, rank - 1))


@dataclass(frozen=True)
class Device:
    """One accelerator: what it computes, holds and moves.

    Attributes:
        name: as its maker calls it.
        peak_flops: per dtype name, the floating-point operations per second of its matrix unit.
        flops_efficiency: the share of the peak that a large matrix product reaches, in (0, 1].
        memory_bytes: the memory a program may use.
        memory_Bps: the bandwidth of that memory in bytes per second.
        memory_efficiency: the share of it that a streaming kernel reaches, in (0, 1].
        on_chip_bytes: what the compiler uses of the memory on the chip (TPU VMEM) for temporaries.
        overlaps: whether it computes while it sends and receives.
    """

    name: str
    peak_flops: tuple[tuple[str, float], ...]
    flops_efficiency: float
    memory_bytes: float
    memory_Bps: float
    memory_efficiency: float
    on_chip_bytes: float = 0.0
    overlaps: bool = False

    @property
    def rounds_products(self) -> bool:
        """Whether matrix products take float32 operands as bfloat16 (TPUs): what only they read is kept rounded."""
        peaks = dict(self.peak_flops)
        return peaks["float32"] == peaks.get("bfloat16")

    def peak(self, dtype: str) -> float:
        """Operations per second at ``dtype``; a dtype without a figure of its own takes that of float32.

        The two 16-bit floats stand for each other, and a narrower float for the widest known below 32 bits.
        """
        peaks = dict(self.peak_flops)
        narrow = ("bfloat16", "float16") if "16" in dtype or dtype.startswith("float8") else ()
        return next((peaks[name] for name in (dtype, *narrow) if name in peaks), peaks["float32"])


@dataclass(frozen=True)
class Link:
    """A connection of one device.

    Attributes:
        bandwidth_Bps: bytes per second that it receives while sending as many.
        alpha_s: seconds that one step of a collective takes however little it moves.
        kinds: collectives that take other times than these two figures say: (kind, factor of the latency, factor of
            the time per byte). Devices that share memory, for one, reduce in one meeting, not in two.
    """

    bandwidth_Bps: float
    alpha_s: float
    kinds: tuple[tuple[str, float, float], ...] = ()

    def of(self, kind: str) -> "Link":
        """The figures that hold for one kind of collective."""
        for name, latency, transfer in self.kinds:
            if name == kind:
                return Link(self.bandwidth_Bps / transfer if transfer else math.inf, self.alpha_s * latency)
        return self


@dataclass(frozen=True)
class Cluster:
    """Equal devices in domains of fast links, joined by a network.

    Attributes:
        name: of the profile.
        device: what stands at each place of the mesh.
        topology: how a domain is wired: "torus" (each mesh axis is a line or ring of neighbours) or "switch"
            (any two devices of the domain talk at full bandwidth).
        domain_devices: how many consecutive devices share the fast links (a TPU pod, an NVLink domain).
        devices_per_host: how many devices one process drives.
        link: the fast link, per device (on a torus: per device and axis).
        network: the link between domains, per device.
    """

    name: str
    device: Device
    topology: str
    domain_devices: int
    devices_per_host: int
    link: Link
    network: Link
