"""Planned reshardings: chains of legal moves, as cheap as a search by brute force, equal to their matrix."""

import functools
import heapq
import itertools
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar.cluster import Mesh
from autopar.errors import SpecError
from autopar.sharding import moves, reshard
from autopar.sharding.moves import Step
from autopar.sharding.reshard import MOVE_S, follow, plan_reshard, reshard_matrix
from autopar.spec import Spec
from tests.sharding.layouts import MESHES, specs

Sizes = dict[str, int]


@dataclass(frozen=True)
class Prices:
    """Latency and bandwidth of each kind and set of axes, drawn from a seed; seed 0: all the same."""

    mesh: Mesh
    seed: int = 0

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        draw = zlib.crc32(f"{kind} {axes} {self.seed}".encode()) if self.seed else 0
        return 1e-6 * (1 + draw % 7) + (1 + draw // 7 % 5) * (1 + (kind == "all_reduce")) * nbytes / 1e9

    def memory_s(self, nbytes: float) -> float:
        return nbytes / 1e12

    def step_s(self, step: Step, local_bytes: float) -> float:
        """A step's price; slices and masks pay for their result."""
        axes = tuple(sorted(step.axes, key=self.mesh.names.index))
        if step.kind in ("slice", "mask"):
            return MOVE_S + self.memory_s(local_bytes)
        return MOVE_S + self.collective_s(step.kind, step.nbytes, axes)


def prices(sizes: Sizes, seed: int = 0) -> Prices:
    return Prices(Mesh(tuple(sizes.items())), seed)


def after(spec: Spec, step: Step, monoid: str = "sum") -> Spec | None:
    """The spec that a step, no permute, leads to from ``spec``; None where it may not be taken."""
    dims, partial, axes, dim = [list(d) for d in spec.dims], set(spec.partial), list(step.axes), step.dim
    idle = not (set(axes) & (set(spec.axes) | partial))
    linear = monoid == "sum"
    if step.kind == "all_gather" and dim is not None and dims[dim][-len(axes) :] == axes:
        dims[dim] = dims[dim][: -len(axes)]
    elif step.kind == "slice" and dim is not None and idle:
        dims[dim] += axes
    elif step.kind == "all_reduce" and set(axes) <= partial and step.monoid == monoid:
        partial -= set(axes)
    elif step.kind == "reduce_scatter" and dim is not None and set(axes) <= partial and linear and len(axes) == 1:
        partial -= set(axes)
        dims[dim] += axes
    elif step.kind == "all_to_all" and dim is not None and dims[step.from_dim or 0][-len(axes) :] == axes:
        dims[step.from_dim or 0] = dims[step.from_dim or 0][: -len(axes)]
        dims[dim] += axes
    elif step.kind == "mask" and idle and linear:
        partial |= set(axes)
    else:
        return None
    return Spec(tuple(map(tuple, dims)), frozenset(partial))


def permuted(spec: Spec, sizes: Sizes) -> list[Spec]:
    """The specs that one collective_permute can lead to: same local shape, same partial axes."""
    parts = [math.prod(sizes[a] for a in dim) for dim in spec.dims]
    return [
        Spec(other.dims, spec.partial)
        for other in _by_parts(len(parts), tuple(sizes.items()))[tuple(parts)]
        if other.dims != spec.dims and not spec.partial & set(other.axes)
    ]


@functools.cache
def _by_parts(rank: int, axes: tuple[tuple[str, int], ...]) -> dict[tuple[int, ...], list[Spec]]:
    """The specs without partial axes, by the number of parts of each dimension."""
    sizes, groups = dict(axes), defaultdict(list)
    for spec in (spec for spec in specs(rank, tuple(sizes)) if not spec.partial):
        groups[tuple(math.prod(sizes[a] for a in dim) for dim in spec.dims)].append(spec)
    return groups


def every_step(spec: Spec, sizes: Sizes, monoid: str) -> Iterator[tuple[Step, Spec]]:
    """Every legal step from ``spec``, by trying them all."""
    dims = range(len(spec.dims))
    orders = [o for n in range(1, len(sizes) + 1) for o in itertools.permutations(sizes, n)]
    kinds = [("all_reduce", None, None), ("mask", None, None)]
    kinds += [(kind, dim, None) for kind in ("all_gather", "slice", "reduce_scatter") for dim in dims]
    kinds += [("all_to_all", dim, other) for dim in dims for other in dims if dim != other]
    for (kind, dim, other), axes in itertools.product(kinds, orders):
        step = Step(kind, axes, dim, other, monoid=monoid)
        if (target := after(spec, step, monoid)) is not None:
            yield step, target
    for target in permuted(spec, sizes):
        before, place = (_places(s, sizes) for s in (spec, target))
        moved = tuple(a for a in sizes if before.get(a) != place.get(a))
        yield Step("collective_permute", moved), target


def _places(spec: Spec, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """The dimension of each axis, and into how many parts the axes after it cut each of its blocks."""
    return {
        axis: (dim, math.prod(sizes[minor] for minor in axes[axes.index(axis) + 1 :]))
        for dim, axes in enumerate(spec.dims)
        for axis in axes
    }


def cheapest(source: Spec, shape, itemsize: int, cost: Prices, monoid: str) -> dict[Spec, float]:
    """Seconds from ``source`` to all specs that it reaches, by Dijkstra's algorithm over ``every_step``."""
    sizes, nbytes = cost.mesh.sizes, itemsize * math.prod(shape)
    done: dict[Spec, float] = {}
    queue = [(0.0, 0, source)] if source.fits(shape, sizes) else []
    count = itertools.count(1)
    while queue:
        spent_s, _, spec = heapq.heappop(queue)
        if spec in done:
            continue
        done[spec] = spent_s
        for step, target in every_step(spec, sizes, monoid):
            if target.fits(shape, sizes) and target not in done:
                larger = nbytes / min(spec.shards(sizes), target.shards(sizes))
                step = Step(step.kind, step.axes, nbytes=larger)
                step_s = cost.step_s(step, nbytes / target.shards(sizes))
                heapq.heappush(queue, (spent_s + step_s, next(count), target))
    return done


@pytest.mark.parametrize(
    ("mesh", "rank", "every"),
    [
        *[(mesh, rank, 1) for mesh in ("8", "2x4") for rank in (1, 2, 3)],
        *[("2x2x2", 1, 1), ("2x2x2", 2, 1), ("2x2x2", 3, 5)],
        pytest.param("2x2x2", 3, 1, marks=pytest.mark.slow),
    ],
)
def test_every_pair_of_specs_is_joined_by_legal_steps_that_sum_to_its_cost(mesh, rank, every):
    sizes, shape, cost = MESHES[mesh], (8, 16, 24)[:rank], prices(MESHES[mesh])
    found, nbytes = specs(rank, tuple(sizes)), 4 * math.prod(shape)
    for source, target in list(itertools.product(found, found))[::every]:
        plan, spec, total_s = plan_reshard(source, target, shape, 4, cost), source, 0.0
        for step in plan.steps:
            before = spec
            if step.kind == "collective_permute":
                # Where it leads shows in the values (tests/lowering); here: every device takes part once.
                assert len(set(step.permutation)) == math.prod(sizes[a] for a in step.axes)
                spec = reached(spec, plan.steps[plan.steps.index(step) + 1 :], target, sizes)
            else:
                spec = after(spec, step)
            assert spec is not None and spec.fits(shape, sizes), f"{source} -> {target}: {plan}"
            larger = nbytes / min(before.shards(sizes), spec.shards(sizes))
            assert step.nbytes == (0.0 if step.kind in ("slice", "mask") else larger)
            total_s += cost.step_s(step, nbytes / spec.shards(sizes))
        assert spec == target, f"{source} -> {target}: {plan}"
        assert plan.cost_s == pytest.approx(total_s, rel=1e-12, abs=0)


def reached(spec: Spec, rest: tuple[Step, ...], target: Spec, sizes: Sizes) -> Spec | None:
    """The spec after a permute of ``spec`` from which the ``rest`` of the steps leads to ``target``."""
    for other in permuted(spec, sizes):
        end: Spec | None = other
        for step in rest:
            end = after(end, step) if end is not None else None
        if end == target:
            return other
    return None


@settings(max_examples=60, deadline=None)
@given(
    mesh=st.sampled_from(sorted(MESHES)),
    shape=st.lists(st.sampled_from([64, 32, 24, 8, 6, 4, 2, 1]), max_size=3).map(tuple),
    seed=st.integers(0, 1000),
    monoid=st.sampled_from(["sum", "max"]),
    data=st.data(),
)
def test_no_chain_of_legal_steps_is_cheaper(mesh, shape, seed, monoid, data):
    sizes, cost = MESHES[mesh], prices(MESHES[mesh], seed)
    found = specs(len(shape), tuple(sizes))
    source = data.draw(st.sampled_from(found))
    expected = cheapest(source, shape, 4, cost, monoid)
    for target in found:
        plan = plan_reshard(source, target, shape, 4, cost, monoid)
        assert plan.cost_s == pytest.approx(expected.get(target, math.inf), rel=1e-12), f"{target}: {plan}"
        assert bool(plan.steps) == (target != source and math.isfinite(plan.cost_s))


@pytest.mark.parametrize(("mesh", "rank"), [("8", 2), ("2x4", 3), ("2x2x2", 2)])
def test_the_matrix_equals_the_plans(mesh, rank):
    sizes, shape, cost = MESHES[mesh], (8, 6, 4)[:rank], prices(MESHES[mesh])
    sources = tuple(specs(rank, tuple(sizes)))
    targets = sources[::-2]
    matrix = reshard_matrix(sources, targets, shape, 2, cost)
    plans = [[plan_reshard(s, t, shape, 2, cost).cost_s for t in targets] for s in sources]
    assert np.array_equal(matrix, plans)
    assert np.isinf(matrix).any() and np.isfinite(matrix).any()


AB, REST = {"a": 2, "b": 4}, ((), ())


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        (Spec(REST), Spec(REST), "nothing"),
        (Spec((("a",), ())), Spec(REST), "all_gather(a) dim 0 512 B"),
        (Spec((("a", "b"), ())), Spec(REST), "all_gather(a, b) dim 0 512 B"),
        (Spec((("a", "b"), ())), Spec((("a",), ())), "all_gather(b) dim 0 256 B"),
        (Spec(REST), Spec(((), ("b",))), "slice(b) dim 1"),
        (Spec(REST, frozenset("ab")), Spec(REST), "all_reduce(a, b) 512 B"),
        (Spec(REST, frozenset("ab")), Spec(REST, frozenset("a")), "all_reduce(b) 512 B"),
        (Spec((("a",), ()), frozenset("b")), Spec((("a", "b"), ())), "reduce_scatter(b) dim 0 256 B"),
        (Spec((("a", "b"), ())), Spec((("a",), ("b",))), "all_to_all(b) dim 0 to 1 64 B"),
        (Spec((("a", "b"), ())), Spec((("b", "a"), ())), "collective_permute(a, b) 64 B"),
        (Spec(REST), Spec(REST, frozenset("a")), "mask(a)"),
        (Spec(REST, frozenset("a")), Spec(((), ("b",)), frozenset("a")), "slice(b) dim 1"),
    ],
)
def test_the_common_reshardings_are_single_moves(source, target, steps):
    assert str(plan_reshard(source, target, (8, 16), 4, prices(AB))) == steps


