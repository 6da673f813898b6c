"""Exact reductions ``Problem -> (Problem, lift)``: the lifted optimum costs the same as the optimum.

Each is a step over the nodes that changed since it last looked at them, and all are done on ids of
hash-consed tables, so a repeated layer is reduced by look-ups. ``simplify`` runs the list until nothing
changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from autopar.solver.draft import Draft, Lift
from autopar.solver.eliminate import minimum_of_sum
from autopar.solver.problem import NoChoiceError, Problem
from autopar.solver.tables import Tables

Reduction = Callable[[Draft, list[int]], None]
# Comparing all pairs of strategies under all neighbours takes k^2 s time; beyond this it is not worth it.
DOMINANCE_STRATEGIES = 512
# Compiled kernels take half a second to load: so many nodes of which no two are alike make that up, or more solves.
MANY_UNLIKE = 500
# Pairs of strategies are compared one by one where they are at most this share of all.
PAIRS_SHARE = 0.25
ROUNDS = 12


def simplify(problem: Problem, tables: Tables) -> tuple[Problem, Lift]:
    """Run every reduction until none changes anything (or a fixed number of rounds).

    Raises:
        NoChoiceError: forbidden costs alone exclude every choice.
    """
    draft = Draft.of(problem, tables)
    reduce_all(draft)
    return draft.finish()


def reduce_all(draft: Draft) -> None:
    """Every reduction, until none changes anything (or a fixed number of rounds)."""
    for _ in range(ROUNDS):
        todo = sorted(draft.changed)
        if not todo:
            break
        draft.changed = set()
        for reduction in REDUCTIONS:
            # What one reduction changes, the next ones see in the same round.
            reduction(draft, [node for node in sorted(draft.changed.union(todo)) if draft.alive[node]])


def forbid_dead(draft: Draft, nodes: list[int]) -> None:
    """Arc consistency: drop strategies that are forbidden, alone or with every strategy of one neighbour."""
    tables = draft.tables
    # By node the tables that say so. Hubs have thousands of edges, of which only those that changed are looked at.
    waiting: dict[int, set[int]] = {}
    for node in reversed(nodes):
        dead = {table for table in (draft.costs[node], *draft.near[node].values()) if tables.memo(_has_dead, table)}
        if dead:
            waiting[node] = dead
    while waiting:
        node, dead = waiting.popitem()
        kept = tables.memo(_possible, frozenset(dead))
        if tables[kept].size == 0:
            raise NoChoiceError("forbidden costs exclude every choice", np.inf, (node,), fix="allow more strategies")
        draft.keep(node, kept)
        for other in draft.near[node]:
            table = draft.near[other][node]
            if tables.memo(_has_dead, table):
                waiting.setdefault(other, set()).add(table)


def _has_dead(tables: Tables, table: int) -> bool:
    return not bool(_alive(tables[table]).all())


def _possible(tables: Tables, dead: frozenset[int]) -> int:
    possible = np.logical_and.reduce([_alive(tables[table]) for table in dead])
    return tables.intern(np.flatnonzero(possible))


def _alive(array: np.ndarray) -> np.ndarray:
    """The strategies that costs allow, or that a matrix leaves a partner."""
    return np.logical_or.reduce(np.isfinite(array).reshape(len(array), -1), axis=1)


def free_least_usage(draft: Draft, nodes: list[int]) -> None:
    """Move what every strategy of a node keeps live into the base, and drop usage that is then zero."""
    tables = draft.tables
    for node in nodes:
        for (lo, hi), table in list(draft.live[node].items()):
            rest, least = tables.memo(_least, table)
            if least:
                draft.base.append((lo, hi, least))
            if rest is None:
                del draft.live[node][lo, hi]
            else:
                draft.live[node][lo, hi] = rest


def _least(tables: Tables, table: int) -> tuple[int | None, float]:
    array = tables[table]
    least = float(array.min())
    return (tables.intern(array - least) if (array > least).any() else None), least


def absorb_separable(draft: Draft, nodes: list[int]) -> None:
    """Drop an edge whose matrix is a row plus a column, both of which join the nodes' costs."""
    for node in nodes:
        for other, table in list(draft.near[node].items()):
            parts = draft.tables.memo(_separable, table)
            if parts is not None:
                draft.drop_edge(node, other)
                draft.add_cost(node, parts[0])
                draft.add_cost(other, parts[1])


def _separable(tables: Tables, table: int) -> tuple[int, int] | None:
    matrix = tables[table]
    if not np.isfinite(matrix).all():
        return None
    column = matrix.min(axis=1)
    rest = matrix - column[:, None]
    return None if (rest != rest[:1]).any() else (tables.intern(column), tables.intern(rest[0]))


