"""The best pipeline of a step: which layers on which devices, in which order, in how many microbatches.

Alpa (Zheng et al. 2022, section 5) profiles every run of layers on every submesh; GPT-39B on 64 devices took 2,393 s.
Here each *kind* of layer is planned once for each submesh, and a stage costs the sum of its layers.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from autopar.api.planning import detect_hardware
from autopar.api.splitting import splitting_of
from autopar.api.staging.costs import LayerCost, Priced, unit_price_s_per_byte
from autopar.api.staging.kinds import Part, crossing_bytes, layer_kinds, parts_of_kinds, tied_arguments
from autopar.api.staging.links import ONE_DEVICE
from autopar.api.staging.tables import AGAIN, KEEP, LayerFacts, LayerTables
from autopar.cluster import Cluster, Mesh
from autopar.cost import RooflineCost, flops_of, hardware
from autopar.ir.layers import Layers, cluster_layers
from autopar.ir.step import Step
from autopar.ir.trace import Traced
from autopar.lowering.pipeline.cut import Layout, microbatched
from autopar.lowering.time.microbatch import batch_arguments
from autopar.plan import RunnerUp, Splitting
from autopar.sharding.lookup import RuleBook
from autopar.solver.schedule import make_schedule
from autopar.solver.slicing import Slicing, SlicingProblem, Submesh, slice_stages

MICROBATCHES = (4, 8, 16)
"""Numbers that are tried where nobody says, as far as they divide the batch."""


@dataclass(frozen=True)
class Search:
    """What to choose from.

    Attributes:
        devices: how many devices there are; fewer may be used.
        hardware: a profile's name or file; None means that of the devices that JAX sees.
        microbatches: numbers of microbatches to try; empty for those of 4, 8 and 16 that divide the batch.
        schedules: names of schedules to try.
        memory_gb: memory of one device in 1e9 bytes; None means that of the profile.
        layers: into how many layers of equal work the step is cut before they are put together to stages.
        chunks: stages on each submesh to try, where a schedule lets one choose.
        frugality: each layer is planned for speed, and once more for each of these prices of memory: 1 gives up one
            percent of speed for one percent of memory.
        stage_devices: numbers of devices that a stage may have; empty for powers of two inside a host and of hosts,
            three hosts, and all.
        batch: pattern of the names of the arguments whose dimension 0 is the batch; empty to guess.
        allow: "recompute" and "ghost_batch_norm": what to accept where microbatches need a value of the whole batch.
        static_argnums: arguments that are hashable Python values.
        runner_ups: how many of the next best plans to give.
        remat: whether stages may run their forward part again where the backward part needs it, to save memory.
    """

    devices: int
    hardware: str | None = None
    microbatches: tuple[int, ...] = ()
    schedules: tuple[str, ...] = ("1f1b",)
    memory_gb: float | None = None
    layers: int = 8
    chunks: tuple[int, ...] = (2,)
    frugality: tuple[float, ...] = (1.0,)
    stage_devices: tuple[int, ...] = ()
    batch: str = ""
    allow: str | tuple[str, ...] = ()
    static_argnums: tuple[int, ...] = ()
    runner_ups: int = 3
    remat: bool = True

    def cluster(self) -> Cluster:
        """The devices and their links, with the memory that may be used."""
        found = hardware(self.hardware or detect_hardware())
        if self.memory_gb is None:
            return found
        return replace(found, device=replace(found.device, memory_bytes=self.memory_gb * 1e9))

    def splitting(self, microbatches: int) -> Splitting:
        """How to split the step."""
        return splitting_of(microbatches, (), self.batch, self.allow)

    def numbers(self, traced: Traced) -> tuple[int, ...]:
        """Into how many microbatches the batch of a step may be split; none are doubled."""
        if self.microbatches:
            return tuple(dict.fromkeys(self.microbatches))
        sizes = [value.shape[0] for value in batch_arguments(traced, self.batch)]
        usual = tuple(m for m in MICROBATCHES if all(size % m == 0 for size in sizes))
        return usual or (max(m for m in range(1, MICROBATCHES[0]) if all(size % m == 0 for size in sizes)),)


@dataclass(frozen=True)
class Seconds:
    """CPU seconds of planning.

    Attributes:
        trace: tracing the step.
        layers: microbatches, layers, which of them are alike.
        intra: planning layers on submeshes.
        slicing: choosing stages.
    """

    trace: float
    layers: float
    intra: float
    slicing: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.by_part.values())

    @property
    def by_part(self) -> dict[str, float]:
        """The parts by name."""
        return asdict(self)


@dataclass(frozen=True)
class StagesPlan:
    """The best pipeline that was found.

    Attributes:
        slicing: stages, microbatches, schedule, what is predicted, and the runner-ups.
        variants: submeshes by name, and how stages are planned on them.
        search: what it was chosen from.
        hardware: the profile that priced it.
        n_problems: how many intra-operator problems were solved for it.
        seconds: what planning took.
        layered: the layers that were priced, by number of microbatches.
    """

    slicing: Slicing
    variants: Mapping[str, "Variant"]
    search: Search
    hardware: str
    n_problems: int
    seconds: Seconds
    problem: SlicingProblem = field(compare=False, repr=False)
    layered: Mapping[int, "Layered"] = field(compare=False, repr=False)

    @property
    def kinds(self) -> tuple[int, ...]:
        """The kind of each layer: equal numbers for equal layers."""
        return self.layered[self.slicing.microbatches].kinds

    @property
    def step_s(self) -> float:
        """The predicted step."""
        return self.slicing.total_s

    def layout(self, slicing: Slicing | None = None) -> tuple[Layout, tuple[float, ...]]:
        """How to run a slicing (the best one unless given), and the price of memory of each of its stages."""
        found = slicing or self.slicing
        schedule = make_schedule(found.schedule, found.n_pipeline_devices, found.microbatches, found.n_chunks)
        places = {stage.device: self.variants[stage.submesh.name].mesh for stage in found.stages}
        sizes = (stage.last_layer - stage.first_layer + 1 for stage in found.stages)
        layout = Layout(
            schedule,
            tuple(places[device] for device in range(schedule.n_devices)),
            tuple(k for k, size in enumerate(sizes) for _ in range(size)),
            self.search.splitting(found.microbatches),
            frozenset(k for k, stage in enumerate(found.stages) if stage.remat == AGAIN),
        )
        return layout, tuple(self.variants[stage.submesh.name].frugality for stage in found.stages)

    def runner_ups(self, chosen: Slicing) -> tuple[RunnerUp, ...]:
        """The other slicings, best first, and how they differ from the chosen one."""
        best = self.slicing
        others = [best, *best.runner_ups]
        return tuple(
            RunnerUp(other.total_s, other.total_s / chosen.total_s - 1, tuple(_differences(chosen, other)))
            for other in others
            if other.stages is not chosen.stages
        )


def search_traced(traced: Traced, trace_s: float, search: Search) -> StagesPlan:
    """The best slicing of a traced step in stages, priced layer by layer; ``autopar.plan_stages`` plans its stages."""
    cluster, layers_s, intra_s = search.cluster(), 0.0, 0.0
    variants = submeshes(cluster, search)
    runs: dict[tuple[str, int], dict[tuple[int, ...], LayerCost]] = {}
    layered: dict[int, Layered] = {}
    numbers, rules = search.numbers(traced), RuleBook()
    for m in numbers:
        start = time.process_time()
        layered[m] = Layered.of(microbatched(traced, search.splitting(m)), search.layers)
        middle = time.process_time()
        runs.update(priced(layered[m].parts, variants, cluster, m, rules))
        layers_s, intra_s = layers_s + middle - start, intra_s + time.process_time() - middle
    start = time.process_time()
    tables = LayerTables({m: found.facts() for m, found in layered.items()}, runs, cluster)
    problem = SlicingProblem(
        tables,
        search.layers,
        search.devices,
        tuple(variant.submesh for variant in variants),
        numbers,
        search.schedules,
        (KEEP, AGAIN) if search.remat else (KEEP,),
        chunks=search.chunks,
        memory_bytes=cluster.device.memory_bytes,
    )
    slicing = slice_stages(problem, search.runner_ups)
    seconds = Seconds(trace_s, layers_s, intra_s, time.process_time() - start)
    named = {variant.submesh.name: variant for variant in variants}
    n_problems = sum(map(len, runs.values()))
    return StagesPlan(slicing, named, search, cluster.name, n_problems, seconds, problem, layered)


# -- layers


@dataclass(frozen=True, eq=False)
class Layered:
    """A step in layers, and one stage of each kind.

    Attributes:
        step: around its loop over microbatches.
        layers: of the loop's body.
        kinds: of the layers.
        parts: a stage of every kind.
        boundary_bytes: what a microbatch sends between layers.
    """

    step: Step
    layers: Layers
    kinds: tuple[int, ...]
    parts: Mapping[tuple[int, ...], Part]
    boundary_bytes: tuple[int, ...]

    @staticmethod
    def of(step: Step, n_layers: int) -> "Layered":
        """Cuts a step into layers."""
        layers = cluster_layers(step.body, n_layers, flops_of)
        kinds = layer_kinds(step, layers)
        return Layered(step, layers, kinds, parts_of_kinds(step, layers, kinds), crossing_bytes(step, layers))

    def facts(self) -> LayerFacts:
        """What the tables of costs take of it."""
        each = {kind: sum(v.nbytes for v in self.parts[kind,].stage.summed) for kind in set(self.kinds)}
        gradients = tuple(each[kind] for kind in self.kinds)
        return LayerFacts(self.kinds, gradients, self.boundary_bytes, tied_arguments(self.step, self.layers))


# -- submeshes


@dataclass(frozen=True)
class Variant:
    """A submesh and how stages are planned on it.

    Attributes:
        submesh: its name and number of devices.
        mesh: its axes.
        frugality: the price of memory, see ``Search``.
    """

    submesh: Submesh
    mesh: Mesh
    frugality: float


def submeshes(cluster: Cluster, search: Search) -> tuple[Variant, ...]:
    """The submeshes to try: powers of two inside a host, then whole hosts, in every useful shape."""
    found = []
    for n in search.stage_devices or _sizes(search.devices, cluster.devices_per_host):
        hosts = -(-n // cluster.devices_per_host)
        for mesh in _shapes(n, cluster.devices_per_host):
            for frugality in (0.0, *search.frugality) if n > 1 else (0.0,):
                name = f"{hosts}x{n // hosts} {mesh}" + (f" frugal {frugality:g}" if frugality else "")
                found.append(Variant(Submesh(name, n), mesh, frugality))
    return tuple(found)


def _sizes(n_devices: int, host: int) -> list[int]:
    """Powers of two inside a host, a host, 2, 3, 4 hosts, powers of two of hosts, all hosts."""
    powers = [1 << i for i in range(n_devices.bit_length())]
    inside = [n for n in powers if n < min(host, n_devices + 1)]
    most = n_devices // host
    return inside + [host * n for n in sorted({n for n in (*powers, 3, most) if 0 < n <= most})]


def _shapes(n_devices: int, host: int) -> tuple[Mesh, ...]:
    """Meshes ``data`` x ``tensor`` with ``tensor`` inside a host.

    Data parallelism over all devices is a plan on any of them. Where all links are alike names mean nothing to an
    unrestricted plan: 2 x 4 and 4 x 2 are one mesh. The flattest shapes are left out.
    """
    inside = min(n_devices, host)
    tensors = [t for t in range(2, inside + 1) if inside % t == 0 and n_devices % t == 0 and t < n_devices]
    tensors = [t for t in tensors if t * t >= inside]
    return tuple(Mesh((("data", n_devices // t), ("tensor", t))) for t in tensors or [1])


# -- prices


def priced(
    parts: Mapping[tuple[int, ...], Part],
    variants: Sequence[Variant],
    cluster: Cluster,
    microbatches: int,
    rules: RuleBook | None = None,
) -> dict[tuple[str, int], dict[tuple[int, ...], LayerCost]]:
    """What every part costs under every variant, by (name of the submesh, microbatches) and run of kinds."""
    found: dict[tuple[str, int], dict[tuple[int, ...], LayerCost]] = {}
    one = RooflineCost(cluster, ONE_DEVICE)
    for run, part in parts.items():
        stages = Priced.of(part, one, microbatches, rules)
        unit_s_per_byte = unit_price_s_per_byte(part, stages.prepared, one)
        for mesh in dict.fromkeys(variant.mesh for variant in variants):
            here = [variant for variant in variants if variant.mesh == mesh]
            prices = [variant.frugality * unit_s_per_byte for variant in here]
            costs = stages.costs(RooflineCost(cluster, mesh), prices)
            for variant, cost in zip(here, costs, strict=True):
                found.setdefault((variant.submesh.name, microbatches), {})[run] = cost
    return found


# -- text


def _differences(best: Slicing, other: Slicing) -> list[str]:
    pairs = [
        ("schedule", best.schedule, other.schedule),
        ("microbatches", best.microbatches, other.microbatches),
        ("stages", len(best.stages), len(other.stages)),
        ("submeshes", _submeshes_of(best), _submeshes_of(other)),
        ("rematerialised stages", _remat_of(best), _remat_of(other)),
    ]
    return [f"{what} {theirs} for {ours}" for what, ours, theirs in pairs if ours != theirs] or ["other layers"]


def _remat_of(slicing: Slicing) -> int:
    return sum(stage.remat == AGAIN for stage in slicing.stages)


def _submeshes_of(slicing: Slicing) -> str:
    counts: dict[str, int] = {}
    for stage in slicing.stages:
        counts[stage.submesh.name] = counts.get(stage.submesh.name, 0) + 1
    return " + ".join(f"{n} of {name}" for name, n in counts.items())