def test_a_permutation_leaves_blocks_where_they_already_are():
    equal = {"a": 2, "b": 2, "c": 2}
    plan = plan_reshard(Spec((("a",),)), Spec((("b",),)), (8,), 4, prices(equal))
    (step,) = [step for step in plan.steps if step.kind == "collective_permute"]
    assert (step.axes, step.permutation) == (("a", "b"), ((0, 0), (1, 2), (2, 1), (3, 3)))


@pytest.mark.parametrize(
    ("source", "target", "shape", "monoid"),
    [
        (Spec((("b",),)), Spec(((),)), (6,), "sum"),
        (Spec(((),)), Spec((("a", "b"),)), (4,), "sum"),
        (Spec((("b",),)), Spec((("b",),)), (6,), "sum"),
        (Spec(((),)), Spec(((),), frozenset("a")), (8,), "max"),
        (Spec(((),), frozenset("b")), Spec(((),), frozenset("ab")), (8,), "and"),
    ],
)
def test_what_cannot_be_done_costs_infinitely_much(source, target, shape, monoid):
    plan = plan_reshard(source, target, shape, 4, prices(AB), monoid)
    assert (plan.steps, plan.cost_s, str(plan)) == ((), math.inf, "inadmissible")
    assert reshard_matrix((source,), (target,), shape, 4, prices(AB), monoid)[0, 0] == math.inf


