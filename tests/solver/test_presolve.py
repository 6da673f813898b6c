"""Each reduction alone, and all together: the lifted optimum costs the same."""

import math

import pytest
from hypothesis import given, settings
from reductions import reduce_once
from slow_twin import brute_force, problems, within

from autopar.solver.presolve import REDUCTIONS, simplify
from autopar.solver.problem import NoChoiceError
from autopar.solver.tables import Tables


def check(problem, reduced, lift):
    optimum, _ = brute_force(problem)
    smaller, found = brute_force(reduced)
    assert math.isclose(optimum, smaller, rel_tol=1e-9, abs_tol=1e-9)
    if found is not None:
        lifted = lift(found)
        assert math.isclose(problem.cost(lifted), optimum, rel_tol=1e-9, abs_tol=1e-9)
        assert within(problem, lifted)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda reduction: reduction.__name__)
@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_lifted_optimum_of_each_reduction_costs_the_same(reduction, problem):
    tables = Tables()
    try:
        # Dominance is only asked after arc consistency, which drops the strategies that have no partner.
        problem = reduce_once(REDUCTIONS[0], problem, tables)[0]
        reduced, lift = reduce_once(reduction, problem, tables)
    except NoChoiceError:
        assert brute_force(problem)[1] is None
        return
    check(problem, reduced, lift)


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_lifted_optimum_of_all_reductions_costs_the_same(problem):
    try:
        reduced, lift = simplify(problem, Tables())
    except NoChoiceError:
        assert brute_force(problem)[1] is None
        return
    check(problem, reduced, lift)
