"""A choice of nearly the same problem, made to do for this one: what it may no longer do is chosen anew.

All nodes but those near the forbidden ones are held, so what is left to solve is small whatever the problem's size.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from autopar.solver.primal import HUB_NEIGHBOURS
from autopar.solver.problem import Choice, NoChoiceError, Problem, Usage

NEAR_NODES = 60


def mend(problem: Problem, hint: Sequence[int], solve: Callable[[Problem], Choice]) -> list[int] | None:
    """The hint, or where forbidden costs exclude it the best choice that differs from it near these only.

    Args:
        problem: what is solved.
        hint: one strategy per node.
        solve: how the small problem of the nodes near by is solved; it may raise ``NoChoiceError``.

    Returns:
        A choice of finite cost, or None where there is none near by; whether it fits is for the caller to see.
    """
    broken = _broken(problem, hint)
    if not broken:
        return list(hint)
    free = _near(problem, broken)
    small = hold(problem, hint, free)
    try:
        found = solve(small).strategies
    except NoChoiceError:
        return None
    mended = list(hint)
    for node, strategy in zip(free, found, strict=False):
        mended[node] = strategy
    return mended


def _broken(problem: Problem, hint: Sequence[int]) -> list[int]:
    """The nodes whose own cost or edges forbid what the hint says."""
    broken = [node for node, (costs, s) in enumerate(zip(problem.nodes, hint, strict=True)) if math.isinf(costs[s])]
    ends = [(u, v) for u, v, matrix in problem.edges if math.isinf(matrix[hint[u], hint[v]])]
    return sorted({*broken, *itertools.chain.from_iterable(ends)})


def _near(problem: Problem, start: Sequence[int]) -> list[int]:
    """Breadth first the nodes next to some, past which hubs do not lead."""
    near: list[list[int]] = [[] for _ in problem.nodes]
    for u, v, _ in problem.edges:
        near[u].append(v)
        near[v].append(u)
    seen, queue = dict.fromkeys(start), deque(start)
    while queue and len(seen) < NEAR_NODES:
        node = queue.popleft()
        for other in near[node] if node in start or len(near[node]) <= HUB_NEIGHBOURS else ():
            if other not in seen:
                seen[other] = None
                queue.append(other)
    return list(seen)


def hold(problem: Problem, chosen: Sequence[int], free: Sequence[int]) -> Problem:
    """The problem of a few nodes, in this order, while all others do as chosen.

    What the others hold in memory, and cost among themselves, is that of one more node with a single strategy; of the
    cost nothing is kept.
    """
    number = {node: at for at, node in enumerate(free)}
    nodes = [problem.nodes[node] for node in free]
    edges = []
    for u, v, matrix in problem.edges:
        if u in number and v in number:
            edges.append((number[u], number[v], matrix))
        elif u in number:
            nodes[number[u]] = nodes[number[u]] + matrix[:, chosen[v]]
        elif v in number:
            nodes[number[v]] = nodes[number[v]] + matrix[chosen[u]]
    if problem.limit is None:
        return Problem(tuple(nodes), tuple(edges))
    live = [usage for usage in problem.usages if usage.lo < usage.hi]
    mine = [Usage(number[usage.node], usage.lo, usage.hi, usage.bytes) for usage in live if usage.node in number]
    held = [usage for usage in live if usage.node not in number]
    base = [Usage(len(nodes), lo, hi, most) for lo, hi, most in _most_held(held, chosen, mine)]
    return Problem((*nodes, np.zeros(1)), tuple(edges), (*mine, *base), problem.limit)


def _most_held(held: list[Usage], chosen: Sequence[int], mine: list[Usage]) -> list[tuple[int, int, np.ndarray]]:
    """The most that is held at any time between two times at which something of mine starts or ends."""
    cuts = sorted({time for usage in mine for time in (usage.lo, usage.hi)})
    times = np.unique([*cuts, *(time for usage in held for time in (usage.lo, usage.hi))])
    if len(cuts) < 2:
        return []
    change = np.zeros(len(times))
    sizes = np.array([usage.bytes[chosen[usage.node]] for usage in held])
    np.add.at(change, np.searchsorted(times, [usage.lo for usage in held]), sizes)
    np.add.at(change, np.searchsorted(times, [usage.hi for usage in held]), -sizes)
    most = np.maximum.reduceat(np.cumsum(change), np.searchsorted(times, cuts))
    # Sums of what came and went may fall below nothing by rounding.
    return [
        (lo, hi, np.array([max(size, 0.0)])) for (lo, hi), size in zip(itertools.pairwise(cuts), most, strict=False)
    ]
