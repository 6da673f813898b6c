"""Tree-reweighted message passing, compiled: the bound and the choice at prices on memory rows.

Sequential tree-reweighted message passing (TRW-S, Kolmogorov, IEEE PAMI 2006), the algorithm of its section
3.3: one pass up and one down through the nodes; the bound is added up on the way down.
"""

from __future__ import annotations

import numpy as np

from autopar.solver.compiled.arrays import Graph, Memory
from autopar.solver.compiled.kernel import kernel


@kernel()
def price(graph: Graph, memory: Memory, prices: np.ndarray, costs: np.ndarray) -> None:
    """Write each strategy's cost plus priced usage into ``costs``."""
    before = np.empty(len(prices) + 1)
    before[0] = 0.0
    for row in range(len(prices)):
        before[row + 1] = before[row] + prices[row]
    for s in range(len(costs)):
        costs[s] = graph.costs[s]
    for item in range(len(memory.node)):
        weight = before[memory.hi[item]] - before[memory.lo[item]]
        if weight != 0.0:
            node = memory.node[item]
            first, at = graph.first[node], memory.at[item]
            for s in range(graph.first[node + 1] - first):
                costs[first + s] += weight * memory.flat[at + s]


@kernel()
def sweep(graph: Graph, costs: np.ndarray, messages: np.ndarray) -> float:
    """Once up and once down through the nodes; the lower bound after it.

    ``messages[out[link] : out[link + 1]]`` is what was moved from the edge to the node that the link leads to.
    """
    nodes = len(graph.first) - 1
    widest = 1
    for node in range(nodes):
        widest = max(widest, graph.first[node + 1] - graph.first[node])
    total = np.empty(widest)
    bound = 0.0
    for step in range(2 * nodes):
        upward = step < nodes
        kept = _visit(graph, costs, messages, step if upward else 2 * nodes - 1 - step, upward, total)
        # Every edge's minimum is zero after the way down, so the nodes' own minima are the bound.
        bound = 0.0 if upward else bound + kept
    return bound


@kernel()
def _visit(graph, costs, messages, node, upward, total):
    """Pull what the edges behind can give to a node, share it among those ahead; the least of what it keeps."""
    first = graph.first[node]
    k = graph.first[node + 1] - first
    low, middle, high = graph.link_first[node], graph.middle[node], graph.link_first[node + 1]
    for s in range(k):
        total[s] = costs[first + s]
    for link in range(low, high):
        # What the edges ahead can give was pulled on the way back, and nothing has changed since.
        if (link < middle) == upward:
            _pull(graph, messages, link, k)
        at = graph.out[graph.twin[link]]
        for s in range(k):
            total[s] += messages[at + s]
    share = 1.0 / max(middle - low, high - middle, 1)
    ahead, end = (middle, high) if upward else (low, middle)
    for link in range(ahead, end):
        at = graph.out[graph.twin[link]]
        for s in range(k):
            messages[at + s] -= share * total[s]
    least = np.inf
    for s in range(k):
        least = min(least, total[s])
    return least * (1.0 - share * (end - ahead))


@kernel()
def _pull(graph, messages, link, k):
    """Move all that an edge can give to this end of a link."""
    twin = graph.twin[link]
    at, away, table = graph.out[twin], graph.out[link], graph.table[twin]
    for s in range(k):
        messages[at + s] = np.inf
    for t in range(graph.out[link + 1] - away):
        moved = messages[away + t]
        row = table + t * k
        for s in range(k):
            value = graph.entries[row + s] - moved
            messages[at + s] = value if value < messages[at + s] else messages[at + s]


@kernel()
def reduced(graph: Graph, costs: np.ndarray, messages: np.ndarray, own: np.ndarray, all_told: np.ndarray) -> None:
    """After a sweep, what choosing each strategy adds to the bound: at its node alone, and with its edges."""
    for node in range(len(graph.first) - 1):
        first, end = graph.first[node], graph.first[node + 1]
        least = np.inf
        for s in range(first, end):
            own[s] = costs[s]
            for link in range(graph.link_first[node], graph.link_first[node + 1]):
                own[s] += messages[graph.out[graph.twin[link]] + s - first]
            least = min(least, own[s])
        for s in range(first, end):
            own[s] -= least
            all_told[s] = own[s]
        for link in range(graph.link_first[node], graph.link_first[node + 1]):
            away, at = graph.out[link], graph.out[graph.twin[link]]
            width = graph.out[link + 1] - away
            for s in range(first, end):
                row = graph.table[link] + (s - first) * width
                least = np.inf
                for t in range(width):
                    value = graph.entries[row + t] - messages[away + t]
                    least = value if value < least else least
                all_told[s] += max(least - messages[at + s - first], 0.0)


@kernel()
def decode(graph, costs, messages, chosen):
    """Choose node by node, given the choices before and what edges to those after can give."""
    total = np.empty(len(costs))
    for node in range(len(graph.first) - 1):
        first = graph.first[node]
        k = graph.first[node + 1] - first
        for s in range(k):
            total[s] = costs[first + s]
        for link in range(graph.link_first[node], graph.middle[node]):
            row = graph.table[graph.twin[link]] + chosen[graph.near[link]] * k
            for s in range(k):
                total[s] += graph.entries[row + s]
        for link in range(graph.middle[node], graph.link_first[node + 1]):
            at = graph.out[graph.twin[link]]
            for s in range(k):
                total[s] += messages[at + s]
        best = 0
        for s in range(k):
            if total[s] < total[best]:
                best = s
        chosen[node] = best


@kernel()
def cost(graph, chosen):
    """What a choice costs."""
    total = 0.0
    for node in range(len(chosen)):
        total += graph.costs[graph.first[node] + chosen[node]]
        for link in range(graph.middle[node], graph.link_first[node + 1]):
            other = graph.near[link]
            k = graph.first[other + 1] - graph.first[other]
            total += graph.entries[graph.table[link] + chosen[node] * k + chosen[other]]
    return total


@kernel()
def excess(memory, chosen):
    """``(rows,)`` bytes over the room of each row; negative where there is room left."""
    change = np.empty(len(memory.room) + 1)
    for row in range(len(change)):
        change[row] = 0.0
    for item in range(len(memory.node)):
        size = memory.flat[memory.at[item] + chosen[memory.node[item]]]
        change[memory.lo[item]] += size
        change[memory.hi[item]] -= size
    over = np.empty(len(memory.room))
    live = 0.0
    for row in range(len(over)):
        live += change[row]
        over[row] = live - memory.room[row]
    return over
