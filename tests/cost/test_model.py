"""Collectives and computation in seconds: units, monotonicity, hierarchy, and Alpa's own prices."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import Cluster, Device, Link, Mesh
from autopar.cost import COLLECTIVES, PROFILES, AlpaCost, CostModel, RooflineCost, Work, hardware

DEVICE = Device("d", (("float32", 1e12), ("bfloat16", 4e12)), 0.5, 16e9, 1e11, 0.8)


def cluster(topology: str = "switch", domain_devices: int = 1024, alpha_s: float = 0.0) -> Cluster:
    """Links of 1e9 B/s inside a domain, 1e8 B/s between domains."""
    return Cluster("c", DEVICE, topology, domain_devices, 8, Link(1e9, alpha_s), Link(1e8, 10 * alpha_s))


def models() -> list[CostModel]:
    meshes = [Mesh.parse("x=8"), Mesh.parse("data=4,tensor=8"), Mesh.parse("a=2,b=3,c=4")]
    rooflines = [RooflineCost(hardware(name), mesh) for name in PROFILES for mesh in meshes]
    return [*rooflines, *(RooflineCost(cluster("torus", 4, 1e-6), mesh) for mesh in meshes)]


@pytest.mark.parametrize(
    ("kind", "topology", "expected_s"),
    [  # 4 devices, 1e9 bytes over 1e9 B/s: the share of the buffer that each device receives
        ("all_gather", "switch", 3 / 4),
        ("reduce_scatter", "switch", 3 / 4),
        ("all_reduce", "switch", 3 / 2),
        ("all_to_all", "switch", 3 / 4),
        ("collective_permute", "switch", 1.0),
        ("all_gather", "torus", 3 / 4),
        ("all_reduce", "torus", 3 / 2),
        ("all_to_all", "torus", 1.0),  # the middle of the ring binds: n/4 buffers
        ("collective_permute", "torus", 1.0),
    ],
)
def test_a_collective_of_a_gigabyte_over_a_gigabyte_per_second(kind, topology, expected_s):
    cost = RooflineCost(cluster(topology), Mesh.parse("x=4"))
    assert cost.collective_s(kind, 1e9, ("x",)) == pytest.approx(expected_s)


@pytest.mark.parametrize(
    ("kind", "topology", "steps"),
    [
        ("all_gather", "torus", 7),
        ("all_reduce", "torus", 14),
        ("all_gather", "switch", 3),
        ("all_reduce", "switch", 6),
        ("collective_permute", "torus", 1),
    ],
)
def test_latency_is_alpha_per_step(kind, topology, steps):
    cost = RooflineCost(cluster(topology, alpha_s=1e-6), Mesh.parse("x=8"))
    assert cost.collective_s(kind, 0.0, ("x",)) == pytest.approx(steps * 1e-6)


def test_an_axis_inside_a_domain_uses_the_fast_link_and_one_across_domains_the_network():
    cost = RooflineCost(cluster(domain_devices=4), Mesh.parse("data=2,tensor=4"))
    assert cost.collective_s("all_gather", 1e9, ("tensor",)) == pytest.approx(0.75)
    assert cost.collective_s("all_gather", 1e9, ("data",)) == pytest.approx(5.0)


def test_an_axis_that_spans_domains_is_hierarchical():
    cost = RooflineCost(cluster(domain_devices=4), Mesh.parse("x=8"))
    inside_s, between_s = 1e9 * 3 / 4 / 1e9, 1e9 / 4 * 1 / 2 / 1e8
    assert cost.collective_s("all_gather", 1e9, ("x",)) == pytest.approx(inside_s + between_s)


def test_an_axis_whose_blocks_straddle_domains_goes_over_the_network():
    cost = RooflineCost(cluster(domain_devices=4), Mesh.parse("a=2,b=3,c=2"))
    assert cost.collective_s("all_gather", 1e9, ("b",)) == pytest.approx(1e9 * 2 / 3 / 1e8)


def test_several_axes_at_once_cost_the_same_in_any_order_and_no_more_than_one_by_one():
    for cost in models():
        axes = cost.mesh.names
        together_s = cost.collective_s("all_gather", 1e8, axes)
        assert together_s == cost.collective_s("all_gather", 1e8, axes[::-1])
        assert together_s <= sum(cost.collective_s("all_gather", 1e8, (axis,)) for axis in axes) * 1.0001


def test_all_reduce_is_reduce_scatter_and_all_gather_unless_the_link_says_otherwise():
    for cost in models():
        if isinstance(cost, RooflineCost) and cost.cluster.link.kinds:
            continue
        parts_s = sum(cost.collective_s(k, 1e7, cost.mesh.names) for k in ("reduce_scatter", "all_gather"))
        assert cost.collective_s("all_reduce", 1e7, cost.mesh.names) == pytest.approx(parts_s)


@given(st.sampled_from(models()), st.sampled_from(COLLECTIVES), st.floats(1, 1e12), st.floats(1, 1e12))
def test_more_bytes_are_never_cheaper(cost, kind, one, other):
    axes = cost.mesh.names[:1]
    assert cost.collective_s(kind, min(one, other), axes) <= cost.collective_s(kind, max(one, other), axes)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_more_devices_on_an_axis_are_never_cheaper(name, kind):
    for nbytes in (1e3, 1e9):
        times_s = [
            RooflineCost(hardware(name), Mesh((("x", 2**k),))).collective_s(kind, nbytes, ("x",)) for k in range(12)
        ]
        assert times_s == sorted(times_s)


def test_another_axis_is_never_cheaper():
    for cost, kind in itertools.product(models(), COLLECTIVES):
        one_s, all_s = (cost.collective_s(kind, 1e8, cost.mesh.names[k:]) for k in (-1, 0))
        assert one_s <= all_s


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_over_axes_of_size_one_is_free(kind):
    mesh = Mesh.parse("a=1,b=8")
    for cost in (RooflineCost(hardware("h100"), mesh), AlpaCost(mesh, (1.0, 1.0), (1.0, 1.0))):
        assert cost.collective_s(kind, 1e9, ("a",)) == 0.0
        assert cost.collective_s(kind, 1e9, ()) == 0.0
        assert cost.collective_s(kind, 1e9, ("a", "b")) == cost.collective_s(kind, 1e9, ("b",)) > 0


def test_a_faster_link_a_lower_latency_and_a_bigger_domain_are_never_slower():
    mesh = Mesh.parse("x=8")
    slow, fast = ((("all_to_all", 1.0, factor),) for factor in (2.0, 1.0))
    base = dataclasses.replace(cluster("switch", 2, 1e-6), link=Link(1e9, 1e-6, slow))
    better = [
        dataclasses.replace(base, link=Link(2e9, 1e-6, slow)),
        dataclasses.replace(base, link=Link(1e9, 1e-7, slow)),
        dataclasses.replace(base, link=Link(1e9, 1e-6, fast)),
        dataclasses.replace(base, domain_devices=4),
    ]
    for kind, improved in itertools.product(COLLECTIVES, better):
        times_s = [RooflineCost(c, mesh).collective_s(kind, 1e6, ("x",)) for c in (improved, base)]
        assert times_s == sorted(times_s)


@pytest.mark.parametrize(
    ("work", "expected_s"),
    [
        (Work("dot_general", 1e12, 0.0, "float32"), 1e12 / (1e12 * 0.5)),
        (Work("dot_general", 1e12, 0.0, "bfloat16"), 1e12 / (4e12 * 0.5)),
        (Work("dot_general", 1e12, 0.0, "float16"), 1e12 / (4e12 * 0.5)),  # stands for bfloat16
        (Work("dot_general", 1e12, 0.0, "int32"), 1e12 / (1e12 * 0.5)),  # no figure: that of float32
        (Work("add", 1.0, 8e10, "float32"), 8e10 / (1e11 * 0.8)),
        (Work("reshape", 0.0, 0.0, "float32"), 0.0),
    ],
)
def test_computation_takes_the_larger_of_arithmetic_and_memory_time(work, expected_s):
    cost = RooflineCost(cluster(), Mesh.parse("x=4"))
    assert cost.compute_s(work) == pytest.approx(expected_s)


def test_moving_memory_takes_bytes_over_the_achieved_bandwidth():
    cost = RooflineCost(cluster(), Mesh.parse("x=4"))
    assert cost.memory_s(8e10) == pytest.approx(1.0)
    assert cost.memory_bytes == 16e9


def test_a_cost_model_is_hashable_and_equal_to_one_of_the_same_data():
    for one, other in zip(models(), models(), strict=True):
        assert hash(one) == hash(other) and one == other


def test_unknown_kinds_and_axes_are_refused():
    cost = RooflineCost(cluster(), Mesh.parse("x=4"))
    with pytest.raises(KeyError, match="broadcast"):
        cost.collective_s("broadcast", 1.0, ("x",))
    with pytest.raises(ValueError, match="not in tuple"):
        cost.collective_s("all_gather", 1.0, ("y",))


def test_alpas_test_of_data_parallelism_has_its_published_objective():
    cost = AlpaCost(Mesh.parse("a=4,b=1"), (1.0, 1.0), (1.0, 1.0))
    parameters = [size for _ in range(6) for size in (32 * 32, 32)]
    total = sum(cost.collective_s("all_reduce", 4 * size, ("a",)) for size in parameters)
    assert total == pytest.approx(12 * 1.01 + 1.5 * 4 * 6 * (32 * 32 + 32))


def test_alpas_test_of_tensor_parallelism_has_its_published_objective():
    cost = AlpaCost(Mesh.parse("a=4,b=1"), (1.0, 1.0), (1.0, 1.0))
    assert 5 * cost.collective_s("all_reduce", 32 * 256 * 4, ("a",)) == pytest.approx(245765.05)


def test_alpas_test_on_two_axes_has_its_published_objective():
    cost = AlpaCost(Mesh.parse("a=2,b=2"), (1.0, 1.0), (1.0, 0.1))

    def all_reduce(nbytes: float, axis: str) -> float:
        return cost.collective_s("all_reduce", nbytes, (axis,))

    gradients = 6 * (all_reduce(32 * 32 * 4 / 2, "a") + all_reduce(32 * 4, "a"))
    assert gradients + 5 * all_reduce(256 * 32 * 4 / 2, "b") == pytest.approx(21265.17)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all_gather", 1 + 3 / 4 * 1000 + 0.1),
        ("reduce_scatter", 1 + 3 / 4 * 1000 + 0.001),
        ("all_to_all", 1 + 3 / 4 / 4 * 1000 * 2 + 0.001),
    ],
)
def test_alpas_other_collectives(kind, expected):
    cost = AlpaCost(Mesh.parse("a=4"), (1.0,), (1.0,))
    assert cost.collective_s(kind, 1000.0, ("a",)) == pytest.approx(expected)
    assert cost.compute_s(Work("dot_general", 1e12, 1e12, "float32")) == cost.memory_s(1e9) == 0.0
