"""Pins, what-if, alternatives and frontiers, each against brute force."""

import itertools
import math
from dataclasses import replace

import pytest
from deep_step import deep_train_step
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_twin import brute_force, peak, problems

from autopar.errors import InfeasibleError, ProblemError
from autopar.solver import Problem, Start, Warm, alternatives, frontier, solve


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-8)


def restricted(problem: Problem, allowed: dict) -> float:
    """The least cost of a feasible choice within the allowed strategies, by trying all."""
    spaces = [allowed.get(node, range(len(costs))) for node, costs in enumerate(problem.nodes)]
    choices = itertools.product(*spaces)
    return min((problem.cost(choice) for choice in choices if problem.feasible(choice)), default=math.inf)


@settings(max_examples=15, deadline=None)
@given(problem=problems(), data=st.data())
def test_pins_exclude_all_other_strategies_and_nothing_else(problem, data):
    nodes = data.draw(st.sets(st.integers(0, len(problem.nodes) - 1)))
    allowed = {node: data.draw(st.sets(st.integers(0, len(problem.nodes[node]) - 1), min_size=1)) for node in nodes}
    optimum, warm = restricted(problem, allowed), Warm()
    # The store of an earlier solve must not change what a later one finds.
    for start in (Start(), Start(warm=warm), Start(warm=warm)):
        try:
            choice = solve(problem.allow(allowed), start=start)
        except InfeasibleError:
            assert optimum == math.inf
            continue
        assert choice.proven and close(choice.objective, optimum)
        assert all(choice.strategies[node] in strategies for node, strategies in allowed.items())


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({9: (0,)}, "there are 4 nodes"),
        ({0: ()}, r"allowed strategies \[\]"),
        ({0: (0, 99)}, r"allowed strategies \[0, 99\]"),
    ],
)
def test_a_pin_on_what_there_is_not_is_refused(allowed, message):
    step = deep_train_step(1, 2)
    problem = Problem(step.nodes[:4])
    with pytest.raises(ProblemError, match=message):
        problem.allow(allowed)


def test_a_warm_solve_after_one_pin_computes_little_and_is_the_same_as_a_cold_one():
    step, warm = deep_train_step(64, 6), Warm()
    first = solve(step, start=Start(warm=warm))
    pinned = step.allow({0: [s for s in range(len(step.nodes[0])) if s != first.strategies[0]]})
    cold = solve(pinned)
    before = warm.tables.misses
    again = solve(pinned, start=Start(warm=warm))
    assert again.proven and close(again.objective, cold.objective)
    assert 4 * (warm.tables.misses - before) < cold.stats["tables_computed"]


@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data())
def test_alternatives_are_those_of_brute_force(problem, data):
    node = data.draw(st.integers(0, len(problem.nodes) - 1))
    costs = [restricted(problem, {node: (s,)}) for s in range(len(problem.nodes[node]))]
    least = sorted(cost for cost in costs if math.isfinite(cost))
    most = data.draw(st.integers(1, 4))
    if not least:
        with pytest.raises(InfeasibleError):
            alternatives(problem, node, most)
        return
    found = alternatives(problem, node, most)
    assert len(found) == min(most, len(least))
    for one, expected in zip(found, least, strict=False):
        assert close(one.choice.objective, expected) and close(costs[one.strategy], expected)
        assert one.choice.strategies[node] == one.strategy


def test_alternatives_of_a_node_that_there_is_not_are_refused():
    with pytest.raises(ProblemError, match="there are"):
        alternatives(deep_train_step(1, 2), 10**6, 1)


@settings(max_examples=40, deadline=None)
@given(problem=problems(limited=False))
def test_the_frontier_is_that_of_brute_force(problem):
    spaces = [range(len(costs)) for costs in problem.nodes]
    met = [(peak(problem, choice), problem.cost(choice)) for choice in itertools.product(*spaces)]
    met = [(high, cost) for high, cost in met if math.isfinite(cost)]
    if not met:
        with pytest.raises(InfeasibleError):
            frontier(problem)
        return
    expected = []
    for high, cost in sorted(met):
        if not expected or cost < expected[-1][1] - 1e-8 * (1 + abs(cost)):
            expected.append((high, cost))
    found = [(point.peak, point.choice.objective) for point in frontier(problem)][::-1]
    assert len(found) == len(expected)
    for (high, cost), (expected_high, expected_cost) in zip(found, expected, strict=True):
        assert close(high, expected_high) and close(cost, expected_cost)


def test_a_frontier_of_few_points_falls_in_peak_and_rises_in_cost():
    step = deep_train_step(12, 5)
    points = frontier(step, most=4, relative_gap=0.01)
    assert 2 <= len(points) <= 6
    assert all(b.peak < a.peak and b.choice.objective > a.choice.objective for a, b in itertools.pairwise(points))
    assert all(point.limit is None or point.peak <= point.limit * (1 + 1e-12) for point in points)
    assert all(replace(step, limit=point.limit).feasible(point.choice.strategies) for point in points)


@settings(max_examples=8, deadline=None)
@given(problem=problems())
def test_a_deterministic_solve_finds_the_optimum_as_well(problem):
    optimum, found = brute_force(problem)
    if found is not None:
        assert close(solve(problem, start=Start(deterministic=True)).objective, optimum)
