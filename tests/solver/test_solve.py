"""The whole solver against brute force, and its promises: certificate, replay, interruption, explanation."""

import itertools
import math

import numpy as np
import pytest
from deep_step import deep_train_step
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_twin import brute_force, least_peak, problems, within

from autopar.errors import InfeasibleError, ProblemError
from autopar.solver import NoChoiceError, Problem, Start, Usage, solve
from autopar.solver.part import Search
from autopar.solver.search import run
from autopar.solver.wide import compile_kernels


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-8, abs_tol=1e-8)


def check_against_brute_force(problem: Problem) -> None:
    optimum, found = brute_force(problem)
    if found is None:
        with pytest.raises(InfeasibleError) as caught:
            solve(problem)
        assert isinstance(caught.value, NoChoiceError)
        least = least_peak(problem)
        assert caught.value.least_bytes <= least * (1 + 1e-9)
        assert problem.limit is None or caught.value.least_bytes > problem.limit
        return
    choice = solve(problem)
    assert choice.proven and close(choice.objective, optimum)
    assert choice.lower_bound <= choice.objective
    assert choice.objective == problem.cost(choice.strategies)
    assert within(problem, choice.strategies)


@settings(max_examples=150, deadline=None)
@given(problem=problems(limited=False))
def test_without_a_limit_the_optimum_is_that_of_brute_force(problem):
    check_against_brute_force(problem)


@settings(max_examples=150, deadline=None)
@given(problem=problems())
def test_under_a_limit_the_optimum_is_that_of_brute_force(problem):
    check_against_brute_force(problem)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    compile_kernels()


