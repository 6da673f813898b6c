"""What the compiler built: collectives, FLOPs and memory of a step, against what the plan predicted."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from autopar.cluster import Mesh
from autopar.errors import MeshError
from autopar.lowering import hlo, hlo_work
from autopar.plan import Collective as Predicted


@dataclass(frozen=True)
class Collective:
    """Compiled collectives of one kind, dtype and set of axes, summed over a step.

    Attributes:
        kind: all_gather, all_reduce, reduce_scatter, all_to_all or collective_permute.
        axes: the mesh axes they span, in the order of the mesh.
        nbytes: bytes per device in one step, of the larger of input and output, summed.
        count: how many a step runs; a combined one counts once per array.
        dtype: of the arrays.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    count: int
    dtype: str


@dataclass(frozen=True)
class Audit:
    """A compiled step, per device.

    Attributes:
        collectives: sorted by kind and axes.
        flops: XLA's count, with products and convolutions in loops as often as the loop runs.
        random_flops: those of random bits among them, which XLA counts too low where it makes them in a loop, as on
            CPU, and which it doubles where it makes them for each reader.
        product_flops: those of the matrix products and convolutions alone.
        argument_bytes: the arguments.
        output_bytes: the results, aliased ones included.
        temp_bytes: everything else that the step allocates.
        alias_bytes: results that live in donated arguments.
        peak_bytes: arguments, results and temporaries together, aliased bytes once.
        estimated_cycles: the TPU compiler's estimate without collectives; None elsewhere.
        platform: cpu, gpu or tpu.
    """

    collectives: tuple[Collective, ...]
    flops: float
    random_flops: float
    product_flops: float
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    alias_bytes: int
    peak_bytes: int
    estimated_cycles: int | None
    platform: str


def audit(compiled: Any, mesh: Mesh) -> Audit:
    """Reads a ``jax.stages.Compiled`` whose devices are laid out as ``mesh``, row-major.

    Raises:
        MeshError: the program runs on another number of devices than the mesh has.
    """
    text = compiled.as_text()
    module, n_devices = hlo.parse(text), hlo.n_partitions(text)
    if n_devices != mesh.n_devices:
        raise MeshError(
            f"the mesh has {mesh.n_devices} devices, the compiled program runs on {n_devices}",
            where=f"mesh {mesh}",
            fix="audit with the mesh that the step was compiled for",
        )
    memory, products = compiled.memory_analysis(), list(hlo_work.products(module))
    uncounted_flops = sum(flops * (times - 1) for flops, times in products)
    held_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Audit(
        collectives=_collectives(module, mesh),
        flops=float((compiled.cost_analysis() or {}).get("flops", 0.0)) + uncounted_flops,
        random_flops=hlo_work.random_flops(module),
        product_flops=sum(flops * times for flops, times in products),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        peak_bytes=held_bytes + memory.temp_size_in_bytes,
        estimated_cycles=hlo_work.estimated_cycles(module),
        platform=_platform(compiled),
    )


def _platform(compiled: Any) -> str:
    """That of the devices; a program without arguments and results has none, and counts as cpu."""
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        for device in sharding.device_set:
            return device.platform
    return "cpu"


def _collectives(module: hlo.Module, mesh: Mesh) -> tuple[Collective, ...]:
    totals: dict[tuple[str, tuple[str, ...], str], list[float]] = defaultdict(lambda: [0.0, 0])
    for found in hlo.communications(module, mesh.n_devices):
        total = totals[found.kind, axes_spanned(found.groups, mesh), found.dtype]
        total[0] += found.nbytes * found.times
        total[1] += found.times * found.arrays
    return tuple(
        Collective(kind, axes, nbytes, int(count), dtype)
        for (kind, axes, dtype), (nbytes, count) in sorted(totals.items())
    )


