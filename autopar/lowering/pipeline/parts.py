"""A stage's local program, cut into the local programs of its parts.

A stage is planned as one program, so that its parts agree on the layout of everything that one leaves to another:
parameters, activations kept for the backward pass, gradients. Then each instruction goes to the part whose equation
it serves. Slots that one part makes and another reads become results and arguments; partial ones stay partial (a
gradient is summed over microbatches before it is summed over devices, or scattered first where the stage says so).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from autopar.errors import PlanError
from autopar.ir.program import Value
from autopar.ir.stages import Part, Stage, Tag
from autopar.lowering.instructions import Barrier, Instruction, LocalProgram, Move, Slot, reads
from autopar.lowering.predict import local_bytes


@dataclass(frozen=True, eq=False)
class Piece:
    """What a stage runs in one round of one part.

    Attributes:
        tag: the part and round.
        local: its instructions; inputs are slots that come from other pieces, stages or steps, outputs first ``kept``,
            then ``sums``.
        kept: results that are read as they are.
        sums: results that are added up over the microbatches.
    """

    tag: Tag
    local: LocalProgram
    kept: tuple[Slot, ...]
    sums: tuple[Slot, ...]

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """All results."""
        return (*self.kept, *self.sums)


@dataclass(frozen=True, eq=False)
class StageParts:
    """A stage's pieces in the order in which it runs them.

    Attributes:
        pieces: by part and round.
        inputs: the slot of each input of the stage's program.
        outputs: the slot of each output of the stage's program.
        last_reader: the piece that reads a slot last; absent for slots that no piece reads.
    """

    pieces: tuple[Piece, ...]
    inputs: Mapping[Value, Slot]
    outputs: Mapping[Value, Slot]
    last_reader: Mapping[Slot, Tag]


def kept_bytes(parts: StageParts, varying: Iterable[Value]) -> float:
    """Bytes on one device that a stage keeps for each microbatch in flight, from its forward part to its last.

    Args:
        parts: the stage.
        varying: values of which there is one for each microbatch.
    """
    (forward,) = (piece for piece in parts.pieces if piece.tag.part == Part.FORWARD)
    received = [slot for slot in parts.inputs.values() if slot.value in varying and slot in forward.local.inputs]
    later = [slot for slot in (*forward.kept, *received) if parts.last_reader.get(slot, forward.tag) != forward.tag]
    return sum(local_bytes(slot, forward.local) for slot in later)


def cut_parts(local: LocalProgram, stage: Stage, varying: Iterable[Value]) -> StageParts:
    """Cuts the local program of a stage.

    Args:
        local: instructions of the stage's program.
        stage: which equation belongs to which part.
        varying: values of which there is one for each microbatch.
    """
    cutter = _Cutter(local, stage, frozenset(varying))
    cutter.assign()
    pieces = tuple(cutter.piece(tag) for tag in sorted(cutter.code))
    last = {slot: piece.tag for piece in pieces for slot in piece.local.inputs}
    ends = zip(stage.program.outputs, local.outputs, strict=True)
    outputs = {value: slot for value, slot in ends if isinstance(value, Value) and isinstance(slot, Slot)}
    inputs = {slot.value: slot for slot in local.inputs}
    return StageParts(pieces, inputs, outputs, last)


@dataclass
class _Cutter:
    local: LocalProgram
    stage: Stage
    varying: frozenset[Value]
    code: dict[Tag, list[Instruction]] = field(default_factory=dict)
    readers: dict[Slot, set[Tag]] = field(default_factory=dict)
    makers: dict[Slot, set[Tag]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        equations = self.stage.program.equations
        tags = self.stage.tags
        self.made = {value: tags.get(eqn) for eqn in equations for value in eqn.outputs}
        self.results = {slot for slot in self.local.outputs if isinstance(slot, Slot)}

    def assign(self) -> None:
        """Gives each instruction to the pieces that run it, readers first."""
        for instruction in reversed(self.local.instructions):
            if isinstance(instruction, Barrier):
                for part in self._split(instruction):
                    self._give(part, self._home(part.outputs[0]))
            elif isinstance(instruction, Move):
                self._give(instruction, self._movers(instruction))
            else:
                home = self._home(instruction.outputs[0])
                self._give(instruction, home or self._wanted(instruction.outputs))
        for code in self.code.values():
            code.reverse()

    def piece(self, tag: Tag) -> Piece:
        """The piece of one part and round."""
        code = self._scattered_at_once(self.code[tag]) if self.stage.scatters else self.code[tag]
        made = {slot for i in code for slot in i.outputs}
        read = dict.fromkeys(slot for i in code for slot in reads(i))
        there = made.union(read)
        kept = [replace(i, after=None) if isinstance(i, Move) and i.after not in there else i for i in code]
        inputs = tuple(slot for slot in read if slot not in made)
        results = [slot for i in code for slot in i.outputs]
        sums = tuple(slot for slot in results if tag.part.per_microbatch and self._is_sum(slot))
        for slot in sums:
            self._check(slot)
        outputs = tuple(slot for slot in results if self._is_kept(slot, tag))
        local = LocalProgram(inputs, (*outputs, *sums), tuple(kept), self.local.mesh)
        return Piece(tag, local, outputs, sums)

    def _scattered_at_once(self, code: list[Instruction]) -> list[Instruction]:
        """The instructions with what scatters a gradient right behind what makes it, so that the whole one dies."""
        behind: dict[Slot, list[Instruction]] = {}
        for i in code:
            if isinstance(i, Move) and i.source.value in self.stage.summed and i.source.spec.partial:
                behind.setdefault(i.source, []).append(i)
        early = {id(move) for moves in behind.values() for move in moves}
        found: list[Instruction] = []
        for i in code:
            if id(i) not in early:
                found.append(i)
                found += [move for slot in i.outputs for move in behind.pop(slot, ())]
        return [*(move for moves in behind.values() for move in moves), *found]

    def _is_sum(self, slot: Slot) -> bool:
        after = any(not tag.part.per_microbatch for tag in self.readers.get(slot, ()))
        return slot.value in self.stage.summed and (after or slot in self.results)

    def _check(self, slot: Slot) -> None:
        if slot.spec.partial and self.stage.summed[slot.value] != "sum":
            raise PlanError(
                f"{slot.value.name} is a {self.stage.summed[slot.value]} over microbatches, but {slot.spec}",
                where=f"mesh {self.local.mesh}",
                fix="pin it to a layout without partial axes",
            )

    def _is_kept(self, slot: Slot, tag: Tag) -> bool:
        readers = self.readers.get(slot, set()) - self.makers[slot]
        if tag.part.per_microbatch and slot.value in self.stage.summed:
            return any(t.part.per_microbatch for t in readers) or (
                slot in self.results and slot.value in self.stage.sent
            )
        return bool(readers) or slot in self.results

    def _made(self, slot: Slot) -> Tag | None:
        return self.made.get(slot.value)

    def _home(self, slot: Slot) -> set[Tag]:
        """The piece whose equation makes a slot; none for what depends on nothing."""
        tag = self._made(slot)
        return set() if tag is None else {tag}

    def _wanted(self, slots: Iterable[Slot]) -> set[Tag]:
        return set().union(*(self.readers.get(slot, set()) for slot in slots))

    def _movers(self, move: Move) -> set[Tag]:
        """The pieces that run a move: its readers where it copies what stays the same all step, else one of them."""
        value, made, wanted = move.source.value, self._made(move.source), self._wanted([move.target])
        if move.target in self.results and made is not None:
            return {made}
        if value not in self.varying or not wanted or (made is None and value in self.made):
            return wanted
        if made is None:
            return self._of_received(move, wanted)
        sizes = self.local.mesh.sizes
        shrinks = move.source.spec.shards(sizes) < move.target.spec.shards(sizes)
        if self.stage.summed.get(value) == "sum" and not min(wanted).part.per_microbatch:
            # Over microbatches first, then over devices: once. Or the other way round: only shards are kept.
            return {made} if self.stage.scatters and shrinks else {min(wanted)}
        combined = value in self.stage.summed and not min(wanted).part.per_microbatch
        return {made} if shrinks or combined else {min(wanted)}

    def _of_received(self, move: Move, wanted: set[Tag]) -> set[Tag]:
        """The pieces that move what another stage, or the batch, gave: the first reader, and who keeps it not."""
        sizes = self.local.mesh.sizes
        grows = move.source.spec.shards(sizes) > move.target.spec.shards(sizes)
        later = {tag for tag in wanted if tag.part > Part.FORWARD}
        return {min(wanted), min(later)} if self.stage.rematerialised and grows and later else {min(wanted)}

    def _give(self, instruction: Instruction, tags: set[Tag]) -> None:
        for tag in tags:
            self.code.setdefault(tag, []).append(instruction)
            for slot in instruction.outputs:
                self.makers.setdefault(slot, set()).add(tag)
            for slot in reads(instruction):
                self.readers.setdefault(slot, set()).add(tag)

    def _split(self, barrier: Barrier) -> list[Barrier]:
        pairs: dict[Tag | None, list[tuple[Slot, Slot]]] = {}
        for source, target in zip(barrier.inputs, barrier.outputs, strict=True):
            pairs.setdefault(self._made(target), []).append((source, target))
        return [Barrier(*map(tuple, zip(*found, strict=True))) for found in pairs.values()]
