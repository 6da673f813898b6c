"""Reshardings on eight CPU devices: the values arrive, and the program moves the predicted bytes."""

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from autopar.cluster import Mesh
from autopar.lowering.reshard import execute
from autopar.sharding.moves import FREE_KINDS, Step, spec_graph
from autopar.sharding.reshard import plan_reshard
from autopar.spec import Spec
from tests.sharding.layouts import MESHES, distribute, is_laid_out, specs

SHAPE = (8, 16, 24)
Case = tuple[Spec, Spec, tuple[Step, ...]]


@dataclass(frozen=True)
class Ring:
    """A microsecond for each axis, and 1 GB/s."""

    mesh: Mesh

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        return 1e-6 * len(axes) + (2 if kind == "all_reduce" else 1) * nbytes / 1e9

    def memory_s(self, nbytes: float) -> float:
        return nbytes / 1e12


def cases(sizes, shape, pairs, itemsize=4, monoid="sum") -> list[Case]:
    cost = Ring(Mesh(tuple(sizes.items())))
    return [(s, t, plan_reshard(s, t, shape, itemsize, cost, monoid).steps) for s, t in pairs]


def program(sizes, plans):
    """Runs one plan for each argument; arguments and results are indexed by the mesh axes first."""
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    lead = tuple(range(len(sizes)))

    def local(values):
        moved = [execute(steps, x.squeeze(lead), sizes) for steps, x in zip(plans, values, strict=True)]
        return [jnp.expand_dims(x, lead) for x in moved]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(*sizes), out_specs=P(*sizes), check_vma=False))


def random_value(shape, dtype):
    return np.random.default_rng(1).integers(0, 2 if dtype == np.bool_ else 100, shape).astype(dtype)


def failures(sizes, value, found: list[Case], combine=np.add) -> list[str]:
    """The cases in which the value does not arrive.

    Most of the time goes to the compiler. So cases that take the same steps from the same local shape run as
    one, stacked along one more dimension, and it optimises nothing.
    """
    groups = defaultdict(list)
    for source, target, steps in found:
        groups[steps, source.local_shape(value.shape, sizes)].append((source, target))
    stacks = [np.stack([distribute(value, s, sizes, combine) for s, _ in pairs], -1) for pairs in groups.values()]
    run = program(sizes, [steps for steps, _ in groups]).lower(stacks)
    results = run.compile({"xla_backend_optimization_level": "0"})(stacks)
    return [
        f"{source} -> {target}: {', '.join(map(str, steps))}"
        for ((steps, _), pairs), result in zip(groups.items(), map(np.asarray, results), strict=True)
        for position, (source, target) in enumerate(pairs)
        if not is_laid_out(result[..., position], value, target, sizes, combine)
    ]


@pytest.mark.parametrize(
    ("mesh", "rank", "every"),
    [
        *[("8", 1, 1), ("8", 2, 1), ("8", 3, 1), ("2x4", 1, 1), ("2x4", 2, 5), ("2x4", 3, 61)],
        *[("2x2x2", 1, 19), ("2x2x2", 2, 359), ("2x2x2", 3, 1499)],
        pytest.param("2x4", 2, 1, marks=pytest.mark.slow),
        pytest.param("2x2x2", 1, 1, marks=pytest.mark.slow),
        pytest.param("2x2x2", 2, 29, marks=pytest.mark.slow),
    ],
)
def test_every_resharding_moves_the_value(mesh, rank, every):
    """All pairs of specs on the small graphs, some on the large ones: for these see the next test."""
    sizes = MESHES[mesh]
    found = specs(rank, tuple(sizes))
    pairs = list(itertools.product(found, found))[::every]
    assert failures(sizes, random_value(SHAPE[:rank], np.float32), cases(sizes, SHAPE[:rank], pairs)) == []


