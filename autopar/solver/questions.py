"""What else could have been chosen: the best alternatives of one node, and the frontier of memory against cost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from autopar.errors import ProblemError
from autopar.solver.part import Warm
from autopar.solver.problem import Choice, NoChoiceError, Problem
from autopar.solver.room import no_room
from autopar.solver.rows import rows_of
from autopar.solver.search import Start, solve

# Peaks closer to each other than this share are one point of a frontier: integer programs tell no closer ones apart.
BELOW = 1e-7


@dataclass(frozen=True)
class Alternative:
    """One strategy of a node, with the best choice that has it."""

    strategy: int
    choice: Choice


@dataclass(frozen=True)
class Point:
    """One point of a frontier.

    Args:
        limit: bytes that it was solved for; None for no limit.
        peak: most bytes live at any time.
        choice: the cheapest found within the limit.
    """

    limit: float | None
    peak: float
    choice: Choice


def alternatives(
    problem: Problem, node: int, most: int, *, seconds: float = 60.0, warm: Warm | None = None
) -> tuple[Alternative, ...]:
    """The best strategies of one node, each with the best choice of all other nodes, the cheapest first.

    Args:
        problem: as it was solved.
        node: whose strategies.
        most: return at most so many.
        seconds: for all of them together; none takes more than its share of what is left.
        warm: what an earlier solve left.

    Raises:
        NoChoiceError: no strategy of the node is part of a feasible choice.

    >>> problem = Problem((np.array([0.0, 3.0]), np.ones(2)), ((0, 1, np.array([[5.0, 4.0], [0.0, 9.0]])),))
    >>> [(found.strategy, found.choice.objective) for found in alternatives(problem, 0, 2)]
    [(1, 4.0), (0, 5.0)]
    """
    if not 0 <= node < len(problem.nodes):
        raise ProblemError(f"there are {len(problem.nodes)} nodes", where=f"node {node}", fix="fix the node")
    warm = Warm() if warm is None else warm
    left = [int(strategy) for strategy in np.flatnonzero(np.isfinite(problem.nodes[node]))]
    found: list[Alternative] = []
    spent = 0.0
    for at, strategy in enumerate(left):
        share = max(seconds - spent, 0.0) / (len(left) - at)
        try:
            choice = solve(problem.allow({node: (strategy,)}), seconds=share, start=Start(warm=warm))
        except NoChoiceError:
            continue
        found.append(Alternative(strategy, choice))
        spent += choice.seconds
    if not found:
        raise no_room(problem)
    return tuple(sorted(found, key=lambda one: (one.choice.objective, one.strategy))[:most])


def frontier(
    problem: Problem, *, most: int | None = None, seconds: float = 60.0, relative_gap: float = 0.0
) -> tuple[Point, ...]:
    """Peaks of memory against the least cost within them, from no limit, each just below the one before.

    Args:
        problem: its own limit is not looked at.
        most: take at most about so many points, evenly spaced in bytes; None for all.
        seconds: for all points together.
        relative_gap: as ``solve``'s.

    Returns:
        Points with falling peaks and rising costs; no other feasible choice has both lower where all are proven.

    Raises:
        NoChoiceError: forbidden costs alone exclude every choice.

    >>> from autopar.solver import Usage
    >>> costs, size = np.array([0.0, 3.0, 4.0]), np.array([9.0, 5.0, 7.0])
    >>> points = frontier(Problem((costs,), (), (Usage(0, 0, 1, size),)))
    >>> [(point.peak, point.choice.objective) for point in points]
    [(9.0, 0.0), (5.0, 3.0)]
    """
    least = float(rows_of(replace(problem, limit=0.0)).least().max(initial=0.0))
    free = solve(replace(problem, limit=None), seconds=seconds, relative_gap=relative_gap)
    points = [Point(None, problem.peak(free.strategies), free)]
    step = 0.0 if most is None else (points[0].peak - least) / most
    spent, warm = free.seconds, Warm()
    while spent < seconds and points[-1].peak > 0.0:
        limit = min(points[-1].peak * (1.0 - BELOW), points[0].peak - step * len(points))
        share = (seconds - spent) / (1 if most is None else max(most - len(points), 1))
        try:
            limited = replace(problem, limit=max(limit, 0.0))
            choice = solve(limited, seconds=share, relative_gap=relative_gap, start=Start(warm=warm))
        except NoChoiceError:
            break
        spent += choice.seconds
        points.append(Point(limit, problem.peak(choice.strategies), choice))
    return tuple(_undominated(points))


def _undominated(points: list[Point]) -> list[Point]:
    """Of points with falling peaks those that no later one beats: ties, and what a solve in a hurry missed."""
    kept: list[Point] = []
    for point in reversed(points):
        if not kept or point.choice.objective < kept[-1].choice.objective:
            kept.append(point)
    return kept[::-1]
