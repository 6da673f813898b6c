"""Collectives that wait for each other, to be sent as one.

Between two computations a collective is a meeting of all devices. Where they do not compute meanwhile, each meeting
costs what the last one is late, and is worth putting off until nothing else can run: the bucketing of gradients (Li et
al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", VLDB 2020, section 3.2.3), both ways.
"""

import functools
import heapq
from collections.abc import Collection
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import pairwise

import jax.numpy as jnp

from autopar.lowering.instructions import Branch, Bundle, Instruction, LocalProgram, Loop, Move, Run, Slot, reads
from autopar.lowering.predict import walk
from autopar.lowering.turns import at_leisure
from autopar.sharding.reshard import CommunicationCost, Resharding

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
"""What is bundled. XLA combines all_reduces by itself (AllReduceCombiner), the other two not on CPU."""

MOST_BYTES = 2**23
"""What is sent as one at most, so that no more than this waits or is there too early."""

_Key = tuple[str, tuple[str, ...], str, str]
_Held = list[tuple[int, Move]]
"""A heap of moves with their places in the program."""


def bundled(local: LocalProgram, most_bytes: float = MOST_BYTES) -> LocalProgram:
    """The program in which collectives of one kind over the same axes go together, in as few bundles as is easily had.

    Everything runs in the order of the program, but for what awaits a collective. When nothing else can run, the
    collectives that the next matrix product waits for are sent, with those like them that are ready.
    """
    code = [part for instruction in local.instructions for part in _parts(instruction, most_bytes)]
    leisure = at_leisure(replace(local, instructions=tuple(code)))
    makers = {slot: at for at, instruction in enumerate(code) for slot in instruction.outputs}
    sorter = TopologicalSorter({at: {makers[s] for s in _needs(i) if s in makers} for at, i in enumerate(code)})
    sorter.prepare()
    ready: list[int] = []
    held: dict[_Key, _Held] = {}
    ordered: list[Instruction] = []
    while sorter.is_active():
        for at in sorter.get_ready():
            instruction = code[at]
            if isinstance(instruction, Move) and (key := _key(instruction)):
                heapq.heappush(held.setdefault(key, []), (at, instruction))
            else:
                heapq.heappush(ready, at)
        if ready:
            at = heapq.heappop(ready)
            ordered.append(code[at])
            sorter.done(at)
        elif held:
            sent = _next(held, leisure, most_bytes)
            ordered.append(Bundle(tuple(move for _, move in sent)) if len(sent) > 1 else sent[0][1])
            sorter.done(*(at for at, _ in sent))
    return replace(local, instructions=tuple(ordered))


def spared_s(local: LocalProgram, cost: CommunicationCost) -> float:
    """Seconds that bundles spare in a step: those of their moves one by one, less those of one as large as all."""
    return sum(times * _spared_s(i, cost) for i, times in walk(bundled(local)) if isinstance(i, Bundle))


def _spared_s(bundle: Bundle, cost: CommunicationCost) -> float:
    steps = [step for move in bundle.moves for step in move.resharding.steps]
    price_s = functools.partial(cost.collective_s, steps[0].kind, axes=steps[0].axes)
    return sum(price_s(step.nbytes) for step in steps) - price_s(sum(step.nbytes for step in steps))


def _parts(instruction: Instruction, most_bytes: float) -> list[Instruction]:
    """The instruction with its bodies bundled; a move of several steps as moves of one."""
    if isinstance(instruction, Loop):
        return [replace(instruction, body=bundled(instruction.body, most_bytes))]
    if isinstance(instruction, Branch):
        return [replace(instruction, bodies=tuple(bundled(body, most_bytes) for body in instruction.bodies))]
    if not isinstance(instruction, Move) or instruction.repeat or len(instruction.resharding.steps) < 2:
        return [instruction]
    path = instruction.resharding
    between = (Slot(instruction.source.value, spec) for spec in path.specs[1:-1])
    slots = [instruction.source, *between, instruction.target]
    costs_s = (path.cost_s, *(0.0 for _ in path.steps[1:]))  # of the whole path
    return [
        Move(source, target, Resharding((step,), cost_s, (source.spec, target.spec), path.monoid))
        for (source, target), step, cost_s in zip(pairwise(slots), path.steps, costs_s, strict=True)
    ]


def _needs(instruction: Instruction) -> list[Slot]:
    """What must be there before: what it reads, and what it waits for."""
    after = instruction.after if isinstance(instruction, Move | Run) else None
    return [*reads(instruction), *([] if after is None else [after])]


def _key(move: Move) -> _Key | None:
    """What the moves of a bundle have in common; None for what is not bundled, such as a gather that is repeated."""
    steps, dtype = move.resharding.steps, move.source.value.dtype
    if len(steps) != 1 or steps[0].kind not in KINDS or move.repeat or not jnp.issubdtype(dtype, jnp.floating):
        return None
    return steps[0].kind, steps[0].axes, steps[0].monoid, str(dtype)


def _next(held: dict[_Key, _Held], leisure: Collection[Instruction], most_bytes: float) -> _Held:
    """Takes a bundle from what is held: the one that holds up a product, or else the first."""
    key = min(held, key=lambda key: min((move in leisure, at) for at, move in held[key]))
    waiting, sent, total_bytes = held.pop(key), _Held(), 0.0
    while waiting:
        total_bytes += sum(step.nbytes for step in waiting[0][1].resharding.steps)
        if sent and total_bytes > most_bytes:
            held[key] = waiting
            break
        sent.append(heapq.heappop(waiting))
    return sent
