"""Problems without memory rows: their order, what messages leave, and guesses of the gap."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from slow_twin import brute_force, problems

from autopar.solver import Problem, solve
from autopar.solver.flat import Unlimited
from autopar.solver.messages import Messages, Unpriced
from autopar.solver.part import Part, Search, whole_part
from autopar.solver.presolve import simplify
from autopar.solver.primal import in_line, line_layout
from autopar.solver.problem import NoChoiceError
from autopar.solver.search import run
from autopar.solver.stages import guess_and_eliminate
from autopar.solver.tables import Tables


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_a_choice_costs_and_holds_the_same_with_the_nodes_in_line(problem, seed):
    moved, lift = in_line(problem, Tables())
    random = np.random.default_rng(seed)
    chosen = [int(random.integers(len(costs))) for costs in moved.nodes]
    assert math.isclose(moved.cost(chosen), problem.cost(lift(chosen)))
    assert math.isclose(moved.peak(chosen), problem.peak(lift(chosen)))
    assert all(u < v for u, v, _ in moved.edges)


def test_a_shuffled_chain_comes_out_in_order():
    random = np.random.default_rng(0)
    names = random.permutation(20)
    edges = [(int(u), int(v), np.eye(2)) for u, v in zip(names[1:], names[:-1], strict=True)]
    shuffled = Problem((np.zeros(2),) * 20, tuple(edges))
    moved, _ = in_line(shuffled, Tables())
    assert sorted((u, v) for u, v, _ in moved.edges) == [(node, node + 1) for node in range(19)]
    assert line_layout(moved).tolist() in (list(range(20)), list(range(20))[::-1])


def test_every_node_has_a_place_of_its_own_beside_hubs():
    """A hub that is met last in a walk once kept the walk back from all others."""
    spokes = [(0, node, np.eye(2)) for node in range(1, 40)]
    rim = [(node, node + 1, np.eye(2)) for node in range(1, 20)]
    place = line_layout(Problem((np.zeros(2),) * 40, (*spokes, *rim)))
    assert sorted(place.tolist()) == list(range(40))
    assert np.abs(np.diff(place[1:21])).tolist() == [1] * 19


def _loopy(seed: int, n: int = 14, k: int = 4) -> Problem:
    """A grid-like tangle that reductions leave as it is."""
    random = np.random.default_rng(seed)
    pairs = [(u, v) for u in range(n) for v in (u + 1, u + 2, u + 5) if v < n]
    edges = tuple((u, v, random.integers(0, 9, (k, k)).astype(float)) for u, v in pairs)
    return Problem(tuple(random.integers(0, 30, k).astype(float) for _ in range(n)), edges)


def _part(problem: Problem) -> Part:
    return whole_part(Search(problem, 60.0, 0.0))


@pytest.mark.parametrize("kind", [lambda part: Unpriced(part.problem, part.search.tables), Unlimited])
@pytest.mark.parametrize("seed", range(4))
def test_messages_count_what_pruning_leaves(kind, seed):
    part = _part(_loopy(seed))
    messages: Messages = kind(part)
    for _ in range(4):
        bound = messages.sweep()
    for share in (0.0, 0.01, 0.1, 10.0):
        room = share * abs(bound)
        kept, _ = messages.prune(room)
        assert messages.left(room) == sum(len(kept[u]) * len(kept[v]) for u, v in messages.ends)
        assert sum(map(len, kept)) <= sum(map(len, part.problem.nodes))
    assert all(len(labels) == 4 for labels in kept)


@settings(max_examples=60, deadline=None)
@given(problem=problems(limited=False), sweeps=st.integers(1, 6))
def test_guesses_bound_the_optimum_and_leave_what_is_part_of_it(problem, sweeps):
    optimum, best = brute_force(problem)
    assume(best is not None)
    part = _part(problem)
    try:
        part = part.smaller(*simplify(part.problem, part.search.tables))
    except NoChoiceError:
        assume(False)
    for _ in range(sweeps):
        part.messages.sweep()
    part.offer(part.messages.decode())
    assume(part.best is not None)
    left, search = guess_and_eliminate(part), part.search
    slack = 1e-9 * (1 + abs(optimum))
    assert search.bound <= optimum + slack and search.objective >= optimum - slack
    if search.objective > optimum + slack:
        assert left is not None
        assert math.isclose(brute_force(left.problem)[0] * part.quantum, optimum, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize("wide_entries", [36, 216])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_too_wide_to_eliminate_is_proven_by_pruning_and_guesses(seed, wide_entries):
    problem = _loopy(seed, n=24, k=6)
    exact = solve(problem)
    search = Search(problem, 60.0, 0.0)
    search.wide_entries = wide_entries
    run(search)
    assert exact.stats["widest_entries"] > wide_entries
    assert search.proven() and search.objective == exact.objective
