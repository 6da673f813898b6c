"""The second lowering target: one global program with sharding constraints, partitioned by XLA.

For regions that a user wants XLA to partition, and as a comparison: the plan's specs are hints here, and XLA decides
the collectives. The explicit lowering (``autopar.lowering.spmd``) is the product.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autopar.compat import key_impl
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.ir.regions import ScanParts
from autopar.lowering.local import without_shardings
from autopar.lowering.spmd import partition_spec, shardings
from autopar.plan import Plan


def lower_jit(program: Program, plan: Plan, mesh: jax.sharding.Mesh, donate: Sequence[int] = ()) -> Any:
    """The jitted program on global arrays, constrained to the plan's specs: flat inputs in, flat results out.

    Args:
        program: the program that the plan was made for.
        plan: its specs; those of partial values constrain nothing, XLA has no such spec.
        mesh: the devices.
        donate: inputs whose buffers the results may reuse.
    """

    def constrained(value: Value, result: Any) -> Any:
        return _constrained(result, plan, value.name, mesh)

    return jax.jit(
        lambda *arguments: run_program(program, arguments, constrained),
        in_shardings=shardings([plan.values[value.name] for value in program.inputs], mesh),
        out_shardings=list(shardings(plan.outputs, mesh)),
        donate_argnums=tuple(donate),
    )


def run_program(
    program: Program, arguments: Sequence[Any], seen: Callable[[Value, Any], Any] = lambda value, result: result
) -> list[Any]:
    """The results of a program on whole arrays, as its equations say, each result passed through ``seen``."""
    env: dict[Atom, Any] = dict(zip(program.inputs, arguments, strict=True))

    def read(atom: Atom) -> Any:
        return jnp.asarray(atom.value, atom.aval.dtype) if isinstance(atom, Constant) else env[atom]

    for eqn in program.equations:
        for value, result in zip(eqn.outputs, _results(eqn, [read(atom) for atom in eqn.inputs]), strict=True):
            env[value] = seen(value, result)
    return [read(atom) for atom in program.outputs]


def _results(eqn: Equation, operands: list[Any]) -> list[Any]:
    if eqn.primitive.name == "scan" and "jaxpr" not in eqn.params:  # a region that autopar made has no jaxpr
        return _scan(eqn, operands)
    if eqn.primitive.name == "cond" and "branches" not in eqn.params:
        branches = [functools.partial(_branch, body) for body in eqn.bodies]
        return lax.switch(operands[0], branches, *operands[1:])
    if eqn.primitive.name == "optimization_barrier":
        return [lax.optimization_barrier(operands[0])]
    params = eqn.params if eqn.bodies else without_shardings(eqn.params)
    results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _branch(body: Program, *operands: Any) -> list[Any]:
    return run_program(body, operands)


def _scan(eqn: Equation, operands: list[Any]) -> list[Any]:
    (body,) = eqn.bodies
    parts = ScanParts.of(eqn)

    def iteration(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        results = run_program(body, [*operands[: parts.n_consts], *carry, *x])
        return results[: parts.n_carry], results[parts.n_carry :]

    carry, x = operands[parts.n_consts : parts.first_x], operands[parts.first_x :]
    carry, ys = lax.scan(iteration, carry, x, length=parts.length, reverse=eqn.params["reverse"])
    return [*carry, *ys]


def _constrained(result: Any, plan: Plan, name: str, mesh: jax.sharding.Mesh) -> Any:
    spec = plan.values.get(name)
    if spec is None or spec.partial or not spec.dims or key_impl(result.dtype) is not None:
        return result
    return lax.with_sharding_constraint(result, jax.sharding.NamedSharding(mesh, partition_spec(spec)))
