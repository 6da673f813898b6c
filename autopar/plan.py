"""The plan: everything that was decided, as plain data that can be read, diffed, edited, saved and run again. No JAX."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.spec import Spec

VERSION = 1


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
class Prediction:
    """What the plan costs, on one device.

    Attributes:
        step_s: predicted seconds of one step.
        compute_s: seconds of computation in it.
        communication_s: seconds of collectives in it.
        peak_bytes: the most memory in use at one time.
        state_bytes: memory of the training state.
        flops: floating-point operations of one step.
        collectives: what is sent, by kind and axes.
    """

    step_s: float
    compute_s: float
    communication_s: float
    peak_bytes: float
    state_bytes: float
    flops: float
    collectives: tuple[Collective, ...]


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
        prediction: what it costs.
        solution: how it was found.
        preset, pins: the restrictions it was solved under.
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
    preset: str = ""
    pins: tuple[tuple[str, str], ...] = ()
    version: int = VERSION
    runtime: Any = field(default=None, compare=False, repr=False)
    """What ``autopar.plan`` keeps so that the plan can explain and run itself; not saved."""

    @property
    def params(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Axes per dimension of every argument that carries state."""
        return {arg.name: arg.spec.dims for arg in self.arguments if arg.state}

    def to_json(self) -> str:
        """The plan as JSON text; ``from_json`` reads it back equal."""
        return json.dumps(_encode(replace(self, runtime=None)), indent=1)

    @staticmethod
    def from_json(text: str, source: str = "plan") -> "Plan":
        """Reads a plan.

        Raises:
            PlanError: not JSON, not a plan, or of another version.
        """
        try:
            data = json.loads(text)
            version = data["version"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise PlanError(
                f"{source} is not an autopar plan: {error}", fix="write one with autopar plan -o plan.json"
            ) from error
        if version != VERSION:
            raise PlanError(
                f"{source} has version {version}, this autopar reads version {VERSION}",
                fix="plan again with autopar plan",
            )
        try:
            return _decode_plan(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{source} is damaged: {error!r}", fix="plan again with autopar plan") from error

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON."""
        Path(path).write_text(self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Reads a plan from a file; raises PlanError if it is missing or damaged."""
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read: {error.strerror}", fix="check the path") from error
        return Plan.from_json(text, str(path))


def _encode_spec(spec: Spec) -> dict[str, Any]:
    encoded: dict[str, Any] = {"dims": [list(dim) for dim in spec.dims]}
    return encoded | ({"partial": sorted(spec.partial)} if spec.partial else {})


def _decode_spec(data: Mapping[str, Any]) -> Spec:
    return Spec(tuple(tuple(dim) for dim in data["dims"]), frozenset(data.get("partial", ())))


def _encode(plan: Plan) -> dict[str, Any]:
    return {
        "version": plan.version,
        "fingerprint": plan.fingerprint,
        "mesh": str(plan.mesh),
        "hardware": plan.hardware,
        "preset": plan.preset,
        "pins": [list(pin) for pin in plan.pins],
        "prediction": asdict(plan.prediction),
        "solution": asdict(plan.solution),
        "arguments": [
            {"name": arg.name, "shape": list(arg.shape), "dtype": arg.dtype, "state": arg.state}
            | _encode_spec(arg.spec)
            for arg in plan.arguments
        ],
        "outputs": [_encode_spec(spec) for spec in plan.outputs],
        "values": {name: _encode_spec(spec) for name, spec in plan.values.items()},
        "equations": {name: dict(splits) for name, splits in plan.equations.items()},
        "views": {
            name: [_encode_spec(view.spec) | {"readers": list(view.readers)} for view in views]
            for name, views in plan.views.items()
        },
    }


def _decode_plan(data: Mapping[str, Any]) -> Plan:
    prediction = dict(data["prediction"])
    collectives = [c | {"axes": tuple(c["axes"])} for c in prediction.pop("collectives")]
    solution = dict(data["solution"])
    solution["replicated_primitives"] = tuple(tuple(pair) for pair in solution["replicated_primitives"])
    return Plan(
        fingerprint=data["fingerprint"],
        mesh=Mesh.parse(data["mesh"]),
        hardware=data["hardware"],
        arguments=tuple(
            Argument(a["name"], tuple(a["shape"]), a["dtype"], _decode_spec(a), a["state"]) for a in data["arguments"]
        ),
        outputs=tuple(_decode_spec(spec) for spec in data["outputs"]),
        values={name: _decode_spec(spec) for name, spec in data["values"].items()},
        equations={name: tuple(splits.items()) for name, splits in data["equations"].items()},
        views={
            name: tuple(View(_decode_spec(view), tuple(view["readers"])) for view in views)
            for name, views in data["views"].items()
        },
        prediction=Prediction(**prediction, collectives=tuple(Collective(**c) for c in collectives)),
        solution=Solution(**solution),
        preset=data["preset"],
        pins=tuple((pattern, spec) for pattern, spec in data["pins"]),
    )
