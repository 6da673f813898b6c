"""A step around its loop over microbatches: what runs before the loop, in it, and after it.

The loop is the scan into which ``autopar.lowering.time.phased`` writes a program that was cut at its time axis. A
pipeline runs its iterations in an order of its own, so the scan is taken apart: what it carries are sums of terms, what
it scans are slices of whole values, what it stacks are parts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from autopar.errors import AutoparError
from autopar.ir.body import Body, ancestors
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.ir.regions import ScanParts

MONOIDS = {"add": "sum", "add_any": "sum", "max": "max", "min": "min", "and": "and", "or": "or"}
"""What a carry adds up, by the primitive that combines it with an iteration's term."""


class LoopError(AutoparError, ValueError):
    """A loop whose iterations depend on each other: they are not microbatches."""


@dataclass(frozen=True, eq=False)
class Step:
    """A step around its loop over microbatches.

    Attributes:
        inputs: the step's arguments, then constants.
        outputs: its results.
        state: pairs (argument, result) of the training state.
        before: equations that run once, before the loop.
        body: what runs per microbatch. It reads inputs of the step, results of ``before``, and slices.
        after: equations that run once, after the loop.
        sums: for each result of the body that is combined over the microbatches, the value of the step that it makes.
        monoids: how each of them is combined: sum, max, min, and, or.
        slices: for each input of the body that differs between microbatches, the value whose first dimension they are.
        stacks: for each result of the body of which every microbatch keeps its own, the value of all of them.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]
    state: tuple[tuple[int, int], ...]
    before: tuple[Equation, ...]
    body: Body
    after: tuple[Equation, ...]
    sums: Mapping[Value, Value]
    monoids: Mapping[Value, str]
    slices: Mapping[Value, Value]
    stacks: Mapping[Value, Value]

    @property
    def equations(self) -> tuple[Equation, ...]:
        """All equations: before, in and after the loop."""
        return (*self.before, *self.body.program.equations, *self.after)


def around_loop(program: Program, state: tuple[tuple[int, int], ...], loop: Equation) -> Step:
    """Takes a step apart at a scan over microbatches.

    Args:
        program: the step.
        state: pairs (argument, result) of the training state.
        loop: one of its equations: a scan whose carries are sums of terms.

    Raises:
        LoopError: a carry of the scan is something else.
    """
    (body,) = loop.bodies
    parts = ScanParts.of(loop)
    outer: dict[Value, Atom] = dict(zip(body.inputs[: parts.n_consts], loop.inputs, strict=False))
    maker = {value: eqn for eqn in body.equations for value in eqn.outputs}
    ends = [atom for atom in body.outputs if isinstance(atom, Value)]
    carries = zip(body.inputs[parts.n_consts : parts.first_x], ends, strict=False)
    terms = [_term(loop, carry, maker.get(new)) for carry, new in carries]
    combining = {maker[new] for new in ends[: parts.n_carry]}
    kept = tuple(_renamed(eqn, outer) for eqn in body.equations if eqn not in combining)
    sums = {term: total for (term, _), total in zip(terms, loop.outputs, strict=False)}
    stacks = dict(zip(ends[parts.n_carry :], loop.outputs[parts.n_carry :], strict=True))
    scanned = zip(body.inputs[parts.first_x :], loop.inputs[parts.first_x :], strict=True)
    slices = {part: whole for part, whole in scanned if isinstance(whole, Value)}
    before, after = _around(program, loop, (*loop.inputs[: parts.n_consts], *slices.values()))
    made = {value for eqn in kept for value in eqn.outputs}
    inputs = tuple(dict.fromkeys(v for eqn in kept for v in eqn.operands if v not in made))
    slices = {part: whole for part, whole in slices.items() if part in inputs}
    read = _needed_by_state(program, state, after)
    gradients = frozenset(v for v, whole in (sums | stacks).items() if whole in read)
    arguments = {v for eqn in before for v in eqn.operands} | set(inputs)
    owners = _owners(program, [(i, o) for i, o in state if program.inputs[i] in arguments], after, sums)
    loop_body = Body(Program(inputs, (*sums, *stacks), kept), frozenset(slices), _origins(before), gradients, owners)
    monoids = dict(terms)
    return Step(program.inputs, program.outputs, state, before, loop_body, after, sums, monoids, slices, stacks)


def _origins(before: tuple[Equation, ...]) -> dict[Value, Value]:
    """What each value made before the loop was mostly made from."""
    largest = {eqn: max(eqn.operands, key=lambda v: v.nbytes, default=None) for eqn in before}
    return {value: source for eqn, source in largest.items() if source is not None for value in eqn.outputs}


def _owners(
    program: Program, state: Sequence[tuple[int, int]], after: tuple[Equation, ...], sums: Mapping[Value, Value]
) -> dict[Value, Value]:
    """The parameter that each gradient updates: values as large as both lead from the one to the other."""
    producer = {value: eqn for eqn in after for value in eqn.outputs}
    of_total: dict[Value, list[Value]] = {}
    for i, o in state:
        parameter, waiting = program.inputs[i], [program.outputs[o]]
        size, seen = math.prod(parameter.shape), set()
        while waiting and parameter.shape:
            value = waiting.pop()
            if not isinstance(value, Value) or value in seen or math.prod(value.shape) != size:
                continue
            seen.add(value)
            of_total.setdefault(value, []).append(parameter)
            waiting += producer[value].operands if value in producer else ()
    read = {part: of_total.get(total, []) for part, total in sums.items()}
    return {part: found[0] for part, found in read.items() if found}


def _needed_by_state(program: Program, state: tuple[tuple[int, int], ...], after: tuple[Equation, ...]) -> set[Value]:
    results = {value for _, o in state if isinstance(value := program.outputs[o], Value)}
    return results | {value for eqn in ancestors(after, results) for value in eqn.operands}


def _renamed(eqn: Equation, outer: Mapping[Value, Atom]) -> Equation:
    if not any(value in outer for value in eqn.operands):
        return eqn
    return replace(eqn, inputs=tuple(outer.get(a, a) if isinstance(a, Value) else a for a in eqn.inputs))


def _term(loop: Equation, carry: Value, eqn: Equation | None) -> tuple[Value, str]:
    """What an iteration contributes to a carry, and how it is combined."""
    monoid = MONOIDS.get(eqn.primitive.name) if eqn is not None else None
    terms = [atom for atom in eqn.inputs if atom is not carry] if eqn is not None else []
    if monoid is None or len(terms) != 1 or not isinstance(terms[0], Value):
        raise LoopError(
            f"{carry.name} is no sum over the iterations of {loop.name}",
            where=f"it becomes {eqn}",
            fix="cut a loop over microbatches, as autopar.lowering.time.phased writes it",
        )
    return terms[0], monoid


def _around(
    program: Program, loop: Equation, operands: tuple[Atom, ...]
) -> tuple[tuple[Equation, ...], tuple[Equation, ...]]:
    """What must run before the loop, and what is left of the rest without it."""
    earlier = ancestors(program.equations, {a for a in operands if isinstance(a, Value)})
    needed = {atom for atom in program.outputs if isinstance(atom, Value)}
    others = [eqn for eqn in program.equations if eqn is not loop and eqn not in earlier]
    used = ancestors(others, needed)
    flat = without_conds([eqn for eqn in others if eqn in used])
    live = ancestors(flat, needed)
    return tuple(eqn for eqn in program.equations if eqn in earlier), tuple(eqn for eqn in flat if eqn in live)


def without_conds(equations: Sequence[Equation]) -> tuple[Equation, ...]:
    """The equations with both branches of every cond run, and one chosen, so that each result is made by itself.

    An update that happens in every k-th step only (``optax.MultiSteps``) is one cond over the parameters of all stages.
    """
    found: list[Equation] = []
    for eqn in equations:
        if eqn.primitive.name != "cond" or not eqn.bodies:
            found.append(eqn)
            continue
        index, cases = eqn.inputs[0], []
        for body in eqn.bodies if isinstance(index, Value) else [eqn.bodies[int(index.value)]]:
            operands = dict(zip(body.inputs, eqn.inputs[1:], strict=True))
            found += without_conds([_renamed(inner, operands) for inner in body.equations])
            cases.append([operands.get(a, a) if isinstance(a, Value) else a for a in body.outputs])
        for value, *choices in zip(eqn.outputs, *cases, strict=True):
            found.append(_chosen(eqn, value, choices))
    return tuple(found)


def _chosen(cond: Equation, value: Value, choices: Sequence[Atom]) -> Equation:
    index = cond.inputs[0] if len(choices) > 1 else Constant(np.int32(0), cond.inputs[0].aval)
    return Equation(jax.lax.select_n_p, (index, *choices), (value,), {}, value.name, cond.source, cond.backward)
