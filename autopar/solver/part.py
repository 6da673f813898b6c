"""A reduced problem with the way back to the caller's, and the search that both belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from autopar.solver.clock import Budget, Clock
from autopar.solver.draft import Lift
from autopar.solver.eliminate import WIDE_ENTRIES
from autopar.solver.messages import Messages, Unpriced
from autopar.solver.milp import ROUNDING
from autopar.solver.problem import Choice, NoChoiceError, Problem, Progress, relative_gap, restricts
from autopar.solver.replay import Replay
from autopar.solver.rows import Rows, rows_of
from autopar.solver.tables import FREE_QUANTA_BITS, QUANTA_BITS, Tables, largest_finite, quantize, quantum_of

# A gap this small is float64 rounding. What rounding to quanta can make of a gap counts as well, up to the second.
PROVEN_GAP, MOST_ROUNDING_GAP = 1e-9, 1e-8
# Compiled kernels take half a second to load, which pays from so many nodes on, or if more solves are to follow.
COMPILED_NODES = 1000
# Numbers (8 bytes each) that may be kept for the next solve.
KEPT_ENTRIES = 60_000_000
# Bounds that may be kept for the next solve.
MOST_KNOWN = 8


class Stopped(Exception):
    """Time is up, or the caller said stop."""


class Warm:
    """What one solve leaves for the next on nearly the same problem: computed tables, their quantum, and bounds.

    Pass the same object to ``solve`` again and again: where only a pin has changed since, almost all tables are
    found computed, and where it forbids more than before, what bounded the earlier problem bounds this one.
    """

    def __init__(self) -> None:
        self.tables, self.quantum = Tables(), 0.0
        self._known: list[tuple[Problem, float]] = []

    def shed(self) -> None:
        """Start anew where too much is held."""
        if self.tables.entries > KEPT_ENTRIES:
            self.tables = Tables()

    def remember(self, problem: Problem, bound: float) -> None:
        """No choice of the problem costs less."""
        if bound > -math.inf:
            self._known = [(problem, bound), *self._known][:MOST_KNOWN]

    def bound(self, problem: Problem) -> float:
        """The best bound of those problems that allow all that this one does, at no more cost; ``-inf`` of none."""
        return max((bound for known, bound in self._known if restricts(problem, known)), default=-math.inf)


class Search:
    """One solve: its clock, its incumbent and its bound (in the caller's costs), its store of tables.

    ``rounding`` is by how much rounding to quanta can change the cost of a choice. ``wide_entries`` bounds the
    tables of exact elimination; what would need larger ones is solved by other means.
    """

    def __init__(
        self,
        problem: Problem,
        seconds: float,
        target_gap: float,
        clock: Clock | None = None,
        warm: Warm | None = None,
    ) -> None:
        self.problem, self.target_gap, self.rounding = problem, target_gap, 0.0
        self.on_progress: Callable[[Progress], None] | None = None
        self.should_stop: Callable[[], bool] | None = None
        self.clock = Clock() if clock is None else clock
        self.end = self.clock.now() + seconds
        self.seed = 0
        self.warm = Warm() if warm is None else warm
        self.keeps_tables = warm is not None
        self.tables = self.warm.tables
        self.tables.poll = self._tick
        self.tables.compiled = self.keeps_tables
        self.strategies: tuple[int, ...] | None = None
        self.objective, self.bound = math.inf, -math.inf
        self.stage = "reading"
        self.wide_entries = WIDE_ENTRIES
        self.stats: dict[str, float] = {}

    @cached_property
    def replay(self) -> Replay:
        """The caller's problem, to replay choices."""
        return Replay(self.problem)

    def seconds(self) -> float:
        """Wall time so far."""
        return self.clock.wall()

    def now(self) -> float:
        """Seconds so far, of wall time or of work."""
        return self.clock.now()

    def remaining(self) -> float:
        """Seconds left."""
        return self.end - self.clock.now()

    def budget(self, end: float) -> Budget:
        """What a stage may spend that ends at a time, at the latest with the search."""
        return Budget(self.clock, min(end, self.end), self.poll)

    def _tick(self) -> None:
        """Before each table operation."""
        self.clock.operation()
        self.poll()

    def poll(self) -> None:
        """Raise ``Stopped`` when it is time to stop."""
        if self.remaining() <= 0.0 or (self.should_stop is not None and self.should_stop()):
            raise Stopped

    def begin(self, stage: str) -> None:
        """Name what comes next."""
        self.stage = stage
        self.report()
        self.poll()

    def report(self) -> None:
        """Tell the caller where the solve stands."""
        if self.on_progress is not None:
            self.on_progress(Progress(self.seconds(), self.objective, self.bound, self.stage))

    def offer(self, strategies: Sequence[int]) -> None:
        """A choice that may be the best; it is replayed on the problem as it was given."""
        cost = self.replay.cost(strategies)
        if cost < self.objective and self.replay.fits(strategies):
            self.strategies, self.objective = tuple(int(s) for s in strategies), cost
            self.bound = min(self.bound, cost)
            self.report()

    def raise_bound(self, bound: float) -> None:
        """A lower bound in the caller's costs; never above the incumbent, whose replay rounds differently."""
        self.bound = min(max(self.bound, bound), self.objective)

    def inherits(self) -> bool:
        """Take the bound that earlier solves left; whether that is enough."""
        self.raise_bound(self.warm.bound(self.problem))
        return self.done()

    def leave(self) -> None:
        """Leave to the next solve what it may use."""
        if self.keeps_tables:
            self.warm.remember(self.problem, self.bound)
            self.warm.shed()

    def gap(self) -> float:
        """The relative gap; ``inf`` without incumbent or bound."""
        return relative_gap(self.objective, self.bound)

    def done(self) -> bool:
        """Whether the gap is as small as asked for."""
        return self.gap() <= self.target_gap or self.proven()

    def proven(self) -> bool:
        """Whether what is left of the gap is rounding."""
        scale = max(abs(self.objective), abs(self.bound))
        rounding = min(self.rounding / scale, MOST_ROUNDING_GAP) if 0.0 < scale < math.inf else 0.0
        return bool(self.gap() <= max(PROVEN_GAP, rounding))  # not NumPy's, which JSON refuses

    def finish(self) -> Choice:
        """Report for the last time and return the choice."""
        self.stage = "done"
        self.report()
        return self.choice()

    def choice(self) -> Choice:
        """The incumbent with its certificate.

        Raises:
            NoChoiceError: there is none.
        """
        if self.strategies is None:
            what = f"no feasible choice found in {self.seconds():.1f} s, and feasibility not excluded"
            raise NoChoiceError(what, -math.inf, (), fix="allow more seconds or a larger limit")
        kept = {"tables_computed": self.tables.misses, "tables_kept": len(self.tables.arrays)}
        stats = self.stats | kept
        return Choice(self.strategies, self.objective, self.bound, self.proven(), self.seconds(), stats)


class Part:
    """A problem in whole quanta that stands for the caller's, with the best choice found in it."""

    def __init__(self, search: Search, problem: Problem, lift: Lift, quantum: float) -> None:
        self.search, self.problem, self.lift, self.quantum = search, problem, lift, quantum
        self.best: list[int] | None = None
        self.least = math.inf

    @cached_property
    def rows(self) -> Rows | None:
        """The memory rows; None where nothing can be over a limit."""
        return rows_of(self.problem) if self.problem.limit is not None and self.problem.usages else None

    @cached_property
    def messages(self) -> Messages:
        """Messages without prices on memory; compiled where that pays."""
        if len(self.problem.nodes) < COMPILED_NODES and not self.search.keeps_tables:
            return Unpriced(self.problem, self.search.tables)
        from autopar.solver.flat import Unlimited

        return Unlimited(self)

    def smaller(self, problem: Problem, lift: Lift) -> Part:
        """A part of this part."""
        mine = self.lift
        return Part(self.search, problem, lambda strategies: mine(lift(strategies)), self.quantum)

    def fits(self, usage: np.ndarray) -> bool:
        """Whether usage by row is within the limit."""
        return self.rows is None or usage.max(initial=0.0) <= self.rows.limit * (1 + ROUNDING)

    def offer(self, strategies: Sequence[int]) -> bool:
        """Offer a choice of this part to the search; whether it is the best of this part so far."""
        cost = self.problem.cost(strategies)
        if cost >= self.least or (self.rows is not None and not self.fits(self.rows.usage(strategies))):
            return False
        self.best, self.least = [int(s) for s in strategies], cost
        self.search.offer(self.lift(strategies))
        return True

    def raise_bound(self, bound: float) -> None:
        """A lower bound in quanta."""
        self.search.raise_bound(bound * self.quantum)

    def room(self, bound: float) -> float:
        """Quanta between a bound and the incumbent, with a little to spare for rounding."""
        return (self.search.objective / self.quantum - bound) * (1 + 1e-9) + 1e-9 * abs(bound)


def whole_part(search: Search) -> Part:
    """The caller's problem in whole quanta, each distinct array once."""
    problem, tables = search.problem, search.tables
    seen: dict[int, tuple[np.ndarray, float]] = {}
    for array in [*problem.nodes, *(matrix for _, _, matrix in problem.edges)]:
        if id(array) not in seen:
            seen[id(array)] = (array, largest_finite(array))
    total = sum(seen[id(costs)][1] for costs in problem.nodes)
    total += sum(seen[id(matrix)][1] for _, _, matrix in problem.edges)
    # A coarser quantum of an earlier solve stays, so that its tables serve again.
    quantum = max(quantum_of(total, FREE_QUANTA_BITS if problem.limit is None else QUANTA_BITS), search.warm.quantum)
    search.warm.quantum = quantum
    search.rounding = quantum / 2 * (len(problem.nodes) + len(problem.edges))
    whole = {key: tables.shared(quantize(array, quantum)) for key, (array, _) in seen.items()}
    nodes = tuple(whole[id(costs)] for costs in problem.nodes)
    edges = tuple((u, v, whole[id(matrix)]) for u, v, matrix in problem.edges)
    return Part(search, Problem(nodes, edges, problem.usages, problem.limit), list, quantum)