def test_maxima_are_reduced_whole_and_then_sliced():
    plan = plan_reshard(Spec(((),), frozenset("b")), Spec((("b",),)), (8,), 4, prices(AB), "max")
    assert [(step.kind, step.monoid) for step in plan.steps] == [("all_reduce", "max"), ("slice", "sum")]


def test_axes_of_size_one_do_nothing():
    sizes = {"a": 1, "b": 4}
    plan = plan_reshard(Spec((("b", "a"),)), Spec((("b",),), frozenset("a")), (8,), 4, prices(sizes))
    assert (plan.steps, plan.cost_s) == ((), 0.0)
    gather = plan_reshard(Spec((("a", "b"),)), Spec(((),)), (8,), 4, prices(sizes))
    assert [step.axes for step in gather.steps] == [("b",)]
    alone = plan_reshard(Spec((("a",),)), Spec(((),), frozenset("a")), (7,), 4, prices({"a": 1}))
    assert (alone.steps, alone.cost_s) == ((), 0.0)


def test_a_scalar_has_partial_axes_only():
    plan = plan_reshard(Spec((), frozenset("ab")), Spec(()), (), 4, prices(AB))
    assert str(plan) == "all_reduce(a, b) 4 B"


def test_several_axes_go_in_one_move_and_ties_are_broken_the_same_way_each_time():
    source, target = Spec(REST, frozenset("b")), Spec((("a", "b"), ()))
    plans = []
    for _ in range(2):
        plans.append(plan_reshard(source, target, (8, 16), 4, prices(AB)))
        for cached in (reshard._path, reshard._distances, moves.spec_graph):
            cached.cache_clear()
    assert plans[0] == plans[1]
    assert [step.kind for step in plans[0].steps] == ["slice", "reduce_scatter"]
    replicated, sharded = Spec(REST), Spec((("b", "a"), ()), frozenset())
    assert str(plan_reshard(replicated, sharded, (8, 16), 4, prices(AB))) == "slice(b, a) dim 0"
    assert str(plan_reshard(replicated, Spec(REST, frozenset("ab")), (8, 16), 4, prices(AB))) == "mask(a, b)"


