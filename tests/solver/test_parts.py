"""The solver's parts one by one: tables, orders, rows, prices, messages, the integer program."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from deep_step import deep_train_step
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slow_twin import brute_force, peak, problems

from autopar.solver import NoChoiceError, Problem, Usage, solve
from autopar.solver.branch import cover, integer_program
from autopar.solver.clock import Budget
from autopar.solver.eliminate import elimination_order, minimum_of_sum
from autopar.solver.messages import Sweeps
from autopar.solver.milp import polytope
from autopar.solver.narrow import branch_whole
from autopar.solver.part import Part, Search
from autopar.solver.presolve import simplify
from autopar.solver.relaxation import ExactRelaxation, Pricing, order_of
from autopar.solver.rows import rows_of
from autopar.solver.tables import Tables, TooManyEntries


def test_equal_tables_have_one_id_and_operations_run_once():
    tables, calls = Tables(), []

    def negate(tables: Tables, table: int) -> int:
        calls.append(table)
        return tables.intern(-tables[table])

    a, b = tables.intern(np.array([1.0, 0.0])), tables.intern(np.array([1.0, -0.0]))
    assert a == b and tables.memo(negate, a) == tables.memo(negate, b)
    assert calls == [a] and tables.misses == 1
    assert tables.add(a, tables.memo(negate, a)) == tables.intern(np.zeros(2))


def test_a_store_forgets_what_is_newer_than_a_mark_and_refuses_to_grow_beyond_its_bound():
    tables = Tables()
    old = tables.intern(np.ones(3))
    mark = tables.mark()
    double = tables.add(old, old)
    assert tables.entries == 6 and tables.add(old, old) == double and tables.misses == 1
    tables.forget(mark)
    assert tables.entries == 3 and tables.intern(np.ones(3)) == old
    assert tables[tables.add(old, old)].tolist() == [2.0, 2.0, 2.0] and tables.misses == 2
    with pytest.raises(TooManyEntries), tables.at_most(8):
        tables.intern(np.arange(9.0))
    assert tables.most_entries == math.inf


def test_an_order_stops_before_a_table_that_would_be_too_wide():
    clique = [(u, v) for u in range(4) for v in range(u)]
    assert elimination_order([5] * 4, clique, 125).left == ()
    assert elimination_order([5] * 4, clique, 125).widest_entries == 125
    assert len(elimination_order([5] * 4, clique, 124).left) == 4
    chain = elimination_order([5] * 50, [(node, node + 1) for node in range(49)])
    assert chain.widest_entries == 5 and chain.left == ()


def test_large_joins_are_minimised_in_slices_like_small_ones():
    random = np.random.default_rng(0)
    arrays = [
        random.normal(size=(7, 60, 1, 5)),
        random.normal(size=(7, 1, 70, 1)),
        random.normal(size=(7, 1, 1, 5)),
    ]
    low, best = minimum_of_sum(arrays)
    total = arrays[0] + arrays[1] + arrays[2]
    assert np.allclose(low, total.min(axis=0)) and (best == total.argmin(axis=0)).all()


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_rows_see_the_same_peak_as_all_times(problem, seed):
    random = np.random.default_rng(seed)
    strategies = tuple(int(random.integers(len(costs))) for costs in problem.nodes)
    usage = rows_of(problem).usage(strategies)
    assert math.isclose(usage.max(initial=0.0), peak(problem, strategies), abs_tol=1e-9)
    assert math.isclose(problem.peak(strategies), peak(problem, strategies), abs_tol=1e-9)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_any_prices_give_a_lower_bound(problem, seed):
    tables = Tables()
    whole = _whole(problem)
    rows = rows_of(whole)
    random = np.random.default_rng(seed)
    pricing = Pricing(whole, tables, rows)
    prices = pricing.round(random.exponential(100.0, len(rows.times)))
    optimum, _ = brute_force(whole)
    _, value = ExactRelaxation(whole, tables, order_of(whole, 10**6)).minimise(pricing.costs(prices))
    # Priced costs are rounded to whole quanta, by at most a half at each node.
    assert value - prices.sum() * rows.limit <= optimum + 0.5 * len(whole.nodes)


@settings(max_examples=60, deadline=None)
@given(problem=problems(limited=False))
def test_messages_bound_the_optimum_and_prune_nothing_that_is_part_of_it(problem):
    tables = Tables()
    try:
        problem, _ = simplify(_whole(problem), tables)
    except NoChoiceError:
        assume(False)
    optimum, best = brute_force(problem)
    assume(best is not None)
    assert best is not None
    sweeps = Sweeps(problem, tables)
    costs = [tables.intern(array) for array in problem.nodes]
    bounds = [sweeps.sweep(costs) for _ in range(5)]
    assert all(later >= earlier - 1e-6 * abs(earlier) for earlier, later in itertools.pairwise(bounds))
    assert bounds[-1] <= optimum + 1e-6
    kept, matrices = sweeps.prune(costs, optimum - bounds[-1] + 1e-6 * (1 + abs(optimum)))
    assert all(strategy in strategies for strategy, strategies in zip(best, kept, strict=True))
    for (u, v), matrix in zip(sweeps.ends, matrices, strict=True):
        assert math.isfinite(matrix[best[u], best[v]])


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_the_integer_program_alone_finds_the_optimum(problem):
    optimum, found = brute_force(problem)
    outcome = integer_program(problem, Tables(), Budget.of(60.0))
    assert (outcome.strategies is None) == (found is None)
    if outcome.strategies is not None:
        assert problem.feasible(outcome.strategies)
        assert math.isclose(problem.cost(outcome.strategies), optimum, rel_tol=1e-6, abs_tol=1e-6)
        assert outcome.bound <= optimum + 1e-5 * (1 + abs(optimum))


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_a_cover_forbids_the_choice_it_was_made_for_and_none_that_fits(problem, seed):
    random = np.random.default_rng(seed)
    chosen = [int(random.integers(len(costs))) for costs in problem.nodes]
    rows, poly = rows_of(problem), polytope(Problem(problem.nodes))
    over = np.flatnonzero(rows.usage(chosen) > rows.limit)
    assume(len(over))
    variables, most = cover(poly, rows, chosen, int(over[0]))

    def counted(choice: Sequence[int]) -> int:
        return int(np.isin(poly.first + np.array(choice), variables).sum())

    assert counted(chosen) == most + 1
    for choice in itertools.product(*[range(len(costs)) for costs in problem.nodes]):
        assert rows.usage(choice).max(initial=0.0) > rows.limit or counted(choice) <= most


@settings(max_examples=40, deadline=None)
@given(problem=problems(limited=False), below=st.sampled_from([1e-7, 1e-9, 1e-12]))
def test_a_limit_by_a_hair_below_a_peak_excludes_it_and_is_solved_to_a_proof(problem, below):
    _, found = brute_force(problem)
    assume(found is not None)
    assert found is not None
    limited = replace(problem, limit=peak(problem, found) * (1.0 - below))
    optimum, best = brute_force(limited)
    assume(best is not None)
    choice = solve(limited, seconds=20.0)
    assert choice.proven and math.isclose(choice.objective, optimum, rel_tol=1e-8, abs_tol=1e-8)


def test_a_hub_that_touches_every_layer_does_not_widen_the_tables():
    step = deep_train_step(24, 5)
    hub, costs = len(step.nodes), np.array([0.0, 1.0])
    random = np.random.default_rng(1)
    shared = {size: random.uniform(size=(size, 2)) for size in range(1, 6)}
    spokes = tuple((node, hub, shared[len(step.nodes[node])]) for node in range(0, hub, 7))
    choice = solve(Problem((*step.nodes, costs), (*step.edges, *spokes)))
    assert choice.proven and choice.stats["widest_entries"] <= 2 * 5**5


@pytest.mark.parametrize("strategies", [1, 2])
def test_a_star_with_hundreds_of_points_is_solved_with_tables_of_one_axis(strategies):
    points, random = 300, np.random.default_rng(2)
    nodes = (np.zeros(strategies), *(random.uniform(size=2) for _ in range(points)))
    edges = tuple((0, point, random.uniform(size=(strategies, 2))) for point in range(1, points + 1))
    choice = solve(Problem(nodes, edges))
    best = min(sum(float((nodes[v] + matrix[hub]).min()) for _, v, matrix in edges) for hub in range(strategies))
    assert choice.proven and choice.objective == pytest.approx(best)
    assert choice.stats["widest_entries"] <= strategies


def test_equal_content_in_different_objects_is_recognised():
    step = deep_train_step(24, 5)
    apart = Problem(
        tuple(costs.copy() for costs in step.nodes),
        tuple((u, v, matrix.copy()) for u, v, matrix in step.edges),
    )
    together = Problem(step.nodes, step.edges)
    assert solve(apart).stats["tables_computed"] == solve(together).stats["tables_computed"]
    assert solve(apart).strategies == solve(together).strategies


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_costs_and_bytes_of_any_scale_are_solved(scale):
    costs = (np.array([1.0, 2.0, 5.0]) * scale, np.array([1.0, 3.0]) * scale)
    usages = tuple(Usage(node, 0, 1, np.array([4.0, 2.0, 1.0])[:size] * scale) for node, size in ((0, 3), (1, 2)))
    choice = solve(Problem(costs, ((0, 1, np.zeros((3, 2))),), usages, 4.0 * scale))
    assert choice.strategies == (1, 1) and choice.proven
    assert choice.objective == pytest.approx(5.0 * scale)


def _whole(problem: Problem) -> Problem:
    """The same problem with whole costs."""
    nodes = tuple(np.rint(costs * 1000.0) for costs in problem.nodes)
    edges = tuple((u, v, np.rint(matrix * 1000.0)) for u, v, matrix in problem.edges)
    return Problem(nodes, edges, problem.usages, problem.limit)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_an_integer_program_without_time_proves_nothing(seconds):
    problem = Problem((np.array([0.0, 1.0]),) * 2, ((0, 1, np.eye(2)),))
    search = Search(problem, 60.0, 0.0)
    part = Part(search, problem, list, 1.0)
    part.offer([1, 1])
    assert not branch_whole(part, seconds) or seconds > 0.0
    assert search.bound <= 1.0 and (seconds > 0.0 or search.bound == -math.inf)
