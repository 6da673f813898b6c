"""Parts too wide for exact elimination: compiled messages at prices on memory, and the choices these lead to."""

from __future__ import annotations

import math
import threading

import numpy as np

from autopar.solver.compiled.arrays import graph_of, memory_of
from autopar.solver.compiled.moves import polish, repair, state_of
from autopar.solver.compiled.peaks import fill
from autopar.solver.compiled.sweeps import cost, decode, excess, price, reduced, sweep
from autopar.solver.messages import BOUND_ROUNDING
from autopar.solver.milp import ROUNDING, highest_cost
from autopar.solver.part import Part
from autopar.solver.problem import Problem

# Prices start at this share of the first bound, spread over all rows; a step multiplies them by at most
# exp(rate), and rates fall from the first to the last.
FIRST_PRICE, FIRST_RATE, LAST_RATE, LEAST_PRICE = 0.3, 2.0, 0.02, 1e-9
# The bound has stalled when it gained less than this share in so many steps.
STALLED_SHARE, STALLED_STEPS = 1e-4, 40
# Steps of weights, however much time there is: kernels may have to be compiled first.
LEAST_STEPS, MOST_STEPS = 20, 600
# Choices are repaired after this share of the time, and take at most that share of it.
REPAIR_AFTER, REPAIR_SHARE = 0.1, 0.35
# What one step of weights looks at besides its tables, in passes over the rows and items.
PASSES = 10
# To offer a choice it is replayed on the caller's problem, which is done this often.
TELL_S = 1.0


