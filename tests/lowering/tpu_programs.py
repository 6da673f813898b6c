"""Compiles small programs for a TPU v5e:4x4 and checks their audits; run by test_audit.py, marked slow."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from autopar.api import Options, plan_traced, traced_in_time
from autopar.cluster import Mesh
from autopar.errors import HardwareError, MeshError
from autopar.ir.arguments import adapt
from autopar.lowering import predict
from autopar.lowering.audit import audit, compare, merged
from autopar.lowering.instructions import Move
from autopar.lowering.local_program import build_local_program
from autopar.lowering.spmd import lower
from autopar.lowering.topology import tpu_mesh
from autopar.plan import Collective as Predicted
from models import gpt

MESH = Mesh.parse("data=4,tensor=4")
BYTES = 4096 * 1024 * 2
CASES = [
    (lambda x: lax.psum(x, "data"), ("all_reduce", ("data",), BYTES, 1)),
    (lambda x: lax.psum(x, ("data", "tensor")), ("all_reduce", ("data", "tensor"), BYTES, 1)),
    (lambda x: lax.all_gather(x, "tensor", tiled=True), ("all_gather", ("tensor",), 4 * BYTES, 1)),
    (
        lambda x: lax.psum_scatter(x, "data", scatter_dimension=0, tiled=True),
        ("reduce_scatter", ("data",), BYTES, 1),
    ),
    (
        lambda x: lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True),
        ("reduce_scatter", ("tensor",), BYTES, 1),
    ),
    (
        lambda x: lax.psum_scatter(x, ("data", "tensor"), scatter_dimension=0, tiled=True),
        ("reduce_scatter", ("data", "tensor"), BYTES, 1),  # runs as an all_reduce
    ),
    (lambda x: lax.all_gather(x[:64, 0], "data", tiled=True), ("all_gather", ("data",), 512, 1)),  # likewise
    (lambda x: lax.all_to_all(x, "tensor", 1, 0, tiled=True), ("all_to_all", ("tensor",), BYTES, 1)),
    (
        lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
        ("collective_permute", ("data",), BYTES, 1),
    ),
    (
        lambda x: lax.scan(lambda c, _: (lax.psum(c, "data") * 0.5, None), x, None, length=7)[0],
        ("all_reduce", ("data",), 7 * BYTES, 7),
    ),
]


def main() -> None:
    mesh = tpu_mesh("v5e:4x4", MESH)
    sharding = NamedSharding(mesh, PartitionSpec())
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    for program, expected in CASES:
        mapped = jax.shard_map(program, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        step = jax.jit(mapped, in_shardings=sharding, out_shardings=sharding)
        found = audit(step.lower(x).compile(), MESH)
        unexplained = [d for d in compare([Predicted(*expected)], found, MESH) if not d.explanation]
        assert not unexplained, unexplained
        assert found.argument_bytes == BYTES, found
    product = jax.jit(lambda x: x @ x.T, in_shardings=sharding, out_shardings=sharding).lower(x).compile()
    assert audit(product, MESH).flops == audit(product, MESH).product_flops == 2 * 4096 * 4096 * 1024
    assert (audit(product, MESH).estimated_cycles or 0) > 0 and audit(product, MESH).platform == "tpu"
    stays_twice(mesh)
    refused(MeshError, "the topology 16", lambda: tpu_mesh("v5e:4x4", Mesh.parse("data=2,tensor=4")))
    refused(HardwareError, "no TPU topology 'v9:1'", lambda: tpu_mesh("v9:1", MESH))


def stays_twice(mesh: jax.sharding.Mesh) -> None:
    """Parameters gathered again, and blocks computed again, in the backward pass: the compiler merges none of it."""
    step, state, batch = gpt.make(abstract=True, layers=2, width=128, heads=8, seq=64, vocab=256, batch=32, remat=True)
    traced, trace_s = traced_in_time(adapt(step, (state, batch)))
    options = Options(mesh=MESH, hardware="v5e", preset="zero3")
    plan = plan_traced(traced, trace_s, options)
    local = build_local_program(traced.program, plan, options.cost_model(MESH))
    assert sum(isinstance(i, Move) and i.repeat > 0 for i in local.instructions) >= 8
    shapes = [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in local.inputs]
    found = audit(lower(local, mesh).lower(*shapes).compile(), MESH)
    assert merged(plan.prediction.collectives, found, MESH) == 0
    assert found.product_flops == predict.flops(local, ("dot_general",))


def refused(kind: type[Exception], message: str, call) -> None:
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"expected {kind.__name__}: {message}")


if __name__ == "__main__":
    main()
