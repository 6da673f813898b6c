"""What an earlier solve leaves: bounds of looser problems, and hints mended where they are forbidden."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from deep_step import deep_train_step
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slow_twin import brute_force, problems

from autopar.solver import NoChoiceError, Problem, Start, Usage, Warm, solve
from autopar.solver.mend import hold, mend
from autopar.solver.problem import restricts


@settings(max_examples=80, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_the_problem_of_a_few_nodes_costs_and_fits_as_the_whole_does(problem, seed):
    random = np.random.default_rng(seed)
    chosen = [int(random.integers(len(costs))) for costs in problem.nodes]
    count = int(random.integers(1, len(chosen) + 1))
    free = random.permutation(len(chosen))[:count].tolist()
    small, costs = hold(problem, chosen, free), []
    for choice in itertools.product(*[range(len(problem.nodes[node])) for node in free]):
        whole = list(chosen)
        for node, strategy in zip(free, choice, strict=True):
            whole[node] = strategy
        mine = (*choice, 0)[: len(small.nodes)]
        assert math.isclose(small.peak(mine), _peak_meanwhile(problem, whole, free), abs_tol=1e-9)
        costs.append((problem.cost(whole), small.cost(mine)))
    finite = [(whole, mine) for whole, mine in costs if math.isfinite(whole)]
    assert all(math.isfinite(mine) for _, mine in finite)
    assert all(math.isclose(a - b, finite[0][0] - finite[0][1], abs_tol=1e-9) for a, b in finite)


def _peak_meanwhile(problem: Problem, chosen: list[int], free: list[int]) -> float:
    """Most bytes live from when the first usage of some nodes starts to when their last one ends."""
    live = [usage for usage in problem.usages if usage.lo < usage.hi]
    mine = [usage for usage in live if usage.node in free]
    first, last = min((usage.lo for usage in mine), default=0), max((usage.hi for usage in mine), default=0)
    held = [
        sum(usage.bytes[chosen[usage.node]] for usage in live if usage.lo <= time < usage.hi)
        for time in range(first, last)
    ]
    return max(held, default=0.0)


@settings(max_examples=80, deadline=None)
@given(problem=problems(), data=st.data())
def test_a_hint_is_mended_to_the_optimum_where_all_nodes_are_near(problem, data):
    free = replace(problem, limit=None)
    _, hint = brute_force(free)
    assume(hint is not None)
    assert hint is not None
    node = data.draw(st.integers(0, len(hint) - 1))
    others = set(range(len(problem.nodes[node]))) - {hint[node]}
    assert mend(free, hint, solve) == list(hint)
    assume(others)
    asked = free.allow({node: others})
    mended, optimum = mend(asked, hint, solve), brute_force(asked)[0]
    assert (mended is None) == math.isinf(optimum)
    assert mended is None or math.isclose(asked.cost(mended), optimum, abs_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(problem=problems(), data=st.data())
def test_questions_one_after_the_other_are_answered_as_if_each_were_the_first(problem, data):
    warm, hint = Warm(), None
    for _ in range(4):
        node = data.draw(st.integers(0, len(problem.nodes) - 1))
        allowed = data.draw(st.sets(st.integers(0, len(problem.nodes[node]) - 1), min_size=1))
        asked = replace(problem.allow({node: allowed}), limit=data.draw(st.sampled_from([None, problem.limit, 9.0])))
        optimum, _ = brute_force(asked)
        try:
            choice = solve(asked, start=Start(warm=warm, hint=hint))
        except NoChoiceError:
            assert math.isinf(optimum)
            continue
        hint = choice.strategies
        assert choice.proven and math.isclose(choice.objective, optimum, rel_tol=1e-9, abs_tol=1e-9)


ONE = Problem((np.zeros(2), np.ones(2)), ((0, 1, np.eye(2)),), (Usage(0, 0, 1, np.ones(2)),), 5.0)


@pytest.mark.parametrize(
    ("problem", "is_one"),
    [
        (ONE, True),
        (ONE.allow({0: (1,)}), True),
        (replace(ONE, limit=4.0), True),
        (replace(ONE, limit=6.0), False),
        (replace(ONE, limit=None), False),
        (replace(ONE, nodes=(np.zeros(2), np.zeros(2))), False),
        (replace(ONE, nodes=(np.zeros(2), np.full(2, 2.0))), True),
        (replace(ONE, edges=((0, 1, np.eye(2)),)), True),
        (replace(ONE, edges=((0, 1, np.eye(2)[::-1].copy()),)), False),
        (replace(ONE, edges=()), False),
        (replace(ONE, usages=(Usage(0, 0, 1, np.ones(2)),)), True),
        (replace(ONE, usages=(Usage(0, 0, 2, np.ones(2)),)), False),
        (replace(ONE, usages=()), False),
        (Problem((np.zeros(3), np.ones(2))), False),
    ],
)
def test_a_problem_restricts_another_where_it_allows_nothing_more_at_no_less_cost(problem, is_one):
    assert restricts(problem, ONE) == is_one


def test_a_question_whose_answer_an_earlier_bound_covers_takes_no_new_solve():
    step, warm = deep_train_step(12, 6), Warm()
    first = solve(step, relative_gap=0.05, start=Start(warm=warm))
    node = next(node for node, costs in enumerate(step.nodes) if np.isfinite(costs).sum() > 2)
    others = set(np.flatnonzero(np.isfinite(step.nodes[node])).tolist()) - {first.strategies[node]}
    stages: list[str] = []
    asked = step.allow({node: others})
    again = solve(
        asked,
        relative_gap=0.05,
        start=Start(warm=warm, hint=first.strategies),
        on_progress=lambda progress: stages.append(progress.stage),
    )
    assert set(stages) <= {"reading", "done"}
    assert again.gap <= 0.05 and again.lower_bound >= first.lower_bound
    assert asked.feasible(again.strategies) and again.lower_bound <= solve(asked).objective * (1 + 1e-9)
