"""Why nothing fits: the least peak that any choice reaches, and the nodes that make it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from autopar.solver.eliminate import WIDE_ENTRIES
from autopar.solver.lagrange import Column, Dual, Priced, maximise
from autopar.solver.presolve import simplify
from autopar.solver.problem import NoChoiceError, Problem, Usage
from autopar.solver.relaxation import ExactRelaxation, Pricing, order_of
from autopar.solver.rows import Rows, rows_of
from autopar.solver.tables import Tables, quantum_of

NAMED_NODES = 5


def least_sum_exceeds(problem: Problem) -> bool:
    """Whether already the least usage of every node, chosen freely, passes the limit at some time."""
    if problem.limit is None or not problem.usages:
        return False
    return bool(rows_of(problem).least().max(initial=0.0) > problem.limit * (1 + 1e-12))


def no_room(problem: Problem, poll: Callable[[], None] | None = None) -> NoChoiceError:
    """The error for a problem of which no choice fits its limit.

    The least peak is the value of the game between choices and prices on times that sum to one: exact up to
    the mixing of choices, else a lower bound. Where that game is too wide, each node's least usage is added
    up instead.
    """
    limit = problem.limit
    least, strategies, time = (math.inf, None, 0) if limit is None else _least_peak(problem, poll)
    if limit is None or strategies is None:
        what = "forbidden costs exclude every choice"
        return NoChoiceError(what, math.inf, (), fix="allow more strategies")
    # The problem is known to be infeasible: what the relaxation misses is more than the limit.
    least = max(least, math.nextafter(limit, math.inf))
    nodes = _largest_at(problem, strategies, time)
    named = ", ".join(f"{node} ({size:.6g} B)" for node, size in nodes[:NAMED_NODES])
    return NoChoiceError(
        f"no choice keeps its peak within {limit:.6g} bytes: at least {least:.6g} bytes are needed",
        least,
        tuple(node for node, _ in nodes),
        where=f"time {time}, where nodes {named} are the largest",
        fix=f"raise the limit above {least:.6g} bytes, or give those nodes smaller strategies",
    )


def _least_peak(problem: Problem, poll: Callable[[], None] | None) -> tuple[float, Sequence[int] | None, int]:
    """``(lower bound in bytes, a choice of low peak, the time of its peak)``."""
    largest = sum(float(usage.bytes.max()) for usage in problem.usages)
    scale = 1.0 / quantum_of(largest)
    tables = Tables(poll)
    try:
        reduced, lift = simplify(_only_usage(problem, scale), tables)
    except NoChoiceError:
        return math.inf, None, 0
    rows, order = rows_of(reduced), order_of(reduced, WIDE_ENTRIES)
    if order.left:
        plain = rows_of(problem)
        smallest = [int(np.argmin(_total_bytes(problem, node))) for node in range(len(problem.nodes))]
        return float(plain.least().max()), smallest, int(plain.times[plain.least().argmax()])
    relaxation = ExactRelaxation(reduced, tables, order)
    priced = Priced(relaxation, Pricing(reduced, tables, rows), rows, lambda strategies: 0.0)
    lowest: list[Column] = []

    def on_step(dual: Dual, column: Column) -> bool:
        if column.strategies and (not lowest or column.usage.max() < lowest[0].usage.max()):
            lowest[:] = [column]
        return bool(lowest) and lowest[0].usage.max() <= dual.bound * (1 + 1e-9)

    dual = maximise(priced, on_step=on_step, penalty=1.0)
    if not lowest:
        return math.inf, None, 0
    return dual.bound * (1 - 1e-9) / scale, lift(lowest[0].strategies), _peak_time(lowest[0], rows)


def _only_usage(problem: Problem, scale: float) -> Problem:
    """Costs become zero or forbidden; bytes are counted in fractions that add exactly; the limit is zero."""
    zeroed: dict[int, np.ndarray] = {}

    def zero(array: np.ndarray) -> np.ndarray:
        if id(array) not in zeroed:
            zeroed[id(array)] = np.where(np.isinf(array), np.inf, 0.0)
        return zeroed[id(array)]

    scaled: dict[int, np.ndarray] = {}
    for usage in problem.usages:
        scaled.setdefault(id(usage.bytes), np.rint(usage.bytes * scale))
    return Problem(
        tuple(zero(costs) for costs in problem.nodes),
        tuple((u, v, zero(matrix)) for u, v, matrix in problem.edges),
        tuple(Usage(usage.node, usage.lo, usage.hi, scaled[id(usage.bytes)]) for usage in problem.usages),
        0.0,
    )


def _total_bytes(problem: Problem, node: int) -> np.ndarray:
    mine = [usage.bytes for usage in problem.usages if usage.node == node and usage.lo < usage.hi]
    allowed = np.where(np.isinf(problem.nodes[node]), np.inf, 0.0)
    return sum(mine, allowed)


def _peak_time(column: Column, rows: Rows) -> int:
    return int(rows.times[column.usage.argmax()]) if len(rows.times) else 0


def _largest_at(problem: Problem, strategies: Sequence[int], time: int) -> list[tuple[int, float]]:
    """``(node, bytes)`` live at a time, the largest first."""
    live: dict[int, float] = {}
    for usage in problem.usages:
        if usage.lo <= time < usage.hi and usage.bytes[strategies[usage.node]] > 0:
            live[usage.node] = live.get(usage.node, 0.0) + float(usage.bytes[strategies[usage.node]])
    return sorted(live.items(), key=lambda item: (-item[1], item[0]))
