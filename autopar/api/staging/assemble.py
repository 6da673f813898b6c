"""A pipeline planned for good: every stage whole, on its submesh, within the memory of the devices that hold it."""

import functools
import re
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from autopar.api.planning import Options
from autopar.api.staging.draft import Draft, Fitting, StagePlanner, peak_bytes
from autopar.api.staging.kinds import Part
from autopar.api.staging.links import Traffic, apart, cluster_of, prices_on
from autopar.api.staging.twins import likeness
from autopar.ir.fingerprint import fingerprint
from autopar.ir.stages import Stage, Stages
from autopar.ir.step import Step
from autopar.ir.trace import Traced
from autopar.lowering.instructions import LocalProgram
from autopar.lowering.pipeline.cut import Layout, cut_for
from autopar.plan import PipelinePlan, PlannedStage, StagePrediction
from autopar.planner.search import Solved
from autopar.sharding.lookup import RuleBook
from autopar.solver import Warm
from autopar.solver.schedule import TaskCosts, Timeline, simulate


@dataclass(frozen=True, eq=False)
class Planned:
    """A pipeline and what runs it.

    Attributes:
        plan: of the pipeline.
        stages: the step in stages.
        programs: the local program of each stage.
    """

    plan: PipelinePlan
    stages: Stages
    programs: tuple[LocalProgram, ...]


def plan_pipeline(
    traced: Traced,
    layout: Layout,
    options: Options,
    frugality: Sequence[float] = (),
    trace_s: float = 0.0,
    step: Step | None = None,
) -> Planned:
    """Plans every stage of a pipeline; no device is touched.

    Args:
        traced: the step.
        layout: where to run what.
        options: hardware, memory of a device, preset and pins; each stage is planned under them.
        frugality: the price of memory of each stage, see ``Search``; empty for none.
        trace_s: seconds that tracing took.
        step: the same step around its loop over the layout's microbatches, where that is known.

    Raises:
        InfeasibleError: a device has too little memory for its stages with their microbatches in flight.
        PipelineError, LayerError, MicrobatchError, PinError, PresetError: see their texts.
    """
    start = time.process_time()
    stages = cut_for(traced, layout, step)
    cut_s = time.process_time() - start
    pipeline = Pipelined.of(stages, layout, options)
    drafts = Fitting(pipeline.planners, pipeline.timeline).fitted(frugality)
    planned = pipeline.planned(fingerprint(traced.program), drafts)
    spent = {"trace": trace_s, "layers": cut_s, "stages": time.process_time() - start - cut_s}
    return replace(planned, plan=replace(planned.plan, seconds=spent))


