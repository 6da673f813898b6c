"""What ``test_processes.py`` checks in each of two processes; prints what was checked, and what both must agree on."""

import hashlib
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import autopar
from autopar.cluster import Mesh as AxesMesh
from autopar.ir.stages import Stage
from autopar.ir.trace import trace
from autopar.lowering.instructions import LocalProgram
from autopar.lowering.morph import _routes, morph
from autopar.lowering.pipeline.build import Compiled
from autopar.lowering.pipeline.compile import slot_shape
from autopar.lowering.pipeline.cut import Layout, PipelineError
from autopar.lowering.pipeline.send import send
from autopar.lowering.pipeline.trace import measure
from autopar.lowering.processes import agreed, everywhere, exchange, is_the_same
from autopar.solver.schedule import make_schedule
from benchmarks.pipelines import compiled_layout, plan_stage
from tests.e2e.several_processes import connect

O0 = {"xla_backend_optimization_level": 0}


def place(devices: Sequence[int], spec: PartitionSpec, *shape: int) -> NamedSharding:
    """A place on devices by their number among all."""
    names = ("a", "b")[: len(shape)]
    return NamedSharding(Mesh(np.array([jax.devices()[i] for i in devices]).reshape(shape), names), spec)


P = PartitionSpec
PLACES = {
    "first process": lambda: place((0, 1, 2, 3), P("a", "b"), 2, 2),
    "second process": lambda: place((4, 5, 6, 7), P("b", None), 2, 2),
    "half of each": lambda: place((0, 1, 4, 5), P(None, "a"), 2, 2),
    "the other halves": lambda: place((2, 3, 6, 7), P("b", "a"), 2, 2),
    "all": lambda: place((0, 4, 1, 5, 2, 6, 3, 7), P("b"), 4, 2),
    "copies": lambda: place(range(8), P(), 8),
}


def equals(found: jax.Array, whole: np.ndarray) -> bool:
    """Whether the blocks here are those of the whole."""
    return all(np.array_equal(shard.data, whole[shard.index]) for shard in found.addressable_shards)


def arrays_pass_between_any_two_places() -> None:
    whole = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for source, target in itertools.permutations([make() for make in PLACES.values()], 2):
        there = send(whole, source)
        for moved in (send(there, target), morph(there, target, donate=True)):
            assert moved.sharding == target and equals(moved, whole), (source, target)
        assert there.is_deleted()


def parts_are_no_larger_than_blocks() -> None:
    shape = (8, 8)
    for source, target in itertools.permutations([make() for make in PLACES.values()], 2):
        most = min(int(np.prod(p.shard_shape(shape))) for p in (source, target))
        routes = _routes(source, target, shape)
        assert all(np.prod(r.shape) <= most for r in itertools.chain(routes.inside, *routes.rounds))


def any_type_passes() -> None:
    source, target = PLACES["first process"](), PLACES["second process"]()
    for dtype in ("bfloat16", "float16", "int8", "uint32", "bool"):
        whole = np.asarray(np.arange(64).reshape(8, 8) % 2, jnp.dtype(dtype))
        assert equals(send(send(whole, source), target), whole), dtype
    keys = jax.random.split(jax.random.key(1), 8)
    moved = morph(morph({"keys": keys}, {"keys": place((0, 1), P("a"), 2)}), {"keys": place((2, 6), P("a"), 2)})["keys"]
    for shard in moved.addressable_shards:
        assert (jax.random.key_data(shard.data) == jax.random.key_data(keys[shard.index[0]])).all()


def numbers_and_texts_are_everywhere() -> None:
    mine, devices = jax.process_index(), jax.devices()
    numbers = [send(value, place((7 * i,), P(), 1)) for i, value in enumerate((np.float32(2.5), np.int32(-3)))]
    assert [x.item() for x in everywhere(numbers, devices)] == [2.5, -3]
    assert agreed("abc" * (mine + 1), devices) == "abc" and agreed("abc" * (mine + 1), devices[::-1]) == "abcabc"
    assert is_the_same("abc", devices) and not is_the_same(f"process {mine}", devices)
    assert exchange([(devices[0], devices[1])], {}, jax.ShapeDtypeStruct((), "int32")) == {} or mine == 0


def small_step(params: Any, batch: Any) -> Any:
    """A step that reports a value of each example, not only numbers."""

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        x = batch["x"]
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return jnp.mean((x - batch["y"]) ** 2), x

    (value, seen), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda p, g: p - 0.5 * g / norm, params, gradients), {"loss": value, "norm": norm, "seen": seen}


