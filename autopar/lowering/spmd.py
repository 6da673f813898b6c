"""Runs a local program on every device: ``jit(shard_map(...))`` with every collective written out."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from autopar.cluster import Mesh
from autopar.errors import MeshError
from autopar.ir.program import Constant
from autopar.ir.regions import ScanParts
from autopar.lowering.bundles import bundled
from autopar.lowering.instructions import Barrier, Branch, Bundle, LocalProgram, Loop, Move, Run, Slot
from autopar.lowering.local import run_local
from autopar.lowering.reshard import execute, execute_together
from autopar.lowering.turns import in_turn
from autopar.plan import Plan
from autopar.spec import Spec


def device_mesh(mesh: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The JAX mesh over the first devices, in row-major order.

    Raises:
        MeshError: there are fewer devices than the mesh needs.
    """
    available = list(jax.devices() if devices is None else devices)
    if len(available) < mesh.n_devices:
        raise MeshError(
            f"mesh {mesh} needs {mesh.n_devices} devices, there are {len(available)}",
            fix="use a smaller mesh, or force CPU devices with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={mesh.n_devices} before JAX starts",
        )
    return jax.sharding.Mesh(np.array(available[: mesh.n_devices]).reshape(mesh.shape), mesh.names)


def partition_spec(spec: Spec) -> PartitionSpec:
    """The PartitionSpec of a complete spec."""
    return PartitionSpec(*(dim if len(dim) > 1 else dim[0] if dim else None for dim in spec.dims))


def shardings(specs: Sequence[Spec], mesh: jax.sharding.Mesh) -> tuple[NamedSharding, ...]:
    """NamedShardings of complete specs."""
    return tuple(NamedSharding(mesh, partition_spec(spec)) for spec in specs)


def argument_shardings(tree: Any, plan: Plan, devices: Sequence[Any] | None = None) -> Any:
    """The plan's specs of the step's arguments as NamedShardings, in the structure ``tree``."""
    specs = [argument.spec for argument in plan.arguments[: tree.num_leaves]]
    return jax.tree.unflatten(tree, shardings(specs, device_mesh(plan.mesh, devices)))


@jax.jit
def copies(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays in buffers of their own, which may be donated."""
    return [jnp.copy(array) for array in arrays]


def run_instructions(local: LocalProgram, arguments: Sequence[Any]) -> list[Any]:
    """Executes a local program on one device's blocks, inside ``jax.shard_map`` over its mesh.

    Args:
        local: the program.
        arguments: local blocks of its inputs.

    Returns:
        Local blocks of its results.
    """
    sizes = local.mesh.sizes
    env: dict[Slot, Any] = dict(zip(local.inputs, arguments, strict=True))

    for instruction in local.instructions:
        if isinstance(instruction, Move):
            block = env[instruction.source]
            if instruction.after is not None:
                block, _ = lax.optimization_barrier((block, env[instruction.after]))
            env[instruction.target] = execute(instruction.resharding.steps, block, sizes, instruction.repeat)
        elif isinstance(instruction, Bundle):
            steps = [move.resharding.steps[0] for move in instruction.moves]
            blocks = execute_together(steps, [env[slot] for slot in instruction.inputs], sizes)
            env.update(zip(instruction.outputs, blocks, strict=True))
        elif isinstance(instruction, Barrier):
            blocks = lax.optimization_barrier(tuple(env[slot] for slot in instruction.inputs))
            env.update(zip(instruction.outputs, blocks, strict=True))
        else:
            operands = [_array(x) if isinstance(x, Constant) else env[x] for x in instruction.inputs]
            wanted = _wanted(instruction)
            operands = [_term(*each) for each in zip(instruction.inputs, wanted, operands, strict=True)]
            if isinstance(instruction, Run) and instruction.after is not None:
                operands[0], _ = lax.optimization_barrier((operands[0], env[instruction.after]))
            env.update(zip(instruction.outputs, _results(instruction, operands, local.mesh), strict=True))
    return [_array(operand) if isinstance(operand, Constant) else env[operand] for operand in local.outputs]


def _array(constant: Constant) -> Any:
    return jnp.asarray(constant.value, constant.aval.dtype)


def _wanted(instruction: Run | Loop | Branch) -> Sequence[Spec]:
    """The spec in which an instruction reads each operand."""
    if isinstance(instruction, Run):
        return instruction.strategy.inputs
    if isinstance(instruction, Loop):
        return [slot.spec for slot in instruction.body.inputs]
    return [Spec(())] * len(instruction.inputs)


def _term(source: Slot | Constant, spec: Spec, block: Any) -> Any:
    """A literal that enters as a partial sum stands on one device and is zero on the others."""
    if isinstance(source, Slot) or not spec.partial or not source.value:
        return block
    return jnp.where(lax.axis_index(tuple(sorted(spec.partial))) == 0, block, jnp.zeros_like(block))


def _results(instruction: Run | Loop | Branch, operands: list[Any], mesh: Mesh) -> list[Any]:
    eqn = instruction.equation
    with jax.named_scope(eqn.name.replace(":", ".")):
        if isinstance(instruction, Loop):
            return _loop(instruction, operands)
        if isinstance(instruction, Branch):
            bodies = [functools.partial(_flat_body, body) for body in instruction.bodies]
            return lax.switch(operands[0], bodies, *operands[1:])
        return run_local(eqn.primitive, eqn.params, instruction.rule, instruction.strategy, mesh.sizes, operands)


def _flat_body(body: LocalProgram, *operands: Any) -> list[Any]:
    return run_instructions(body, operands)


def _loop(loop: Loop, operands: list[Any]) -> list[Any]:
    params, parts = loop.equation.params, ScanParts.of(loop.equation)
    constants = operands[: parts.n_consts]
    init, xs = operands[parts.n_consts : parts.first_x], operands[parts.first_x :]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = run_instructions(loop.body, [*constants, *carry, *x])
        return results[: parts.n_carry], results[parts.n_carry :]

    options = {"reverse": params["reverse"], "unroll": params["unroll"]}
    carry, ys = lax.scan(body, init, xs, length=loop.length, **options)
    return [*carry, *ys]


def lower(local: LocalProgram, mesh: jax.sharding.Mesh, donate: Sequence[int] = ()) -> Any:
    """The jitted program on global arrays: flat inputs in, flat results out.

    Args:
        local: the program of one device.
        mesh: the devices.
        donate: inputs whose buffers the results may reuse.
    """
    in_specs = [slot.spec for slot in local.inputs]
    out_specs = [Spec(()) if isinstance(slot, Constant) else slot.spec for slot in local.outputs]

    order = {"tpu": in_turn, "cpu": bundled}.get(mesh.devices.flat[0].platform)
    ordered = order(local) if order else local

    def step(*arguments: Any) -> list[Any]:
        return run_instructions(ordered, arguments)

    mapped = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=tuple(partition_spec(spec) for spec in in_specs),
        out_specs=[partition_spec(spec) for spec in out_specs],
        check_vma=False,
    )
    return jax.jit(
        mapped,
        in_shardings=shardings(in_specs, mesh),
        out_shardings=list(shardings(out_specs, mesh)),
        donate_argnums=tuple(donate),
    )