def drop_fixed(draft: Draft, nodes: list[int]) -> None:
    """Remove nodes with one strategy; their costs and usage are no choice."""
    for node in nodes:
        if draft.size(node) == 1 and draft.alive[node]:
            for other, table in list(draft.near[node].items()):
                draft.drop_edge(node, other)
                draft.add_cost(other, draft.tables.memo(_first_row, table))
            draft.base += [(*span, float(draft.tables[table][0])) for span, table in draft.live[node].items()]
            draft.constant += float(draft.tables[draft.costs[node]][0])
            draft.remove(node, (), np.array(0))


def _first_row(tables: Tables, table: int) -> int:
    return tables.intern(tables[table][0])


def merge_followers(draft: Draft, nodes: list[int]) -> None:
    """Merge a node into a neighbour whose every strategy leaves it exactly one: it follows.

    Only where the leader has no more strategies than the follower, or the follower at most one other
    neighbour: else the follower's other edges would grow. Of two that follow each other the one with more
        edges leads.
    """
    tables = draft.tables
    queue = list(reversed(nodes))
    while queue:
        node = queue.pop()
        for other in list(draft.near[node]):
            # An earlier merge may have changed or removed this edge.
            table = draft.near[node].get(other)
            followed = None if table is None else tables.memo(_follows, table)
            if table is None or followed is None:
                continue
            back = None
            if draft.size(node) == draft.size(other) and _load(draft, node) < _load(draft, other):
                back = tables.memo(_follows, tables.transpose(table))
            if back is not None:
                _merge(draft, other, node, back)
                queue.append(other)
                break
            if draft.size(node) <= draft.size(other) or len(draft.near[other]) <= 2:
                _merge(draft, node, other, followed)


def _load(draft: Draft, node: int) -> int:
    return len(draft.near[node]) + len(draft.live[node])


def _follows(tables: Tables, table: int) -> tuple[int, int] | None:
    """``(strategy that follows, its cost)`` per row when each row has exactly one finite entry."""
    finite = np.isfinite(tables[table])
    if (finite.sum(axis=1) != 1).any():
        return None
    at = finite.argmax(axis=1)
    return tables.intern(at), tables.intern(tables[table][np.arange(len(at)), at])


def _merge(draft: Draft, leader: int, follower: int, followed: tuple[int, int]) -> None:
    tables, (at, cost) = draft.tables, followed
    edges = [(other, tables.take(table, at)) for other, table in draft.near[follower].items() if other != leader]
    live = [(interval, tables.take(table, at)) for interval, table in draft.live[follower].items()]
    mine = tables.add(tables.take(draft.costs[follower], at), cost)
    draft.remove(follower, (leader,), tables[at])
    draft.add_cost(leader, mine)
    for other, table in edges:
        draft.add_edge(leader, other, table)
    for interval, table in live:
        draft.add_usage(leader, interval, table)


def drop_dominated(draft: Draft, nodes: list[int]) -> None:
    """Drop a strategy if another is never dearer, whatever the neighbours do, and never larger.

    To be run after ``forbid_dead``: strategies without a partner cannot be compared.
    """
    nodes = [node for node in nodes if 1 < draft.size(node) <= DOMINANCE_STRATEGIES]
    unlike = len({_surroundings(draft, node) for node in nodes})
    function = _undominated if unlike < MANY_UNLIKE and not draft.tables.compiled else _undominated_compiled
    for node in nodes:
        kept = draft.tables.memo(function, *_surroundings(draft, node))
        if kept is not None:
            draft.keep(node, kept)


