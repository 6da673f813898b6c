"""What a local program costs, read off its instructions: collectives, memory over time, floating-point operations."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from autopar.cost import CostModel, Work, equation_flops, fusible, rounds_products
from autopar.cost.liveness import LAYOUT, kept_values, read_by_products
from autopar.cost.on_chip import Stay, chip_of, placed_on_chip
from autopar.lowering.instructions import (
    Barrier,
    Branch,
    Bundle,
    Instruction,
    LocalProgram,
    Loop,
    Move,
    Run,
    Slot,
    reads,
)
from autopar.lowering.turns import PRODUCTS, at_leisure, in_turn
from autopar.plan import Collective
from autopar.sharding.moves import Step

PACKING = 1.1
"""What the TPU compiler's heap of temporaries takes for each byte that is in use at its peak, for the flags of
asynchronous copies, which take 16 KiB each, and for gaps: 1.07 to 1.16 in seven steps of gpt and bert on v5e:4x4
(measured in the buffer assignments of libtpu 0.0.52)."""


@dataclass(frozen=True)
class Live:
    """A buffer: ``nbytes`` on this device over instructions [start, stop).

    Attributes:
        name: of the value.
        nbytes: on this device.
        start, stop: instructions.
        uses: those that make and read a temporary, ascending; empty for what is not one.
    """

    name: str
    nbytes: float
    start: int
    stop: int
    uses: tuple[int, ...] = ()


@dataclass(frozen=True)
class Memory:
    """What a step needs on one device.

    Attributes:
        peak_bytes: the most that arguments and temporaries take of the device's memory at one time.
        on_chip_bytes: the most that temporaries take of the memory on the chip at one time.
    """

    peak_bytes: float
    on_chip_bytes: float


def walk(local: LocalProgram, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Every instruction, each move of a bundle too, and how often it runs; every branch of a cond counts once."""
    for instruction in local.instructions:
        yield instruction, times
        if isinstance(instruction, Bundle):
            yield from ((move, times) for move in instruction.moves)
        elif isinstance(instruction, Loop):
            yield from walk(instruction.body, times * instruction.length)
        elif isinstance(instruction, Branch):
            for body in instruction.bodies:
                yield from walk(body, times)


def collectives(local: LocalProgram) -> tuple[Collective, ...]:
    """The collectives of one step, summed by kind and axes, most bytes first."""
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for instruction, times in walk(local):
        for step in steps_of(instruction):
            if step.nbytes:
                total = totals.setdefault((step.kind, step.axes), [0.0, 0])
                total[0] += step.nbytes * times
                total[1] += times
    found = [Collective(kind, axes, nbytes, int(n)) for (kind, axes), (nbytes, n) in totals.items()]
    return tuple(sorted(found, key=lambda c: -c.nbytes))


def steps_of(instruction: Instruction) -> tuple[Step, ...]:
    """The moves of a resharding, or the collectives inside an equation."""
    if isinstance(instruction, Move):
        return instruction.resharding.steps
    return instruction.sent.steps if isinstance(instruction, Run) else ()


def communication_s(local: LocalProgram) -> float:
    """Seconds of all reshardings and of the collectives inside equations, one after another."""
    moved_s = sum(i.resharding.cost_s * times for i, times in walk(local) if isinstance(i, Move))
    return moved_s + inside_s(local)


def inside_s(local: LocalProgram) -> float:
    """Seconds of the collectives inside equations, which the planner counts to the equations."""
    return sum(i.sent.cost_s * times for i, times in walk(local) if isinstance(i, Run))


def flops(local: LocalProgram, primitives: Collection[str] | None = None) -> float:
    """Floating-point operations of one step on one device; only those of ``primitives`` where they are named."""
    return sum(
        _flops(instruction, local) * times
        for instruction, times in walk(local)
        if isinstance(instruction, Run) and (primitives is None or instruction.equation.primitive.name in primitives)
    )


