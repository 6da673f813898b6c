"""The compiled kernels, each against a slow twin: rows, segment tree, messages, forests, neighbourhoods."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reductions import reduce_once
from slow_twin import brute_force, peak, problems
from test_solve import wide_step

from autopar.solver import NoChoiceError, Problem, Start, Usage, lineages, narrow, solve
from autopar.solver.compiled.arrays import graph_of, memory_of
from autopar.solver.compiled.dominance import undominated
from autopar.solver.compiled.forests import forest_of, grow, hold_rest, minimise
from autopar.solver.compiled.moves import repair, state_of
from autopar.solver.compiled.peaks import add, fill, tree_of, worst_row
from autopar.solver.compiled.sweeps import cost, excess
from autopar.solver.flat import Flat, price_by_weights
from autopar.solver.lineages import improve
from autopar.solver.narrow import Settled, guess_the_gap
from autopar.solver.part import Part, Search, Stopped
from autopar.solver.presolve import _undominated, forbid_dead
from autopar.solver.replay import Replay
from autopar.solver.rows import rows_of
from autopar.solver.tables import Tables
from autopar.solver.wide import close_wide, compile_kernels, improve_free


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_kernels()


def consistent(problem: Problem) -> Problem:
    """Without parallel edges, and without strategies that have no partner."""
    try:
        return reduce_once(forbid_dead, problem, Tables())[0]
    except NoChoiceError:
        assume(False)
        raise


def flat_of(problem: Problem) -> Flat:
    return Flat(Part(Search(problem, 60.0, 0.0), problem, list, 1.0), 0)


def choices(problem: Problem):
    return itertools.product(*[range(len(costs)) for costs in problem.nodes])


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_rows_say_of_every_choice_whether_it_fits(problem):
    memory = memory_of(problem)
    for choice in itertools.islice(choices(problem), 200):
        over = excess(memory, np.array(choice)).max(initial=-1.0)
        # Rows that no choice can violate are left out; usage that is no choice at all may violate the limit alone.
        if len(memory.room):
            least = Problem(problem.nodes, (), tuple(u for u in problem.usages if len(u.bytes) == 1), None)
            fits_alone = least.peak([0] * len(problem.nodes)) <= problem.limit
            assert not fits_alone or (over > 0.0) == (peak(problem, choice) > problem.limit)


@settings(max_examples=60, deadline=None)
@given(problem=problems(limited=False), data=st.data())
def test_costs_in_flat_arrays_are_those_of_the_problem(problem, data):
    problem = consistent(problem)
    graph = graph_of(problem)
    choice = [data.draw(st.integers(0, len(costs) - 1)) for costs in problem.nodes]
    assert cost(graph, np.array(choice)) == pytest.approx(problem.cost(choice), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 1000))
def test_the_segment_tree_is_an_array_with_range_add_and_max(rows, seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=rows)
    most, added = tree_of(rows)
    fill(most, added, values)
    for _ in range(30):
        lo, hi = sorted(random.integers(0, rows + 1, 2).tolist())
        if lo < hi:
            amount = float(random.normal())
            values[lo:hi] += amount
            add(most, added, lo, hi, amount)
        assert most[1] == pytest.approx(values.max()) and values[worst_row(most)] == pytest.approx(values.max())


@settings(max_examples=60, deadline=None)
@given(problem=problems(), data=st.data())
def test_sweeps_bound_every_feasible_choice_and_pruning_keeps_the_best(problem, data):
    problem = consistent(problem)
    flat = flat_of(problem)
    optimum, found = brute_force(problem)
    rows = len(flat.prices)
    for _ in range(6):
        prices = np.array(data.draw(st.lists(st.floats(0.0, 2.0), min_size=rows, max_size=rows)))
        bound = flat.sweep(prices)
        assert bound <= optimum + 1e-7
        if found is not None:
            kept, matrices = flat.prune(optimum - bound + 1e-6)
            assert all(strategy in kept[node] for node, strategy in enumerate(found))
            for (u, v), matrix in zip(flat.ends, matrices, strict=True):
                assert np.isfinite(matrix[found[u], found[v]])


@settings(max_examples=40, deadline=None)
@given(problem=problems(limited=False))
def test_at_prices_that_stay_the_bound_never_falls(problem):
    flat = flat_of(Problem(*_parts(consistent(problem)), limit=1e9))
    bounds = [flat.sweep(flat.prices) for _ in range(8)]
    assert all(after >= before - 1e-7 for before, after in itertools.pairwise(bounds))


def _parts(problem: Problem):
    return problem.nodes, problem.edges, problem.usages


@settings(max_examples=60, deadline=None)
@given(problem=problems(limited=False), seed=st.integers(0, 50))
def test_a_forest_is_solved_exactly_with_the_rest_held(problem, seed):
    problem = consistent(problem)
    graph, forest = graph_of(problem), forest_of(graph_of(problem), 4)
    state = state_of(graph, memory_of(Problem(*_parts(problem), limit=1e9)), seed)
    forest.ends[0] = seed % len(problem.nodes)
    count = grow(graph, forest, state.random, 1, 1, 4)
    members = forest.order[:count].tolist()
    assert len(set(members)) == count
    forest.values[:] = graph.costs
    held = [0] * len(problem.nodes)
    hold_rest(graph, forest, np.array(held), 1, count)
    minimise(graph, forest, count)

    def total(picks):
        choice = list(held)
        for node, pick in zip(members, picks, strict=True):
            choice[node] = pick
        inside = [(u, v, m) for u, v, m in problem.edges if u in members or v in members]
        own = sum(problem.nodes[node][choice[node]] for node in members)
        return own + sum(m[choice[u], choice[v]] for u, v, m in inside)

    best = min(total(picks) for picks in itertools.product(*[range(len(problem.nodes[node])) for node in members]))
    if np.isfinite(best):
        assert total([int(forest.picked[node]) for node in members]) == pytest.approx(best, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(problem=problems())
def test_neighbourhoods_keep_a_choice_feasible_and_never_worsen_it(problem):
    problem = consistent(problem)
    _, found = brute_force(problem)
    assume(found is not None)
    flat = flat_of(problem)
    start = next(choice for choice in choices(problem) if problem.feasible(choice))
    (ended,) = improve(flat, [np.array(start)], 1.0, 0)
    assert problem.feasible(ended.tolist())
    assert problem.cost(ended.tolist()) <= problem.cost(start) + 1e-9


def test_repair_makes_an_overfull_choice_fit():
    problem = wide_step(limited=True)
    graph, memory = graph_of(problem), memory_of(problem)
    state = state_of(graph, memory, 0)
    state.chosen[:] = 7
    fill(state.most, state.added, excess(memory, state.chosen))
    assert state.most[1] > 0.0
    paid, fits = repair(graph, memory, state, 1, 0.0, np.inf)
    assert fits and problem.feasible(state.chosen.tolist())
    assert paid == pytest.approx(problem.cost(state.chosen.tolist()) - problem.cost([7] * len(problem.nodes)))


def test_weights_raise_the_bound_and_find_feasible_choices():
    problem = wide_step(limited=True)
    flat = flat_of(problem)
    free = flat.sweep(np.zeros(len(flat.prices)))
    found = price_by_weights(flat, 2.0)
    assert flat.bound > free and found
    assert all(problem.feasible(choice.tolist()) for choice in found)
    assert flat.best is not None and flat.bound <= flat.best[0]


def tangle(nodes: int) -> Problem:
    """A long graph of short edges, too wide to eliminate; what is live at a time is a stretch of it."""
    random = np.random.default_rng(7)
    costs = tuple(random.uniform(size=8) for _ in range(nodes))
    pairs = {(u, v) for u in range(nodes) for v in random.integers(u + 1, u + 16, 3).tolist() if v < nodes}
    edges = tuple((u, v, random.uniform(size=(8, 8))) for u, v in sorted(pairs))
    usages = tuple(Usage(node, node, node + 20, random.permutation(8.0 + np.arange(8))) for node in range(nodes))
    return Problem(costs, edges, usages, 200.0)


@pytest.mark.parametrize("problem", [wide_step(limited=True), tangle(120)], ids=["dense", "long"])
def test_a_deterministic_solve_takes_the_same_steps_each_time_and_a_seed_changes_them(problem):
    # Prices, linear and integer programs and neighbourhoods all have a part in it.
    runs = [solve(problem, seconds=0.1, start=Start(deterministic=True, seed=seed)) for seed in (3, 3, 4)]
    assert runs[0].strategies == runs[1].strategies and runs[0].lower_bound == runs[1].lower_bound
    assert runs[0].stats == runs[1].stats
    assert all(problem.feasible(run.strategies) and run.lower_bound <= run.objective for run in runs)


def test_a_stop_reaches_a_chunk_that_has_begun_and_those_that_wait(monkeypatch):
    # Each chunk alone would take days.
    monkeypatch.setattr(lineages, "CHUNK_ENTRIES", 10**15)
    monkeypatch.setattr(lineages, "CHUNK_SWEEPS", 10**12)
    problem = wide_step(limited=True)
    flat = flat_of(problem)
    start = np.zeros(len(problem.nodes), np.int64)
    polls = itertools.count()
    flat.part.search.should_stop = lambda: next(polls) > 2
    with pytest.raises(Stopped):
        improve(flat, [start] * 6, 60.0, 0)
    assert flat.best is None or problem.feasible(flat.best[1].tolist())


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_a_replay_costs_and_peaks_as_the_problem_says(problem, seed):
    random = np.random.default_rng(seed)
    choice = tuple(int(random.integers(len(costs))) for costs in problem.nodes)
    replay = Replay(problem)
    assert replay.cost(choice) == problem.cost(choice)
    assert replay.peak(choice) == pytest.approx(peak(problem, choice), abs=1e-9)
    assert replay.fits(choice) == (peak(problem, choice) <= problem.limit)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), seed=st.integers(0, 99))
def test_rows_of_fewer_strategies_are_those_of_the_problem(problem, seed):
    random = np.random.default_rng(seed)
    kept = [np.flatnonzero((random.random(len(costs)) < 0.6) | (np.arange(len(costs)) == 0)) for costs in problem.nodes]
    choice = [int(random.integers(len(labels))) for labels in kept]
    rows, whole = rows_of(problem).keep(kept), [int(labels[s]) for labels, s in zip(kept, choice, strict=True)]
    assert rows.usage(choice).tolist() == rows_of(problem).usage(whole).tolist()


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_the_compiled_dominance_drops_what_the_plain_one_drops(problem):
    try:
        problem = reduce_once(forbid_dead, problem, Tables())[0]
    except NoChoiceError:
        assume(False)
    near: list[list[np.ndarray]] = [[] for _ in problem.nodes]
    for u, v, matrix in problem.edges:
        near[u].append(matrix)
        near[v].append(matrix.T)
    for node, costs in enumerate(problem.nodes):
        used = [usage.bytes for usage in problem.usages if usage.node == node]
        tables = Tables()
        around = [tuple(sorted(map(tables.intern, arrays))) for arrays in (near[node], used)]
        kept = _undominated(tables, tables.intern(costs), *around)
        expected = np.arange(len(costs)) if kept is None else tables[kept]
        assert np.flatnonzero(undominated(costs, near[node], used)).tolist() == expected.tolist()


@settings(max_examples=60, deadline=None)
@given(problem=problems())
def test_guesses_of_the_gap_bound_the_optimum_and_end_with_it(problem):
    problem = consistent(problem)
    optimum, found = brute_force(problem)
    flat = flat_of(problem)
    part, bound = flat.part, max(flat.sweep(flat.prices) for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow, "FEW_ENTRIES", 0)
        patch.setattr(narrow, "FIRST_GUESS", 1e-2)
        better = guess_the_gap(part, Settled(flat.prune, flat.ends, bound), 60.0)
    assert better == (found is not None)
    assert part.search.objective == pytest.approx(optimum, rel=1e-6, abs=1e-6)
    assert found is None or part.search.bound <= optimum + 1e-6 * (1 + abs(optimum))


def test_neighbourhoods_improve_a_choice_where_there_is_no_limit():
    problem = wide_step(limited=False)
    part = Part(Search(problem, 60.0, 0.0), problem, list, 1.0)
    part.offer([0] * len(problem.nodes))
    before = part.search.objective
    improve_free(part, 0.5)
    assert part.search.bound <= part.search.objective < 0.9 * before
    assert part.search.strategies is not None
    assert part.search.objective == problem.cost(part.search.strategies)


def test_a_choice_met_while_prices_are_found_counts_when_time_runs_out():
    problem = wide_step(limited=True)
    part, polls = Part(Search(problem, 60.0, 0.0), problem, list, 1.0), itertools.count()
    part.search.should_stop = lambda: next(polls) > 30
    with pytest.raises(Stopped):
        close_wide(part)
    assert part.search.strategies is not None and problem.feasible(part.search.strategies)
