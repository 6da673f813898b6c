"""Collectives, FLOPs and memory of compiled programs against predicted ones: on 8 CPU devices, on TPU topologies."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from autopar.cluster import Mesh
from autopar.errors import HardwareError, MeshError
from autopar.lowering.audit import Audit, Collective, audit, compare, merged
from autopar.lowering.topology import TPU_ENVIRONMENT, tpu_mesh
from autopar.plan import Collective as Predicted

MESH = Mesh.parse("data=2,tensor=4")
BOTH = ("data", "tensor")
RING = [(i, (i + 1) % 4) for i in range(4)]


def f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def compiled(program, aval, mesh: jax.sharding.Mesh):
    """``program`` per device, on a replicated argument."""
    everywhere = PartitionSpec()
    mapped = jax.shard_map(program, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    sharding = NamedSharding(mesh, everywhere)
    return jax.jit(mapped, in_shardings=sharding, out_shardings=sharding).lower(aval).compile()


def gather(x, axes, dim=0):
    return lax.all_gather(x, axes, axis=dim, tiled=True)


def scatter(x, axes, dim=0):
    return lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True)


def exchange(x, axes):
    return lax.all_to_all(x, axes, 1, 0, tiled=True)


def scan_of(body, length):
    return lambda x: lax.scan(lambda c, _: (body(c), None), x, None, length=length)[0]


K = 16 * 16 * 4  # bytes of the argument in float32
X, HALF = f32(16, 16), bf16(16, 16)
# name -> (program, argument, what is compiled on CPU: (kind, axes, bytes, count, dtype))
CASES = {
    "all_reduce": (lambda x: lax.psum(x, "tensor"), X, [("all_reduce", ("tensor",), K, 1, "float32")]),
    "major axis": (lambda x: lax.psum(x, "data"), X, [("all_reduce", ("data",), K, 1, "float32")]),
    "both axes": (lambda x: lax.psum(x, BOTH), X, [("all_reduce", BOTH, K, 1, "float32")]),
    "max": (lambda x: lax.pmax(x, "data"), X, [("all_reduce", ("data",), K, 1, "float32")]),
    "gather": (lambda x: gather(x, "tensor"), X, [("all_gather", ("tensor",), 4 * K, 1, "float32")]),
    "gather minor": (lambda x: gather(x, "data", 1), X, [("all_gather", ("data",), 2 * K, 1, "float32")]),
    "gather both": (lambda x: gather(x, BOTH), X, [("all_gather", BOTH, 8 * K, 1, "float32")]),
    "gather bool": (
        lambda x: gather(x > 0, "data"),
        X,
        [("all_gather", ("data",), 2 * 16 * 16, 1, "bool")],
    ),
    "scatter": (lambda x: scatter(x, "tensor"), X, [("reduce_scatter", ("tensor",), K, 1, "float32")]),
    "scatter minor": (
        lambda x: scatter(x, "data", 1),
        X,
        [("reduce_scatter", ("data",), K, 1, "float32")],
    ),
    "exchange": (lambda x: exchange(x, "tensor"), X, [("all_to_all", ("tensor",), K, 1, "float32")]),
    "exchange both": (lambda x: exchange(x, BOTH), X, [("all_to_all", BOTH, K, 1, "float32")]),
    "permute": (
        lambda x: lax.ppermute(x, "tensor", RING),
        X,
        [("collective_permute", ("tensor",), K, 1, "float32")],
    ),
    "permute one way": (
        lambda x: lax.ppermute(x, "data", [(0, 1)]),
        X,
        [("collective_permute", ("data",), K, 1, "float32")],
    ),
    "combined": (
        lambda x: (lax.psum(x, "data"), lax.psum(x * 2, "data")),
        X,
        [("all_reduce", ("data",), 2 * K, 2, "float32")],
    ),
    "one after another": (
        lambda x: gather(lax.psum(x, "tensor"), "data"),
        X,
        [("all_gather", ("data",), 2 * K, 1, "float32"), ("all_reduce", ("tensor",), K, 1, "float32")],
    ),
    "two exchanges": (
        lambda x: (exchange(x, "tensor"), exchange(x * 2, "tensor")),
        X,
        [("all_to_all", ("tensor",), 2 * K, 2, "float32")],
    ),
    "in a scan": (
        scan_of(lambda x: lax.psum(x, "data") * 0.5, 7),
        X,
        [("all_reduce", ("data",), 7 * K, 7, "float32")],
    ),
    "in nested scans": (
        scan_of(scan_of(lambda x: lax.psum(x, "data") * 0.5, 3), 7),
        X,
        [("all_reduce", ("data",), 21 * K, 21, "float32")],
    ),
    "in a loop from 3 to 8": (
        lambda x: lax.fori_loop(3, 8, lambda i, c: lax.psum(c, "data") * 0.5, x),
        X,
        [("all_reduce", ("data",), 5 * K, 5, "float32")],
    ),
    "in a loop of unknown length": (
        lambda x: lax.while_loop(lambda c: c[0, 0] < 9.0, lambda c: lax.psum(c, "data") * 0.5, x),
        X,
        [("all_reduce", ("data",), K, 1, "float32")],
    ),
    "in a branch": (
        lambda x: lax.cond(x[0, 0] > 0, lambda v: lax.psum(v, "data"), lambda v: v, x),
        X,
        [("all_reduce", ("data",), K, 1, "float32")],
    ),
    # 16-bit floats: the CPU sends them as float32; the audit takes that back.
    "all_reduce of half": (
        lambda x: lax.psum(x, "tensor"),
        HALF,
        [("all_reduce", ("tensor",), K / 2, 1, "bfloat16")],
    ),
    "gather of half": (lambda x: gather(x, "data"), HALF, [("all_gather", ("data",), K, 1, "bfloat16")]),
    "scatter of half": (
        lambda x: scatter(x, "data"),
        HALF,
        [("reduce_scatter", ("data",), K / 2, 1, "bfloat16")],
    ),
    "exchange of half": (
        lambda x: exchange(x * 2, "tensor"),
        HALF,
        [("all_to_all", ("tensor",), K / 2, 1, "bfloat16")],
    ),
    "permute of half": (
        lambda x: lax.ppermute(x, "tensor", RING),
        HALF,
        [("collective_permute", ("tensor",), K / 2, 1, "bfloat16")],
    ),
    "no communication": (lambda x: x @ x, X, []),
}


@pytest.mark.parametrize("name", CASES)
def test_the_collectives_of_a_program_on_eight_cpu_devices(name, jax_mesh):
    program, aval, expected = CASES[name]
    found = audit(compiled(program, aval, jax_mesh(data=2, tensor=4)), MESH).collectives
    assert found == tuple(Collective(*one) for one in expected)


@pytest.mark.parametrize("axes", [("a",), ("b",), ("c",), ("a", "c"), ("a", "b"), ("b", "c"), ("a", "b", "c")])
def test_every_subset_of_three_axes_is_recognised(axes, jax_mesh):
    program = compiled(lambda x: lax.psum(x, axes), X, jax_mesh(a=2, b=2, c=2))
    found = audit(program, Mesh.parse("a=2,b=2,c=2")).collectives
    assert found == (Collective("all_reduce", axes, K, 1, "float32"),)


def test_flops_and_memory_are_per_device(jax_mesh):
    found = audit(compiled(lambda x: x @ x + gather(x, "data")[:16], X, jax_mesh(data=2, tensor=4)), MESH)
    assert found.flops >= 2 * 16**3 and found.argument_bytes == found.output_bytes == K
    assert (
        found.alias_bytes == 0
        and found.temp_bytes >= 2 * K
        and found.estimated_cycles is None
        and found.platform == "cpu"
    )
    assert found.peak_bytes == found.argument_bytes + found.output_bytes + found.temp_bytes


@pytest.mark.parametrize(
    ("program", "products"),
    [
        (lambda x: x @ x, 1),
        (scan_of(lambda x: x @ x, 7), 7),
        (scan_of(scan_of(lambda x: x @ x, 3), 7), 21),
    ],
)
def test_products_in_loops_count_as_often_as_the_loop_runs(program, products, jax_mesh):
    found = audit(compiled(program, X, jax_mesh(data=2, tensor=4)), MESH)
    assert found.flops == pytest.approx(products * 2 * 16**3, abs=100)
    assert found.product_flops == products * 2 * 16**3


def test_convolutions_in_loops_count_every_round_without_padding(jax_mesh):
    def convolve(x):
        return lax.conv(x[None, None], x[None, None, :3, :3], (1, 1), "SAME")[0, 0]

    found = audit(compiled(scan_of(convolve, 7), X, jax_mesh(data=2, tensor=4)), MESH)
    assert found.flops == pytest.approx(7 * 2 * 46 * 46, abs=100)
    assert found.product_flops == 7 * 2 * 46 * 46


def test_a_donated_argument_counts_once(jax_mesh):
    mesh = jax_mesh(data=2, tensor=4)
    sharding = NamedSharding(mesh, PartitionSpec("data", "tensor"))
    step = jax.jit(lambda x: x + 1, in_shardings=sharding, out_shardings=sharding, donate_argnums=0)
    found = audit(step.lower(X).compile(), MESH)
    assert found.argument_bytes == found.output_bytes == found.alias_bytes == K / 8
    assert found.peak_bytes == K / 8 + found.temp_bytes


def test_an_audit_with_another_number_of_devices_is_refused(jax_mesh):
    program = compiled(lambda x: x, X, jax_mesh(data=2, tensor=2))
    with pytest.raises(MeshError, match="mesh has 8 devices, the compiled program runs on 4"):
        audit(program, MESH)


def test_a_gather_that_the_tpu_rounds_to_bfloat16_is_explained():
    half = Collective("all_gather", ("data",), 60.0, 2, "bfloat16")
    rest = Collective("all_gather", ("data",), 80.0, 1, "float32")
    compiled_step = audited(half, rest, platform="tpu")
    (narrowed,) = compare(of(("all_gather", ("data",), 200.0, 3)), compiled_step, MESH)
    assert "rounds float32 to bfloat16" in narrowed.explanation
    (other,) = compare(of(("all_gather", ("data",), 300.0, 3)), compiled_step, MESH)
    assert not other.explanation
    (elsewhere,) = compare(of(("all_gather", ("data",), 200.0, 3)), audited(half, rest, platform="cpu"), MESH)
    assert not elsewhere.explanation


def test_reductions_and_gathers_that_the_tpu_runs_as_all_reduces_are_explained_there_and_only_there():
    predicted = of(("reduce_scatter", BOTH, 1000.0, 3), ("all_gather", BOTH, 100.0, 5), ("all_reduce", BOTH, 8.0, 2))
    compiled_ones = (
        Collective("all_gather", BOTH, 30.0, 1, "bfloat16"),  # 60 bytes, rounded
        Collective("all_reduce", BOTH, 1048.0, 9, "float32"),  # 8, 1000 scattered, 40 gathered
    )
    on_tpu = compare(predicted, audited(*compiled_ones, platform="tpu"), MESH)
    assert len(on_tpu) == 3 and all("as an all_reduce" in d.explanation for d in on_tpu)
    on_cpu = compare(predicted, audited(*compiled_ones, platform="cpu"), MESH)
    assert [d.kind for d in on_cpu if not d.explanation] == ["all_reduce"]


def of(*collectives: tuple[str, tuple[str, ...], float, int]) -> list[Predicted]:
    return [Predicted(*one) for one in collectives]


def audited(*collectives: Collective, platform: str) -> Audit:
    return Audit(collectives, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0, None, platform)


def built(*collectives: tuple[str, tuple[str, ...], float, int], platform: str = "tpu") -> Audit:
    return audited(*(Collective(*one, "float32") for one in collectives), platform=platform)


def test_equal_collectives_do_not_differ_whatever_their_grouping_axis_order_and_axes_of_size_one():
    predicted = of(
        ("all_reduce", ("tensor", "data"), 60.0, 2),
        ("all_reduce", ("data", "tensor", "one"), 40.0, 1),
        ("all_gather", ("one",), 99.0, 1),
    )
    mesh = Mesh.parse("data=2,tensor=4,one=1")
    assert compare(predicted, built(("all_reduce", BOTH, 100.0, 3)), mesh) == ()


@pytest.mark.parametrize(
    ("predicted", "compiled_ones", "explanations"),
    [
        ([("all_reduce", BOTH, 8.0, 1)], [], ["merged identical"]),
        ([], [("all_reduce", BOTH, 8.0, 1)], [""]),
        ([("all_gather", BOTH, 8.0, 1)], [("all_gather", BOTH, 16.0, 1)], [""]),
        ([("all_gather", BOTH, 16.0, 1)], [("all_gather", BOTH, 8.0, 1)], [""]),
        ([("all_gather", BOTH, 8.0, 1)], [("all_gather", ("data",), 8.0, 1)], ["", "merged identical"]),
        (
            [("all_reduce", BOTH, 8.0, 1)],
            [("reduce_scatter", BOTH, 8.0, 1)],
            ["became a reduce_scatter", "became a reduce_scatter"],
        ),
        (
            [("reduce_scatter", BOTH, 8.0, 1)],
            [("all_reduce", BOTH, 8.0, 1)],
            ["as an all_reduce", "as an all_reduce"],
        ),
        ([("reduce_scatter", BOTH, 8.0, 1)], [("all_reduce", BOTH, 9.0, 1)], ["", "merged identical"]),
        (
            [("reduce_scatter", BOTH, 800.0, 1)],
            [("reduce_scatter", BOTH, 800.0, 1), ("collective_permute", BOTH, 8.0, 1)],
            ["shifts the rows"],
        ),
        (
            [("reduce_scatter", BOTH, 800.0, 1)],
            [("reduce_scatter", BOTH, 800.0, 1), ("collective_permute", BOTH, 80.0, 1)],
            [""],
        ),
    ],
)
def test_differences_are_explained_only_by_what_the_compiler_is_known_to_do(predicted, compiled_ones, explanations):
    found = compare(of(*predicted), built(*compiled_ones), MESH)
    assert len(found) == len(explanations)
    for one, expected in zip(found, explanations, strict=True):
        assert expected in one.explanation and bool(expected) == bool(one.explanation)


@pytest.mark.parametrize(
    ("planned", "compiled_ones", "lacking"),
    [
        ([("all_gather", BOTH, 8.0, 4)], [("all_gather", BOTH, 8.0, 4)], 0),
        ([("all_gather", BOTH, 8.0, 4)], [("all_gather", BOTH, 4.0, 1), ("all_reduce", BOTH, 6.0, 3)], 0),
        ([("all_gather", BOTH, 8.0, 4)], [("all_gather", BOTH, 6.0, 3)], 1),
        ([("all_gather", BOTH, 8.0, 4)], [("all_gather", ("data",), 8.0, 4)], 4),
        ([("all_gather", BOTH, 8.0, 1)], [("collective_permute", BOTH, 8.0, 1)], 1),
        ([], [("collective_permute", ("data",), 8.0, 1)], 0),
    ],
)
def test_a_collective_is_merged_where_one_is_lacking_over_the_same_axes(planned, compiled_ones, lacking):
    assert merged(of(*planned), built(*compiled_ones), MESH) == lacking


def test_a_dropped_duplicate_is_explained_in_a_real_program(jax_mesh):
    program = compiled(lambda x: lax.psum(x, "data") + lax.psum(x, "data") * 2, X, jax_mesh(data=2, tensor=4))
    found = compare(of(("all_reduce", ("data",), 2 * K, 2)), audit(program, MESH), MESH)
    assert [(d.predicted_count, d.compiled_count) for d in found] == [(2, 1)]
    assert "merged identical" in found[0].explanation


def test_a_topology_without_its_environment_says_what_to_set(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    with pytest.raises(HardwareError, match=r"(?s)TPU_SKIP_MDS_QUERY.*start the program with TPU_SKIP"):
        tpu_mesh("v5e:4x4", MESH)


def test_a_topology_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(HardwareError, match=r"pip install 'autopar\[tpu\]'"):
        tpu_mesh("v5e:4x4", MESH)


@pytest.mark.slow
def test_tpu_programs_have_the_collectives_that_were_written():
    """In a process of its own: libtpu reads its environment when it is loaded."""
    pytest.importorskip("libtpu")
    script = Path(__file__).with_name("tpu_programs.py")
    environment = os.environ | TPU_ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
