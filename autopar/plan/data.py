"""The dataclasses of a plan: names, specs and numbers only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.plan import files
from autopar.spec import Spec

VERSION = 2


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes, summed over a step.

    Attributes:
        kind: all_gather, all_reduce, reduce_scatter, all_to_all or collective_permute.
        axes: the mesh axes they span.
        nbytes: bytes per device in one step, of the larger of input and output, summed.
        count: how many a step runs.
    """

    kind: str
    axes: tuple[str, ...]
    nbytes: float
    count: int


@dataclass(frozen=True)
class View:
    """A copy of a value in another spec, shared by several equations.

    Attributes:
        spec: the layout of the copy.
        readers: names of the equations that read the copy instead of the value itself.
    """

    spec: Spec
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Route:
    """How a value of some size gets from one spec to another; many values share one.

    Attributes:
        shape, itemsize: of the whole value, in elements and bytes per element.
        monoid: how the terms of a partial value combine: sum, max, min, and, or.
        specs: from the first to the last, one move apart.
    """

    shape: tuple[int, ...]
    itemsize: int
    monoid: str
    specs: tuple[Spec, ...]


@dataclass(frozen=True)
class Prediction:
    """What the plan costs, on one device.

    Attributes:
        step_s: predicted seconds of one step, with what is sent while the device computes.
        compute_s: seconds of computation in it.
        communication_s: seconds of collectives in it.
        peak_bytes: the most memory in use at one time.
        state_bytes: memory of the arguments: training state, batch and constants.
        flops: floating-point operations of one step.
        collectives: what is sent, by kind and axes.
        on_chip_bytes: the most that temporaries take of the memory on the chip besides (TPU).
        spared_s: seconds of communication that are spared because what is ready together is sent as one.
    """

    step_s: float
    compute_s: float
    communication_s: float
    peak_bytes: float
    state_bytes: float
    flops: float
    collectives: tuple[Collective, ...]
    on_chip_bytes: float = 0.0
    spared_s: float = 0.0

    @property
    def serial_s(self) -> float:
        """Seconds of a step in which nothing ran at the same time: what the solver minimises."""
        return self.compute_s + self.communication_s

    @property
    def bundled_s(self) -> float:
        """The same, but with what is ready together sent as one: what chooses between meshes."""
        return self.serial_s - self.spared_s


@dataclass(frozen=True)
class Solution:
    """How good the plan is known to be.

    Attributes:
        objective_s: the solver's cost of the plan.
        lower_bound_s: no plan in the searched space costs less.
        proven_optimal: whether the two meet.
        trace_s, build_s, solve_s: seconds spent.
        n_equations, n_nodes: size of the program and of the solver's problem.
        replicated_primitives: primitives without a rule, with the source line of one use each.
    """

    objective_s: float
    lower_bound_s: float
    proven_optimal: bool
    trace_s: float = 0.0
    build_s: float = 0.0
    solve_s: float = 0.0
    n_equations: int = 0
    n_nodes: int = 0
    replicated_primitives: tuple[tuple[str, str], ...] = ()

    @property
    def gap(self) -> float:
        """(objective - bound) / objective; 0 when proven."""
        return 0.0 if self.objective_s <= 0 else max(0.0, 1 - self.lower_bound_s / self.objective_s)


