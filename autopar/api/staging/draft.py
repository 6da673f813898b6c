"""Stages planned under a price of memory that rises until the devices that hold them have enough."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.api.planning import Options, as_lowered, plan_prepared
from autopar.api.staging.costs import Prices, frugal, unit_price_s_per_byte
from autopar.api.staging.kinds import Part
from autopar.api.staging.links import ONE_DEVICE, prices_on
from autopar.api.staging.prepare import prepare_stage
from autopar.api.staging.twins import Names
from autopar.cost import CostModel
from autopar.errors import InfeasibleError
from autopar.plan import Plan
from autopar.plan.figures import nbytes
from autopar.planner.intra import Formulation
from autopar.planner.pins import restrict
from autopar.planner.search import Limits, Prepared, Solved, search
from autopar.sharding.lookup import RuleBook
from autopar.solver import Choice
from autopar.solver.schedule import Timeline
from autopar.solver.slicing import StageCost

FRUGALITIES = (1.0, 4.0, 16.0, 64.0)
"""Prices of memory, tried in turn while a device has too little: percents of speed for one percent of memory."""

TRIES = 3
"""How often a stage is planned under a limit, where no price of memory is enough."""

SLACK = 0.02
"""By how much more than what is lacking a stage is squeezed, relatively: the counts of two plans differ a little."""


@dataclass(frozen=True, eq=False)
class Draft:
    """A stage that has been planned.

    Attributes:
        plan: of it.
        prices: its pieces and what they cost.
        cost: the same, summed up.
        price_s_per_byte: the price of memory that it was planned with.
    """

    plan: Plan
    prices: Prices
    cost: StageCost
    price_s_per_byte: float

    def of_twin(self, part: Part, rules: RuleBook) -> "Draft":
        """The same for a stage that is alike."""
        mine = part.scattering() if self.prices.part.stage.scatters else part
        names = Names.of(self.prices.part.stage.program, mine.stage.program)
        plan = names.plan(self.plan, mine.stage.program)
        return replace(self, plan=plan, prices=self.prices.of_twin(names, plan, mine, rules))

    @property
    def room_bytes(self) -> float:
        """What it needs of a device with one microbatch in flight."""
        return self.cost.state_bytes + self.cost.activation_bytes_per_microbatch + self.cost.peak_extra_bytes


@dataclass(eq=False)
class StagePlanner:
    """Plans one stage under one price of memory after another.

    Attributes:
        part: the stage.
        cost: prices its submesh.
        microbatches: of a step.
        options: the restrictions.
        solved: what the planners of all stages solved so far, and their rules.
        twin: the planner of a stage that is like this one: it plans for both.
    """

    part: Part
    cost: CostModel
    microbatches: int
    options: Options
    solved: tuple[Solved, RuleBook] = field(default_factory=lambda: (Solved(), RuleBook()))
    twin: "StagePlanner | None" = None
    _drafts: dict[float, Draft] = field(default_factory=dict)

    def draft(self, frugality: float) -> Draft:
        """The best plan at a price of memory; see ``Search.frugality``."""
        if frugality not in self._drafts and self.twin is not None:
            self._drafts[frugality] = self.twin.draft(frugality).of_twin(self.part, self.solved[1])
        elif frugality not in self._drafts:
            price_s_per_byte = frugality * self._unit_s_per_byte if frugality else 0.0
            self._drafts[frugality] = self._planned(price_s_per_byte, math.inf)
        return self._drafts[frugality]

    def within(self, memory_bytes: float) -> Draft:
        """The best plan that needs no more with one microbatch in flight; raises InfeasibleError."""
        return self._planned(0.0, memory_bytes)

    def _planned(self, price_s_per_byte: float, memory_bytes: float) -> Draft:
        """The best plan; gradients are scattered in every microbatch where that is worth the memory."""
        prepared = frugal(self._prepared, self.part.stage, price_s_per_byte)
        plan, formulation, choice = self._found(prepared, memory_bytes)
        prices = Prices.of(prepared, (plan, formulation, choice), self.part, self.microbatches)
        plan = as_lowered(plan, prices.local, self.options, (prepared, formulation, choice))
        ways = (prices, prices.scattering()) if price_s_per_byte else (prices,)
        return min((Draft(plan, way, way.stage_cost(), price_s_per_byte) for way in ways), key=self._worth_s)

    def _found(self, prepared: Prepared, memory_bytes: float) -> tuple[Plan, Formulation, Choice]:
        """The best plan that needs no more memory; what it costs as a whole step matters only where that is little."""
        if math.isinf(memory_bytes):
            masks = restrict(prepared.graph, prepared.formulator, self.options.preset, self.options.pins)
            return search(prepared, Limits(None, self.options.seconds, on_progress=self.options.on_progress), masks)
        plan = plan_prepared(prepared, self.cost, replace(self.options, memory_gb=memory_bytes / 1e9))
        _, formulation, choice = plan.runtime
        return plan, formulation, choice

    def _worth_s(self, draft: Draft) -> float:
        """Seconds of a step, and the price of the memory that it needs."""
        cost = draft.cost
        passes_s = self.microbatches * (cost.forward_s + cost.backward_s + cost.weight_s)
        return passes_s + cost.sync_s + cost.optimizer_s + draft.price_s_per_byte * draft.room_bytes

    @cached_property
    def _prepared(self) -> Prepared:
        solved, rules = self.solved
        own = prepare_stage(self.part.stage, self.cost, self.microbatches, rules, strict=self.options.strict)
        return replace(own, solved=solved)

    @cached_property
    def _unit_s_per_byte(self) -> float:
        return unit_price_s_per_byte(self.part, self._prepared, prices_on(self.options, ONE_DEVICE))


def peak_bytes(run: Timeline, drafts: Sequence[Draft], device: int) -> float:
    """Memory of one place of the pipeline: its stages' state, activations in flight, what a task needs besides."""
    extra = max(drafts[stage].cost.peak_extra_bytes for stage in run.schedule.stages_of(device))
    return run.peak_bytes[device] + extra


