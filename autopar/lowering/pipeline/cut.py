"""From a traced step to the programs of its stages: microbatches, layers, stages."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from autopar.cluster import Mesh
from autopar.cost import flops_of
from autopar.errors import AutoparError
from autopar.ir.layers import cluster_layers
from autopar.ir.remat import rematerialised
from autopar.ir.stages import Stages, cut
from autopar.ir.step import Step, around_loop
from autopar.ir.trace import Traced
from autopar.lowering.time.microbatch import batch_phases
from autopar.lowering.time.phased import LOOP_NAME, split_over_time
from autopar.plan import Splitting
from autopar.solver.schedule import Schedule


class PipelineError(AutoparError, ValueError):
    """A pipeline whose stages, submeshes and schedule do not fit together."""


@dataclass(frozen=True)
class Layout:
    """Where a pipeline runs what.

    Attributes:
        schedule: the order of tasks; says how many stages, devices of the pipeline and microbatches there are.
        meshes: the submesh behind each device of the schedule, cut from the devices in turn.
        stage_of_layer: the stage of each layer; empty for one layer a stage, of equal work.
        splitting: which arguments are the batch, and what is allowed; the number of microbatches is the schedule's.
        remat: the stages that run their forward part again where the backward part needs it, and keep only what they
            were sent.
    """

    schedule: Schedule
    meshes: tuple[Mesh, ...]
    stage_of_layer: tuple[int, ...] = ()
    splitting: Splitting = field(default_factory=Splitting)
    remat: frozenset[int] = frozenset()


def cut_for(traced: Traced, layout: Layout, step: Step | None = None) -> Stages:
    """A traced step in the stages of a layout.

    Args:
        traced: the step.
        layout: where to run what.
        step: the same around its loop over the layout's microbatches, where that is known.

    Raises:
        PipelineError, LayerError, MicrobatchError: see their texts.
    """
    check_devices(len(layout.meshes), layout.schedule)
    _check_remat(layout)
    splitting = replace(layout.splitting, microbatches=layout.schedule.n_microbatches)
    stages = into_stages(step or microbatched(traced, splitting), layout.schedule, layout.stage_of_layer)
    return rematerialised(stages, layout.remat)


def microbatched(traced: Traced, splitting: Splitting) -> Step:
    """A traced step around its loop over microbatches.

    Args:
        traced: the step.
        splitting: how many microbatches, which arguments are the batch, what is allowed. (Chunks are not cut here.)

    Raises:
        MicrobatchError: the step cannot be split exactly.
        PipelineError: nothing in it depends on the batch.
    """
    split = split_over_time(batch_phases(traced, splitting), LOOP_NAME)
    known = {eqn.name for eqn in traced.program.equations}
    loops = [eqn for eqn in split.equations if eqn.primitive.name == "scan" and eqn.name not in known]
    if not loops:
        raise PipelineError("nothing in the step depends on its batch", fix="pass the batch as an argument of its own")
    main = max(loops, key=lambda eqn: sum(map(flops_of, eqn.bodies[0].equations)))
    return around_loop(split, traced.state, main)


def into_stages(step: Step, schedule: Schedule, stage_of_layer: Sequence[int] = ()) -> Stages:
    """Cuts a step into stages.

    Args:
        step: the step around its loop.
        schedule: says how many stages there are and whether backward is split in two.
        stage_of_layer: the stage of each layer, rising; empty for one layer a stage, of equal work.

    Raises:
        LayerError: the step has fewer places to cut.
        PipelineError: the layers make another number of stages.
    """
    stage_of_layer = tuple(stage_of_layer) or tuple(range(schedule.n_stages))
    if sorted(set(stage_of_layer)) != list(range(schedule.n_stages)) or list(stage_of_layer) != sorted(stage_of_layer):
        raise PipelineError(
            f"layers on stages {', '.join(map(str, stage_of_layer))} are no {schedule.n_stages} stages in a row",
            where=f"schedule {schedule.name}",
            fix="give every stage a run of layers, from stage 0 on",
        )
    layers = cluster_layers(step.body, len(stage_of_layer), flops_of)
    return cut(step, layers, stage_of_layer, split_weights=bool(schedule.split))


def check_devices(n_meshes: int, schedule: Schedule) -> None:
    """Raises PipelineError unless there is a submesh for every device of a schedule."""
    if n_meshes != schedule.n_devices:
        raise PipelineError(
            f"{n_meshes} submeshes for the {schedule.n_devices} devices of schedule {schedule.name}",
            fix="pass one submesh for every device of the schedule",
        )


def _check_remat(layout: Layout) -> None:
    unknown = sorted(layout.remat - set(range(layout.schedule.n_stages)))
    if unknown:
        raise PipelineError(
            f"remat names stage {', '.join(map(str, unknown))}, there are stages 0 to {layout.schedule.n_stages - 1}",
            where=f"schedule {layout.schedule.name}",
            fix="give numbers of stages, or True for all of them",
        )
