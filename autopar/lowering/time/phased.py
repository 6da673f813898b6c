"""Writes a program that was cut at its time axis as a program again: loops become scans, everything else stays flat.

    hoisted equations
    scan over the parts:  terms added to totals in the carry, parts stacked
    equations that needed those totals
    scan ...
    what runs once

Equations keep their names and source lines, so that the planner, its plan and its errors speak of the user's step.
What enters a loop gets a name of the loop's own: a pin on a parameter shall not mean its copy inside.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import jax.numpy as jnp
from jax import lax

from autopar import compat
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.lowering.time.iteration import Iteration, Writer, named
from autopar.lowering.time.shard import join_parts, take_parts
from autopar.sharding.time.demand import ESTIMATE, TERM
from autopar.sharding.time.phases import Loop, Phases
from autopar.sharding.time.timing import Cut, total_nbytes

LOOP_NAME = "microbatches"

COMBINE: Mapping[str, Callable[..., Any]] = {
    "sum": lax.add,
    "max": lax.max,
    "min": lax.min,
    "and": lax.bitwise_and,
    "or": lax.bitwise_or,
}


def split_over_time(phases: Phases, name: str = LOOP_NAME, taken: Iterable[str] = ()) -> Program:
    """The program in which the loops of ``phases`` are scans; it computes what the old one did.

    Args:
        phases: the program, cut.
        name: of the scans.
        taken: names of values that its own shall not have: those of the programs around it.
    """
    return _Splitter(phases, name, taken).program()


def neutral(monoid: str, dtype: Any) -> Any:
    """What changes nothing when combined: the total before the first iteration."""
    if monoid in ("sum", "or"):
        return jnp.zeros((), dtype)
    if monoid == "and":
        return jnp.ones((), dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.array(-jnp.inf if monoid == "max" else jnp.inf, dtype)
    limits = jnp.iinfo(dtype)
    return jnp.array(limits.min if monoid == "max" else limits.max, dtype)


class _Splitter:
    """The whole program: sections and scans in turn."""

    def __init__(self, phases: Phases, name: str, taken: Iterable[str]) -> None:
        self.phases, self.name = phases, name
        old = phases.question.program
        self.producer = {value: eqn for eqn in old.equations for value in eqn.outputs}
        self.outer = Writer(dict.fromkeys((*taken, *(value.name for value in old.inputs)), 1))
        self.env: dict[Atom, Atom] = {value: value for value in old.inputs}

    def program(self) -> Program:
        """The program with scans."""
        old = self.phases.question.program
        for section, loop in zip_longest(self.phases.sections, self.phases.loops):
            for eqn in section:
                made = self.outer.keep(eqn, [self.whole(a) for a in eqn.inputs], [v.shape for v in eqn.outputs])
                for value, atom in zip(eqn.outputs, made, strict=True):
                    self.env.setdefault(value, atom)
            if loop is not None:
                self.loop(loop)
        outputs = tuple(self.whole(atom) for atom in old.outputs)
        return Program(old.inputs, outputs, tuple(self.outer.equations), old.constants)

    def whole(self, atom: Atom) -> Atom:
        """The whole value outside the loops."""
        return atom if isinstance(atom, Constant) else self.env[atom]

    def loop(self, loop: Loop) -> None:
        """Adds one scan, with what prepares its operands and reads its results."""
        body = _Body(self, loop)
        carried, stacked = body.write()
        program = body.program(carried, stacked)
        inputs = [*body.constants, *body.starts, *body.scanned]
        results = tuple(self.outer.value(f"{self.name}/{v.name}", v.aval) for v in (*loop_values(loop, carried),))
        parts = tuple(
            self.outer.value(f"{self.name}/{v.name}", v.aval, (self.phases.question.steps, *atom.aval.shape))
            for (v, _), atom in zip(loop.stacks, stacked, strict=True)
        )
        params = {"num_consts": len(body.constants), "num_carry": len(carried), "reverse": False, "unroll": 1}
        params["length"] = self.phases.question.steps
        name = self.outer.unique(self.name)
        outputs = (*results, *parts)
        self.outer.equations.append(
            Equation(compat.scan_primitive(), tuple(inputs), outputs, params, name, bodies=(program,))
        )
        self._results(loop, results, parts)

    def _results(self, loop: Loop, totals: Sequence[Value], parts: Sequence[Value]) -> None:
        """Totals in their own dtype, parts joined."""
        for (value, _), total in zip(loop.totals, totals, strict=True):
            like = named(f"{value.name}/total", value.aval, self.producer[value])
            self.env[value] = total
            if total.dtype != value.dtype:
                (self.env[value],) = self.outer.write(
                    lambda x, dtype=value.dtype: lax.convert_element_type(x, dtype), [total], like, ("as", value.dtype)
                )
        for (value, cut), part in zip(loop.stacks, parts, strict=True):
            like = named(f"{value.name}/joined", value.aval, self.producer[value])
            (self.env[value],) = self.outer.write(lambda x, cut=cut: join_parts(x, cut), [part], like)


def loop_values(loop: Loop, carried: Sequence[Atom]) -> list[Value]:
    """Stand-ins for the results of a loop's carries: names of the totals, avals of what carries them."""
    return [Value(value.name, atom.aval) for (value, _), atom in zip(loop.totals, carried, strict=True)]