def axes_spanned(groups: hlo.Groups, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ; all axes of size > 1 where groups is empty.

    >>> axes_spanned(((0, 4), (1, 5), (2, 6), (3, 7)), Mesh.parse("data=2,tensor=4"))
    ('data',)
    """
    groups = groups or (tuple(range(mesh.n_devices)),)
    spanned: set[int] = set()
    for group in groups:
        places = np.array(np.unravel_index(np.array(group), mesh.shape))  # axes x members
        spanned |= set(np.flatnonzero((places != places[:, :1]).any(axis=1)).tolist())
    return tuple(name for at, name in enumerate(mesh.names) if at in spanned)


@dataclass(frozen=True)
class Difference:
    """Predicted and compiled collectives of one kind over the same axes that are not equal.

    Attributes:
        kind: of the collective.
        axes: the mesh axes it spans.
        predicted_bytes, compiled_bytes: per device in one step.
        predicted_count, compiled_count: how many a step runs.
        explanation: why the compiler may do so; empty where nothing known explains it.
    """

    kind: str
    axes: tuple[str, ...]
    predicted_bytes: float
    compiled_bytes: float
    predicted_count: int
    compiled_count: int
    explanation: str = ""


# What XLA does to collectives, beyond what `hlo.communications` already takes back (combining several into
# one tuple, sending 16-bit floats as float32 on CPU, padding a fused reduce-scatter on TPU).
SLICED = "an all_reduce and the slice of its result became a reduce_scatter (XLA's ReduceScatterCreator)"
REDUCED = "the TPU runs a reduce_scatter over all devices, and collectives on vectors, as an all_reduce"
NARROWED = "the TPU rounds float32 to bfloat16 before it sends what only matrix products read"
HALO = "the TPU shifts the rows by which it padded a reduce_scatter to its neighbours"
DROPPED = "XLA merged identical collectives, or dropped one of a constant or of an unused value"


def compare(predicted: Iterable[Predicted], audited: Audit, mesh: Mesh) -> tuple[Difference, ...]:
    """Where compiled collectives differ from ``predicted`` ones in kind, axes, count or bytes.

    A difference that the compiler is known to make carries its explanation; check
    ``[d for d in compare(...) if not d.explanation]``.
    """
    expected, built = _by_kind_and_axes(predicted, mesh), _by_kind_and_axes(audited.collectives, mesh)
    differences = [
        Difference(*key, expected[key][0], built[key][0], expected[key][1], built[key][1])
        for key in sorted(expected.keys() | built.keys())
        if expected[key] != built[key]
    ]
    return tuple(replace(found, explanation=_explanation(found, differences, audited)) for found in differences)


def merged(predicted: Iterable[Predicted], audited: Audit, mesh: Mesh) -> int:
    """How many planned collectives the compiled program lacks; what was turned into another kind is not lacking.

    0 means that what the plan does twice, such as gathering a parameter again in the backward pass, runs twice: the
    compiler merged none. (A combined collective counts once per array.)
    """
    lacking: defaultdict[_Key, int] = defaultdict(int)
    for sign, collectives in ((1, predicted), (-1, audited.collectives)):
        for (kind, axes), (_, count) in _by_kind_and_axes(collectives, mesh).items():
            lacking[_REDUCED_KINDS[0] if kind in _REDUCED_KINDS else kind, axes] += sign * count
    return sum(max(count, 0) for count in lacking.values())


_Key = tuple[str, tuple[str, ...]]


def _by_kind_and_axes(
    collectives: Iterable[Predicted | Collective], mesh: Mesh
) -> defaultdict[_Key, tuple[float, int]]:
    totals: defaultdict[_Key, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for one in collectives:
        axes = tuple(name for name, size in mesh.axes if name in one.axes and size > 1)
        if axes and one.count:
            nbytes, count = totals[one.kind, axes]
            totals[one.kind, axes] = (nbytes + one.nbytes, count + one.count)
    return totals


def _explanation(found: Difference, differences: list[Difference], audited: Audit) -> str:
    alike = {d.kind: d for d in differences if d.axes == found.axes}
    surplus = {kind: d.compiled_bytes - d.predicted_bytes for kind, d in alike.items()}
    reduced, scattered, gathered = (surplus.get(kind, 0.0) for kind in ("all_reduce", "reduce_scatter", "all_gather"))
    if found.kind in ("all_reduce", "reduce_scatter") and scattered > 0 and reduced == -scattered:
        return SLICED
    if audited.platform == "tpu":
        lacking_bytes = -(reduced + scattered + gathered)
        all_reduced = reduced > 0 >= max(scattered, gathered)
        rounded_bytes = _narrow_bytes(audited, "all_gather", found.axes)
        if found.kind in _REDUCED_KINDS and all_reduced and 0 <= lacking_bytes <= rounded_bytes:
            return REDUCED
        same_count = found.compiled_count == found.predicted_count
        if same_count and 0 < -surplus[found.kind] <= _narrow_bytes(audited, found.kind, found.axes):
            return NARROWED
        if found.kind == "collective_permute" and 0 < surplus[found.kind] <= _most_halo_bytes(audited, found):
            return HALO
    if surplus[found.kind] < 0 and found.compiled_count < found.predicted_count:
        return DROPPED
    return ""


_REDUCED_KINDS = ("all_reduce", "reduce_scatter", "all_gather")


def _narrow_bytes(audited: Audit, kind: str, axes: tuple[str, ...]) -> float:
    """Bytes that are sent as 16-bit floats."""
    narrow = ("bfloat16", "float16")
    return sum(c.nbytes for c in audited.collectives if (c.kind, c.axes) == (kind, axes) and c.dtype in narrow)


def _most_halo_bytes(audited: Audit, found: Difference) -> float:
    """At most some tiles of rows of what is reduced and scattered over the same axes: up to 96 of 2048 were seen."""
    scattered = (c.nbytes for c in audited.collectives if (c.kind, c.axes) == ("reduce_scatter", found.axes))
    return 0.05 * sum(scattered)