def _surroundings(draft: Draft, node: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """All that decides which of a node's strategies are dominated."""
    usage = tuple(sorted(set(draft.live[node].values())))
    return draft.costs[node], tuple(sorted(draft.near[node].values())), usage


def _undominated_compiled(tables: Tables, costs: int, matrices: tuple[int, ...], usage: tuple[int, ...]) -> int | None:
    from autopar.solver.compiled.dominance import undominated

    stays = undominated(tables[costs], [tables[matrix] for matrix in matrices], [tables[table] for table in usage])
    return None if stays.all() else tables.intern(np.flatnonzero(stays))


def _undominated(tables: Tables, costs: int, matrices: tuple[int, ...], usage: tuple[int, ...]) -> int | None:
    array = tables[costs]
    # Usage leaves few pairs of strategies of which the second could do for the first.
    pairs = ~np.eye(len(array), dtype=bool)
    for table in usage:
        pairs &= tables[table][:, None] >= tables[table][None, :]
    # Looking at one column of each matrix leaves fewer still; then all columns are looked at, matrix by matrix.
    at_most = array[:, None] - array[None, :]
    for matrix in matrices:
        at_most = at_most + tables[tables.memo(_margin_at_least, matrix)]
    worse, better = np.nonzero(pairs & (at_most >= 0))
    margin = at_most[worse, better]
    for matrix in sorted(matrices, key=lambda matrix: tables[matrix].size):
        if not len(worse):
            return None
        loose = tables[tables.memo(_margin_at_least, matrix)][worse, better]
        margin = margin + (_least_margin(tables, matrix, worse, better) - loose)
        possible = margin >= 0
        worse, better, margin = worse[possible], better[possible], margin[possible]
    at_least = np.zeros(pairs.shape, bool)
    at_least[worse, better] = True
    # Of strategies as good as each other the first stays.
    first = np.arange(len(array))[:, None] > np.arange(len(array))[None, :]
    dominated = (at_least & (~at_least.T | first)).any(axis=1)
    return tables.intern(np.flatnonzero(~dominated)) if dominated.any() else None


def _margin_at_least(tables: Tables, table: int) -> int:
    """``matrix[a, c] - matrix[b, c]`` in the column ``c`` where ``a`` is least: no smaller than the least of all."""
    matrix = tables[table]
    least = matrix.argmin(axis=1)
    return tables.intern(matrix.min(axis=1)[:, None] - matrix[:, least].T)


def _least_margin(tables: Tables, table: int, worse: np.ndarray, better: np.ndarray) -> np.ndarray:
    """``min over columns of matrix[worse] - matrix[better]`` of each pair, without those forbidden to ``worse``."""
    matrix = tables[table]
    if len(worse) > PAIRS_SHARE * len(matrix) ** 2:
        return tables[tables.memo(_gain, table)][worse, better]
    margin = np.full(len(worse), np.inf)
    for column in matrix.T:
        above = column[worse]
        forbidden = np.isinf(above)
        step = np.where(forbidden, 0.0, above) - column[better]
        np.minimum(margin, np.where(forbidden, np.inf, step), out=margin)
    return margin


def _gain(tables: Tables, table: int) -> int:
    """``gain[a, b] = min over columns of matrix[a] - matrix[b]``; columns forbidden to ``a`` do not count."""
    matrix = tables[table]
    gain = np.full((len(matrix), len(matrix)), np.inf)
    for column in matrix.T:
        # inf - inf is "forbidden to a": it must not count, so it is inf as well.
        forbidden = np.isinf(column)
        finite = np.where(forbidden, 0.0, column)
        step = finite[:, None] - np.where(forbidden, np.inf, finite)[None, :]
        step[forbidden] = np.inf
        np.minimum(gain, step, out=gain)
    return tables.intern(gain)


def eliminate_free(draft: Draft, nodes: list[int]) -> None:
    """Eliminate nodes without usage and with at most two neighbours; the result is a cost or an edge."""
    queue, waiting = list(reversed(nodes)), set(nodes)
    while queue:
        node = queue.pop()
        waiting.discard(node)
        near = tuple(sorted(draft.near[node]))
        if len(near) > 2 or draft.live[node] or not draft.alive[node]:
            continue
        parts = tuple(draft.near[node][other] for other in near)
        result, best, least = draft.tables.memo(_eliminate_free, draft.costs[node], parts)
        draft.remove(node, near, best)
        draft.constant += least
        if len(near) == 1:
            draft.add_cost(near[0], result)
        elif near:
            draft.add_edge(near[0], near[1], result)
        for other in near:
            if other not in waiting:
                waiting.add(other)
                queue.append(other)


def _eliminate_free(tables: Tables, costs: int, parts: tuple[int, ...]) -> tuple[int, np.ndarray, float]:
    arrays = [tables[costs].reshape([-1] + [1] * len(parts))]
    for axis, table in enumerate(parts):
        shape = [tables[table].shape[0]] + [1] * len(parts)
        shape[1 + axis] = tables[table].shape[1]
        arrays.append(tables[table].reshape(shape))
    low, best = minimum_of_sum(arrays)
    least = float(low.min())
    least = least if np.isfinite(least) else 0.0
    return tables.intern(low - least), best, least


def restrict(problem: Problem, tables: Tables, kept: list[np.ndarray]) -> tuple[Problem, Lift]:
    """Keep only the strategies listed for each node; that they suffice is for the caller to know."""
    draft = Draft.of(problem, tables)
    for node, strategies in enumerate(kept):
        if len(strategies) < draft.size(node):
            draft.keep(node, tables.intern(strategies))
    return draft.finish()


REDUCTIONS: tuple[Reduction, ...] = (
    forbid_dead,
    free_least_usage,
    drop_fixed,
    absorb_separable,
    merge_followers,
    # Merging may leave strategies without a partner, which dominance does not understand.
    forbid_dead,
    drop_dominated,
    eliminate_free,
)