class Flat:
    """A part as flat arrays, with messages kept warm.

    Attributes:
        bound: the best lower bound so far, in quanta.
        prices: the prices of that bound, one per row of ``memory``.
        best: the best feasible choice so far with its cost, None without one.
    """

    def __init__(self, part: Part, seed: int) -> None:
        self.part = part
        self.graph, self.memory = graph_of(part.problem), memory_of(part.problem)
        self.messages, self.costs = np.zeros(self.graph.out[-1]), self.graph.costs.copy()
        self.bound, self.prices = -math.inf, np.zeros(len(self.memory.room))
        self.best: tuple[float, np.ndarray] | None = None
        self._offering = threading.Lock()
        self.spare = ROUNDING * (part.problem.limit or 0.0)
        self.state = state_of(self.graph, self.memory, seed)
        self.stamp = 0
        sizes = np.diff(self.graph.first)
        self.upward = np.flatnonzero(self.graph.near[self.graph.twin] < self.graph.near)
        self.sweep_entries = int((sizes[self.graph.near] * np.repeat(sizes, np.diff(self.graph.link_first))).sum())

    def sweep(self, prices: np.ndarray) -> float:
        """One sweep at prices on rows; the lower bound in quanta."""
        price(self.graph, self.memory, prices, self.costs)
        value = sweep(self.graph, self.costs, self.messages)
        paid = float(prices @ self.memory.room)
        self.part.search.clock.work(self.sweep_entries + PASSES * (len(self.memory.node) + len(prices)))
        bound = value - paid - BOUND_ROUNDING * (abs(value) + abs(paid))
        if bound > self.bound:
            self.bound, self.prices = bound, prices
            self.part.raise_bound(bound)
        return bound

    def decode(self) -> tuple[np.ndarray, np.ndarray]:
        """``(a choice, its bytes over the room of each row)`` after a sweep."""
        chosen = np.zeros(len(self.graph.first) - 1, np.int64)
        decode(self.graph, self.costs, self.messages, chosen)
        return chosen, excess(self.memory, chosen)

    def repaired(self, chosen: np.ndarray, over: np.ndarray) -> float:
        """Make a choice fit its rows, and improve it node by node, into ``state``; its cost, ``inf`` if in vain."""
        graph, memory, state = self.graph, self.memory, self.state
        state.chosen[:] = chosen
        state.work[0] = 0
        fill(state.most, state.added, over)
        _, fits = repair(graph, memory, state, self._next(), self.spare, math.inf)
        if fits:
            polish(graph, memory, state, np.arange(len(chosen)), self._next(), self.spare)
        self.part.search.clock.work(int(state.work[0]))
        return self.offer(state.chosen) if fits else math.inf

    def _next(self) -> int:
        self.stamp += 1
        self.state.count[0] = 0
        return self.stamp

    def offer(self, chosen: np.ndarray) -> float:
        """Keep a choice that fits if it is the best so far, of which the part hears by ``flush``; its cost."""
        value = float(cost(self.graph, chosen))
        with self._offering:
            if self.best is None or value < self.best[0]:
                self.best = value, chosen.copy()
        return value

    def _reduced(self) -> tuple[np.ndarray, np.ndarray]:
        """By strategy what it adds to the bound of the last sweep: at its node alone, and with its edges."""
        own, all_told = np.empty_like(self.costs), np.empty_like(self.costs)
        reduced(self.graph, self.costs, self.messages, own, all_told)
        self.part.search.clock.work(self.sweep_entries)
        return own, all_told

    def left(self, room: float) -> int:
        """How many edge entries ``prune`` leaves at least, had each edge those of all strategies that it leaves."""
        graph = self.graph
        kept = np.add.reduceat(self._reduced()[1] <= room, graph.first[:-1], dtype=np.int64)
        ends = graph.near[graph.twin[self.upward]], graph.near[self.upward]
        return int((kept[ends[0]] * kept[ends[1]]).sum())

    def prune(self, room: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What can be part of a choice that costs at most ``room`` more than the bound of the last sweep.

        Returns:
            The strategies to keep of each node, and each edge's matrix with impossible pairs forbidden.
        """
        graph, first = self.graph, self.graph.first
        own, all_told = self._reduced()
        above, dearer = np.split(own, first[1:-1]), np.split(all_told, first[1:-1])
        matrices = []
        for (u, v), link in zip(self.ends, self.upward.tolist(), strict=True):
            start, shape = graph.table[link], (len(above[u]), len(above[v]))
            matrix = graph.entries[start : start + shape[0] * shape[1]].reshape(shape)
            rest = np.maximum(matrix - self._toward(graph.twin[link])[:, None] - self._toward(link), 0.0)
            matrices.append(np.where(rest + above[u][:, None] + above[v] <= room, matrix, np.inf))
        return [np.flatnonzero(extra <= room) for extra in dearer], matrices

    def _toward(self, link: int) -> np.ndarray:
        """What was moved from a link's edge to the node that it leads to."""
        return self.messages[self.graph.out[link] : self.graph.out[link + 1]]

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The two nodes of each edge, the lower one first, in the order of ``prune``'s matrices."""
        low, high = self.graph.near[self.graph.twin[self.upward]], self.graph.near[self.upward]
        return list(zip(low.tolist(), high.tolist(), strict=True))

    def take(self) -> None:
        """Hear of the part's best choice."""
        if self.part.best is not None:
            self.offer(np.array(self.part.best, np.int64))

    def flush(self) -> None:
        """Offer the best choice to the part."""
        best = self.best
        if best is not None and best[0] < self.part.least:
            self.part.offer(best[1].tolist())


class Unlimited:
    """``Messages`` of a part without its memory rows.

    Attributes:
        flat: the part's arrays.
    """

    def __init__(self, part: Part) -> None:
        free = Problem(part.problem.nodes, part.problem.edges, (), 0.0)
        self.flat = Flat(Part(part.search, free, part.lift, part.quantum), part.search.seed)

    @staticmethod
    def of(part: Part) -> Unlimited:
        """The part's messages, where they are such already."""
        return part.messages if isinstance(part.messages, Unlimited) else Unlimited(part)

    @property
    def ends(self) -> list[tuple[int, int]]:
        """The edges."""
        return self.flat.ends

    def sweep(self) -> float:
        """One more sweep; the bound after it."""
        return self.flat.sweep(self.flat.prices)

    def decode(self) -> list[int]:
        """A choice, improved node by node."""
        self.flat.repaired(*self.flat.decode())
        return self.flat.state.chosen.tolist()

    def left(self, room: float) -> int:
        """As ``Messages.left``."""
        return self.flat.left(room)

    def prune(self, room: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What can be part of a choice that costs at most ``room`` more than the bound."""
        return self.flat.prune(room)


def price_by_weights(flat: Flat, seconds: float) -> list[np.ndarray]:
    """Raise the bound by multiplicative weights, and repair the choices met on the way.

    A row's price grows with its overload and shrinks with its slack, by factors that approach one (Arora,
    Hazan and Kale, Theory of Computing 2012); each step needs one warm sweep.

    Returns:
        The feasible choices that were the best when they were met.
    """
    search, room = flat.part.search, np.maximum(flat.memory.room, 1.0)
    start, repair_s, told = search.now(), 0.0, search.now()
    least, found = math.inf, []
    trail: list[float] = []
    first, ceiling = max(abs(flat.sweep(np.zeros(len(room)))), 1.0), highest_cost(flat.part.problem)
    prices = np.full(len(room), FIRST_PRICE * first / max(room.sum(), 1.0))
    overload = np.zeros(len(room))
    for step in range(MOST_STEPS):
        search.poll()
        chosen, over = flat.decode()
        at = search.now()
        spent = max((at - start) / seconds, step / MOST_STEPS)
        if over.max(initial=0.0) <= flat.spare or (spent > REPAIR_AFTER and repair_s <= REPAIR_SHARE * (at - start)):
            value = flat.repaired(chosen, over)
            if value < least:
                least = value
                found.append(flat.state.chosen.copy())
            repair_s += search.now() - at
        if len(found) < 2 or search.now() - told > TELL_S:
            flat.flush()
            told = search.now()
        trail.append(flat.bound)
        if (spent >= 1.0 and step >= LEAST_STEPS) or flat.bound > ceiling or search.done() or _stalled(trail):
            break
        overload = (overload + np.clip(over / room, -1.0, 1.0)) / 2
        prices = prices * np.exp(FIRST_RATE * (LAST_RATE / FIRST_RATE) ** min(spent, 1.0) * overload)
        prices = np.maximum(prices, LEAST_PRICE * prices.max(initial=0.0))
        flat.sweep(prices)
        search.stats["prices_solved"] = step
    flat.flush()
    return found


def _stalled(trail: list[float]) -> bool:
    if len(trail) <= STALLED_STEPS:
        return False
    return trail[-1] - trail[-1 - STALLED_STEPS] <= STALLED_SHARE * abs(trail[-1])
