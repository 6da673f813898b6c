"""What a stage costs on a submesh: planned with the intra-operator planner, priced part by part."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from autopar.api.planning import equation_seconds
from autopar.api.staging.kinds import Part
from autopar.api.staging.prepare import prepare_stage
from autopar.api.staging.twins import Names
from autopar.cost import CostModel, overlaps
from autopar.ir.program import Value
from autopar.ir.stages import Part as Kind
from autopar.ir.stages import Stage
from autopar.lowering.instructions import LocalProgram, Move, Slot, reads
from autopar.lowering.local_program import build_local_program
from autopar.lowering.pipeline.parts import Piece, StageParts, cut_parts
from autopar.lowering.predict import collectives, communication_s, flops, local_bytes, memory
from autopar.lowering.simulate import simulate
from autopar.plan import Collective, Plan, Prediction
from autopar.planner.intra import Formulation, Formulator
from autopar.planner.search import Limits, Prepared, Solved, search
from autopar.planner.space import Space
from autopar.sharding.lookup import RuleBook
from autopar.solver import Choice, Problem, Warm
from autopar.solver.slicing import StageCost

GAP = 1e-3
"""How close to its optimum a layer is priced: stages are planned whole, and exactly, once they are chosen."""

PASSES = (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHTS)


@dataclass(frozen=True)
class LayerCost(StageCost):
    """What a layer costs as a stage, and more that decides what it costs in one that runs its forward part again.

    Attributes:
        again_s: forward pass up to what its own backward pass needs of it.
        received_bytes: what it is sent for a microbatch, by the layers below or the batch.
    """

    again_s: float = 0.0
    received_bytes: float = 0.0


@dataclass(frozen=True, eq=False)
class Frugal:
    """A formulator that prices memory too: what is in use where forward turns into backward, or that into update.

    The price is a Lagrange multiplier of the memory of a device, whose limit no single layer knows.

    Attributes:
        plain: formulates without that price.
        turns: the last equations of the forward and of the backward pass.
        price_s_per_byte: the price.
        known: what the plain one formulates, if that is known: several prices share it.
    """

    plain: Formulator
    turns: tuple[int, ...]
    price_s_per_byte: float
    known: Formulation | None = None

    @property
    def cost(self) -> CostModel:
        """Prices the submesh."""
        return self.plain.cost

    @property
    def space(self) -> Space:
        """The choices."""
        return self.plain.space

    def formulate(self, limit_bytes: float | None = None, allowed: Mapping | None = None) -> Formulation:
        """The problem with the price of memory in the costs of its nodes, and no limit."""
        found = self.known if self.known and not allowed else self.plain.formulate(0.0, allowed)
        nodes = list(found.problem.nodes)
        for usage in found.problem.usages if self.price_s_per_byte else ():
            if any(usage.lo <= turn < usage.hi for turn in self.turns):
                nodes[usage.node] = nodes[usage.node] + self.price_s_per_byte * usage.bytes
        return replace(found, problem=Problem(tuple(nodes), found.problem.edges))


@dataclass(frozen=True, eq=False)
class Priced:
    """Stages of one part of a step, on any submesh.

    Attributes:
        part: the stage and the cut that it is from.
        prepared: its graph, with how often a step of so many microbatches runs each equation.
        microbatches: of a step.
    """

    part: Part
    prepared: Prepared
    microbatches: int

    @staticmethod
    def of(part: Part, cost: CostModel, microbatches: int, rules: RuleBook | None = None) -> "Priced":
        """Lays the stage's program out; ``rules`` are those that other parts looked up."""
        return Priced(part, prepare_stage(part.stage, cost, microbatches, rules), microbatches)

    def costs(self, cost: CostModel, prices_s_per_byte: Sequence[float]) -> tuple[LayerCost, ...]:
        """What the stage costs on a submesh, planned once for each price of memory.

        Args:
            cost: prices the submesh.
            prices_s_per_byte: seconds of a step that a byte of a device is worth; 0 plans for speed alone.
        """
        formulator, turns = Formulator(self.prepared.graph, cost), _turns(self.prepared, self.part.stage)
        known, found, solved = formulator.formulate(0.0), [], Solved(Warm())
        for price_s_per_byte in prices_s_per_byte:
            priced = Frugal(formulator, turns, price_s_per_byte, known)
            own = replace(self.prepared, formulator=priced, solved=solved)  # type: ignore[arg-type]
            planned = search(own, Limits(relative_gap=GAP))
            found.append(Prices.of(own, planned, self.part, self.microbatches).layer_cost())
        return tuple(found)


