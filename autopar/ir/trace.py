"""Tracing a step into a Program: jaxpr, dead code removed, calls inlined, values named.

Nothing is materialised: arguments may be arrays or ``jax.ShapeDtypeStruct``. Calls (``jit``, ``closed_call``, custom
derivative rules, the solver of a linear solve) are inlined, and what returns its operand unchanged is left out. A
rematerialised block is inlined behind optimization barriers, so that its recomputation survives common-subexpression
elimination while the planner sees every equation of it. ``scan``, ``while`` and ``cond`` keep their bodies as nested
programs.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jax.interpreters import partial_eval

from autopar import compat
from autopar.errors import AutoparError, TraceError
from autopar.ir.layers import MARK
from autopar.ir.program import Atom, Constant, Equation, Program, Value

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
_REMAT = ("remat", "remat2", "checkpoint")
_PLACEMENT = ("device_put", "sharding_constraint")
"""What a single-device step says about placement is dropped: the plan decides."""


@dataclass(frozen=True)
class Traced:
    """A traced step and what is needed to call it again.

    Attributes:
        program: the flat program; its arguments are the leaves of ``args`` in order.
        in_tree: structure of the positional arguments.
        out_tree: structure of the result.
        state: pairs (argument leaf, result leaf) that carry the training state from step to step.
    """

    program: Program
    in_tree: Any
    out_tree: Any
    state: tuple[tuple[int, int], ...]


def abstract(tree: Any) -> Any:
    """The shapes and dtypes of a pytree of arrays, scalars or ShapeDtypeStructs."""
    return jax.tree.map(compat.shape_struct, tree)


def trace(step: Callable[..., Any], *args: Any) -> Traced:
    """Traces ``step(*args)``; arrays are never made, shapes are enough.

    Raises:
        TraceError: the step branches on a traced value, returns a non-array, or is not a function of pytrees.
    """
    leaves, in_tree = jax.tree.flatten(args)
    try:
        shapes = [compat.shape_struct(leaf) for leaf in leaves]
        closed, out_shape = jax.make_jaxpr(step, return_shape=True)(*jax.tree.unflatten(in_tree, shapes))
    except AutoparError:
        raise
    except (TypeError, ValueError, jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise TraceError(
            f"the step cannot be traced: {type(error).__name__}: {str(error).splitlines()[0]}",
            where=compat.error_location(error) or getattr(step, "__name__", repr(step)),
            fix="make it a pure function of arrays; mark Python values with static_argnums",
        ) from error
    out_tree = jax.tree.structure(out_shape)
    names = [_path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(args)[0]]
    program = flatten(closed, names)
    return Traced(program, in_tree, out_tree, match_state(args, out_shape))


def _path_name(path: Sequence[Any]) -> str:
    parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    # The position of the argument says little when what it holds has names of its own.
    return "/".join(parts[1:]) if len(parts) > 1 else f"arg{parts[0]}"


def match_state(args: Any, out_shape: Any) -> tuple[tuple[int, int], ...]:
    """Pairs each argument with the result of the same structure and shapes, largest trees first.

    A train step takes its state and returns it updated. Neither position nor name says which: the
    argument ``(params, opt_state)`` and the result ``(params, opt_state, loss)`` meet piece by piece.
    """
    args, out_shape = abstract(args), abstract(out_shape)
    results = list(_subtrees(out_shape))
    taken: set[int] = set()
    pairs: list[tuple[int, int]] = []

    def match(tree: Any, start: int) -> None:
        n_leaves = len(jax.tree.leaves(tree))
        key = _signature(tree)
        for out_start, out_key, n_out in results:
            span = set(range(out_start, out_start + n_out))
            if out_key == key and n_out and not span & taken:
                taken.update(span)
                pairs.extend((start + i, out_start + i) for i in range(n_leaves))
                return
        for child in _children(tree):
            match(child, start)
            start += len(jax.tree.leaves(child))

    start = 0
    for arg in args:
        if not _is_leaf(arg):
            match(arg, start)
        start += len(jax.tree.leaves(arg))
    return tuple(pairs)


def _is_leaf(tree: Any) -> bool:
    return jax.tree_util.all_leaves([tree])


def _children(tree: Any) -> list[Any]:
    if _is_leaf(tree):
        return []
    return [child for _, child in jax.tree_util.tree_flatten_with_path(tree, lambda t: t is not tree)[0]]


def _subtrees(tree: Any, start: int = 0):
    """Every subtree with the position of its first leaf, outer before inner."""
    n_leaves = len(jax.tree.leaves(tree))
    yield start, _signature(tree), n_leaves
    for child in _children(tree):
        yield from _subtrees(child, start)
        start += len(jax.tree.leaves(child))


def _signature(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@dataclass
class _Flattener:
    """The state of one flattening: the equations so far, the names in use, and the arrays met on the way."""

    equations: list[Equation] = field(default_factory=list)
    used: dict[str, int] = field(default_factory=dict)
    barriers: Any = field(default_factory=itertools.count)
    hoisted: dict[int, tuple[Value, Any]] = field(default_factory=dict)

    def unique(self, base: str) -> str:
        count = self.used.get(base, 0)
        self.used[base] = count + 1
        if not count:
            return base
        name = f"{base}:{count + 1}"
        if name in self.used:
            return self.unique(base)
        self.used[name] = 1
        return name

    def constants(self, jaxpr: Any, consts: Sequence[Any]) -> list[Atom]:
        """What a jaxpr closes over: scalars are written into the equations, arrays become inputs, each once."""
        found: list[Atom] = []
        for const, var in zip(consts, jaxpr.constvars, strict=True):
            scalar = np.ndim(const) == 0 and not jax.numpy.issubdtype(var.aval.dtype, jax.dtypes.extended)
            found.append(Constant(const, var.aval) if scalar else self.array(const, var.aval))
        return found

    def array(self, const: Any, aval: Any) -> Value:
        """The input that stands for an array."""
        if id(const) not in self.hoisted:
            self.hoisted[id(const)] = (Value(self.unique("constant"), aval), const)
        return self.hoisted[id(const)][0]

    def nested(self, jaxpr: Any, consts: Sequence[Any], scope: str) -> Program:
        """The program of a region's body, with its own list of equations and the same table of names."""
        inner = _Flattener([], self.used, self.barriers)
        inputs = tuple(Value(self.unique(f"{scope}/in"), var.aval) for var in jaxpr.invars)
        outputs = inner.inline(jaxpr, inner.constants(jaxpr, consts), inputs, scope)
        values, arrays = zip(*inner.hoisted.values(), strict=True) if inner.hoisted else ((), ())
        return Program((*inputs, *values), tuple(outputs), tuple(inner.equations), arrays)

    def inline(self, jaxpr: Any, consts: Sequence[Atom], inputs: Sequence[Atom], scope: str) -> list[Atom]:
        """Adds the equations of a jaxpr; returns its outputs."""
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))

        def read(var: Any) -> Atom:
            return Constant(var.val, var.aval) if isinstance(var, jex.Literal) else env[var]

        for eqn in jaxpr.eqns:
            outputs = self.equation(eqn, [read(var) for var in eqn.invars], scope)
            env.update(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def equation(self, eqn: Any, inputs: list[Atom], scope: str) -> Sequence[Atom]:
        """Inlines a call, keeps anything else; returns the results."""
        name = eqn.primitive.name
        scope = _scope(scope, eqn.source_info.name_stack)
        if name in _PLACEMENT or _changes_nothing(eqn):
            return inputs
        if name in _CALLS and _CALLS[name] in eqn.params:
            return self.call(eqn.params[_CALLS[name]], inputs, scope)
        if name == "custom_linear_solve":
            return self.call(eqn.params["jaxprs"].solve, _solve_operands(inputs, eqn.params["const_lengths"]), scope)
        if name in _REMAT:
            if eqn.params["differentiated"] and eqn.params["prevent_cse"]:
                inputs = self.barrier(inputs, scope)
            return self.call(eqn.params["jaxpr"], inputs, scope)
        base = f"{_clean(scope)}/{name}".lstrip("/")
        outputs = tuple(Value(self.unique(base), var.aval) for var in eqn.outvars)
        bodies = tuple(
            self.nested(*_open(eqn.params[key][i] if i is not None else eqn.params[key]), outputs[0].name)
            for key, i in _bodies(eqn)
        )
        inputs, bodies, params = self.opened(eqn, inputs, bodies)
        kept = Equation(
            eqn.primitive,
            tuple(inputs),
            outputs,
            params,
            outputs[0].name if outputs else self.unique(base),
            eqn.source_info,
            "transpose(" in scope,
            bodies,
        )
        self.equations.append(kept)
        return outputs

    def call(self, jaxpr: Any, inputs: list[Atom], scope: str) -> list[Atom]:
        """Inlines a jaxpr, closed or not."""
        opened, consts = _open(jaxpr)
        return self.inline(opened, self.constants(opened, consts), inputs, scope)

    def opened(
        self, eqn: Any, inputs: list[Atom], bodies: tuple[Program, ...]
    ) -> tuple[list[Atom], tuple[Program, ...], dict[str, Any]]:
        """Passes the arrays that bodies close over as operands (a while loop is run as it is and keeps them)."""
        is_scan = eqn.primitive.name == "scan"
        params = compat.scan_params(eqn.params, len(inputs)) if is_scan else eqn.params
        if eqn.primitive.name not in ("scan", "cond") or not any(body.constants for body in bodies):
            return inputs, bodies, params
        outer: list[Atom] = []
        added: list[list[Value]] = [[] for _ in bodies]
        for body in bodies:
            for value, const in zip(body.inputs[len(body.arguments) :], body.constants, strict=True):
                outer.append(self.array(const, value.aval))
                for other, extra in zip(bodies, added, strict=True):
                    extra.append(value if other is body else Value(self.unique(value.name), value.aval))
        at = params["num_consts"] if is_scan else len(bodies[0].arguments)
        opened = tuple(
            Program((*body.arguments[:at], *extra, *body.arguments[at:]), body.outputs, body.equations)
            for body, extra in zip(bodies, added, strict=True)
        )
        first = at if is_scan else at + 1  # the first operand of a cond picks the branch
        params = params | ({"num_consts": at + len(outer)} if is_scan else {})
        return [*inputs[:first], *outer, *inputs[first:]], opened, params

    def barrier(self, inputs: list[Atom], scope: str) -> list[Atom]:
        """One optimization barrier over all inputs, written as an equation a value so that specs stay apart."""
        group = next(self.barriers)
        outputs: list[Atom] = []
        for atom in inputs:
            if isinstance(atom, Constant):
                outputs.append(atom)
                continue
            name = self.unique(f"{_clean(scope)}/recompute".lstrip("/"))
            result = Value(name, atom.aval)
            params = {"group": group}
            primitive = jax.lax.optimization_barrier_p
            self.equations.append(Equation(primitive, (atom,), (result,), params, name, "", True))
            outputs.append(result)
        return outputs


def _solve_operands(inputs: list[Atom], lengths: Any) -> list[Atom]:
    """What the solver inside a ``custom_linear_solve`` reads: what it closes over, and the right-hand sides."""
    start = lengths.matvec + lengths.vecmat
    return [*inputs[start : start + lengths.solve], *inputs[sum(lengths) :]]


def _changes_nothing(eqn: Any) -> bool:
    """Whether the only result is the only operand: the gradient of a 1 x 1 convolution reverses its kernel."""
    same = _SAME.get(eqn.primitive.name)
    if same is None or len(eqn.invars) != 1:
        return False
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    alike = (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)
    return alike and same(before.shape, eqn.params)


_SAME: dict[str, Callable[[tuple[int, ...], Any], bool]] = {
    "concatenate": lambda shape, params: True,
    "convert_element_type": lambda shape, params: True,
    "name": lambda shape, params: params["name"] != MARK,
    "reshape": lambda shape, params: params["dimensions"] is None,
    "rev": lambda shape, params: all(shape[dim] == 1 for dim in params["dimensions"]),
    "slice": lambda shape, params: True,
    "transpose": lambda shape, params: tuple(params["permutation"]) == tuple(range(len(shape))),
}
"""Primitives whose result may be their operand: given that its shape and dtype are the operand's, when it is."""


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _bodies(eqn: Any) -> list[tuple[str, int | None]]:
    """Where the nested programs of a region stand in its parameters."""
    name = eqn.primitive.name
    if name == "scan":
        return [("jaxpr", None)]
    if name == "while":
        return [("cond_jaxpr", None), ("body_jaxpr", None)]
    if name == "cond":
        return [("branches", i) for i in range(len(eqn.params["branches"]))]
    return []


def _scope(outer: str, stack: Any) -> str:
    inner = str(stack)
    return f"{outer}/{inner}" if outer and inner else outer or inner


_WRAPPERS = re.compile(r"\b(?:jvp|transpose|vmap|jit|pjit|checkpoint|rematted_computation|remat)\(([^()]*)\)")


def _clean(scope: str) -> str:
    """Drops the marks of transformations: ``transpose(jvp(GPT))/h_0`` reads ``GPT/h_0``."""
    before = None
    while before != scope:
        before, scope = scope, _WRAPPERS.sub(r"\1", scope)
    parts = [part for part in scope.split("/") if part and part not in ("checkpoint", "rematted_computation")]
    return "/".join(part for i, part in enumerate(parts) if i == 0 or part != parts[i - 1])


def flatten(closed: Any, names: Sequence[str]) -> Program:
    """A closed jaxpr as a Program: dead code dropped, calls inlined, array constants hoisted to inputs.

    Args:
        closed: a ClosedJaxpr.
        names: names of its arguments.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True)
    flattener = _Flattener()
    arguments = tuple(Value(flattener.unique(name), var.aval) for name, var in zip(names, jaxpr.invars, strict=True))
    constants = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    atoms = flattener.constants(jaxpr, [constants[var] for var in jaxpr.constvars])
    outputs = flattener.inline(jaxpr, atoms, arguments, "")
    hoisted = flattener.hoisted.values()
    return _live(
        Program(
            (*arguments, *(value for value, _ in hoisted)),
            tuple(outputs),
            tuple(flattener.equations),
            tuple(const for _, const in hoisted),
        )
    )


def _live(program: Program) -> Program:
    """Drops equations whose results nothing needs (inlining leaves some behind)."""
    live = {id(atom) for atom in program.outputs}
    kept: list[Equation] = []
    for eqn in reversed(program.equations):
        if any(id(value) in live for value in eqn.outputs):
            kept.append(eqn)
            live.update(id(atom) for atom in eqn.inputs)
    return Program(program.inputs, program.outputs, tuple(reversed(kept)), program.constants)
