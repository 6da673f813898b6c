"""Single moves on a choice, with the rows they change and a log to undo them: polish and repair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from autopar.solver.compiled.arrays import BLOCK_ROWS, Graph, Memory
from autopar.solver.compiled.kernel import kernel
from autopar.solver.compiled.peaks import add, tree_of, worst_row

# Repair ends after so many steps, and weighs the moves of so many items of the worst row, with a little chance.
REPAIR_STEPS, REPAIR_ITEMS, REPAIR_CHANCE = 3000, 60, 0.2
POLISH_ROUNDS = 4
# A change of the segment tree takes the time of so many entries.
ITEM_WORK = 16


class State(NamedTuple):
    """A choice under change.

    Args:
        chosen: ``(nodes,)``.
        most, added: the segment tree of bytes over the room.
        log_node, log_old: the nodes moved since the last mark, with what they were before; ``count[0]`` of them.
        count: ``(1,)``.
        mark: ``(nodes,)`` the stamp of the log that a node is in.
        total: scratch, one number per strategy.
        random: ``(1,)`` the state of the random numbers.
        work: ``(1,)`` entries of tables looked at.
    """

    chosen: np.ndarray
    most: np.ndarray
    added: np.ndarray
    log_node: np.ndarray
    log_old: np.ndarray
    count: np.ndarray
    mark: np.ndarray
    total: np.ndarray
    random: np.ndarray
    work: np.ndarray


def state_of(graph: Graph, memory: Memory, seed: int) -> State:
    """A state to be filled with a choice."""
    nodes = len(graph.first) - 1
    widest = int(np.diff(graph.first).max(initial=1))
    most, added = tree_of(len(memory.room))
    chosen, log_node, log_old, mark = (np.zeros(nodes, np.int64) for _ in range(4))
    count, work = (np.zeros(1, np.int64) for _ in range(2))
    random = np.array([(2 * seed + 1) * 0x9E3779B97F4A7C15 % 2**64], np.uint64)
    return State(chosen, most, added, log_node, log_old, count, mark, np.empty(widest), random, work)


@kernel()
def uniform(random):
    """A random number in [0, 1): xorshift64* (Vigna 2016)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return float((x * np.uint64(0x2545F4914F6CDD1D)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@kernel()
def costs_here(graph, state, node):
    """Write each strategy's cost at a node, with all others as they are, into ``total``."""
    chosen, total = state.chosen, state.total
    first = graph.first[node]
    k = graph.first[node + 1] - first
    for s in range(k):
        total[s] = graph.costs[first + s]
    state.work[0] += k * (1 + graph.link_first[node + 1] - graph.link_first[node])
    for link in range(graph.link_first[node], graph.link_first[node + 1]):
        row = graph.table[graph.twin[link]] + chosen[graph.near[link]] * k
        for s in range(k):
            total[s] += graph.entries[row + s]


@kernel()
def move(memory, state, node, strategy):
    """Choose a strategy, whatever that does to the rows."""
    old = state.chosen[node]
    state.work[0] += ITEM_WORK * (memory.item_first[node + 1] - memory.item_first[node])
    for item in range(memory.item_first[node], memory.item_first[node + 1]):
        amount = memory.flat[memory.at[item] + strategy] - memory.flat[memory.at[item] + old]
        if amount != 0.0:
            add(state.most, state.added, memory.lo[item], memory.hi[item], amount)
    state.chosen[node] = strategy


@kernel()
def note(state, node, stamp):
    """Log what a node was before the first of its moves under this stamp."""
    if state.mark[node] != stamp:
        state.mark[node] = stamp
        state.log_node[state.count[0]] = node
        state.log_old[state.count[0]] = state.chosen[node]
        state.count[0] += 1


@kernel()
def undo(memory, state):
    """Take back all moves in the log."""
    for at in range(state.count[0]):
        if state.chosen[state.log_node[at]] != state.log_old[at]:
            move(memory, state, state.log_node[at], state.log_old[at])


@kernel()
def polish(graph, memory, state, nodes, stamp, spare):
    """Move single nodes while that saves cost and leaves no row further over than ``spare``; what is saved."""
    saved = 0.0
    again = True
    rounds = 0
    while again and rounds < POLISH_ROUNDS:
        again = False
        rounds += 1
        for at in range(len(nodes)):
            gain = _improve(graph, memory, state, nodes[at], stamp, spare)
            if gain > 0.0:
                saved += gain
                again = True
    return saved


@kernel()
def _improve(graph, memory, state, node, stamp, spare):
    """The best move of one node that the rows allow; what it saves."""
    k = graph.first[node + 1] - graph.first[node]
    if k < 2:
        return 0.0
    total, old = state.total, state.chosen[node]
    costs_here(graph, state, node)
    ceiling = max(state.most[1], spare)
    while True:
        best = old
        for s in range(k):
            if total[s] < total[best]:
                best = s
        if best == old:
            return 0.0
        note(state, node, stamp)
        move(memory, state, node, best)
        if state.most[1] <= ceiling:
            return total[old] - total[best]
        move(memory, state, node, old)
        total[best] = np.inf


@kernel()
def repair(graph, memory, state, stamp, spare, most):
    """At the worst row take the move that costs least per byte, until every row fits.

    Returns:
        What it costs, and whether it fits. It gives up after ``REPAIR_STEPS`` or when that costs too much.
    """
    paid = 0.0
    for _ in range(REPAIR_STEPS):
        if state.most[1] <= spare or paid > most:
            break
        row = worst_row(state.most)
        node, strategy, price = _cheapest_move(graph, memory, state, row)
        if node < 0:
            break
        paid += price
        note(state, node, stamp)
        move(memory, state, node, strategy)
    return paid, state.most[1] <= spare and paid <= most


@kernel()
def _cheapest_move(graph, memory, state, row):
    """``(node, strategy, cost)`` of the move that frees bytes at a row for the least; node -1 if none does."""
    over, block = state.most[1], row // BLOCK_ROWS
    first, items = memory.block_first[block], memory.block_first[block + 1] - memory.block_first[block]
    offset = int(uniform(state.random) * items)
    best, best_node, best_strategy, best_price = np.inf, -1, -1, 0.0
    seen = 0
    for index in range(items):
        if seen >= REPAIR_ITEMS:
            break
        item = memory.block_items[first + (offset + index) % items]
        node = memory.node[item]
        old = state.chosen[node]
        if memory.lo[item] > row or memory.hi[item] <= row or memory.flat[memory.at[item] + old] <= 0.0:
            continue
        seen += 1
        costs_here(graph, state, node)
        for s in range(graph.first[node + 1] - graph.first[node]):
            freed = _freed(memory, node, row, old, s)
            price = state.total[s] - state.total[old]
            if freed <= 0.0 or price == np.inf:
                continue
            weight = price
            if price > 0.0:
                weight = price / min(freed, over) * (1.0 + REPAIR_CHANCE * (uniform(state.random) - 0.5))
            if weight < best:
                best, best_node, best_strategy, best_price = weight, node, s, price
    return best_node, best_strategy, best_price


@kernel()
def _freed(memory, node, row, old, strategy):
    """Bytes that a move frees at a row."""
    freed = 0.0
    for item in range(memory.item_first[node], memory.item_first[node + 1]):
        if memory.lo[item] <= row < memory.hi[item]:
            freed += memory.flat[memory.at[item] + old] - memory.flat[memory.at[item] + strategy]
    return freed