@pytest.mark.parametrize(
    ("mesh", "rank", "every"),
    [
        *[("2x2x2", 1, 1), ("2x2x2", 2, 13), ("2x4", 3, 7), ("2x2x2", 3, 71)],
        *[pytest.param(*row, 1, marks=pytest.mark.slow) for row in [("2x2x2", 2), ("2x4", 3), ("2x2x2", 3)]],
    ],
)
def test_every_move_moves_the_value(mesh, rank, every):
    """Every resharding is a chain of moves (tests/sharding/test_reshard.py), so these are all there is."""
    sizes = MESHES[mesh]
    graph = spec_graph(rank, tuple(sizes.items()), "sum")
    nbytes = 4 * math.prod(SHAPE[:rank])
    found = [
        (graph.specs[source], graph.specs[target], (graph.move(source, target, nbytes),))
        for source, target in graph.ends[::every].tolist()
    ]
    assert failures(sizes, random_value(SHAPE[:rank], np.float32), found) == []


@pytest.mark.parametrize(
    ("dtype", "monoid", "combine"),
    [
        (np.float32, "max", np.maximum),
        (np.int32, "min", np.minimum),
        (np.bool_, "and", np.bitwise_and),
        (np.bool_, "or", np.bitwise_or),
        (np.int32, "and", np.bitwise_and),
        (np.uint8, "or", np.bitwise_or),
    ],
)
def test_partial_values_of_every_monoid_combine(dtype, monoid, combine):
    sizes = MESHES["2x2x2"]
    value = random_value((8,), dtype)
    pairs = [(s, t) for s, t in itertools.product(specs(1, tuple(sizes)), repeat=2) if t.partial <= s.partial][::9]
    assert failures(sizes, value, cases(sizes, (8,), pairs, value.itemsize, monoid), combine) == []


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.int8, np.uint32, np.complex64])
def test_values_of_every_width_move(dtype):
    sizes = MESHES["2x4"]
    value = random_value((8, 16), dtype)
    found = specs(2, tuple(sizes))
    pairs = list(itertools.product(found, found))[::17]
    assert failures(sizes, value, cases(sizes, (8, 16), pairs, value.itemsize)) == []


def test_the_compiler_survives_sums_of_complex_constants():
    sizes, cost = MESHES["2x4"], Ring(Mesh(tuple(MESHES["2x4"].items())))
    first = next(iter(sizes))
    partial, whole = Spec(((),), frozenset(sizes)), Spec(((first,),))
    steps = plan_reshard(partial, whole, (8,), 8, cost).steps
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    local = lambda: execute(steps, jnp.full((8,), 1j, jnp.complex64), sizes)  # noqa: E731
    total = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=P(first), check_vma=False))()
    assert np.array_equal(total, np.full(8, 8j))


def test_truth_values_move_without_sums():
    sizes = MESHES["2x4"]
    found = [spec for spec in specs(2, tuple(sizes)) if not spec.partial]
    value = random_value((8, 16), np.bool_)
    pairs = list(itertools.product(found, found))[::3]
    assert failures(sizes, value, cases(sizes, (8, 16), pairs, 1)) == []


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_move_as_their_words(impl):
    sizes, keys = MESHES["2x4"], jax.random.split(jax.random.key(0, impl=impl), (8, 16))
    words = np.asarray(jax.random.key_data(keys))
    found = [spec for spec in specs(2, tuple(sizes)) if not spec.partial]
    for source, target, steps in cases(sizes, (8, 16), list(itertools.product(found, found))[::31], 8):
        whole = Spec((*source.dims, ())), Spec((*target.dims, ()))
        local = jax.random.wrap_key_data(jnp.asarray(distribute(words, whole[0], sizes)), impl=impl)
        (moved,) = program(sizes, [steps])([local])
        assert moved.dtype == keys.dtype
        assert is_laid_out(np.asarray(jax.random.key_data(moved)), words, whole[1], sizes), f"{source} -> {target}"


def rows_of(axes: Iterable[str], sizes: dict[str, int]) -> np.ndarray:
    """The devices of each group that communicates over some axes, (groups, devices)."""
    ids = np.arange(8).reshape(*sizes.values())
    at = [list(sizes).index(axis) for axis in axes]
    return np.moveaxis(ids, at, range(-len(at), 0)).reshape(-1, math.prod(ids.shape[i] for i in at))