def test_an_empty_value_and_free_prices_still_have_plans():
    @dataclass(frozen=True)
    class Free(Prices):
        def collective_s(self, kind, nbytes, axes):
            return 0.0

        def memory_s(self, nbytes):
            return 0.0

    found = specs(2, ("a", "b"))
    for shape, (source, target) in itertools.product([(0, 8), (8, 8)], itertools.product(found, found)):
        assert math.isfinite(plan_reshard(source, target, shape, 4, Free(Mesh.parse("a=2,b=4"))).cost_s)


@pytest.mark.parametrize(
    "spec", [Spec(((),)), Spec((("a",), ("a",))), Spec((("a",), ()), frozenset("a")), Spec((("z",), ()))]
)
def test_a_spec_that_is_none_of_the_value_is_refused(spec):
    with pytest.raises(SpecError, match=r"does not lay out a value of 2 dimensions\n.*mesh a=2,b=4\n.*to fix"):
        plan_reshard(spec, Spec(REST), (8, 16), 4, prices(AB))
    with pytest.raises(SpecError, match="does not lay out"):
        reshard_matrix((Spec(REST),), (spec,), (8, 16), 4, prices(AB))


# -- routes that a plan says


@pytest.mark.parametrize(("mesh", "rank", "every"), [("8", 2, 1), ("2x4", 2, 7), ("2x2x2", 2, 997)])
def test_a_route_is_followed_at_the_price_of_whoever_asks(mesh, rank, every):
    sizes, shape = MESHES[mesh], (16, 24)[:rank]
    for source, target in list(itertools.product(specs(rank, tuple(sizes)), repeat=2))[::every]:
        planned = plan_reshard(source, target, shape, 4, prices(sizes, seed=3))
        followed = follow(planned.specs, shape, 4, prices(sizes, seed=3), "sum")
        assert followed.steps == planned.steps and followed.cost_s == pytest.approx(planned.cost_s)
        elsewhere = follow(planned.specs, shape, 4, prices(sizes, seed=5), "sum")
        assert elsewhere.steps == planned.steps
        assert elsewhere.cost_s >= plan_reshard(source, target, shape, 4, prices(sizes, seed=5)).cost_s * (1 - 1e-9)


def test_a_route_that_skips_a_move_is_refused():
    route = (Spec((("x",), ())), Spec(((), ("y",))))
    with pytest.raises(SpecError, match=r"no single move leads from \[x, -\] to \[-, y\]"):
        follow(route, (8, 8), 4, prices({"x": 2, "y": 4}), "sum")