def _flops(run: Run, local: LocalProgram) -> float:
    """Floating-point operations of one equation at the shapes of one device."""
    sizes, equation = local.mesh.sizes, run.equation
    pairs = zip(equation.inputs, run.strategy.inputs, strict=True)
    operands = [spec.complete.local_shape(atom.aval.shape, sizes) for atom, spec in pairs]
    results = [slot.spec.complete.local_shape(slot.value.shape, sizes) for slot in run.outputs]
    return equation_flops(equation.primitive.name, equation.params, operands, results)


def local_bytes(slot: Slot, local: LocalProgram) -> float:
    """Bytes of a slot on one device."""
    return slot.value.nbytes / slot.spec.shards(local.mesh.sizes)


def memory(local: LocalProgram, cost: CostModel, state: Sequence[tuple[int, int]] = ()) -> Memory:
    """The most memory that a step needs at one time, in the device's memory and on the chip.

    Args:
        local: the program.
        cost: its device may keep temporaries on the chip.
        state: (input, output) pairs that share a buffer.
    """
    chip = chip_of(cost)
    buffers = live_buffers(local if chip is None else in_turn(local), rounds_products=rounds_products(cost))
    if chip is None:
        return Memory(peak(buffers)[0], 0.0)
    buffers += _copied(local, state)
    temporaries = [buffer for buffer in buffers if buffer.uses]
    stored = frozenset(buffer.name for buffer in temporaries)
    placed = placed_on_chip([Stay(b.nbytes, b.uses) for b in temporaries], ends_s(local, cost, stored), chip)
    away = {id(b) for b, on_chip in zip(temporaries, placed, strict=True) if on_chip}
    inside, outside = [b for b in buffers if id(b) in away], [b for b in buffers if id(b) not in away]
    state_bytes = sum(local_bytes(slot, local) for slot in local.inputs)
    return Memory(state_bytes + PACKING * (peak(outside)[0] - state_bytes), peak(inside)[0])


def _copied(local: LocalProgram, state: Sequence[tuple[int, int]]) -> list[Live]:
    """Donated arguments whose new value comes straight from a collective.

    A TPU's collective cannot write into an argument, so that the compiler copies the old value at the start of the
    step for all who read it (XLA's CopyInsertion; seen in its dumps for v5e). Not so if it gathers along the last
    dimension: then the result comes transposed, and what puts it straight writes into the argument.
    """
    moved = {i.target for i in local.instructions if isinstance(i, Move) and not _fuses(i) and not _transposes(i)}
    old = {local.inputs[i]: [0] for i, o in state if local.outputs[o] in moved}
    for position, instruction in enumerate(local.instructions):
        for slot in reads(instruction):
            if slot in old:
                old[slot].append(position)
    return [Live(slot.value.name, local_bytes(slot, local), 0, at[-1] + 1, tuple(at)) for slot, at in old.items()]


def _transposes(move: Move) -> bool:
    sent = [step for step in move.resharding.steps if step.nbytes]
    return sent[-1].kind == "all_gather" and sent[-1].dim == len(move.target.value.shape) - 1


def ends_s(local: LocalProgram, cost: CostModel, stored: Collection[str]) -> list[float]:
    """Seconds of computation from the start of a step to the end of each instruction.

    Args:
        local: the program.
        cost: prices computation.
        stored: names of the values that fusing equations write to memory.
    """
    found: list[float] = []
    total_s = 0.0
    for instruction in local.instructions:
        total_s += _compute_s(instruction, local, cost, stored)
        found.append(total_s)
    return found


def _compute_s(instruction: Instruction, local: LocalProgram, cost: CostModel, stored: Collection[str]) -> float:
    if isinstance(instruction, Loop | Branch):
        bodies_s = [(ends_s(body, cost, stored) or [0.0])[-1] for body in _bodies(instruction)]
        return max(bodies_s) * (instruction.length if isinstance(instruction, Loop) else 1)
    if not isinstance(instruction, Run):
        return 0.0
    touched = [slot for slot in instruction.outputs if not _fuses(instruction) or slot.value.name in stored]
    if not _fuses(instruction):
        touched += [slot for slot in instruction.inputs if isinstance(slot, Slot)]
    equation = instruction.equation
    dtype = str(equation.outputs[0].dtype) if equation.outputs else "float32"
    nbytes = sum(local_bytes(slot, local) for slot in touched)
    return cost.compute_s(Work(equation.primitive.name, _flops(instruction, local), nbytes, dtype))