def predicted(steps: tuple[Step, ...], sizes: dict[str, int]) -> Counter:
    """Kinds, groups of devices and bytes of the collectives of a resharding."""
    found: Counter = Counter()
    for step in (step for step in steps if step.kind not in FREE_KINDS):
        rows = rows_of(step.axes, sizes)
        if step.permutation:
            rows = rows[:, np.array(step.permutation)].reshape(-1, 2)
        groups = frozenset(tuple(row) if step.permutation else frozenset(row) for row in rows.tolist())
        found[step.kind, groups, step.nbytes] += 1
    return found


def lowered(text: str, sizes: dict[str, int]) -> Counter:
    """The same, read from StableHLO, which names groups one by one or, since JAX 0.12, by the axes of the mesh."""
    found: Counter = Counter()
    kinds = r'"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all|collective_permute)"'
    listed = r"(?:replica_groups|source_target_pairs) = dense<(\[\[.*?\]\])>"
    named = r"replica_groups = #stablehlo\.replica_group_mesh_axes<mesh = @\w+, axes = \[(.*?)\]>"
    types = r": \(tensor<([^>]*)>\) -> tensor<([^>]*)>"
    for kind, groups, axes, *buffers in re.findall(f"{kinds}.*?(?:{listed}|{named}).*?{types}", text, re.DOTALL):
        rows = json.loads(groups) if groups else rows_of(re.findall(r'name = "(\w+)"', axes), sizes).tolist()
        rows = frozenset(tuple(row) if kind == "collective_permute" else frozenset(row) for row in rows)
        nbytes = [math.prod(map(int, buffer.split("x")[:-1])) * 4 for buffer in buffers]
        found[kind, rows, max(nbytes)] += 1
    return found


def compiled(text: str, sizes: dict[str, int]) -> Counter:
    """Kinds and bytes, read from the optimised HLO."""
    found: Counter = Counter()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if match := re.search(rf" = (.*?) ({kinds})\(", line):
            shapes = re.findall(r"f32\[([\d,]*)\]", match[1])
            nbytes = sum(4 * math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
            if match[2] == "reduce-scatter":
                group = re.search(r"replica_groups=(?:\{\{([\d,]*)\}|mesh\[.*?\] \{(.*?)\})", line)
                assert group, line
                listed, named = group.groups()
                nbytes *= len(listed.split(",")) if listed else math.prod(sizes[a] for a in re.findall(r"\w+", named))
            found[match[2].replace("-", "_"), nbytes] += 1
    return found


@pytest.mark.parametrize(
    ("mesh", "rank", "every"),
    [("8", 3, 1), ("2x4", 2, 5), ("2x2x2", 1, 47), ("2x2x2", 2, 199), ("2x2x2", 3, 911)],
)
def test_the_lowered_program_moves_the_predicted_bytes_over_the_predicted_axes(mesh, rank, every):
    sizes, shape = MESHES[mesh], SHAPE[:rank]
    pairs = list(itertools.product(specs(rank, tuple(sizes)), repeat=2))[::every]
    for source, target, steps in cases(sizes, shape, pairs):
        local = (*sizes.values(), *source.local_shape(shape, sizes))
        text = program(sizes, [steps]).lower([jax.ShapeDtypeStruct(local, jnp.float32)]).as_text()
        assert lowered(text, sizes) == predicted(steps, sizes), f"{source} -> {target}"


@pytest.mark.parametrize(("mesh", "every"), [("8", 1), ("2x4", 41), ("2x2x2", 911)])
def test_the_compiled_program_moves_the_predicted_bytes(mesh, every):
    sizes, shape = MESHES[mesh], SHAPE[:2]
    pairs = list(itertools.product(specs(2, tuple(sizes)), repeat=2))[::every]
    for source, target, steps in cases(sizes, shape, pairs):
        local = (*sizes.values(), *source.local_shape(shape, sizes))
        run = program(sizes, [steps]).lower([jax.ShapeDtypeStruct(local, jnp.float32)]).compile()
        text = run.as_text()
        expected = Counter((step.kind, step.nbytes) for step in steps if step.kind not in FREE_KINDS)
        assert text is not None and compiled(text, sizes) == expected, f"{source} -> {target}"
