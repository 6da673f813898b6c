"""Feasible choices from prices: dearer prices on one part of the graph, cheaper ones on the rest.

At the best prices all copies of a layer change their mind at once, from a choice that is too large to one
that is smaller than it need be. Between the two lie the choices whose first layers are of one kind and whose
others are of the other; which of them fits is found by bisection over a layout of the graph on a line. Both
kinds of layer were solved already, so with hash-consed tables a step of the bisection is mostly look-ups.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from autopar.solver.draft import Lift
from autopar.solver.lagrange import Column, Dual, Priced
from autopar.solver.milp import ROUNDING
from autopar.solver.problem import Problem, Usage
from autopar.solver.tables import Tables

SCALES = (1.0, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 4.0, 16.0, 256.0)
# A node with more neighbours than this joins layers that are far apart (a gradient norm); distance ignores
# it.
HUB_NEIGHBOURS = 24


def hubs_of(problem: Problem) -> set[int]:
    """The nodes that join what is far apart: a graph with many of them is no thin, long thing."""
    ends = np.array([(u, v) for u, v, _ in problem.edges], np.int64).ravel()
    return set(np.flatnonzero(np.bincount(ends, minlength=1) > HUB_NEIGHBOURS).tolist())


def line_layout(problem: Problem) -> np.ndarray:
    """``(nodes,)`` the place of each node on a line: breadth-first order from a far end of each component."""
    near: list[list[int]] = [[] for _ in problem.nodes]
    hubs = hubs_of(problem)
    for u, v, _ in problem.edges:
        if u not in hubs and v not in hubs:
            near[u].append(v)
            near[v].append(u)
    place = np.full(len(near), -1)
    count = 0
    for node in range(len(near)):
        if place[node] < 0:
            far = _breadth_first(near, node)[-1]
            for name in _breadth_first(near, far):
                if place[name] < 0:
                    place[name] = count
                    count += 1
    return place


def in_line(problem: Problem, tables: Tables) -> tuple[Problem, Lift]:
    """The nodes in the order of the layout, and the way back; along it a sweep of messages carries far.

    In the order of a train step each layer stands in three places (parameters, forward, backward), and a choice that
    is made node by node in that order comes back to a layer when all its neighbours are settled.
    """
    place = line_layout(problem).tolist()
    nodes: list[np.ndarray] = [problem.nodes[0]] * len(place)
    for node, at in enumerate(place):
        nodes[at] = problem.nodes[node]
    edges = []
    for u, v, matrix in problem.edges:
        a, b = place[u], place[v]
        edges.append((a, b, matrix) if a < b else (b, a, tables[tables.transpose(tables.intern(matrix))]))
    usages = tuple(Usage(place[usage.node], usage.lo, usage.hi, usage.bytes) for usage in problem.usages)
    moved = Problem(tuple(nodes), tuple(sorted(edges, key=lambda edge: edge[:2])), usages, problem.limit)
    return moved, lambda strategies: [int(strategies[at]) for at in place]


def _breadth_first(near: list[list[int]], start: int) -> list[int]:
    seen, queue = {start}, deque([start])
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for other in near[node]:
            if other not in seen:
                seen.add(other)
                queue.append(other)
    return order


def feasible_by_prices(priced: Priced, dual: Dual, layout: np.ndarray, on_column: Callable[[Column], bool]) -> bool:
    """Try prices around the best ones, until ``on_column`` says that it is enough.

    Args:
        priced: the relaxed solver.
        dual: where the dual ended.
        layout: the place of each node on a line.
        on_column: told of every choice; True stops.

    Returns:
        Whether it was told to stop.
    """
    fits_limit = priced.rows.limit * (1 + ROUNDING)

    def attempt(factors: np.ndarray) -> tuple[bool, bool]:
        column = priced.at(dual.prices, factors)
        return bool(column.usage.max(initial=0.0) <= fits_limit), on_column(column)

    everywhere = np.ones(len(layout))
    low = 1.0 / SCALES[2]
    for high in SCALES:
        fits, stop = attempt(everywhere * high)
        if stop:
            return True
        if not fits:
            low = high
            continue
        return any(_bisect(attempt, layout, (low, high), flip) for flip in (False, True))
    return False


def _bisect(
    attempt: Callable[[np.ndarray], tuple[bool, bool]],
    layout: np.ndarray,
    scales: tuple[float, float],
    flip: bool,
) -> bool:
    """Bisect over how much of the line is dear; everything dear is known to fit."""
    cheap, dear = 0, len(layout)
    while dear - cheap > 1:
        middle = (cheap + dear) // 2
        part = layout >= len(layout) - middle if flip else layout < middle
        fits, stop = attempt(np.where(part, scales[1], scales[0]))
        if stop:
            return True
        cheap, dear = (cheap, middle) if fits else (middle, dear)
    return False
