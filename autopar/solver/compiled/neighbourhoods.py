"""Large neighbourhoods: a random forest is solved anew at memory prices, repaired, polished, and kept if not worse."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from autopar.solver.compiled.arrays import BLOCK_ROWS, Graph, Memory
from autopar.solver.compiled.forests import grow, hold_rest, minimise
from autopar.solver.compiled.kernel import kernel
from autopar.solver.compiled.moves import costs_here, move, note, polish, repair, undo, uniform

# Shares of neighbourhoods: seeded by what is live at one row; without prices; with noise in costs; with a kick.
ROW_SHARE, FREE_SHARE, NOISE_SHARE, KICK_SHARE = 0.5, 0.15, 0.4, 0.3
NOISE = 0.3
# Prices are scaled by exp of a number of this spread: the sum of three uniform ones, standard deviation 0.6.
SPREAD = 1.2
NEIGHBOURHOOD_WORK = 1000
# Costs are in quanta, of which a choice has billions: less than this is rounding.
LEAST_CHANGE = 1e-9
POLISH_NODES = 400
ROW_SEEDS = 60


class Task(NamedTuple):
    """What is searched, and how.

    Args:
        graph, memory: the problem.
        before: ``(rows + 1,)`` running sum of prices on rows.
        hot: nodes with edges, from which growth starts.
        spare: bytes by which rounding may pass a row's room.
        stop: ``(1,)`` set from outside to leave early.
    """

    graph: Graph
    memory: Memory
    before: np.ndarray
    hot: np.ndarray
    spare: float
    stop: np.ndarray


@kernel()
def search(task, state, forest, work):
    """Try neighbourhoods until so many entries of tables were looked at, or it is told to stop; the change of cost."""
    graph, memory = task.graph, task.memory
    change = 0.0
    nodes = np.empty(POLISH_NODES, np.int64)
    stamp = 0
    for node in range(len(state.mark)):
        stamp = max(stamp, state.mark[node], abs(forest.member[node]))
    state.work[0] = 0
    while state.work[0] < work and task.stop[0] == 0:
        stamp += 1
        state.count[0] = 0
        count = _grow_somewhere(task, state, forest, stamp)
        _propose(task, state, forest, stamp, count)
        delta = _apply(graph, memory, state, forest, stamp, count)
        # Growing and undoing look at no tables, but take time.
        state.work[0] += NEIGHBOURHOOD_WORK
        if state.count[0] == 0:
            continue
        paid, fits = repair(graph, memory, state, stamp, task.spare, max(-delta, 0.0))
        delta += paid
        if fits:
            around = _around(graph, state, stamp, nodes)
            delta -= polish(graph, memory, state, nodes[:around], stamp, task.spare)
        if fits and delta <= LEAST_CHANGE:
            change += delta
        else:
            undo(memory, state)
    return change


@kernel()
def _grow_somewhere(task, state, forest, stamp):
    """A forest from a node, or from several that are live at one row; the number of its nodes."""
    graph, memory = task.graph, task.memory
    random, nodes = state.random, len(state.chosen)
    most = len(forest.order)
    size = 2 + int((most - 2) * uniform(random) ** 3)
    forest.ends[0] = int(uniform(random) * nodes)
    if uniform(random) < 0.5:
        forest.ends[0] = task.hot[int(uniform(random) * len(task.hot))]
    ends = 1
    if len(memory.room) and uniform(random) < ROW_SHARE:
        block = int(uniform(random) * len(memory.room)) // BLOCK_ROWS
        first, items = memory.block_first[block], memory.block_first[block + 1] - memory.block_first[block]
        if items:
            ends = 1 + int(min(most - 1, ROW_SEEDS) * uniform(random) ** 2)
            for at in range(ends):
                forest.ends[at] = memory.node[memory.block_items[first + int(uniform(random) * items)]]
    return grow(graph, forest, random, stamp, ends, min(size + ends - 1, most))


@kernel()
def _propose(task, state, forest, stamp, count):
    """Solve the forest at prices, at times with noise, at times with its first node forced to change."""
    graph, random = task.graph, state.random
    scale = math.exp(SPREAD * (uniform(random) + uniform(random) + uniform(random) - 1.5))
    scale = 0.0 if uniform(random) < FREE_SHARE else scale
    noise = NOISE if uniform(random) < NOISE_SHARE else 0.0
    kick = uniform(random) < KICK_SHARE
    for index in range(count):
        node = forest.order[index]
        _own_values(task, forest, random, node, scale, noise)
    if kick:
        node = forest.order[0]
        first = graph.first[node]
        k = graph.first[node + 1] - first
        forced = int(uniform(random) * k)
        if forced != state.chosen[node]:
            for s in range(k):
                if s != forced:
                    forest.values[first + s] = np.inf
    state.work[0] += hold_rest(graph, forest, state.chosen, stamp, count)
    state.work[0] += minimise(graph, forest, count)


@kernel()
def _own_values(task, forest, random, node, scale, noise):
    """A node's costs at scaled prices."""
    graph, memory = task.graph, task.memory
    first = graph.first[node]
    k = graph.first[node + 1] - first
    for s in range(k):
        forest.values[first + s] = graph.costs[first + s]
    if scale > 0.0:
        for item in range(memory.item_first[node], memory.item_first[node + 1]):
            weight = scale * (task.before[memory.hi[item]] - task.before[memory.lo[item]])
            if weight != 0.0:
                for s in range(k):
                    forest.values[first + s] += weight * memory.flat[memory.at[item] + s]
    if noise > 0.0:
        for s in range(k):
            forest.values[first + s] *= 1.0 + noise * (uniform(random) - 0.5)


@kernel()
def _apply(graph, memory, state, forest, stamp, count):
    """Move the forest to what was picked; the change of cost."""
    delta = 0.0
    for index in range(count):
        node = forest.order[index]
        picked, old = forest.picked[node], state.chosen[node]
        if picked != old:
            costs_here(graph, state, node)
            delta += state.total[picked] - state.total[old]
            note(state, node, stamp)
            move(memory, state, node, picked)
    return delta


@kernel()
def _around(graph, state, stamp, nodes):
    """The nodes that moved and their neighbours, as many as there is room for."""
    count = min(state.count[0], len(nodes))
    for index in range(count):
        nodes[index] = state.log_node[index]
    for index in range(count):
        node = nodes[index]
        for link in range(graph.link_first[node], graph.link_first[node + 1]):
            if count < len(nodes) and state.mark[graph.near[link]] != stamp:
                nodes[count] = graph.near[link]
                count += 1
    return count
