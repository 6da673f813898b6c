"""Measures the devices at hand and fits the figures of a hardware profile to them by least squares."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax

from autopar.cluster import Cluster, Device, Link, Mesh
from autopar.cost import timing
from autopar.cost.model import COLLECTIVES, RooflineCost
from autopar.cost.profiles import write_profile

Progress = Callable[[str, int, int], None]
"""Called before each measurement with what it is, its number from 0 and how many there are."""


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
        widths: of the square matrices that are multiplied.
        dtypes: of the matrices; float32 is needed.
        nbytes: sizes of the buffers that are streamed and sent, per device.
    """

    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    nbytes: tuple[int, ...] = (2**14, 2**18, 2**21, 2**24)


@dataclass(frozen=True)
class Sample:
    """One measurement: a matrix product, a copy or a collective; its flops or bytes; its seconds."""

    kind: str
    dtype: str
    amount: float
    seconds: float


def calibrate(
    devices: Sequence[Any] | None = None,
    sizes: Sizes | None = None,
    progress: Progress | None = None,
) -> tuple[Cluster, tuple[Sample, ...]]:
    """The measured profile of ``devices`` (JAX devices, all by default), and the measurements behind it.

    Takes about a second per measurement on CPU. All devices work at the same time. With one device there
    are no collectives: its link is its own memory.
    """
    sizes, mesh = sizes or Sizes(), timing.device_mesh(devices)
    jobs = list(_jobs(sizes, mesh))
    samples = []
    for number, (kind, dtype, amount, measure) in enumerate(jobs):
        if progress:
            progress(f"{kind} {dtype} {amount:.3g}", number, len(jobs))
        samples.append(Sample(kind, dtype, amount, measure()))
    processes = [device.process_index for device in mesh.devices.flat]
    return fit(samples, mesh.devices.flat[0], mesh.size, processes.count(processes[0])), tuple(samples)


def write_calibration(path: str | Path, cluster: Cluster, samples: Sequence[Sample]) -> None:
    """Writes the profile that ``hardware(path)`` reads."""
    source = f"measured: {len(samples)} timings with JAX {jax.__version__}"
    fields = ("peak_flops", "flops_efficiency", "memory_bytes", "memory_Bps", "memory_efficiency")
    figures = ("bandwidth_Bps", "alpha_s", "kinds")
    links = (f"{link}.{figure}" for link in ("link", "network") for figure in figures)
    places = ("domain_devices", "devices_per_host")
    write_profile(path, cluster, dict.fromkeys((*fields, *places, *links), source))


_Job = tuple[str, str, float, Callable[[], float]]


def _jobs(sizes: Sizes, mesh: jax.sharding.Mesh) -> Iterator[_Job]:
    for dtype, width in itertools.product(sizes.dtypes, sizes.widths):
        yield "matmul", dtype, 2.0 * width**3, _timer(lambda x: x @ x, (width, width), dtype, mesh)
    for nbytes in sizes.nbytes:
        shape = (nbytes // 4,)
        yield "copy", "float32", 2.0 * nbytes, _timer(lambda x: x + 1, shape, "float32", mesh)
    if mesh.size > 1:
        for kind, nbytes in itertools.product(COLLECTIVES, sizes.nbytes):
            shape, run = _collective(kind, nbytes, mesh.size)
            yield kind, "float32", 4.0 * _buffer(kind, shape, mesh.size), _timer(run, shape, "float32", mesh)


def _timer(run: Callable[..., Any], shape: tuple[int, ...], dtype: str, mesh: jax.sharding.Mesh) -> Callable[[], float]:
    def measure() -> float:
        program = timing.on_every_device(run, mesh)
        return timing.seconds_per_call(program, [timing.random_operand(shape, dtype, mesh)])

    return measure


def _collective(kind: str, nbytes: int, size: int) -> tuple[tuple[int, ...], Callable[..., Any]]:
    """The local input shape (rows x devices) and the program of one collective on about ``nbytes``."""
    axis, rows = timing.AXIS, max(nbytes // 4 // size, 1)
    ring = [(at, (at + 1) % size) for at in range(size)]
    runs: dict[str, Callable[..., Any]] = {
        "all_gather": lambda x: lax.all_gather(x, axis, tiled=True),
        "all_reduce": lambda x: lax.psum(x, axis),
        "reduce_scatter": lambda x: lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True),
        "all_to_all": lambda x: lax.all_to_all(x, axis, 0, 0, tiled=True),
        "collective_permute": lambda x: lax.ppermute(x, axis, ring),
    }
    return (1, rows) if kind == "all_gather" else (size, rows), runs[kind]


def _buffer(kind: str, shape: tuple[int, ...], size: int) -> int:
    """Elements of the larger of input and output."""
    return shape[0] * shape[1] * (size if kind == "all_gather" else 1)


def fit(samples: Sequence[Sample], device: Any, n_devices: int, devices_per_host: int) -> Cluster:
    """The profile that explains ``samples`` best, in relative error.

    A matrix product and a copy take a constant plus a time proportional to their flops or bytes; the best
    rate seen is the peak, and the fitted slope's share of it the efficiency. A collective takes what
    ``RooflineCost`` says, which is linear in alpha and 1/bandwidth; each kind has its own factors of the two.
    """
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.kind, sample.dtype), []).append(sample)
    rates = {key: _rate(group) for key, group in groups.items() if key[0] in ("matmul", "copy")}
    products = {dtype: rate for (kind, dtype), rate in rates.items() if kind == "matmul"}
    memory_Bps, memory_efficiency = rates["copy", "float32"]
    link = _link([s for s in samples if s.kind in COLLECTIVES], n_devices) or Link(memory_Bps, 0.0)
    return Cluster(
        name=f"{device.device_kind} x {n_devices}, measured",
        device=Device(
            name=device.device_kind,
            peak_flops=tuple((dtype, peak) for dtype, (peak, _) in products.items()),
            flops_efficiency=float(np.mean([efficiency for _, efficiency in products.values()])),
            memory_bytes=_memory_bytes(device, n_devices),
            memory_Bps=memory_Bps,
            memory_efficiency=memory_efficiency,
        ),
        topology="switch",
        domain_devices=n_devices,
        devices_per_host=devices_per_host,
        link=link,
        network=link,
    )


