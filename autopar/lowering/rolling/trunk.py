"""The trunk of a step: the runs of alike layers, forward and backward, that belong together.

The longest run leads. Others are linked to it where each of their copies reads what one of its copies makes or reads:
the backward pass of layer k reads the residuals and the parameters of layer k. Where a repeat leaves open in which of
its equations a copy begins, it is where least passes from copy to copy, and where the copies of linked runs are the
same layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.errors import AutoparError
from autopar.ir.body import free_values
from autopar.ir.program import Equation, Program, Value
from autopar.lowering.rolling.repeats import Repeat, contracts, repeats
from autopar.lowering.rolling.unit import Run, longest_chain

_LEAST_SHARE = 0.5
"""The least share of a step's contractions that a run holds to which none is linked: the sum of the gradients of
queries, keys and values is no trunk."""


class RollError(AutoparError, ValueError):
    """A step whose layers cannot be rolled into a loop."""


@dataclass(frozen=True)
class Link:
    """Copy j of ``run`` belongs to copy ``first + direction * j`` of the leading run."""

    run: Run
    first: int
    direction: int

    def layers(self) -> tuple[int, int]:
        """The copies of the leading run that it belongs to: the first, and the one behind the last."""
        last = self.first + self.direction * (self.run.count - 1)
        return min(self.first, last), max(self.first, last) + 1

    def part(self, start: int, stop: int) -> "Link":
        """The copies that belong to copies ``start`` to ``stop`` of the leading run, which are copies 0, 1, ... now."""
        skipped = start - self.first if self.direction > 0 else self.first - (stop - 1)
        first = 0 if self.direction > 0 else stop - start - 1
        return Link(self.run.part(skipped, stop - start), first, self.direction)


def find_links(program: Program) -> list[Link]:
    """The longest run of alike layers of a program and those linked to it; none if no layers are alike."""
    return _Search(program).links()


def common_layers(program: Program, found: Sequence[Link], n_layers: int | None = None) -> tuple[Link, ...]:
    """The layers that all runs have, in program order: copies of the runs before and behind them stay as they are.

    Raises:
        RollError: there are fewer layers than asked for, or they are not what the step is about.
    """
    start = max((link.layers()[0] for link in found), default=0)
    stop = min((link.layers()[1] for link in found), default=0)
    total = sum(map(contracts, program.equations))
    held = sum(contracts(eqn) for link in found for eqn in program.equations[link.run.start : link.run.stop])
    wanted = n_layers if n_layers is not None else 2
    if stop - start < max(wanted, 2) or (len(found) == 1 and held < _LEAST_SHARE * total):
        lengths = ", ".join(f"{each.run.count} of {each.run.period} equations" for each in found) or "none"
        raise RollError(
            f"the step has no {wanted if n_layers else 'run of'} layers that are alike and follow one another",
            where=f"{len(program.equations)} equations, {total} contractions; runs of alike layers: {lengths}",
            fix="make the layers alike (same shapes, same operations), or run the step as it is written",
        )
    found = sorted(found, key=lambda link: link.run.start)
    if n_layers is not None and found[0].direction > 0:
        stop = start + n_layers
    elif n_layers is not None:
        start = stop - n_layers
    return tuple(link.part(start, stop) for link in found)


class _Search:
    """Runs of one program, tried from the most promising on."""

    def __init__(self, program: Program) -> None:
        self.equations = program.equations
        self.free = free_values(program.equations)
        self.maker = {value: i for i, eqn in enumerate(program.equations) for value in eqn.outputs}

    def links(self) -> list[Link]:
        """The leading run and those linked to it; none if nothing is alike."""
        leader: Repeat | None = None
        found: list[Link] = []
        for repeat in repeats(self.equations):
            if any(_overlap(repeat, link.run) for link in found):
                continue
            if leader is None:
                run = longest_chain(self.equations, self._runs(repeat)[0])
                if run is not None:
                    leader, found = repeat, [Link(run, 0, 1)]
            else:
                found = self._with(found, leader, repeat)
        return found

    def _with(self, found: list[Link], leader: Repeat, repeat: Repeat) -> list[Link]:
        """The links and one more, if the repeat is linked; the first one fixes where the leader's copies begin."""
        leading = self._runs(leader) if len(found) == 1 else [found[0].run]
        reads = self._reads(leader, repeat)
        votes = [(_votes(reads, one, other), one, other) for one in leading for other in self._runs(repeat)]
        (count, first, direction), one, other = max(votes, key=lambda vote: vote[0][0])
        lead = found[0].run if len(found) > 1 else longest_chain(self.equations, one)
        run = longest_chain(self.equations, other)
        if not count or lead is None or run is None:
            return found
        first -= (lead.start - one.start) // one.period
        first += direction * ((run.start - other.start) // other.period)
        link = Link(run, first, direction)
        low, high = link.layers()
        if min(high, lead.count) - max(low, 0) < 2:
            return found
        return [Link(lead, 0, 1), *found[1:], link]

    def _runs(self, repeat: Repeat) -> list[Run]:
        """Where its copies may begin: where least passes from one to the next."""
        crossing = self._crossing_bytes(repeat)
        middle = repeat.start + repeat.period * (repeat.count // 2)
        nbytes = crossing[middle - repeat.start : middle - repeat.start + repeat.slack + 1]
        least = np.flatnonzero(nbytes == nbytes.min())
        return [Run(repeat.start + int(i), repeat.period, repeat.count) for i in least]

    def _crossing_bytes(self, repeat: Repeat) -> np.ndarray:
        """The bytes that equations of a repeat make before each of its positions and read from there on."""
        last: dict[Value, int] = {}
        for i in range(repeat.start, repeat.stop):
            last.update(dict.fromkeys(self.equations[i].operands, i))
        change = np.zeros(repeat.stop - repeat.start + 2, dtype=np.int64)
        for value, i in last.items():
            at = self.maker.get(value, -1)
            if at >= repeat.start and value not in self.free:
                change[at + 1 - repeat.start] += value.nbytes
                change[i + 1 - repeat.start] -= value.nbytes
        return np.cumsum(change)

    def _reads(self, leader: Repeat, repeat: Repeat) -> np.ndarray:
        """Pairs of positions in both: where the leader makes a value, or alone has it, and where the other has it."""
        places = _places(self.equations, leader, self.maker), _places(self.equations, repeat, self.maker)
        both = [(places[0][value], places[1][value]) for value in places[0].keys() & places[1].keys()]
        return np.array(both, dtype=np.int64).reshape(-1, 2)


def _places(equations: Sequence[Equation], repeat: Repeat, maker: dict[Value, int]) -> dict[Value, int]:
    """Where a repeat makes or first reads each value that no two of its copies read from outside."""
    first: dict[Value, int] = {}
    shared: set[Value] = set()
    for i in range(repeat.start, repeat.stop):
        for value in equations[i].operands:
            at = first.setdefault(value, i)
            if i - at >= repeat.period:
                shared.add(value)
        first.update(dict.fromkeys(equations[i].outputs, i))
    inside = {value for value in first if repeat.start <= maker.get(value, -1) < repeat.stop}
    return {value: at for value, at in first.items() if value in inside or value not in shared}


def _votes(reads: np.ndarray, leader: Run, run: Run) -> tuple[int, int, int]:
    """How many pairs agree on the copy of the leader that the run's first copy belongs to; that copy; the direction."""
    copies = (reads - (leader.start, run.start)) // (leader.period, run.period)
    inside = ((copies >= 0) & (copies < (leader.count, run.count))).all(axis=1)
    best = (0, 0, 1)
    for direction in (1, -1):
        firsts, counts = np.unique(copies[inside, 0] - direction * copies[inside, 1], return_counts=True)
        if len(firsts) and counts.max() > best[0]:
            best = (int(counts.max()), int(firsts[counts.argmax()]), direction)
    return best


def _overlap(repeat: Repeat, run: Run) -> bool:
    return repeat.start + repeat.slack < run.stop and run.start < repeat.stop - repeat.slack
