"""Plans of pipelines as JSON text and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autopar.cluster import Mesh
from autopar.plan import codec
from autopar.plan.data import Plan
from autopar.plan.pipeline import PipelinePlan, PlannedStage, RunnerUp, StagePrediction

KIND = "pipeline"


def encode(plan: PipelinePlan) -> str:
    """The plan as JSON text."""
    data = {
        "version": plan.version,
        "kind": KIND,
        "fingerprint": plan.fingerprint,
        "hardware": plan.hardware,
        "schedule": plan.schedule,
        "chunks": plan.chunks,
        "splitting": asdict(plan.splitting),
        "stage_of_layer": list(plan.stage_of_layer),
        "meshes": list(map(str, plan.meshes)),
        "devices_per_host": plan.devices_per_host,
        "step_s": plan.step_s,
        "preset": plan.preset,
        "pins": [list(pin) for pin in plan.pins],
        "runner_ups": [asdict(other) for other in plan.runner_ups],
        "seconds": dict(plan.seconds),
        "provenance": dict(plan.provenance),
        "stages": [
            {"device": stage.device, "price_s_per_byte": stage.price_s_per_byte, "scatters": stage.scatters}
            | {"rematerialised": stage.rematerialised}
            | {"prediction": asdict(stage.prediction), "plan": codec.encoded(stage.plan)}
            for stage in plan.stages
        ],
    }
    return json.dumps(data, indent=1)


def decode(text: str, source: str) -> Plan | PipelinePlan:
    """The plan of either kind that a JSON text holds; ``source`` names the text in errors.

    Raises:
        PlanError: not JSON, not a plan, or of another version.
    """
    return codec.read(text, source, {"": codec.decoded, KIND: _decoded})


def _decoded(data: Mapping[str, Any]) -> PipelinePlan:
    return PipelinePlan(
        fingerprint=data["fingerprint"],
        hardware=data["hardware"],
        schedule=data["schedule"],
        chunks=data["chunks"],
        splitting=codec.decoded_splitting(data["splitting"]),
        stage_of_layer=tuple(data["stage_of_layer"]),
        meshes=tuple(map(Mesh.parse, data["meshes"])),
        stages=tuple(map(_decoded_stage, data["stages"])),
        devices_per_host=data.get("devices_per_host", 0),
        step_s=data["step_s"],
        preset=data["preset"],
        pins=tuple((pattern, spec) for pattern, spec in data["pins"]),
        runner_ups=tuple(RunnerUp(**o | {"differences": tuple(o["differences"])}) for o in data["runner_ups"]),
        seconds=data["seconds"],
        provenance=data["provenance"],
    )


def _decoded_stage(data: Mapping[str, Any]) -> PlannedStage:
    prediction = StagePrediction(**data["prediction"])
    plan, scatters, again = codec.decoded(data["plan"]), bool(data["scatters"]), bool(data.get("rematerialised"))
    return PlannedStage(data["device"], plan, data["price_s_per_byte"], scatters, prediction, again)
