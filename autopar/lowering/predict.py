"""What a local program costs, read off its instructions: collectives, memory over time, floating-point operations."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from autopar.cost import equation_flops, fusible
from autopar.cost.liveness import LAYOUT, kept_values, read_by_products
from autopar.lowering.local_program import Barrier, Branch, Instruction, LocalProgram, Loop, Move, Run, Slot
from autopar.plan import Collective


@dataclass(frozen=True)
class Live:
    """A buffer: ``nbytes`` on this device over instructions [start, stop)."""

    name: str
    nbytes: float
    start: int
    stop: int


def walk(local: LocalProgram, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """Every instruction and how often a step runs it; every branch of a cond counts once."""
    for instruction in local.instructions:
        yield instruction, times
        if isinstance(instruction, Loop):
            yield from walk(instruction.body, times * instruction.length)
        elif isinstance(instruction, Branch):
            for body in instruction.bodies:
                yield from walk(body, times)


def collectives(local: LocalProgram) -> tuple[Collective, ...]:
    """The collectives of one step, summed by kind and axes, most bytes first."""
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for instruction, times in walk(local):
        if isinstance(instruction, Move):
            for step in instruction.resharding.steps:
                if step.nbytes:
                    total = totals.setdefault((step.kind, step.axes), [0.0, 0])
                    total[0] += step.nbytes * times
                    total[1] += times
    found = [Collective(kind, axes, nbytes, int(n)) for (kind, axes), (nbytes, n) in totals.items()]
    return tuple(sorted(found, key=lambda c: -c.nbytes))


def communication_s(local: LocalProgram) -> float:
    """Seconds of all reshardings, one after another."""
    return sum(i.resharding.cost_s * times for i, times in walk(local) if isinstance(i, Move))


def flops(local: LocalProgram, primitives: Collection[str] | None = None) -> float:
    """Floating-point operations of one step on one device; only those of ``primitives`` where they are named."""
    sizes = local.mesh.sizes
    total = 0.0
    for instruction, times in walk(local):
        if isinstance(instruction, Run) and (primitives is None or instruction.equation.primitive.name in primitives):
            strategy = instruction.strategy
            operands = [
                spec.complete.local_shape(atom.aval.shape, sizes)
                for atom, spec in zip(instruction.equation.inputs, strategy.inputs, strict=True)
            ]
            results = [slot.spec.complete.local_shape(slot.value.shape, sizes) for slot in instruction.outputs]
            name, params = instruction.equation.primitive.name, instruction.equation.params
            total += equation_flops(name, params, operands, results) * times
    return total


def local_bytes(slot: Slot, local: LocalProgram) -> float:
    """Bytes of a slot on one device."""
    return slot.value.nbytes / slot.spec.shards(local.mesh.sizes)


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

    kept = kept_values(((_fuses(i), tuple(_reads(i)), tuple(_writes(i))) for i in local.instructions), nbytes)
    heavy = [i for i, instruction in enumerate(local.instructions) if not _fuses(instruction)]
    born: dict[Slot, int] = {}
    last: dict[Slot, int] = {}
    needed: set[Slot] = set()
    found = [Live(slot.value.name, local_bytes(slot, local), 0, end) for slot in local.inputs]
    for position, instruction in enumerate(local.instructions):
        for read in _reads(instruction):
            for slot in kept.get(read, (read,)):
                last[slot] = position
                if _in_memory(slot, born.get(slot), position, instruction, local, heavy):
                    needed.add(slot)
        born.update(dict.fromkeys(_writes(instruction), position))
        for body in _bodies(instruction):
            inside = _temporary(body, rounds_products)
            found.append(Live(f"inside {_name(instruction)}", inside, position, position + 1))
    done = {*local.inputs, *(slot for slot in local.outputs if isinstance(slot, Slot))}
    temporary = [slot for slot in born if slot in needed and slot not in done]
    found += [Live(slot.value.name, nbytes(slot), born[slot], last[slot] + 1) for slot in temporary]
    return found


def _name(instruction: Instruction) -> str:
    return instruction.equation.name if isinstance(instruction, Run | Loop | Branch) else ""


def _in_memory(
    slot: Slot, born: int | None, read: int, reader: Instruction, local: LocalProgram, heavy: list[int]
) -> bool:
    """Whether a read needs a buffer: something that does not fuse makes or reads the value, or runs in between."""
    if born is None:
        return False
    if not _fuses(local.instructions[born]):
        return True
    crossed = bisect_left(heavy, read) - bisect_right(heavy, born)
    return crossed > 0 or not (_fuses(reader) or _reduces(reader))


def _read_by_products(local: LocalProgram) -> frozenset[Slot]:
    """The slots that nothing but matrix products reads."""
    steps = [
        (
            i.equation.primitive.name if isinstance(i, Run) else LAYOUT if isinstance(i, Move) else "",
            _reads(i),
            _writes(i),
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


def _reads(instruction: Instruction) -> Iterable[Slot]:
    if isinstance(instruction, Move):
        return (instruction.source,)
    return (slot for slot in instruction.inputs if isinstance(slot, Slot))


def _writes(instruction: Instruction) -> Iterable[Slot]:
    return (instruction.target,) if isinstance(instruction, Move) else instruction.outputs


def _fuses(instruction: Instruction) -> bool:
    """Whether the instruction can be part of its reader's loop."""
    if isinstance(instruction, Barrier):
        return True
    if isinstance(instruction, Move):
        return not any(step.nbytes for step in instruction.resharding.steps)
    if isinstance(instruction, Loop | Branch):
        return False
    return fusible(instruction.equation.primitive.name)


def _reduces(instruction: Instruction) -> bool:
    return isinstance(instruction, Run) and instruction.equation.primitive.name.startswith("reduce_")


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
