"""What a stage costs on a submesh: planned with the intra-operator planner, priced part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from autopar.api.planning import equation_seconds
from autopar.api.staging.kinds import Part
from autopar.api.staging.prepare import prepare_stage
from autopar.cost import CostModel, overlaps
from autopar.ir.program import Value
from autopar.ir.stages import Part as Kind
from autopar.lowering.local_program import LocalProgram, Move, Slot, build_local_program
from autopar.lowering.pipeline.parts import Piece, StageParts, cut_parts
from autopar.lowering.predict import local_bytes, memory
from autopar.lowering.simulate import simulate
from autopar.planner.intra import Formulation, Formulator
from autopar.planner.search import Limits, Prepared, search
from autopar.sharding.lookup import RuleBook
from autopar.solver import Problem
from autopar.solver.slicing import StageCost

PASSES = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHTS)


@dataclass(frozen=True, eq=False)
class Frugal:
    """A formulator that prices memory too: what is in use where forward turns into backward, or that into update.

    The price is a Lagrange multiplier of the memory of a device, whose limit no single layer knows.

    Attributes:
        plain: formulates without that price.
        turns: the last equations of the forward and of the backward pass.
        price_s_per_byte: the price.
    """

    plain: Formulator
    turns: tuple[int, ...]
    price_s_per_byte: float

    @property
    def cost(self) -> CostModel:
        """Prices the submesh."""
        return self.plain.cost

    def formulate(self, limit_bytes: float | None = None, allowed: Mapping | None = None) -> Formulation:
        """The problem with the price of memory in the costs of its nodes, and no limit."""
        found = self.plain.formulate(0.0, allowed)
        nodes = list(found.problem.nodes)
        for usage in found.problem.usages:
            if any(usage.lo <= turn < usage.hi for turn in self.turns):
                nodes[usage.node] = nodes[usage.node] + self.price_s_per_byte * usage.bytes
        return replace(found, problem=Problem(tuple(nodes), found.problem.edges))


@dataclass(frozen=True, eq=False)
class Priced:
    """Stages of one part of a step, on any submesh.

    Attributes:
        part: the stage and the cut that it is from.
        prepared: its graph, with how often a step of so many microbatches runs each equation.
    """

    part: Part
    prepared: Prepared

    @staticmethod
    def of(part: Part, cost: CostModel, microbatches: int) -> "Priced":
        """Lays the stage's program out."""
        return Priced(part, prepare_stage(part.stage, cost, microbatches))

    def costs(self, cost: CostModel, prices_s_per_byte: Sequence[float]) -> tuple[StageCost, ...]:
        """What the stage costs on a submesh, planned once for each price of memory.

        Args:
            cost: prices the submesh.
            prices_s_per_byte: seconds of a step that a byte of a device is worth; 0 plans for speed alone.
        """
        formulator = Formulator(self.prepared.graph, cost)
        found = []
        for price_s_per_byte in prices_s_per_byte:
            own = Frugal(formulator, self._turns(), price_s_per_byte) if price_s_per_byte else formulator
            prepared = replace(self.prepared, formulator=own, rules=RuleBook())  # type: ignore[arg-type]
            found.append(_Prices.of(prepared, cost, self.part).stage_cost())
        return tuple(found)

    def _turns(self) -> tuple[int, ...]:
        tags, last = self.part.stage.tags, {}
        for position, eqn in enumerate(self.prepared.graph.program.equations):
            if eqn in tags and tags[eqn].part in PASSES:
                last[tags[eqn].part == Kind.FORWARD] = position
        return tuple(last.values())


@dataclass(frozen=True, eq=False)
class _Prices:
    """A planned stage, cut into its pieces."""

    part: Part
    local: LocalProgram
    parts: StageParts
    cost: CostModel
    once_s: Mapping[str, float]

    @staticmethod
    def of(prepared: Prepared, cost: CostModel, part: Part) -> "_Prices":
        plan, formulation, choice = search(prepared, Limits())
        local = build_local_program(prepared.traced.program, plan, cost, prepared.rules)
        graph = prepared.graph
        times = {eqn.name: n for eqn, n in zip(graph.program.equations, graph.times, strict=True)}
        seconds = equation_seconds(formulation, choice)
        once_s = {name: each / times[name] for name, each in seconds.items()}
        varying = part.stages.varying
        return _Prices(part, local, cut_parts(local, part.stage, varying), cost, once_s)

    def stage_cost(self) -> StageCost:
        pieces = self.parts.pieces
        rare = [piece for piece in pieces if not piece.tag.part.per_microbatch]
        sync_s = sum(i.resharding.cost_s for p in rare for i in p.local.instructions if isinstance(i, Move))
        kept, saved = self._persistent(), self._activations()
        saved_bytes = self._bytes(saved)
        return StageCost(
            *(sum(self._run_s(p) for p in pieces if p.tag.part == kind) for kind in PASSES),
            sync_s=sync_s,
            optimizer_s=sum(self._serial_s(p) for p in rare) - sync_s,
            state_bytes=self._bytes(kept),
            activation_bytes_per_microbatch=saved_bytes,
            peak_extra_bytes=max(self._extra_bytes(p, kept | saved, saved_bytes) for p in pieces),
        )

    def _run_s(self, piece: Piece) -> float:
        return simulate(piece.local, self.once_s, overlap=overlaps(self.cost)).makespan_s

    def _serial_s(self, piece: Piece) -> float:
        return simulate(piece.local, self.once_s, overlap=False).makespan_s

    def _persistent(self) -> frozenset[Slot]:
        """What a device keeps all step: arguments, results of the prologue, accumulated gradients."""
        varying = self.part.stages.varying
        kept = {slot for slot in self.local.inputs if slot.value not in varying}
        for piece in self.parts.pieces:
            kept.update(piece.sums)
            if piece.tag.part == Kind.PROLOGUE:
                kept.update(piece.kept)
        return frozenset(kept)

    def _activations(self) -> frozenset[Slot]:
        """What the backward pass reads of a microbatch that was there before it began."""
        saved: set[Slot] = set()
        made = {slot for piece in self.parts.pieces if piece.tag.part == Kind.FORWARD for slot in piece.kept}
        for piece in self.parts.pieces:
            if piece.tag.part in (Kind.BACKWARD, Kind.WEIGHTS):
                saved.update(slot for slot in piece.local.inputs if slot in made or self._came_up(slot.value))
        return frozenset(saved)

    def _came_up(self, value: Value) -> bool:
        """Whether a stage below, or the batch, gives a value."""
        stages = self.part.stages
        return value in stages.varying and stages.maker.get(value, -1) < self.part.index

    def _extra_bytes(self, piece: Piece, counted: frozenset[Slot], saved_bytes: float) -> float:
        """What a piece needs beyond what is counted; an update runs when no activations are kept."""
        inputs, own = piece.local.inputs, piece.tag.part.per_microbatch
        inside = memory(piece.local, self.cost).peak_bytes - self._bytes(frozenset(inputs))
        ends = frozenset((*inputs, *(piece.kept if own else ()))) - counted
        return max(inside + self._bytes(ends) - (0.0 if own else saved_bytes), 0.0)

    def _bytes(self, slots: frozenset[Slot]) -> float:
        return sum(local_bytes(slot, self.local) for slot in slots)
