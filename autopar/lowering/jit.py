"""The second lowering target: one global program with sharding constraints, partitioned by XLA.

For regions that a user wants XLA to partition, and as a comparison: the plan's specs are hints here, and XLA decides
the collectives. The explicit lowering (``autopar.lowering.spmd``) is the product.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from autopar.compat import key_impl
from autopar.ir.program import Atom, Constant, Equation, Program
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

    def step(*arguments: Any) -> list[Any]:
        env: dict[Atom, Any] = dict(zip(program.inputs, arguments, strict=True))

        def read(atom: Atom) -> Any:
            return atom.value if isinstance(atom, Constant) else env[atom]

        for eqn in program.equations:
            for value, result in zip(eqn.outputs, _results(eqn, [read(atom) for atom in eqn.inputs]), strict=True):
                env[value] = _constrained(result, plan, value.name, mesh)
        return [read(atom) for atom in program.outputs]

    return jax.jit(
        step,
        in_shardings=shardings([plan.values[value.name] for value in program.inputs], mesh),
        out_shardings=list(shardings(plan.outputs, mesh)),
        donate_argnums=tuple(donate),
    )


def _results(eqn: Equation, operands: list[Any]) -> list[Any]:
    if eqn.primitive.name == "optimization_barrier":
        return [lax.optimization_barrier(operands[0])]
    params = eqn.params if eqn.bodies else without_shardings(eqn.params)
    results = eqn.primitive.bind(*operands, **params)
    return list(results) if eqn.primitive.multiple_results else [results]


def _constrained(result: Any, plan: Plan, name: str, mesh: jax.sharding.Mesh) -> Any:
    spec = plan.values.get(name)
    if spec is None or spec.partial or not spec.dims or key_impl(result.dtype) is not None:
        return result
    return lax.with_sharding_constraint(result, jax.sharding.NamedSharding(mesh, partition_spec(spec)))
