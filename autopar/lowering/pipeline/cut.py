"""From a traced step to the programs of its stages: microbatches, layers, stages."""

from collections.abc import Sequence

from autopar.cost import flops_of
from autopar.errors import AutoparError
from autopar.ir.layers import cluster_layers
from autopar.ir.stages import Stages, cut
from autopar.ir.step import Step, around_loop
from autopar.ir.trace import Traced
from autopar.lowering.time.microbatch import batch_phases
from autopar.lowering.time.phased import LOOP_NAME, split_over_time
from autopar.plan import Splitting
from autopar.solver.schedule import Schedule


class PipelineError(AutoparError, ValueError):
    """A pipeline whose stages, submeshes and schedule do not fit together."""


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
