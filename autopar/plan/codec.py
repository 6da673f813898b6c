"""Plans as JSON text and back."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.plan.data import VERSION, Argument, Collective, Plan, Prediction, Route, Solution, Splitting, View
from autopar.spec import Spec


def encode(plan: Plan) -> str:
    """The plan as JSON text."""
    return json.dumps(encoded(plan), indent=1)


def decode(text: str, source: str) -> Plan:
    """The plan that a JSON text holds; ``source`` names the text in errors.

    Raises:
        PlanError: not JSON, not a plan, of another version, or the plan of a pipeline.
    """
    return read(text, source, {"": decoded})


def read(text: str, source: str, decoders: Mapping[str, Callable[[Mapping[str, Any]], Any]]) -> Any:
    """What a JSON text holds, read by the decoder of its kind.

    Args:
        text: of the file.
        source: names it in errors.
        decoders: by kind of plan; the plan for one mesh has none.

    Raises:
        PlanError: not JSON, not a plan, of another version, or of another kind.
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
    kind = data.get("kind", "")
    if kind not in decoders:
        raise PlanError(
            f"{source} is the plan of a {kind or 'single mesh'}", fix="read plans of any kind with autopar.load_plan"
        )
    try:
        return decoders[kind](data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{source} is damaged: {error!r}", fix="plan again with autopar plan") from error


def _encode_spec(spec: Spec) -> dict[str, Any]:
    encoded: dict[str, Any] = {"dims": [list(dim) for dim in spec.dims]}
    return encoded | ({"partial": sorted(spec.partial)} if spec.partial else {})


def _decode_spec(data: Mapping[str, Any]) -> Spec:
    return Spec(tuple(tuple(dim) for dim in data["dims"]), frozenset(data.get("partial", ())))


def encoded(plan: Plan) -> dict[str, Any]:
    """The plan as what JSON knows."""
    return {
        "version": plan.version,
        "fingerprint": plan.fingerprint,
        "mesh": str(plan.mesh),
        "hardware": plan.hardware,
        "preset": plan.preset,
        "pins": [list(pin) for pin in plan.pins],
        "provenance": dict(plan.provenance),
        "splitting": asdict(plan.splitting),
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
        "routes": [
            {"shape": list(route.shape), "itemsize": route.itemsize, "monoid": route.monoid}
            | {"specs": [_encode_spec(spec) for spec in route.specs]}
            for route in plan.routes
        ],
    }


def decoded_splitting(data: Mapping[str, Any]) -> Splitting:
    """Microbatches and chunks; plans of the time before them have none."""
    chunk = tuple((pattern, dim, count) for pattern, dim, count in data.get("chunk", ()))
    numbers = {name: data[name] for name in ("microbatches", "stages", "rounds") if name in data}
    return Splitting(chunk=chunk, batch=data.get("batch", ""), allow=tuple(data.get("allow", ())), **numbers)


def decoded(data: Mapping[str, Any]) -> Plan:
    """The plan that ``encoded`` wrote down."""
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
        routes=tuple(
            Route(tuple(r["shape"]), r["itemsize"], r["monoid"], tuple(map(_decode_spec, r["specs"])))
            for r in data["routes"]
        ),
        preset=data["preset"],
        pins=tuple((pattern, spec) for pattern, spec in data["pins"]),
        provenance=data.get("provenance", {}),
        splitting=decoded_splitting(data.get("splitting", {})),
    )