def _rate(samples: Sequence[Sample]) -> tuple[float, float]:
    """The best rate of ``samples``, and the share of it in the fitted ``constant + amount / rate``."""
    best = max(sample.amount / sample.seconds for sample in samples)
    _, per_unit_s = _least_squares([(1.0, sample.amount) for sample in samples], [s.seconds for s in samples])
    return best, min(1.0, 1 / (per_unit_s * best)) if per_unit_s else 1.0


def _link(samples: Sequence[Sample], n_devices: int) -> Link | None:
    """The link with which ``RooflineCost`` explains collectives over all devices; None without any."""
    if not samples:
        return None
    steps, passes = (_unit_cost(link, n_devices) for link in (Link(float("inf"), 1.0), Link(1.0, 0.0)))

    def fitted(kinds: Sequence[str]) -> tuple[float, float]:
        chosen = [s for s in samples if s.kind in kinds]
        rows = [tuple(unit.collective_s(s.kind, s.amount, (timing.AXIS,)) for unit in (steps, passes)) for s in chosen]
        return _least_squares(rows, [s.seconds for s in chosen])

    alpha_s, s_per_byte = fitted(COLLECTIVES)
    apart = {kind: fitted((kind,)) for kind in COLLECTIVES}
    kinds = ((kind, _ratio(alpha, alpha_s), _ratio(beta, s_per_byte)) for kind, (alpha, beta) in apart.items())
    return Link(1 / s_per_byte if s_per_byte else float("inf"), alpha_s, tuple(kinds))


def _ratio(one: float, other: float) -> float:
    """How much larger one figure is; 1 where there is nothing to compare with."""
    return one / other if other else 1.0


def _unit_cost(link: Link, n_devices: int) -> RooflineCost:
    """The cost model whose collectives cost the coefficient of alpha, or of 1/bandwidth, alone."""
    device = Device("", (("float32", 1.0),), 1.0, 1.0, 1.0, 1.0)
    cluster = Cluster("", device, "switch", n_devices, n_devices, link, link)
    return RooflineCost(cluster, Mesh(((timing.AXIS, n_devices),)))


def _least_squares(rows: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> tuple[float, float]:
    """The two coefficients, none below 0, that minimise the squared relative error of ``rows`` to seconds."""
    scaled, ones = np.array(rows) / np.array(seconds)[:, None], np.ones(len(rows))
    found = np.linalg.lstsq(scaled, ones, rcond=None)[0]
    if (found < 0).any():  # then the optimum lies on the edge where that coefficient is 0
        keep = int(np.argmax(found))
        found = np.zeros(2)
        found[keep] = scaled[:, keep] @ ones / (scaled[:, keep] @ scaled[:, keep])
    return float(found[0]), float(found[1])


def _memory_bytes(device: Any, n_devices: int) -> float:
    """What the device reports, or else its share of the host's memory."""
    stats = device.memory_stats() or {}
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return float(stats.get("bytes_limit", host_bytes / n_devices))