def live_buffers(local: LocalProgram, *, rounds_products: bool = False) -> list[Live]:
    """Every buffer of a step and when it is in use; arguments stay, donated results take their place.

    Args:
        local: the program.
        rounds_products: whether what only matrix products read is kept as bfloat16 (``Device.rounds_products``).
    """
    end = len(local.instructions)
    rounded = _read_by_products(local) if rounds_products else frozenset()

    def nbytes(slot: Slot) -> float:
        narrow = slot in rounded and slot.value.itemsize == 4
        return local_bytes(slot, local) / (2 if narrow else 1)

    kept = kept_values(((_fuses(i), reads(i), i.outputs) for i in local.instructions), nbytes)
    stored = _stored(local, kept)
    again = _recomputed(local, stored, kept)
    found = [Live(slot.value.name, local_bytes(slot, local), 0, end) for slot in local.inputs]
    for position, instruction in enumerate(local.instructions):
        for body in _bodies(instruction):
            inside = _temporary(body, rounds_products)
            found.append(Live(f"inside {_name(instruction)}", inside, position, position + 1))
    return found + [
        Live(slot.value.name, nbytes(slot), at[0], at[-1] + 1, tuple(at))
        for slot, at in stored.items()
        if slot not in again
    ]


Kept = Mapping[Slot, frozenset[Slot]]
"""Value -> those that are kept in its place, itself if it is kept."""


def _stored(local: LocalProgram, kept: Kept) -> dict[Slot, list[int]]:
    """The temporaries that need a buffer, with the instructions that make and read them, in order."""
    heavy = [i for i, instruction in enumerate(local.instructions) if not _fuses(instruction)]
    moved = {i.target: i.source for i in local.instructions if isinstance(i, Move)}
    reductions = {i for i in at_leisure(local) if _reduces(i)}
    uses: dict[Slot, list[int]] = {}
    needed: set[Slot] = set()
    for position, instruction in enumerate(local.instructions):
        # What is on its way to where an equation waits for it may be there until then.
        awaited = [moved[i] for i in _awaited(instruction) if i in moved]
        found = [slot for read in (*reads(instruction), *awaited) for slot in kept.get(read, (read,)) if slot in uses]
        # The compiler does not keep a large value for what makes it small and may run at any time.
        soon = max((uses[slot][0] + 1 for slot in found), default=0)
        for slot in found:
            at = soon if instruction in reductions else position
            uses[slot].append(at)
            if _in_memory(uses[slot][0], at, instruction, local, heavy):
                needed.add(slot)
        uses.update((slot, [position]) for slot in instruction.outputs)
    done = {*local.inputs, *(slot for slot in local.outputs if isinstance(slot, Slot))}
    return {slot: sorted(at) for slot, at in uses.items() if slot in needed and slot not in done}


def _awaited(instruction: Instruction) -> list[Slot]:
    return [instruction.after] if isinstance(instruction, Run) and instruction.after is not None else []