@pytest.mark.parametrize("limited", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_where_tables_would_be_too_wide_the_other_stages_find_the_optimum(limited, data):
    problem = data.draw(problems(limited=limited))
    optimum, found = brute_force(problem)
    search = Search(problem, 60.0, 0.0)
    search.wide_entries = 1
    try:
        run(search)
        choice = search.choice()
    except NoChoiceError:
        assert found is None
        return
    assert choice.proven and close(choice.objective, optimum)
    assert within(problem, choice.strategies)


@settings(max_examples=60, deadline=None)
@given(problem=problems(), gap=st.sampled_from([1e-3, 0.02, 0.2]))
def test_a_search_that_may_stop_at_a_gap_keeps_its_certificate(problem, gap):
    optimum, found = brute_force(problem)
    search = Search(problem, 60.0, gap)
    search.wide_entries = 1
    try:
        run(search)
    except NoChoiceError:
        assert found is None
        return
    choice = search.choice()
    assert within(problem, choice.strategies) and choice.gap <= max(gap, 1e-8)
    assert choice.lower_bound <= optimum + 1e-8 * abs(optimum)


def _grid(first: int, rows: int) -> np.ndarray:
    return np.array([[1000.0 * (first + i) + 100 * j for j in range(4)] for i in range(rows)])


def _same(k: int) -> np.ndarray:
    return np.where(np.eye(k, dtype=bool), 0.0, np.inf)


def xla_problem(**changes: float) -> Problem:
    """The five-node problem of XLA's auto-sharding solver tests; ``changes`` forbid single entries."""
    nodes = [
        np.array([110.0, 121, 132, 143]),
        np.array([220.0, 231, 242]),
        np.array([330.0, 341, 352, 363]),
        np.array([440.0, 451, 462, 473]),
        np.array([550.0, 561, 572]),
    ]
    sizes = [
        Usage(0, 0, 5, np.array([100000.0, 110000, 990000, 130000])),
        Usage(1, 0, 5, np.array([200000.0, 210000, 220000])),
        Usage(2, 2, 4, np.array([300000.0, 310000, 320000, 330000])),
        Usage(3, 3, 5, np.array([400000.0, 410000, 420000, 430000])),
    ]
    first_edge = _grid(1, 4)
    if "edge" in changes:
        first_edge[0, 0] = math.inf
    if "node" in changes:
        nodes[0][:3] = math.inf
    edges = ((0, 2, first_edge), (1, 2, _grid(5, 3)), (4, 1, _same(3)), (3, 2, _same(4)))
    return Problem(tuple(nodes), edges, tuple(sizes), 1_500_000.0)


@pytest.mark.parametrize(
    ("changes", "cost", "strategies"),
    [
        ({}, 7650.0, (0, 0, 0, 0, 0)),
        ({"node": math.inf}, 10683.0, (3, 0, 0, 0, 0)),
        ({"edge": math.inf}, 7872.0, (0, 0, 1, 1, 0)),
    ],
)
def test_xla_auto_sharding_solver_problem_has_its_known_optimum(changes, cost, strategies):
    choice = solve(xla_problem(**changes))
    assert (choice.objective, choice.strategies, choice.proven) == (cost, strategies, True)
    assert choice.gap == 0.0


def test_repeated_layers_are_computed_once_whatever_the_depth():
    shallow, deep = solve(deep_train_step(16, 6)), solve(deep_train_step(256, 6))
    assert shallow.proven and deep.proven
    assert deep.stats["tables_computed"] <= shallow.stats["tables_computed"] + 10
    assert deep.stats["tables_kept"] <= shallow.stats["tables_kept"] + 10


def test_a_limit_that_binds_on_a_deep_step_is_closed_to_half_a_percent():
    free = deep_train_step(48, 6)
    peak = free.peak(solve(free).strategies)
    tight = Problem(free.nodes, free.edges, free.usages, 0.8 * peak)
    choice = solve(tight, relative_gap=0.005)
    assert choice.gap <= 0.005
    assert tight.feasible(choice.strategies) and choice.objective == tight.cost(choice.strategies)
    assert choice.lower_bound > solve(free).objective


def tight_step() -> Problem:
    free = deep_train_step(24, 8)
    return Problem(free.nodes, free.edges, free.usages, 0.8 * free.peak(solve(free).strategies))


def test_should_stop_returns_the_incumbent_with_its_gap():
    seen = []
    choice = solve(
        tight_step(),
        on_progress=seen.append,
        should_stop=lambda: bool(seen) and math.isfinite(seen[-1].incumbent),
    )
    assert not choice.proven and 0.0 < choice.gap < 1.0
    assert choice.objective == seen[-1].incumbent and seen[-1].stage == "done"
    assert tight_step().feasible(choice.strategies)


def test_interrupt_returns_the_incumbent_if_there_is_one():
    def interrupt(progress):
        if math.isfinite(progress.incumbent) and progress.stage != "done":
            raise KeyboardInterrupt

    choice = solve(tight_step(), on_progress=interrupt)
    assert math.isfinite(choice.objective) and not choice.proven


def wide_step(limited: bool) -> Problem:
    """A problem whose tables are too wide to be eliminated: only messages find its first choice."""
    random = np.random.default_rng(5)
    nodes = tuple(random.uniform(size=8) for _ in range(40))
    edges = tuple((u, v, random.uniform(size=(8, 8))) for u in range(40) for v in range(u) if random.random() < 0.4)
    usages = tuple(Usage(node, 0, 1, np.arange(8.0)) for node in range(40))
    return Problem(nodes, edges, usages, 60.0 if limited else None)


@pytest.mark.parametrize("limited", [False, True])
def test_there_is_an_incumbent_before_the_first_long_stage(limited):
    def interrupt(progress):
        if progress.stage in ("message passing", "prices"):
            raise KeyboardInterrupt

    problem = wide_step(limited)
    choice = solve(problem, on_progress=interrupt)
    assert problem.feasible(choice.strategies) and not choice.proven and math.isfinite(choice.lower_bound)


@pytest.mark.parametrize("seed", range(5))
def test_a_part_solved_exactly_ends_the_search_whatever_rounding_leaves_of_the_gap(seed):
    # The dear strategy makes quanta so coarse that the incumbent's cost differs from its bound.
    random = np.random.default_rng(seed)
    nodes = tuple(np.array([*random.uniform(1.0, 2.0, 3), 1e8]) for _ in range(2))
    problem = Problem(nodes, ((1, 0, random.uniform(1.0, 2.0, (4, 4))),))
    search, stages = Search(problem, 60.0, 0.0), []
    search.wide_entries = 1
    search.on_progress = lambda progress: stages.append(progress.stage)
    run(search)
    assert stages.count("message passing") <= 2
    optimum, _ = brute_force(problem)
    choice = search.choice()
    assert choice.objective == pytest.approx(optimum, abs=2 * search.rounding)
    assert choice.objective - choice.lower_bound <= 2 * search.rounding


def test_what_rounding_to_quanta_leaves_of_the_gap_is_proven_and_no_more():
    problem = Problem((np.array([1.0, 2.0]),))
    search = Search(problem, 60.0, 0.0)
    search.offer((0,))
    search.rounding = 1.0
    search.raise_bound(1.0 - 5e-9)
    assert search.choice().proven
    search.bound = 1.0 - 5e-8
    assert not search.choice().proven
    search.rounding = 2e-9
    search.bound = 1.0 - 5e-9
    assert not search.choice().proven


def test_interrupt_without_an_incumbent_goes_to_the_caller():
    def interrupt(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solve(tight_step(), on_progress=interrupt)


def test_a_feasible_hint_is_the_first_incumbent_and_an_infeasible_one_is_ignored():
    problem = xla_problem()
    seen = []
    assert solve(problem, start=Start(hint=(1, 0, 0, 0, 0)), on_progress=seen.append).objective == 7650.0
    assert seen[0].incumbent == problem.cost((1, 0, 0, 0, 0))
    assert solve(problem, start=Start(hint=(0, 0, 0, 1, 0))).objective == 7650.0


def test_progress_never_worsens_and_bound_never_passes_the_incumbent():
    seen = []
    solve(tight_step(), relative_gap=0.002, on_progress=seen.append)
    assert all(later.incumbent <= earlier.incumbent for earlier, later in itertools.pairwise(seen))
    assert all(progress.bound <= progress.incumbent for progress in seen)
    assert "prices" in {progress.stage for progress in seen}


def test_without_time_there_is_an_error_that_says_so():
    with pytest.raises(InfeasibleError, match=r"no feasible choice found in .* s, and feasibility not excluded"):
        solve(tight_step(), seconds=0.0)


def test_an_infeasible_limit_names_the_least_peak_and_the_nodes_that_make_it():
    # Nodes 0 and 1 must agree, so one of them is large; node 2 lives at another time.
    agree = _same(2)
    usages = (
        Usage(0, 0, 4, np.array([10.0, 90.0])),
        Usage(1, 0, 4, np.array([80.0, 10.0])),
        Usage(2, 5, 6, np.array([50.0])),
    )
    problem = Problem((np.zeros(2), np.zeros(2), np.zeros(1)), ((0, 1, agree),), usages, 60.0)
    with pytest.raises(InfeasibleError, match="at least 90 bytes are needed") as caught:
        solve(problem)
    assert isinstance(caught.value, NoChoiceError)
    assert caught.value.least_bytes == pytest.approx(90.0)
    assert caught.value.nodes == (1, 0)


def test_costs_that_forbid_everything_are_named():
    agree = _same(2)
    differ = np.where(np.eye(2, dtype=bool), np.inf, 0.0)
    with pytest.raises(InfeasibleError, match="forbidden costs exclude every choice"):
        solve(Problem((np.zeros(2), np.zeros(2)), ((0, 1, agree), (0, 1, differ))))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"nodes": (np.zeros(0),)}, "at least one strategy"),
        ({"nodes": (np.zeros(2, np.int64),)}, "float64 array with 1 dimensions"),
        ({"nodes": (np.array([np.nan]),)}, "NaN or -inf"),
        ({"nodes": (np.zeros(1),), "edges": ((0, 0, np.zeros((1, 1))),)}, "joins two different nodes"),
        (
            {"nodes": (np.zeros(1), np.zeros(2)), "edges": ((0, 1, np.zeros((2, 1))),)},
            r"\(2, 1\), strategies are \(1, 2\)",
        ),
        ({"nodes": (np.zeros(1),), "usages": (Usage(3, 0, 1, np.zeros(1)),)}, "there are 1 nodes"),
        ({"nodes": (np.zeros(1),), "usages": (Usage(0, 0, 1, np.zeros(2)),)}, "bytes are"),
        ({"nodes": (np.zeros(1),), "usages": (Usage(0, 0, 1, -np.ones(1)),)}, "finite and not negative"),
        ({"nodes": (np.zeros(1),), "limit": -1.0}, "limit -1.0"),
    ],
)
def test_a_malformed_problem_is_refused(arguments, message):
    with pytest.raises(ProblemError, match=message):
        Problem(**arguments)


def test_the_empty_problem_has_the_empty_choice():
    assert solve(Problem(())).strategies == ()