class _Body(Iteration):
    """The body of one loop, and the operands that it needs from outside."""

    def __init__(self, splitter: _Splitter, loop: Loop) -> None:
        super().__init__(splitter.phases.timings, splitter.name, splitter.outer.names)
        self.splitter, self.work = splitter, loop
        self.constant_of: dict[Value, Value] = {}
        self.constants: list[Atom] = []
        self.starts: list[Atom] = []
        self.carries: list[Value] = []
        self.scanned: list[Atom] = []
        self.xs: list[Value] = []

    def program(self, carried: Sequence[Atom], stacked: Sequence[Atom]) -> Program:
        """The body as a program."""
        if any(self.counter in eqn.inputs for eqn in self.writer.equations):
            self._count()
        inputs = (*self.constant_of.values(), *self.carries, *self.xs)
        return Program(inputs, (*carried, *stacked), tuple(self.writer.equations))

    def write(self) -> tuple[list[Atom], list[Atom]]:
        """Runs the body; returns the new totals and the parts to stack."""
        for value, cut in self.work.slices:
            self.made[value, cut] = self._slice(value, cut)
        for run in self.work.runs:
            self.run(run)
            for value, form in zip(run.equation.outputs, run.forms, strict=True):
                if form == TERM and value in self.work.estimates:
                    self._estimate(value, run.inside.rule.monoid if run.inside else "sum")
        carried = [self._total(value, monoid) for value, monoid in self.work.totals]
        return carried, [self.made[value, cut] for value, cut in self.work.stacks]

    def _count(self) -> None:
        """Scans over the numbers of the iterations."""
        assert self.counter is not None
        like = named(f"{self.splitter.name}/numbers", compat.int32_aval(self.steps))
        self.scanned += self.splitter.outer.write(lambda: lax.iota(jnp.int32, self.steps), [], like)
        self.xs.append(self.counter)

    def _scanned(self, whole: Atom, name: str) -> Value:
        inside = self.writer.value(name, whole.aval, whole.aval.shape[1:])
        self.scanned.append(whole)
        self.xs.append(inside)
        return inside

    def _slice(self, value: Value, cut: Cut) -> Value:
        """The part of a whole value: scanned over all of its parts."""
        like = named(f"{self.splitter.name}/parts", value.aval, self.splitter.producer.get(value))
        whole = self.splitter.whole(value)
        (parts,) = self.splitter.outer.write(lambda x: take_parts(x, cut, self.steps), [whole], like)
        return self._scanned(parts, f"{self.splitter.name}/part")

    def entering(self, value: Value) -> Atom:
        """A whole value, as one more operand of the loop."""
        if value not in self.constant_of:
            whole = self.splitter.whole(value)
            if isinstance(whole, Constant):
                return whole
            self.constants.append(whole)
            self.constant_of[value] = self.writer.value(f"{self.splitter.name}/in", value.aval)
        return self.constant_of[value]

    def _estimate(self, value: Value, monoid: str) -> None:
        """The total, had all microbatches the term of this one."""
        self.made[value, ESTIMATE] = self.made[value, TERM]
        if monoid == "sum":
            like = named(f"{value.name}/estimate", value.aval, self.splitter.producer[value])
            (self.made[value, ESTIMATE],) = self.writer.write(
                lambda term: term * jnp.asarray(self.steps, term.dtype), [self.made[value, TERM]], like
            )

    def _total(self, value: Value, monoid: str) -> Atom:
        """Adds this iteration's term to the total in the carry."""
        term, like = self.made[value, TERM], self.splitter.producer[value]
        wide = total_nbytes(value) > value.nbytes
        dtype = jnp.float32 if wide and monoid == "sum" else value.dtype
        start = lambda: jnp.full(value.shape, neutral(monoid, dtype), dtype)  # noqa: E731
        key = monoid, dtype, value.shape
        self.starts += self.splitter.outer.write(
            start, [], named(f"{value.name}/start", value.aval, like), ("start", key)
        )
        carry = self.writer.value(f"{value.name}/so_far", self.starts[-1].aval)
        self.carries.append(carry)
        (total,) = self.writer.write(
            lambda total, term: COMBINE[monoid](total, lax.convert_element_type(term, dtype)),
            [carry, term],
            named(f"{value.name}/sum", value.aval, like),
            ("sum", key),
        )
        return total