def unit_price_s_per_byte(part: Part, prepared: Prepared, cost: CostModel) -> float:
    """The price at which one percent of memory is worth one percent of speed, by what a stage costs on one device.

    Args:
        part: the stage.
        prepared: its graph, with how often a step runs each equation.
        cost: prices one device, where every equation has one strategy.
    """
    pricing = Formulator(prepared.graph, cost).pricing
    step_s = sum(float(pricing.vector(unit)[0]) for unit in prepared.graph.units)
    kept = {value for value in part.stage.program.inputs if value not in part.stages.varying}.union(part.stage.summed)
    return step_s / max(sum(value.nbytes for value in kept), 1)


def frugal(prepared: Prepared, stage: Stage, price_s_per_byte: float) -> Prepared:
    """The same stage, ready to be planned with a price on memory: see ``Frugal``."""
    if not price_s_per_byte:
        return prepared
    own = Frugal(prepared.formulator, _turns(prepared, stage), price_s_per_byte)
    return replace(prepared, formulator=own)  # type: ignore[arg-type]


def _turns(prepared: Prepared, stage: Stage) -> tuple[int, ...]:
    last: dict[bool, int] = {}
    for position, eqn in enumerate(prepared.graph.program.equations):
        if eqn in stage.tags and stage.tags[eqn].part in PASSES:
            last[stage.tags[eqn].part == Kind.FORWARD] = position
    return tuple(last.values())