def _recomputed(local: LocalProgram, stored: Mapping[Slot, list[int]], kept: Kept) -> set[Slot]:
    """The values that products and fusing equations compute again, each for itself.

    XLA fuses what a product reads into the product (an activation function, a softmax), forward and backward: it is
    written only where that spares what it is made of, or where more products read it (a normalised value that queries,
    keys and values are made of).
    """
    inputs, again = set(local.inputs), set[Slot]()
    readers: dict[Slot, list[Instruction]] = {slot: [] for slot in stored}
    for instruction in local.instructions:
        for slot in {s for read in reads(instruction) for s in kept.get(read, (read,))} & readers.keys():
            readers[slot].append(instruction)
    for instruction in local.instructions:
        for slot in instruction.outputs if _fuses(instruction) else ():
            products = [reader for reader in readers.get(slot, ()) if _multiplies(reader)]
            others = [reader for reader in readers.get(slot, ()) if not (_fuses(reader) or _multiplies(reader))]
            if slot not in stored or others or len(products) > _MOST_PRODUCTS:
                continue
            sources = frozenset().union(*(kept.get(item, frozenset((item,))) for item in reads(instruction)))
            large = [s for s in sources if 2 * local_bytes(s, local) >= local_bytes(slot, local)]
            if all(s in inputs or (s in stored and stored[s][-1] >= stored[slot][-1]) for s in large):
                again.add(slot)
    return again


_MOST_PRODUCTS = 2


def _multiplies(instruction: Instruction) -> bool:
    return isinstance(instruction, Run) and instruction.equation.primitive.name in PRODUCTS


def _name(instruction: Instruction) -> str:
    return instruction.equation.name if isinstance(instruction, Run | Loop | Branch) else ""


def _in_memory(born: int, read: int, reader: Instruction, local: LocalProgram, heavy: list[int]) -> bool:
    """Whether a read needs a buffer: something that does not fuse makes or reads the value, or runs in between."""
    if not _fuses(local.instructions[born]):
        return True
    crossed = bisect_left(heavy, read) - bisect_right(heavy, born)
    return crossed > 0 or not (_fuses(reader) or _reduces(reader))


def _read_by_products(local: LocalProgram) -> frozenset[Slot]:
    """The slots that nothing but matrix products reads."""
    steps = [
        (
            i.equation.primitive.name if isinstance(i, Run) else LAYOUT if isinstance(i, Move) else "",
            reads(i),
            i.outputs,
        )
        for i in local.instructions
    ]
    return read_by_products(steps, (slot for slot in local.outputs if isinstance(slot, Slot)))


def _bodies(instruction: Instruction) -> tuple[LocalProgram, ...]:
    if isinstance(instruction, Loop):
        return (instruction.body,)
    return instruction.bodies if isinstance(instruction, Branch) else ()


def _temporary(body: LocalProgram, rounds_products: bool) -> float:
    """The most bytes that a body holds beyond its inputs."""
    buffers = live_buffers(body, rounds_products=rounds_products)
    return peak(buffers)[0] - sum(local_bytes(slot, body) for slot in body.inputs)


def _fuses(instruction: Instruction) -> bool:
    """Whether the instruction can be part of its reader's loop."""
    if isinstance(instruction, Barrier):
        return True
    if isinstance(instruction, Move):
        return not any(step.nbytes for step in instruction.resharding.steps)
    if isinstance(instruction, Loop | Branch | Bundle):
        return False
    return fusible(instruction.equation.primitive.name) or _selects(instruction)


def _selects(run: Run) -> bool:
    """Whether a scatter has one update per row: XLA compares the row with an iota and selects, which fuses."""
    if run.equation.primitive.name != "scatter-add":
        return False
    numbers, (operand, _, updates) = run.equation.params["dimension_numbers"], run.equation.inputs
    rows = math.prod(operand.aval.shape[dim] for dim in numbers.operand_batching_dims)
    return not numbers.update_window_dims and math.prod(updates.aval.shape) == rows


def _reduces(instruction: Instruction) -> bool:
    return isinstance(instruction, Run) and instruction.equation.primitive.name.startswith(("reduce_", "arg"))


def peak(buffers: list[Live]) -> tuple[float, int]:
    """The most bytes in use at one time, and the instruction at which they are."""
    change: dict[int, float] = {}
    for buffer in buffers:
        change[buffer.start] = change.get(buffer.start, 0.0) + buffer.nbytes
        change[buffer.stop] = change.get(buffer.stop, 0.0) - buffer.nbytes
    best, at, total = 0.0, 0, 0.0
    for time in sorted(change):
        total += change[time]
        if total > best:
            best, at = total, time
    return best, at
