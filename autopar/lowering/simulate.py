"""When each instruction of a local program runs: a list-scheduling simulation of computation and communication.

A device has two resources. Its compute units take, of the instructions whose operands are there, the first in the
program. Its links take the collectives in the order in which their operands are there. A value that was there from
the start, such as a sharded parameter, is sent for when the one before it is read: one ahead of its reader, as in
double buffering, so that gathered copies do not pile up.
"""

import heapq
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.lowering.instructions import Branch, Bundle, Instruction, LocalProgram, Loop, Move, Run, Slot, reads
from autopar.lowering.predict import walk


@dataclass(frozen=True)
class Event:
    """One instruction on the time line of a device, in seconds from the start of the step."""

    instruction: Instruction
    start_s: float
    stop_s: float


@dataclass(frozen=True)
class Timeline:
    """What a simulated step does when.

    Attributes:
        events: by their start.
        makespan_s: when the last of them ends.
    """

    events: tuple[Event, ...]
    makespan_s: float


def simulate(local: LocalProgram, seconds: Mapping[str, float], *, overlap: bool) -> Timeline:
    """Runs a local program on two clocks.

    Args:
        local: the program of one device.
        seconds: of each equation, each time that it runs, by name; those without a price take none.
        overlap: whether the devices compute while they send; if not, one instruction follows the other.
    """
    durations_s = [_duration_s(instruction, seconds, overlap) for instruction in local.instructions]
    if overlap:
        events = _Clocks(local, durations_s).run()
    else:
        starts_s = itertools.accumulate(durations_s, initial=0.0)
        pairs = zip(local.instructions, itertools.pairwise(starts_s), strict=True)
        events = [Event(instruction, start_s, stop_s) for instruction, (start_s, stop_s) in pairs]
    return Timeline(
        tuple(sorted(events, key=lambda event: event.start_s)), max((event.stop_s for event in events), default=0.0)
    )


def hidden_s(local: LocalProgram, seconds: Mapping[str, float], *, overlap: bool) -> float:
    """Seconds of communication that pass while a device computes.

    Args:
        local: the program of one device.
        seconds: what a step spends in each equation, all its runs together, by name.
        overlap: whether the devices compute while they send.
    """
    if not overlap:
        return 0.0
    runs = {i.equation.name: times for i, times in walk(local) if isinstance(i, Run)}
    once = {name: seconds[name] / times for name, times in runs.items() if name in seconds}
    apart, together = (simulate(local, once, overlap=beside).makespan_s for beside in (False, True))
    return max(0.0, apart - together)


def _duration_s(instruction: Instruction, seconds: Mapping[str, float], overlap: bool) -> float:
    if isinstance(instruction, Move):
        return instruction.resharding.cost_s
    if isinstance(instruction, Bundle):
        return sum(move.resharding.cost_s for move in instruction.moves)
    if isinstance(instruction, Run):
        return seconds.get(instruction.equation.name, 0.0)
    if isinstance(instruction, Loop):
        return simulate(instruction.body, seconds, overlap=overlap).makespan_s * instruction.length
    if isinstance(instruction, Branch):
        return max(simulate(body, seconds, overlap=overlap).makespan_s for body in instruction.bodies)
    return 0.0


def _sends(instruction: Instruction) -> bool:
    """Whether an instruction takes the links."""
    return isinstance(instruction, Move | Bundle) or (isinstance(instruction, Run) and bool(instruction.sent.steps))


Waiting = list[tuple[float, int]]
"""A heap of instructions by number, each with the time from which it can run."""


class _Clocks:
    """The state of the simulation: what is there since when, and what waits for which resource."""

    def __init__(self, local: LocalProgram, durations_s: list[float]) -> None:
        self.instructions, self.durations_s = local.instructions, durations_s
        self.events: list[Event] = []
        self.sent_s = 0.0
        self.to_compute: Waiting = []
        self.to_send: Waiting = []
        self.missing = [len(set(reads(i))) for i in local.instructions]
        self.ready_s = [0.0] * len(local.instructions)
        self.readers: dict[Slot, list[int]] = {}
        for number, instruction in enumerate(local.instructions):
            for slot in set(reads(instruction)):
                self.readers.setdefault(slot, []).append(number)
        self.after = self._one_ahead(local)
        for slot in local.inputs:
            self._made(slot, 0.0)
        for number, missing in enumerate(self.missing):
            if missing == 0 and not reads(local.instructions[number]):
                self._issue(number)

    def _one_ahead(self, local: LocalProgram) -> dict[Slot, int]:
        """For the copy that a move makes of an argument, the next such move: its reader issues that one."""
        there = set(local.inputs)
        moves = [n for n, i in enumerate(local.instructions) if isinstance(i, Move) and i.source in there]
        for number in moves[1:]:
            self.missing[number] += 1
        targets = [self.instructions[number].outputs[0] for number in moves]
        return dict(zip(targets, moves[1:], strict=False))

    def run(self) -> list[Event]:
        """Every instruction's time."""
        computed_s = 0.0
        ready: list[int] = []
        while len(self.events) < len(self.instructions):
            if not (ready or self.to_compute or self.to_send):
                self._need(computed_s)
            if not ready:
                if not self.to_compute:
                    self._send()
                    continue
                computed_s = max(computed_s, self.to_compute[0][0])
            while self.to_send and max(self.sent_s, self.to_send[0][0]) <= computed_s:
                self._send()
            while self.to_compute and self.to_compute[0][0] <= computed_s:
                heapq.heappush(ready, heapq.heappop(self.to_compute)[1])
            if ready:
                computed_s = self._do(heapq.heappop(ready), computed_s)
        return self.events

    def _need(self, at_s: float) -> None:
        """Issues the first move that is held back: its value is read together with the one before it."""
        slot = min(self.after, key=self.after.__getitem__)
        self._less(self.after.pop(slot), at_s)

    def _send(self) -> None:
        issued_s, number = heapq.heappop(self.to_send)
        self.sent_s = self._do(number, max(issued_s, self.sent_s))

    def _do(self, number: int, start_s: float) -> float:
        """Runs an instruction and returns when it ends."""
        instruction = self.instructions[number]
        stop_s = start_s + self.durations_s[number]
        self.events.append(Event(instruction, start_s, stop_s))
        for slot in reads(instruction):
            following = self.after.pop(slot, None)
            if following is not None:
                self._less(following, start_s)
        for slot in instruction.outputs:
            self._made(slot, stop_s)
        return stop_s

    def _made(self, slot: Slot, at_s: float) -> None:
        for number in self.readers.pop(slot, ()):
            self._less(number, at_s)

    def _less(self, number: int, at_s: float) -> None:
        """One thing less that an instruction waits for."""
        self.missing[number] -= 1
        self.ready_s[number] = max(self.ready_s[number], at_s)
        if self.missing[number] == 0:
            self._issue(number)

    def _issue(self, number: int) -> None:
        waiting = self.to_send if _sends(self.instructions[number]) else self.to_compute
        heapq.heappush(waiting, (self.ready_s[number], number))