@dataclass(frozen=True, eq=False)
class Prices:
    """A planned stage, cut into its pieces.

    Attributes:
        part: the stage and the cut that it is from.
        local: its local program.
        cost: prices its submesh.
        once_s: seconds of each equation, each time that it runs, by name.
        microbatches: of a step; where there are several, each adds its gradients to those of the ones before.
    """

    part: Part
    local: LocalProgram
    cost: CostModel
    once_s: Mapping[str, float]
    microbatches: int

    @cached_property
    def parts(self) -> StageParts:
        """Its pieces."""
        return cut_parts(self.local, self.part.stage, self.part.stages.varying)

    @staticmethod
    def of(prepared: Prepared, found: tuple[Plan, Formulation, Choice], part: Part, microbatches: int) -> "Prices":
        """Lowers what was found for a stage."""
        plan, formulation, choice = found
        graph, cost = prepared.graph, prepared.formulator.cost
        local = build_local_program(prepared.traced.program, plan, cost, prepared.rules)
        times = {eqn.name: n for eqn, n in zip(graph.program.equations, graph.times, strict=True)}
        seconds = equation_seconds(formulation, choice)
        once_s = {name: each / times[name] for name, each in seconds.items()}
        return Prices(part, local, cost, once_s, microbatches)

    def of_twin(self, names: Names, plan: Plan, part: Part, rules: RuleBook) -> "Prices":
        """The same for a stage that is alike: its plan, and what it calls the equations of this one."""
        local = build_local_program(part.stage.program, plan, self.cost, rules)
        once_s = {names.equations[name]: seconds for name, seconds in self.once_s.items()}
        return Prices(part, local, self.cost, once_s, self.microbatches)

    def scattering(self) -> "Prices":
        """The same stage, whose gradients are scattered in every microbatch."""
        return replace(self, part=self.part.scattering())

    def prediction(self, peak_bytes: float) -> Prediction:
        """What a step costs one device of the stage, bubbles aside.

        Args:
            peak_bytes: memory of the device, which may hold other stages too.
        """
        runs = [(p, self.microbatches if p.tag.part.per_microbatch else 1) for p in self.parts.pieces]
        sent: dict[tuple[str, tuple[str, ...]], Collective] = {}
        for piece, n in runs:
            for one in collectives(piece.local):
                before = sent.get((one.kind, one.axes), replace(one, nbytes=0.0, count=0))
                sent[one.kind, one.axes] = replace(
                    one, nbytes=before.nbytes + n * one.nbytes, count=before.count + n * one.count
                )
        return Prediction(
            step_s=sum(n * self._run_s(p) for p, n in runs),
            compute_s=sum(n * self._compute_s(p) for p, n in runs),
            communication_s=sum(n * communication_s(p.local) for p, n in runs),
            peak_bytes=peak_bytes,
            state_bytes=self._bytes(self._persistent()),
            flops=sum(n * flops(p.local) for p, n in runs),
            collectives=tuple(sent.values()),
        )

    def layer_cost(self) -> LayerCost:
        """The same, and what it would be in a stage that runs its forward part again."""
        received = frozenset(slot for slot in self.local.inputs if self._came_up(slot.value))
        return LayerCost(**vars(self.stage_cost()), again_s=self._again_s(), received_bytes=self._bytes(received))

    def stage_cost(self) -> StageCost:
        """The pieces' seconds and bytes as the search over stages takes them."""
        pieces = self.parts.pieces
        rare = [piece for piece in pieces if not piece.tag.part.per_microbatch]
        sync_s = sum(i.resharding.cost_s for p in rare for i in p.local.instructions if isinstance(i, Move))
        kept, saved = self._persistent(), self._activations()
        return StageCost(
            *(sum(self._run_s(p) for p in pieces if p.tag.part == kind) for kind in PASSES),
            sync_s=sync_s,
            optimizer_s=sum(self._serial_s(p) for p in rare) - sync_s,
            state_bytes=self._bytes(kept),
            activation_bytes_per_microbatch=self._bytes(saved),
            peak_extra_bytes=max(self._extra_bytes(p, kept, saved) for p in pieces),
            left_bytes_per_microbatch=self._bytes(self._left()),
        )

    def _compute_s(self, piece: Piece) -> float:
        return self._serial_s(piece) - communication_s(piece.local)

    def _run_s(self, piece: Piece) -> float:
        return simulate(piece.local, self.once_s, overlap=overlaps(self.cost)).makespan_s + self._adding_s(piece)

    def _serial_s(self, piece: Piece) -> float:
        return simulate(piece.local, self.once_s, overlap=False).makespan_s + self._adding_s(piece)

    def _adding_s(self, piece: Piece) -> float:
        """Seconds to add a microbatch's terms up: reads them and the sums so far, and writes the new sums."""
        return self.cost.memory_s(3 * self._bytes(frozenset(piece.sums))) if self.microbatches > 1 else 0.0

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

    def _left(self) -> frozenset[Slot]:
        """What the weight part reads of a microbatch."""
        varying = self.part.stages.varying
        weights = (piece for piece in self.parts.pieces if piece.tag.part == Kind.WEIGHTS)
        return frozenset(slot for piece in weights for slot in piece.local.inputs if slot.value in varying)

    def _again_s(self) -> float:
        """The forward part without what only other stages read."""
        saved, total_s = self._activations(), 0.0
        for piece in (piece for piece in self.parts.pieces if piece.tag.part == Kind.FORWARD):
            needed, again = set(saved), []
            for instruction in reversed(piece.local.instructions):
                if not needed.isdisjoint(instruction.outputs):
                    needed.update(reads(instruction))
                    again.append(instruction)
            again = tuple(reversed(again))
            total_s += self._run_s(replace(piece, local=replace(piece.local, instructions=again), sums=()))
        return total_s

    def _came_up(self, value: Value) -> bool:
        """Whether a stage below, or the batch, gives a value."""
        stages = self.part.stages
        return value in self.parts.inputs and value in stages.varying and stages.maker.get(value, -1) < self.part.index

    def _extra_bytes(self, piece: Piece, kept: frozenset[Slot], saved: frozenset[Slot]) -> float:
        """What a piece needs beyond what is counted: what it reads and makes of that is in its own peak, too.

        An update runs when no activations are kept, nor what an earlier piece read last: the sums of gradients, once
        they are reduced. What a microbatch's piece makes for other stages stays until it is sent.
        """
        own, counted = piece.tag.part.per_microbatch, kept | saved
        local = replace(piece.local, outputs=piece.kept)  # a term of a sum dies as it is added up
        twice = counted.intersection((*piece.local.inputs, *piece.kept))
        leaving = frozenset(piece.kept) - counted if own else frozenset()
        read = (slot for slot in counted if self.parts.last_reader.get(slot, piece.tag) < piece.tag)
        gone = frozenset() if own else saved.union(read)
        needed = memory(local, self.cost).peak_bytes - self._bytes(twice | gone) + self._bytes(leaving)
        return max(needed, 0.0)

    def _bytes(self, slots: frozenset[Slot]) -> float:
        return sum(local_bytes(slot, self.local) for slot in slots)
