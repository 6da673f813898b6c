"""One iteration of a loop over time, equation by equation: on parts, on terms, on copies; and scans inside it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from autopar import compat
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.ir.trace import flatten
from autopar.lowering.local import without_shardings
from autopar.lowering.time.shard import TimeShard, part_shape, take_parts
from autopar.sharding.lookup import signature
from autopar.sharding.registry import LOCAL_RULES
from autopar.sharding.time.demand import COPY, ESTIMATE, TERM, Demand, Form, Run
from autopar.sharding.time.nested import Nested
from autopar.sharding.time.timing import Cut, Timings


@dataclass
class Writer:
    """Equations of one program in the making; ``names`` is shared by all, ``traced`` are functions written before."""

    names: dict[str, int]
    equations: list[Equation] = field(default_factory=list)
    traced: dict[Hashable, Program] = field(default_factory=dict)

    def unique(self, base: str) -> str:
        """A name that no value has yet."""
        count = self.names[base] = self.names.get(base, 0) + 1
        return base if count == 1 else self.unique(f"{base}~{count}")

    def value(self, name: str, aval: Any, shape: Sequence[int] | None = None) -> Value:
        """A new value."""
        return Value(self.unique(name), aval if shape is None else compat.reshaped(aval, shape))

    def keep(self, eqn: Equation, inputs: Sequence[Atom], shapes: Sequence[Sequence[int]]) -> list[Atom]:
        """Adds the same equation on other operands."""
        outputs = tuple(self.value(v.name, v.aval, shape) for v, shape in zip(eqn.outputs, shapes, strict=True))
        name = outputs[0].name if outputs else self.unique(eqn.name)
        params = eqn.params if eqn.bodies else without_shardings(eqn.params)
        self.equations.append(replace(eqn, inputs=tuple(inputs), outputs=outputs, name=name, params=params))
        return list(outputs)

    def write(
        self, function: Callable[..., Any], operands: Sequence[Atom], like: Equation, key: Hashable = None
    ) -> list[Atom]:
        """Adds the equations of ``function(*operands)``, named after ``like``, which they stand for.

        Functions of equal keys (not None) and operands are equal: a step of many layers writes the same few a thousand
        times.
        """
        values = [atom for atom in operands if isinstance(atom, Value)]
        whole = None if key is None or len(values) < len(operands) else (key, *(value.aval for value in values))
        small = self.traced.get(whole)
        if small is None:
            small = _traced(function, operands, values)
            if whole is not None:
                self.traced[whole] = small
        assert not small.constants, f"{like.name} closes over arrays"
        env: dict[Atom, Atom] = dict(zip(small.inputs, values, strict=True))
        scope = like.name.rpartition("/")[0]
        final = dict(zip(small.outputs, (value.name for value in like.outputs), strict=False))
        for eqn in small.equations:
            names = (final.get(v) or f"{scope}/{eqn.primitive.name}".lstrip("/") for v in eqn.outputs)
            outputs = tuple(self.value(n, v.aval) for n, v in zip(names, eqn.outputs, strict=True))
            env.update(zip(eqn.outputs, outputs, strict=True))
            self.equations.append(
                replace(
                    eqn,
                    inputs=tuple(env.get(atom, atom) for atom in eqn.inputs),
                    outputs=outputs,
                    name=outputs[0].name,
                    source=like.source,
                    backward=like.backward,
                )
            )
        return [env.get(atom, atom) for atom in small.outputs]


def _traced(function: Callable[..., Any], operands: Sequence[Atom], values: Sequence[Value]) -> Program:
    """A function of the operands that are values."""

    def called(*arrays: Any) -> Any:
        rest = iter(arrays)
        return function(*(next(rest) if isinstance(atom, Value) else _array(atom) for atom in operands))

    closed = jax.make_jaxpr(called)(*(compat.struct_of(value.aval) for value in values))
    return flatten(closed, [value.name for value in values])


def _array(constant: Atom) -> Any:
    assert isinstance(constant, Constant)
    return jnp.asarray(constant.value, constant.aval.dtype)


def named(name: str, aval: Any, like: Equation | None = None) -> Equation:
    """Stands for what a loop adds to a program: a name for its results."""
    source, backward = (like.source, like.backward) if like else ("", False)
    return Equation(None, (), (Value(name, aval),), {}, name, source, backward)


class Iteration:
    """The equations that every iteration runs.

    Attributes:
        writer: takes the equations.
        made: the forms that the iteration has of values.
        counter: the iteration's number, once something asked for it.
    """

    def __init__(self, timings: Timings, name: str, names: dict[str, int]) -> None:
        self.timings, self.name, self.steps = timings, name, timings.question.steps
        self.writer = Writer(names)
        self.made: dict[tuple[Value, Form], Atom] = {}
        self.counter: Value | None = None

    def outside(self, atom: Atom) -> Atom:
        """A value that the iteration has whole, or that stands for it."""
        if isinstance(atom, Constant):
            return atom
        for form in (COPY, ESTIMATE):
            if (atom, form) in self.made:
                return self.made[atom, form]
        return self.entering(atom)

    def entering(self, value: Value) -> Atom:
        """A whole value from outside the loop."""
        raise NotImplementedError

    def time(self) -> Value:
        """The iteration's number."""
        if self.counter is None:
            self.counter = self.writer.value(f"{self.name}/number", compat.int32_aval())
        return self.counter

    def run(self, run: Run) -> None:
        """Adds one equation in the forms that the run says."""
        eqn, inside = run.equation, run.inside
        operands = [self.operand(run, k, atom) for k, atom in enumerate(eqn.inputs)]
        cuts = [form if isinstance(form, Cut) else None for form in run.forms]
        shapes = [part_shape(v.shape, cut, self.steps) for v, cut in zip(eqn.outputs, cuts, strict=True)]
        local = LOCAL_RULES.get(eqn.primitive.name)
        if inside is not None and inside.nested is not None:
            made = self._region(run, operands)
        elif inside is None or inside.factor is None or local is None:
            made = self.writer.keep(eqn, operands, shapes)
        else:
            params = without_shardings(eqn.params)

            def shard(time: Any, *arrays: Any) -> Any:
                around = TimeShard(
                    eqn.primitive, inside, self.steps, time, tuple(x.shape for x in arrays), tuple(shapes)
                )
                return list(local(around, *arrays, **params))

            key = "shard", signature(eqn), inside.factor, inside.inner
            made = self.writer.write(shard, [self.time(), *operands], eqn, key)
        self.made.update(zip(zip(eqn.outputs, run.forms, strict=True), made, strict=True))

    def operand(self, run: Run, k: int, atom: Atom) -> Atom:
        """An operand in the form that the run needs."""
        inside = run.inside
        cut = inside.cut(inside.rule.operands[k]) if inside else None
        if isinstance(atom, Value) and cut is not None:
            return self.made[atom, cut]
        if inside is None or k not in inside.terms:
            return self.outside(atom)
        if isinstance(atom, Value) and (atom, TERM) in self.made:
            return self.made[atom, TERM]
        return self.term(atom, run.equation)

    def term(self, atom: Atom, like: Equation) -> Atom:
        """A whole value as a term of itself: all of it in the first iteration, zero in the others."""
        whole = self.outside(atom)
        if self.timings.is_zero(atom):
            return whole
        mask = lambda time, x: jnp.where(time == 0, x, jnp.zeros_like(x))  # noqa: E731
        (term,) = self.writer.write(mask, [self.time(), whole], like)
        return term

    def _region(self, run: Run, operands: list[Atom]) -> list[Atom]:
        """A scan or cond whose bodies run on parts; they get the number of this iteration if they ask for it."""
        eqn, inside = run.equation, run.inside
        assert inside is not None
        nested, is_scan = inside.nested, eqn.primitive.name == "scan"
        bodies = [
            Inner(body, demand, nested, f"{eqn.name}/{self.name}", self.writer.names)
            for body, demand in zip(eqn.bodies, nested.demands, strict=True)
        ]
        programs = [body.program() for body in bodies]
        counted = any(body.counter is not None for body in bodies)
        if counted:
            at = nested.n_consts if is_scan else 1
            operands = [*operands[:at], self.time(), *operands[at:]]
            programs = [body.counting(program) for body, program in zip(bodies, programs, strict=True)]
        cuts = [form if isinstance(form, Cut) else None for form in run.forms]
        shapes = [part_shape(v.shape, cut, self.steps) for v, cut in zip(eqn.outputs, cuts, strict=True)]
        kept = {name: value for name, value in eqn.params.items() if name not in ("jaxpr", "branches")}
        if is_scan:
            kept["num_consts"] = nested.n_consts + counted
        return self.writer.keep(replace(eqn, bodies=tuple(programs), params=kept), operands, shapes)