@dataclass(frozen=True, eq=False)
class Fitting:
    """Stages that are planned until every device has room for those that it holds.

    Attributes:
        planners: of the stages.
        timeline: when a step runs what, and what devices hold meanwhile.
    """

    planners: Sequence[StagePlanner]
    timeline: Callable[[Sequence[Draft]], Timeline]

    def fitted(self, frugality: Sequence[float]) -> list[Draft]:
        """The stages, planned at the prices of memory that are asked for, or at higher ones where they do not fit.

        Raises:
            InfeasibleError: no price is enough, nor is a plan found under the limit itself.
        """
        asked = list(frugality) or [0.0] * len(self.planners)
        drafts = [planner.draft(each) for planner, each in zip(self.planners, asked, strict=True)]
        for price in FRUGALITIES:
            over = self._over(drafts)
            if not over:
                return drafts
            for stage in over:
                drafts[stage] = self.planners[stage].draft(max(price, asked[stage]))
        for _ in range(TRIES):
            over = self._over(drafts)
            for stage, (lacks_bytes, run) in sorted(over.items(), key=lambda item: -item[1][0]):
                drafts[stage] = self._squeezed(drafts, stage, lacks_bytes, run)
            if not over:
                return drafts
        over = self._over(drafts)
        if over:
            worst = max(over, key=lambda stage: over[stage][0])
            raise self._refusal(drafts, worst, over[worst][1])
        return drafts

    def _over(self, drafts: Sequence[Draft]) -> dict[int, tuple[float, Timeline]]:
        """The stages on devices that have too little memory, with the bytes that these lack."""
        run, found = self.timeline(drafts), {}
        for device in range(run.schedule.n_devices):
            for stage in set(run.schedule.stages_of(device)):
                planner = self.planners[stage]
                lacks_bytes = peak_bytes(run, drafts, device) - planner.options.limit_bytes(planner.cost)
                if lacks_bytes > 0:
                    found[stage] = (lacks_bytes, run)
        return found

    def _squeezed(self, drafts: Sequence[Draft], stage: int, lacks_bytes: float, run: Timeline) -> Draft:
        """A stage planned under the limit that is left for it.

        Prices see what a device holds between two passes: where that alone is too much, a limit does no better.
        """
        if lacks_bytes >= drafts[stage].cost.peak_extra_bytes:
            raise self._refusal(drafts, stage, run)
        try:
            return self.planners[stage].within(drafts[stage].room_bytes - lacks_bytes * (1 + SLACK))
        except InfeasibleError as error:
            raise self._refusal(drafts, stage, run) from error

    def _refusal(self, drafts: Sequence[Draft], stage: int, run: Timeline) -> InfeasibleError:
        planner, cost, schedule = self.planners[stage], drafts[stage].cost, run.schedule
        device = schedule.placements[0][stage]
        limit_bytes = planner.options.limit_bytes(planner.cost)
        needs_bytes, held = peak_bytes(run, drafts, device), run.peak_in_flight[device]
        again = "" if planner.part.stage.rematerialised else f", run its forward part again (--remat {stage})"
        fewer = "" if schedule.name == "1f1b" else ", or schedule 1f1b, which keeps fewer of them"
        return InfeasibleError(
            f"stage {stage} does not fit {nbytes(limit_bytes)} a device: the leanest plan found needs "
            f"{nbytes(needs_bytes)} with {held} microbatches in flight",
            where=f"mesh {planner.cost.mesh}, schedule {schedule.name}, {planner.microbatches} microbatches: "
            f"{nbytes(cost.state_bytes)} of state, {nbytes(cost.activation_bytes_per_microbatch)} kept for each "
            f"microbatch, {nbytes(cost.peak_extra_bytes)} besides",
            fix=f"raise --memory-gb to {needs_bytes * 1.005 / 1e9:.3g}, take more microbatches, more stages or larger "
            f"submeshes{again}{fewer}",
            least_bytes=needs_bytes,
        )