@dataclass(frozen=True, eq=False)
class Pipelined:
    """The stages of a step, each with its planner.

    Attributes:
        stages: the step in stages.
        layout: where they run.
        options: the restrictions.
        planners: of the stages.
    """

    stages: Stages
    layout: Layout
    options: Options
    planners: tuple[StagePlanner, ...]

    @staticmethod
    def of(stages: Stages, layout: Layout, options: Options) -> "Pipelined":
        """A planner for each stage, with the pins that are for it."""
        planners, solved, shown = [], (Solved(Warm()), RuleBook()), dict[int, str]()
        first: dict[Hashable, StagePlanner] = {}
        for index, device in enumerate(layout.schedule.placements[0]):
            own = replace(options, pins=_pins_of(stages.stages, index, options.pins))
            part, mesh = Part(stages, index), layout.meshes[device]
            cost, alike = prices_on(options, mesh), None if own.pins else likeness(part, shown)
            twin = first.get((alike, mesh))
            planners.append(StagePlanner(part, cost, layout.schedule.n_microbatches, own, solved, twin))
            if alike is not None:
                first.setdefault((alike, mesh), planners[-1])
        return Pipelined(stages, layout, options, tuple(planners))

    @functools.cached_property
    def traffic(self) -> Traffic:
        """What the stages send each other."""
        return Traffic.of(self.stages)

    def timeline(self, drafts: Sequence[Draft]) -> Timeline:
        """The microbatches of a step, task by task."""
        costs = [draft.cost for draft in drafts]
        task_costs = TaskCosts(
            forward_s=tuple(cost.forward_s for cost in costs),
            backward_s=tuple(cost.backward_s for cost in costs),
            weight_s=tuple(cost.weight_s for cost in costs),
            transfer_s=self._transfers_s,
            activation_bytes=tuple(cost.activation_bytes_per_microbatch for cost in costs),
            kept_bytes=tuple(cost.left_bytes_per_microbatch for cost in costs),
            state_bytes=tuple(cost.state_bytes for cost in costs),
        )
        return simulate(self.layout.schedule, task_costs, apart=apart(self.layout.meshes, self._devices_per_host))

    @functools.cached_property
    def _devices_per_host(self) -> int:
        cluster = cluster_of(self.planners[0].cost)
        return cluster.devices_per_host if cluster else 0

    @functools.cached_property
    def _transfers_s(self) -> tuple[float, ...]:
        return self.traffic.transfers_s(cluster_of(self.planners[0].cost), [p.cost.mesh for p in self.planners])

    def planned(self, program: str, drafts: Sequence[Draft]) -> Planned:
        """The plan of stages that have been planned; ``program`` is the fingerprint of the whole one."""
        layout, options, run = self.layout, self.options, self.timeline(drafts)
        predictions = self._predictions(drafts, run)
        once_s = [prediction.once_s for prediction in predictions]
        stages = tuple(map(self._stage, range(len(drafts)), drafts, predictions))
        plan = PipelinePlan(
            fingerprint=program,
            hardware=options.hardware or drafts[0].plan.hardware,
            schedule=layout.schedule.name,
            chunks=layout.schedule.pipeline.v,
            splitting=replace(layout.splitting, microbatches=layout.schedule.n_microbatches),
            stage_of_layer=tuple(layout.stage_of_layer) or tuple(range(len(drafts))),
            meshes=layout.meshes,
            devices_per_host=self._devices_per_host,
            stages=stages,
            step_s=max(
                events[-1].end_s + sum(once_s[stage] for stage in layout.schedule.stages_of(device))
                for device, events in enumerate(run.by_device)
            ),
            preset=options.preset,
            pins=options.pins,
        )
        own = replace(self.stages, stages=tuple(draft.prices.part.stage for draft in drafts))
        return Planned(plan, own, tuple(draft.prices.local for draft in drafts))

    def _stage(self, index: int, draft: Draft, prediction: StagePrediction) -> PlannedStage:
        own = draft.prices.prediction(prediction.peak_bytes)
        device = self.layout.schedule.placements[0][index]
        stage, plan = draft.prices.part.stage, replace(draft.plan, prediction=own)
        again = stage.rematerialised
        return PlannedStage(device, plan, draft.price_s_per_byte, stage.scatters, prediction, again)

    def _predictions(self, drafts: Sequence[Draft], run: Timeline) -> list[StagePrediction]:
        schedule, m = self.layout.schedule, self.layout.schedule.n_microbatches
        meshes = [planner.cost.mesh for planner in self.planners]
        shared_s = self.traffic.once_s(cluster_of(self.planners[0].cost), meshes, len(schedule.placements))
        found = []
        for index, (draft, device) in enumerate(zip(drafts, schedule.placements[0], strict=True)):
            cost, held = draft.cost, schedule.stages_of(device)
            last = index + 1 == len(drafts)
            found.append(
                StagePrediction(
                    forward_s=cost.forward_s,
                    backward_s=cost.backward_s,
                    weight_s=cost.weight_s,
                    once_s=cost.sync_s + cost.optimizer_s + shared_s[index],
                    transfer_s=0.0 if last else self._transfers_s[index],
                    busy_s=m * (cost.forward_s + cost.backward_s + cost.weight_s),
                    bubble_s=(run.makespan_s - run.busy_s[device]) / len(held),
                    state_bytes=cost.state_bytes,
                    kept_bytes=cost.activation_bytes_per_microbatch,
                    extra_bytes=cost.peak_extra_bytes,
                    peak_bytes=peak_bytes(run, drafts, device),
                    in_flight=run.peak_in_flight[device],
                    sent_bytes=0.0 if last else m * self.traffic.crossing_bytes[index],
                    left_bytes=cost.left_bytes_per_microbatch,
                )
            )
        return found


def _pins_of(stages: Sequence[Stage], index: int, pins: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The pins that name something in a stage; the first stage has those that no stage knows, and refuses them."""

    def known(stage: Stage, pattern: str) -> bool:
        made = (value for eqn in stage.program.equations for value in eqn.outputs)
        return any(re.search(pattern, value.name) for value in (*stage.program.inputs, *made))

    mine = []
    for pattern, spec in pins:
        where = [number for number, stage in enumerate(stages) if known(stage, pattern)] or [0]
        if index in where:
            mine.append((pattern, spec))
    return tuple(mine)
