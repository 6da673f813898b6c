"""Pipelines that were planned before: the plan is checked against the step, and nothing is searched."""

from dataclasses import replace

from autopar.api.planning import Options
from autopar.api.staging.assemble import Planned
from autopar.api.staging.links import apart, prices_on
from autopar.errors import PlanError
from autopar.ir.fingerprint import fingerprint
from autopar.ir.stages import Stages
from autopar.ir.trace import Traced
from autopar.lowering.local_program import build_local_program
from autopar.lowering.pipeline.cut import Layout, cut_for
from autopar.plan import PipelinePlan
from autopar.solver.schedule import Schedule, TaskCosts, Timeline, make_schedule, simulate

AGAIN = "plan again with autopar plan"


def schedule_of(plan: PipelinePlan) -> Schedule:
    """The order of tasks that a plan names."""
    return make_schedule(plan.schedule, len(plan.meshes), plan.microbatches, plan.chunks)


def timeline_of(plan: PipelinePlan) -> Timeline:
    """When a step runs what, as the plan predicts its tasks."""
    each = [stage.prediction for stage in plan.stages]
    costs = TaskCosts(
        forward_s=tuple(p.forward_s for p in each),
        backward_s=tuple(p.backward_s for p in each),
        weight_s=tuple(p.weight_s for p in each),
        transfer_s=tuple(p.transfer_s for p in each[:-1]),
        activation_bytes=tuple(p.kept_bytes for p in each),
        kept_bytes=tuple(p.left_bytes for p in each),
        state_bytes=tuple(p.state_bytes for p in each),
    )
    return simulate(schedule_of(plan), costs, apart=apart(plan.meshes, plan.devices_per_host))


def planned_before(traced: Traced, plan: PipelinePlan) -> Planned:
    """The stages of a step as a plan has them.

    Raises:
        PlanError: the plan is for another program, or its stages, layers or submeshes were edited apart.
    """
    check_program(plan, traced)
    schedule = schedule_of(plan)
    stages = cut_for(traced, Layout(schedule, plan.meshes, plan.stage_of_layer, plan.splitting, plan.remat))
    _check_stages(plan, stages, schedule)
    programs = []
    for stage, found in zip(stages.stages, plan.stages, strict=True):
        # The plan has its routes; prices are asked only where it was edited by hand, and then those of these devices.
        programs.append(build_local_program(stage.program, found.plan, prices_on(Options(), found.plan.mesh)))
    pairs = zip(stages.stages, plan.stages, strict=True)
    own = tuple(replace(stage, scatters=found.scatters) for stage, found in pairs)
    return Planned(plan, replace(stages, stages=own), tuple(programs))


def check_program(plan: PipelinePlan, traced: Traced) -> None:
    """Raises PlanError unless the plan was made for this program."""
    actual = fingerprint(traced.program)
    if plan.fingerprint == actual:
        return
    known = {arg.name: arg.shape for stage in plan.stages for arg in stage.plan.arguments}
    changed = [v.name for v in traced.program.inputs if known.get(v.name, tuple(v.shape)) != tuple(v.shape)]
    raise PlanError(
        f"the plan is for program {plan.fingerprint}, this step is program {actual}",
        where=f"arguments that differ: {', '.join(changed[:5])}"
        if changed
        else "the arguments agree, the equations do not",
        fix=AGAIN,
    )


def _check_stages(plan: PipelinePlan, stages: Stages, schedule: Schedule) -> None:
    if len(plan.stages) != schedule.n_stages:
        raise PlanError(
            f"the plan has {len(plan.stages)} stages, schedule {plan.schedule} on {len(plan.meshes)} submeshes has "
            f"{schedule.n_stages}",
            fix=AGAIN,
        )
    for index, (stage, found) in enumerate(zip(stages.stages, plan.stages, strict=True)):
        first, last = plan.layers[index]
        device = schedule.placements[0][index]
        if found.device != device or found.plan.mesh != plan.meshes[device]:
            raise PlanError(
                f"stage {index} was planned for place {found.device}, mesh {found.plan.mesh}; the pipeline runs it at "
                f"place {device}, mesh {plan.meshes[device]}",
                where=f"schedule {plan.schedule}",
                fix=AGAIN,
            )
        actual = fingerprint(stage.program)
        if found.plan.fingerprint != actual:
            raise PlanError(
                f"stage {index} was planned for program {found.plan.fingerprint}, layers {first} to {last} of this "
                f"step are program {actual}",
                where=f"{len(plan.stage_of_layer)} layers, schedule {plan.schedule}",
                fix=AGAIN,
            )