@dataclass(frozen=True)
class Argument:
    """One leaf of the step's arguments.

    Attributes:
        name: its path, as ``params/h_0/attn/query/kernel``.
        shape, dtype: of the whole array.
        spec: how it is laid out.
        state: whether the step returns it updated.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: Spec
    state: bool


@dataclass(frozen=True)
class Splitting:
    """How a step is split over time before it is planned.

    Attributes:
        microbatches: parts of the batch, one after the other; totals over the batch are exact.
        chunk: (pattern, dimension, parts) of values that are never made whole; where the dimension is None, the first
            is a dimension's own name.
        batch: pattern of the names of the arguments that have the batch as dimension 0; empty to guess.
        allow: "recompute", to run layers again for a value of the whole batch; "ghost_batch_norm", to take statistics
            that layers need from each microbatch.
        stages: of the pipelines that scans over layers become; 1 for none. Only they then run in microbatches.
        rounds: how often a microbatch goes through all stages: 1 is GPipe order, more the circular one.
    """

    microbatches: int = 1
    chunk: tuple[tuple[str, int | None, int], ...] = ()
    batch: str = ""
    allow: tuple[str, ...] = ()
    stages: int = 1
    rounds: int = 1


@dataclass(frozen=True)
class Plan:
    """A parallel program for one step on one mesh.

    Attributes:
        fingerprint: of the program that it was made for.
        mesh: the logical grid.
        hardware: name of the profile that priced it.
        arguments: every argument leaf in order, hoisted constants last.
        outputs: the spec of every result leaf.
        values: spec of every value that is not free, by name (arguments too).
        equations: what each mesh axis splits in each equation: name -> ((axis, factor or linear group), ...).
        views: copies shared by several equations, by value name.
        routes: how values get from spec to spec, as the prices of the planner had it: running asks no prices.
        prediction: what it costs.
        solution: how it was found.
        preset, pins: the restrictions it was solved under.
        splitting: its microbatches and chunks; the names of its equations are those of the program so split.
        provenance: where it comes from: the command line's target and settings, to plan it again.
    """

    fingerprint: str
    mesh: Mesh
    hardware: str
    arguments: tuple[Argument, ...]
    outputs: tuple[Spec, ...]
    values: Mapping[str, Spec]
    equations: Mapping[str, tuple[tuple[str, str | int], ...]]
    views: Mapping[str, tuple[View, ...]]
    prediction: Prediction
    solution: Solution
    routes: tuple[Route, ...] = ()
    preset: str = ""
    pins: tuple[tuple[str, str], ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    splitting: Splitting = Splitting()
    version: int = VERSION
    runtime: Any = field(default=None, compare=False, repr=False)
    """What ``autopar.plan`` keeps so that the plan can explain and run itself; not saved."""
    place: Callable[["Plan"], Any] | None = field(default=None, compare=False, repr=False)
    """Lays the step's arguments out on the devices as the plan says: ``shardings``; not saved."""

    @property
    def microbatches(self) -> int:
        """Into how many parts a step takes its batch, one after the other."""
        return self.splitting.microbatches

    @property
    def params(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Axes per dimension of every argument that carries state."""
        return {arg.name: arg.spec.dims for arg in self.arguments if arg.state}

    @property
    def shardings(self) -> Any:
        """A NamedSharding for every leaf of the step's arguments, in pytrees like them, as Orbax wants.

        NNX objects stand first, as the state that ``nnx.split`` makes of them.

        Raises:
            PlanError: the plan comes from a file, which knows names and not pytrees.
            MeshError: there are fewer devices than the plan's mesh needs.
        """
        if self.place is None:
            raise PlanError(
                "a plan read from a file does not know the pytrees of its step",
                fix="ask autopar.compile(step, plan).plan(*args).shardings",
            )
        return self.place(self)

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back equal."""
        from autopar.plan import codec

        return codec.encode(self)

    @staticmethod
    def from_json(text: str, source: str = "plan") -> "Plan":
        """Reads a plan.

        Raises:
            PlanError: not JSON, not a plan, or of another version.
        """
        from autopar.plan import codec

        return codec.decode(text, source)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; raises PlanError if it cannot."""
        files.write(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Reads a plan from a file; raises PlanError if it is missing or damaged."""
        return Plan.from_json(files.read(path), str(path))

    def __rich__(self) -> Any:
        from autopar.plan import terminal

        return terminal.plan_page(self)

    def __str__(self) -> str:
        from autopar.plan import terminal

        return terminal.as_text(self.__rich__())

    def _repr_html_(self) -> str:
        from autopar.plan import html

        return html.page(self)