def made() -> tuple[Any, Any]:
    random = np.random.default_rng(0)
    params = {f"w{i}": 0.3 * random.normal(size=(8, 8)).astype(np.float32) for i in range(4)}
    return params, {name: random.normal(size=(16, 8)).astype(np.float32) for name in "xy"}


def pipeline(schedule: str, devices: Sequence[int], *meshes: str) -> Compiled:
    """Stages on submeshes cut from these devices."""
    layout = Layout(make_schedule(schedule, len(meshes), 4), tuple(map(AxesMesh.parse, meshes)))
    order = [jax.devices()[i] for i in devices]
    return compiled_layout(trace(small_step, *made()), layout, devices=order)


def trains_as_one_device(run: Compiled) -> None:
    params, batch = made()
    reference, one = params, jax.jit(small_step)
    for _ in range(2):
        params, metrics = run(params, batch)
        reference, expected = one(reference, batch)
        for name in ("loss", "norm"):
            np.testing.assert_allclose(float(metrics[name]), expected[name], rtol=1e-5)
    found, wanted = jax.tree.leaves((params, metrics)), jax.tree.leaves((reference, expected))
    for array, whole in zip(found, wanted, strict=True):
        for shard in array.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], rtol=1e-5, atol=1e-6)


def a_stage_in_each_process() -> None:
    run = pipeline("1f1b", range(6), "data=4", "data=2")
    trains_as_one_device(run)
    params, _ = run(*made())
    assert {device.process_index for device in params["w0"].sharding.device_set} == {0}
    assert params["w0"].is_fully_addressable == (jax.process_index() == 0)


def stages_that_span_processes() -> str:
    """The hash of the programs of their pieces."""
    run = pipeline("zb_h1", (0, 4, 1, 5), "data=2", "data=2")
    trains_as_one_device(run)
    texts = []
    for runner in run.runners:
        for tag, compiled in sorted(runner.pieces.items()):
            sums = compiled.piece.sums if tag.part.per_microbatch else ()
            slots = (*compiled.piece.local.inputs, *sums)
            shapes = [jax.ShapeDtypeStruct(slot_shape(slot, runner.mesh), slot.value.dtype) for slot in slots]
            texts.append(compiled.function.__wrapped__.lower(*shapes).as_text())
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def replicas_and_moved_memory() -> None:
    trains_as_one_device(pipeline("bpipe", (0, 4, 1, 5), *["data=1"] * 4))
    run = pipeline("chimera", (0, 4), "data=1", "data=1")
    trains_as_one_device(run)
    found = measure(run, *made())
    assert {span.device for span in found.spans} == {jax.process_index()}
    assert len([span for span in found.spans if span.name[0] == "F"]) == 4


def a_run_goes_on_under_the_plan_of_the_first_process() -> None:
    """From a stage in each process to one plan over all devices, which the second process would make otherwise."""
    params, batch = made()
    reference, one = params, jax.jit(small_step)
    run, pins = pipeline("gpipe", (0, 4), "data=1", "data=1"), (("", "a"), ("b", ""))[jax.process_index()]
    other = autopar.parallelize(small_step, mesh="a=4,b=2", pins=[("^x$", f"{','.join(pins)}")], hardware="cpu")
    plan = other.plan(params, batch)
    assert is_the_same(str(plan.arguments), jax.devices())
    for step, places in ((run, run.shardings), (other, plan.shardings), (run, run.shardings)):
        params, metrics = step(morph(params, places[0]), batch)
        reference, expected = one(reference, batch)
        np.testing.assert_allclose(float(metrics["loss"]), expected["loss"], rtol=1e-5)


def different_stages_are_refused() -> None:
    def plan(stage: Stage, mesh: AxesMesh, microbatches: int) -> LocalProgram:
        local = plan_stage(stage, mesh, microbatches)
        return replace(local, instructions=local.instructions[jax.process_index() :])

    layout = Layout(make_schedule("gpipe", 2, 4), (AxesMesh.parse("data=1"),) * 2)
    devices = [jax.devices()[0], jax.devices()[4]]
    with pytest.raises(PipelineError, match="the processes have planned different stages"):
        compiled_layout(trace(small_step, *made()), layout, plan, devices)


def main(argv: Sequence[str]) -> None:
    """Checks all, and says so."""
    address, n_processes, process = argv
    connect(address, int(n_processes), int(process))
    checks = (
        arrays_pass_between_any_two_places,
        parts_are_no_larger_than_blocks,
        any_type_passes,
        numbers_and_texts_are_everywhere,
        a_stage_in_each_process,
        replicas_and_moved_memory,
        a_run_goes_on_under_the_plan_of_the_first_process,
        different_stages_are_refused,
    )
    for check in checks:
        check()
    found = {"checked": [check.__name__ for check in checks], "own programs": stages_that_span_processes()}
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
