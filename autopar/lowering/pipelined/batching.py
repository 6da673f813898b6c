"""Equations run for all stages at once: every one vectorised over a new first dimension, names and sources kept."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autopar.ir.program import Atom, Constant, Equation, Program
from autopar.ir.regions import ScanParts
from autopar.lowering.local import without_shardings
from autopar.lowering.time.iteration import Writer, named


class Batching:
    """Writes programs vectorised over ``size`` stages.

    Args:
        size: the new first dimension of what differs between stages.
        writer: takes the equations.
    """

    def __init__(self, size: int, writer: Writer) -> None:
        self.size, self.writer = size, writer
        self.env: dict[Atom, Atom] = {}
        self.batched: set[Atom] = set()

    def inline(self, program: Program, operands: Sequence[Atom], batched: Sequence[bool]) -> list[Atom]:
        """Adds the equations of a program; returns its results, all with the dimension of the stages.

        Args:
            program: one stage's.
            operands: its inputs in the new program.
            batched: which of them have the dimension of the stages.
        """
        self.env.update(zip(program.inputs, operands, strict=True))
        self.batched.update(v for v, flag in zip(program.inputs, batched, strict=True) if flag)
        for eqn in program.equations:
            self._equation(eqn)
        return [self.spread(self._read(atom), atom in self.batched) for atom in program.outputs]

    def spread(self, atom: Atom, batched: bool) -> Atom:
        """A value with the dimension of the stages, which it may lack."""
        if batched:
            return atom
        like = named(f"{getattr(atom, 'name', 'constant')}/stages", atom.aval)
        (copies,) = self.writer.write(lambda x: jnp.broadcast_to(x, (self.size, *x.shape)), [atom], like)
        return copies

    def _read(self, atom: Atom) -> Atom:
        return atom if isinstance(atom, Constant) else self.env[atom]

    def _equation(self, eqn: Equation) -> None:
        operands = [self._read(atom) for atom in eqn.inputs]
        flags = [atom in self.batched for atom in eqn.inputs]
        if not any(flags):
            made = self.writer.keep(eqn, operands, [value.shape for value in eqn.outputs])
            self.env.update(zip(eqn.outputs, made, strict=True))
            return
        self.batched.update(eqn.outputs)
        self.env.update(zip(eqn.outputs, self._vectorised(eqn, operands, flags), strict=True))

    def _vectorised(self, eqn: Equation, operands: list[Atom], flags: list[bool]) -> Sequence[Atom]:
        name = eqn.primitive.name
        if name == "scan" and eqn.bodies:
            return self._scan(eqn, operands, flags)
        if name == "cond" and eqn.bodies:
            return self._select(eqn, operands, flags) if flags[0] else self._cond(eqn, operands, flags)
        if name == "optimization_barrier":
            return self.writer.keep(eqn, operands, [(self.size, *value.shape) for value in eqn.outputs])
        params = eqn.params if eqn.bodies else without_shardings(eqn.params)
        axes = tuple(0 if flag else None for flag in flags)
        mapped = jax.vmap(lambda *xs: eqn.primitive.bind(*xs, **params), in_axes=axes)
        return self.writer.write(mapped, operands, eqn)

    def body(self, program: Program, batched: Sequence[bool]) -> Program:
        """A body for all stages; all its results have their dimension."""
        inner = Batching(self.size, Writer(self.writer.names))
        inputs = [
            inner.writer.value(v.name, v.aval, (self.size, *v.shape) if flag else None)
            for v, flag in zip(program.inputs, batched, strict=True)
        ]
        outputs = inner.inline(program, inputs, batched)
        return Program(tuple(inputs), tuple(outputs), tuple(inner.writer.equations))

    def _scan(self, eqn: Equation, operands: list[Atom], flags: list[bool]) -> Sequence[Atom]:
        """A scan inside a layer: its carries have the dimension of the stages, and so has all that it makes."""
        (body,), parts = eqn.bodies, ScanParts.of(eqn)
        for k in range(parts.n_consts, parts.first_x):
            operands[k], flags[k] = self.spread(operands[k], flags[k]), True
        for k in range(parts.first_x, len(operands)):
            if flags[k]:
                (operands[k],) = self.writer.write(
                    lambda x: jnp.swapaxes(x, 0, 1), [operands[k]], named(f"{eqn.name}/scanned", operands[k].aval, eqn)
                )
        params = _kept(eqn.params, "jaxpr")
        shapes = [(self.size, *value.shape) for value in eqn.outputs[: parts.n_carry]]
        shapes += [(parts.length, self.size, *value.shape[1:]) for value in eqn.outputs[parts.n_carry :]]
        made = self.writer.keep(replace(eqn, bodies=(self.body(body, flags),), params=params), operands, shapes)
        for k, value in enumerate(eqn.outputs[parts.n_carry :], parts.n_carry):
            like = named(f"{value.name}/stages", value.aval, eqn)
            (made[k],) = self.writer.write(lambda x: jnp.swapaxes(x, 0, 1), [made[k]], like)
        return made

    def _cond(self, eqn: Equation, operands: list[Atom], flags: list[bool]) -> Sequence[Atom]:
        """All stages take the same branch."""
        bodies = tuple(self.body(body, flags[1:]) for body in eqn.bodies)
        shapes = [(self.size, *value.shape) for value in eqn.outputs]
        kept = replace(eqn, bodies=bodies, params=_kept(eqn.params, "branches"))
        return self.writer.keep(kept, operands, shapes)

    def _select(self, eqn: Equation, operands: list[Atom], flags: list[bool]) -> Sequence[Atom]:
        """Stages take different branches: all of them run, as ``jax.vmap`` has it."""
        made: list[list[Atom]] = []
        for body in eqn.bodies:
            branch = Batching(self.size, self.writer)
            made.append(branch.inline(body, operands[1:], flags[1:]))
        return [
            self.writer.write(_choose, [operands[0], *results], named(value.name, value.aval, eqn))[0]
            for value, *results in zip(eqn.outputs, *made, strict=True)
        ]


def _choose(index: Any, *cases: Any) -> Any:
    which = jnp.clip(index.astype(jnp.int32), 0, len(cases) - 1)
    which = which.reshape(which.shape + (1,) * (cases[0].ndim - 1))
    chosen = cases[0]
    for number, case in enumerate(cases[1:], 1):
        chosen = lax.select(jnp.broadcast_to(which == number, case.shape), case, chosen)
    return chosen


def _kept(params: Mapping[str, Any], jaxpr: str) -> dict[str, Any]:
    return {name: value for name, value in params.items() if name != jaxpr}
