"""The plan of a pipeline: which layers run where, in which order, and how each stage is laid out. No JAX."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopar.cluster import Mesh
from autopar.plan import files
from autopar.plan.data import VERSION, Plan, Splitting


@dataclass(frozen=True)
class StagePrediction:
    """What a stage costs; bytes on one of its devices.

    Attributes:
        forward_s, backward_s, weight_s: of one microbatch; the backward pass up to the gradients of the stage's inputs,
            and the gradients of its weights.
        once_s: of a step: gradient synchronisation and update.
        transfer_s: from this stage to the next, one microbatch; 0 for the last.
        busy_s: computation and its collectives in a step.
        bubble_s: the rest of the step, on this stage's share of its devices.
        state_bytes: parameters, optimizer state and sums of gradients.
        kept_bytes: what a microbatch in flight keeps for its backward pass.
        extra_bytes: the most that a task needs besides.
        peak_bytes: of a device, with all the stages that it holds and the microbatches in flight.
        in_flight: the most microbatches that the device keeps something for, counted once for each of its stages.
        sent_bytes: to the next stage in a step.
        left_bytes: what a microbatch keeps from its backward pass for its weight part, where the schedule splits them.
    """

    forward_s: float
    backward_s: float
    weight_s: float
    once_s: float
    transfer_s: float
    busy_s: float
    bubble_s: float
    state_bytes: float
    kept_bytes: float
    extra_bytes: float
    peak_bytes: float
    in_flight: int
    sent_bytes: float
    left_bytes: float = 0.0


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a pipeline.

    Attributes:
        device: its place in the pipeline; several stages may share one.
        plan: how it is laid out on its submesh; what it predicts is a whole step of this stage.
        price_s_per_byte: what a byte of memory was worth when it was planned.
        scatters: whether gradients are reduced and scattered in every microbatch, so that only shards are summed.
        prediction: its part of the step.
        rematerialised: whether it runs its forward part again where the backward part needs it.
    """

    device: int
    plan: Plan
    price_s_per_byte: float
    scatters: bool
    prediction: StagePrediction
    rematerialised: bool = False


@dataclass(frozen=True)
class RunnerUp:
    """A pipeline that was not chosen.

    Attributes:
        step_s: what it would take, as the search prices it.
        slower: by what share that is more than the search's price of the chosen one.
        differences: from the chosen one, in words.
    """

    step_s: float
    slower: float
    differences: tuple[str, ...]


@dataclass(frozen=True)
class PipelinePlan:
    """A step as a pipeline of stages on submeshes.

    Attributes:
        fingerprint: of the whole program that it was made for.
        hardware: name of the profile that priced it.
        schedule: the order of tasks, by name.
        chunks: stages on each submesh.
        splitting: the microbatches, and which arguments are the batch.
        stage_of_layer: the stage of each layer, rising.
        meshes: the submesh at each place of the pipeline; their devices follow each other.
        stages: in the order of the model.
        step_s: the predicted step.
        preset, pins: the restrictions that stages were planned under.
        devices_per_host: how many devices a process was taken to drive; 0 if one drives all.
        runner_ups: the next best that a search found; empty where nothing was searched.
        seconds: CPU seconds of planning, by part.
        provenance: the command line's target and settings.
    """

    fingerprint: str
    hardware: str
    schedule: str
    chunks: int
    splitting: Splitting
    stage_of_layer: tuple[int, ...]
    meshes: tuple[Mesh, ...]
    stages: tuple[PlannedStage, ...]
    step_s: float
    preset: str = ""
    pins: tuple[tuple[str, str], ...] = ()
    devices_per_host: int = 0
    runner_ups: tuple[RunnerUp, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def microbatches(self) -> int:
        """Into how many parts a step takes its batch."""
        return self.splitting.microbatches

    @property
    def n_devices(self) -> int:
        """Devices of all submeshes."""
        return sum(mesh.n_devices for mesh in self.meshes)

    @property
    def peak_bytes(self) -> float:
        """Memory of the device that needs most."""
        return max(stage.prediction.peak_bytes for stage in self.stages)

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """First and last layer of each stage."""
        rows = range(len(self.stages))
        return tuple((self.stage_of_layer.index(k), _last(self.stage_of_layer, k)) for k in rows)

    @property
    def remat(self) -> frozenset[int]:
        """The stages that run their forward part again."""
        return frozenset(index for index, stage in enumerate(self.stages) if stage.rematerialised)

    @property
    def params(self) -> dict[str, tuple[tuple[str, ...], ...]]:
        """Axes per dimension of every argument that carries state, at the stage that keeps it."""
        found: dict[str, tuple[tuple[str, ...], ...]] = {}
        for stage in self.stages:
            found.update(stage.plan.params)
        return found

    def to_json(self) -> str:
        """The plan as JSON text; ``load_plan`` reads it back equal."""
        from autopar.plan import pipeline_codec

        return pipeline_codec.encode(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; raises PlanError if it cannot."""
        files.write(path, self.to_json())

    def __rich__(self) -> Any:
        from autopar.plan import pipeline_views

        return pipeline_views.pipeline_page(self)

    def __str__(self) -> str:
        from autopar.plan import terminal

        return terminal.as_text(self.__rich__())

    def _repr_html_(self) -> str:
        from autopar.plan import pipeline_views

        return pipeline_views.html_page(self)


def _last(stage_of_layer: tuple[int, ...], stage: int) -> int:
    return len(stage_of_layer) - 1 - stage_of_layer[::-1].index(stage)


def load_plan(path: str | Path) -> Plan | PipelinePlan:
    """Reads a plan of either kind from a file.

    Raises:
        PlanError: the file is missing or damaged, holds something else, or is of another version.
    """
    from autopar.plan import pipeline_codec

    return pipeline_codec.decode(files.read(path), str(path))