class Inner(Iteration):
    """The body of a scan or cond on parts; it knows its own values only."""

    def __init__(self, body: Program, demand: Demand, nested: Nested, name: str, names: dict[str, int]) -> None:
        super().__init__(demand.timings, name, names)
        self.body, self.demand, self.nested = body, demand, nested
        self.env: dict[Atom, Atom] = {}

    def entering(self, value: Value) -> Atom:
        """A whole value of the body."""
        return self.env[value]

    def program(self) -> Program:
        """The body, without the number of the iteration over time."""
        demand, inputs = self.demand, []
        for value, form in zip(self.body.inputs, self.nested.inputs, strict=True):
            cut = form if isinstance(form, Cut) else None
            inputs.append(self.writer.value(value.name, value.aval, part_shape(value.shape, cut, self.steps)))
            if form is None:
                self.env[value] = inputs[-1]
            else:
                self.made[value, form] = inputs[-1]
        once, runs = set(demand.once), {}
        for run, _ in reversed(demand.runs):
            runs.setdefault(run.equation, []).append(run)
        self._slices(self.body.inputs)
        for eqn in self.body.equations:
            if eqn in once:
                whole = [self.outside(atom) for atom in eqn.inputs]
                made = self.writer.keep(eqn, whole, [value.shape for value in eqn.outputs])
                self.env.update(zip(eqn.outputs, made, strict=True))
                self._slices(eqn.outputs)
            for run in runs.get(eqn, ()):
                self.run(run)
        pairs = zip(self.body.outputs, self.nested.outputs, strict=True)
        outputs = tuple(self._result(atom, form) for atom, form in pairs)
        return Program(tuple(inputs), outputs, tuple(self.writer.equations))

    def counting(self, program: Program) -> Program:
        """The body with the number of the iteration over time as one more constant."""
        at = self.nested.n_consts
        return replace(program, inputs=(*program.inputs[:at], self.time(), *program.inputs[at:]))

    def _slices(self, values: Sequence[Value]) -> None:
        """Takes the parts of whole values that the iteration needs."""
        for value, cut in self.demand.slices:
            if value in values:
                like = named(f"{self.name}/part", value.aval)
                take = lambda time, x, cut=cut: lax.dynamic_index_in_dim(  # noqa: E731
                    take_parts(x, cut, self.steps), time, keepdims=False
                )
                (self.made[value, cut],) = self.writer.write(take, [self.time(), self.env[value]], like)

    def _result(self, atom: Atom, form: Form | None) -> Atom:
        if form is None:
            return self.outside(atom)
        if isinstance(atom, Value) and (atom, form) in self.made:
            return self.made[atom, form]
        assert form == TERM, f"{atom} has no part {form}"
        return self.term(atom, named(f"{self.name}/term", atom.aval))
