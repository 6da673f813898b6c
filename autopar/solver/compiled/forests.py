"""Random induced forests of a graph, solved exactly by dynamic programming with everything else held."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.solver.compiled.arrays import Graph
from autopar.solver.compiled.kernel import kernel
from autopar.solver.compiled.moves import uniform

# How often growth follows a random open end instead of the oldest, and how often a new node opens its own.
RANDOM_END, OPEN_NODE = 0.5, 0.7


class Forest(NamedTuple):
    """An induced forest and the scratch to solve it.

    Args:
        order: the nodes, parents before children.
        parent: ``(most nodes,)`` the link from each to its parent, -1 at a root.
        member: ``(nodes,)`` the stamp of the forest a node is in, or less the stamp of one it cannot join.
        ends: where growth may go on.
        values: ``(strategies,)`` costs of subtrees.
        picked: ``(nodes,)`` the best strategies found.
    """

    order: np.ndarray
    parent: np.ndarray
    member: np.ndarray
    ends: np.ndarray
    values: np.ndarray
    picked: np.ndarray


def forest_of(graph: Graph, most_nodes: int) -> Forest:
    """Room for forests of at most so many nodes."""
    nodes = len(graph.first) - 1
    return Forest(
        np.empty(most_nodes, np.int64),
        np.empty(most_nodes, np.int64),
        np.zeros(nodes, np.int64),
        np.empty(len(graph.near) + most_nodes, np.int64),
        np.empty(len(graph.costs)),
        np.zeros(nodes, np.int64),
    )


@kernel()
def grow(graph, forest, random, stamp, ends, most):
    """Grow from the first ``ends`` open ends to at most so many nodes, each touching at most one before it."""
    count = 0
    while ends > 0 and count < most:
        at = int(uniform(random) * ends) if uniform(random) < RANDOM_END else 0
        node = forest.ends[at]
        ends -= 1
        forest.ends[at] = forest.ends[ends]
        if abs(forest.member[node]) == stamp:
            continue
        touched, parent = 0, -1
        for link in range(graph.link_first[node], graph.link_first[node + 1]):
            if forest.member[graph.near[link]] == stamp:
                touched += 1
                parent = link
        if touched > 1:
            forest.member[node] = -stamp
            continue
        forest.member[node] = stamp
        forest.order[count] = node
        forest.parent[count] = parent
        count += 1
        if uniform(random) < OPEN_NODE:
            for link in range(graph.link_first[node], graph.link_first[node + 1]):
                if abs(forest.member[graph.near[link]]) != stamp and ends < len(forest.ends):
                    forest.ends[ends] = graph.near[link]
                    ends += 1
    return count


@kernel()
def hold_rest(graph, forest, chosen, stamp, count):
    """Add to the values of the forest's nodes what edges to the nodes outside cost; the entries looked at."""
    work = 0
    for index in range(count):
        node = forest.order[index]
        first = graph.first[node]
        k = graph.first[node + 1] - first
        for link in range(graph.link_first[node], graph.link_first[node + 1]):
            other = graph.near[link]
            if forest.member[other] != stamp:
                row = graph.table[graph.twin[link]] + chosen[other] * k
                work += k
                for s in range(k):
                    forest.values[first + s] += graph.entries[row + s]
    return work


@kernel()
def minimise(graph, forest, count):
    """Solve the forest by its values, leaves to roots, then back, into ``picked``; the entries looked at."""
    work = 0
    for index in range(count - 1, -1, -1):
        link = forest.parent[index]
        if link >= 0:
            work += _lift_values(graph, forest, forest.order[index], link)
    for index in range(count):
        node, link = forest.order[index], forest.parent[index]
        first = graph.first[node]
        k = graph.first[node + 1] - first
        row = -1
        if link >= 0:
            row = graph.table[graph.twin[link]] + forest.picked[graph.near[link]] * k
        best, least = 0, np.inf
        for s in range(k):
            value = forest.values[first + s] + (graph.entries[row + s] if row >= 0 else 0.0)
            if value < least:
                best, least = s, value
        forest.picked[node] = best
    return work


@kernel()
def _lift_values(graph, forest, node, link):
    """Add the least of a node and its edge to its parent's values."""
    first, above = graph.first[node], graph.first[graph.near[link]]
    k, width = graph.first[node + 1] - first, graph.first[graph.near[link] + 1] - above
    table = graph.table[graph.twin[link]]
    for t in range(width):
        least = np.inf
        row = table + t * k
        for s in range(k):
            value = forest.values[first + s] + graph.entries[row + s]
            least = value if value < least else least
        forest.values[above + t] += least
    return k * width
