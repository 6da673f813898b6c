"""A problem as flat arrays, in the form that the compiled kernels walk through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from autopar.solver.problem import Problem

# Repair looks up what is live at a row by blocks of so many rows.
BLOCK_ROWS = 32


class Graph(NamedTuple):
    """Nodes, strategies and edges; an edge is two links, one from each end, and a node's links are side by side.

    Args:
        first: ``(nodes + 1,)`` where each node's strategies start among all.
        costs: ``(strategies,)``.
        link_first: ``(nodes + 1,)`` where each node's links start, those to lower nodes first.
        middle: ``(nodes,)`` the first of each node's links that leads to a higher node.
        near: ``(links,)`` the node each link leads to.
        twin: ``(links,)`` the same edge's other link.
        table: ``(links,)`` where the edge's matrix starts in ``entries``, this end's strategies as rows.
        out: ``(links + 1,)`` where the link's message to the other end starts.
        entries: all distinct matrices, both ways round.
    """

    first: np.ndarray
    costs: np.ndarray
    link_first: np.ndarray
    middle: np.ndarray
    near: np.ndarray
    twin: np.ndarray
    table: np.ndarray
    out: np.ndarray
    entries: np.ndarray


class Memory(NamedTuple):
    """What is live when, by row; a row stands for times at which the same choices are live.

    Args:
        item_first: ``(nodes + 1,)`` where each node's items start; an item is a usage that some row can feel.
        node: ``(items,)`` whose item it is.
        lo, hi: ``(items,)`` half-open range of rows.
        at: ``(items,)`` where its bytes start in ``flat``, one number per strategy.
        flat: bytes.
        room: ``(rows,)`` the limit less what no choice changes.
        block_first, block_items: the items live in each block of rows.
    """

    item_first: np.ndarray
    node: np.ndarray
    lo: np.ndarray
    hi: np.ndarray
    at: np.ndarray
    flat: np.ndarray
    room: np.ndarray
    block_first: np.ndarray
    block_items: np.ndarray


def graph_of(problem: Problem) -> Graph:
    """The graph of a problem without parallel edges."""
    sizes = np.array([len(costs) for costs in problem.nodes], np.int64)
    ends = np.array([(u, v) for u, v, _ in problem.edges], np.int64).reshape(-1, 2)
    entries, tables = _tables(problem.edges)
    # Link 2e leads from the first end of edge e to the second, link 2e + 1 back.
    here, there = ends.reshape(-1), ends[:, ::-1].reshape(-1)
    order = np.lexsort((there, here))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    twin = place[np.arange(len(order)) ^ 1][order]
    near = there[order]
    link_first = np.searchsorted(here[order], np.arange(len(sizes) + 1))
    middle = link_first[:-1] + np.bincount(here[there < here], minlength=len(sizes))
    costs = np.concatenate([*problem.nodes, np.zeros(0)])
    first, out = _starts(sizes), _starts(sizes[near])
    return Graph(first, costs, link_first, middle, near, twin, tables[order], out, entries)


def _tables(edges: Sequence[tuple[int, int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """``(all matrices both ways round, where those of each link start)``."""
    flat: list[np.ndarray] = []
    placed: dict[int, tuple[int, int]] = {}
    end = 0
    starts = np.empty(2 * len(edges), np.int64)
    for index, (_, _, matrix) in enumerate(edges):
        if id(matrix) not in placed:
            placed[id(matrix)] = (end, end + matrix.size)
            flat += [matrix.ravel(), matrix.T.ravel()]
            end += 2 * matrix.size
        starts[2 * index : 2 * index + 2] = placed[id(matrix)]
    return np.concatenate([*flat, np.zeros(0)]), starts


def memory_of(problem: Problem) -> Memory:
    """The memory rows that some choice can violate, and the usage that they feel."""
    assert problem.limit is not None
    live = [usage for usage in problem.usages if usage.lo < usage.hi]
    distinct = {id(usage.bytes): usage.bytes for usage in live if len(usage.bytes) > 1}
    used = {key for key, sizes in distinct.items() if sizes.any()}
    free = [usage for usage in live if id(usage.bytes) in used]
    times = np.unique([time for usage in free for time in (usage.lo, usage.hi)])
    room = _least_room(problem.limit, [usage for usage in live if len(usage.bytes) == 1], times)
    lo = np.searchsorted(times, np.array([usage.lo for usage in free], np.int64))
    hi = np.searchsorted(times, np.array([usage.hi for usage in free], np.int64))
    most = _spread(lo, hi, np.array([usage.bytes.max() for usage in free]), len(room))
    kept = _felt(lo, hi, room, most > room)
    before = np.concatenate([[0], np.cumsum(kept)])
    items: dict[tuple[int, int, int], np.ndarray] = {}
    for usage, low, high in zip(free, before[lo].tolist(), before[hi].tolist(), strict=True):
        if low < high:
            key = (usage.node, low, high)
            items[key] = items[key] + usage.bytes if key in items else usage.bytes
    return _memory(len(problem.nodes), dict(sorted(items.items())), room[kept])


def _least_room(limit: float, fixed: Sequence, times: np.ndarray) -> np.ndarray:
    """``(len(times) - 1,)`` the least room that usage which is no choice leaves between two times."""
    if len(times) < 2:
        return np.zeros(0)
    lo, hi = (np.array([getattr(usage, end) for usage in fixed], np.int64) for end in ("lo", "hi"))
    change = np.unique(np.concatenate([times, lo, hi]))
    used = _spread(
        np.searchsorted(change, lo),
        np.searchsorted(change, hi),
        np.array([float(usage.bytes[0]) for usage in fixed]),
        len(change) - 1,
    )
    inside = used[np.searchsorted(change, times[0]) : np.searchsorted(change, times[-1])]
    starts = np.searchsorted(change, times[:-1]) - np.searchsorted(change, times[0])
    return limit - np.maximum.reduceat(inside, starts)


def _spread(lo: np.ndarray, hi: np.ndarray, sizes: np.ndarray, rows: int) -> np.ndarray:
    change = np.bincount(lo, sizes, rows + 1) - np.bincount(hi, sizes, rows + 1)
    return np.cumsum(change[:-1])


def _felt(lo: np.ndarray, hi: np.ndarray, room: np.ndarray, possible: np.ndarray) -> np.ndarray:
    """Rows that can be violated, less those whose neighbour has all that is live in them and no more room."""
    kept = possible.copy()
    count = len(room)
    starts, ends = (np.bincount(at, minlength=count + 1).tolist() for at in (lo, hi))
    room, last = room.tolist(), -1
    for row in np.flatnonzero(possible).tolist():
        if last == row - 1 and last >= 0:
            if not starts[row] and room[row] >= room[last]:
                kept[row] = False
                continue
            if not ends[row] and room[last] >= room[row]:
                kept[last] = False
        last = row
    return kept


def _memory(nodes: int, items: dict[tuple[int, int, int], np.ndarray], room: np.ndarray) -> Memory:
    keys = np.array(list(items), np.int64).reshape(-1, 3)
    sizes = np.array([len(table) for table in items.values()], np.int64)
    node, lo, hi = keys.T
    blocks = -(-len(room) // BLOCK_ROWS)
    first, last = lo // BLOCK_ROWS, (hi - 1) // BLOCK_ROWS
    counts = last - first + 1
    owner = np.repeat(np.arange(len(keys)), counts)
    block = first[owner] + np.arange(len(owner)) - _starts(counts)[owner]
    order = np.argsort(block, kind="stable")
    return Memory(
        np.searchsorted(node, np.arange(nodes + 1)),
        node.copy(),
        lo.copy(),
        hi.copy(),
        _starts(sizes)[:-1],
        np.concatenate([*items.values(), np.zeros(0)]),
        room,
        np.searchsorted(block[order], np.arange(blocks + 1)),
        owner[order],
    )


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
