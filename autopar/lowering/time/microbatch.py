"""A traced step over time: microbatches of its batch, and chunks of other dimensions, before anything is planned."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from autopar.errors import MicrobatchError
from autopar.ir.program import Equation, Program, Value, check
from autopar.ir.trace import Traced
from autopar.lowering.pipelined.step import Pipelining, pipelined_step
from autopar.lowering.time.indices import findable_in_parts
from autopar.lowering.time.phased import LOOP_NAME, split_over_time
from autopar.lowering.time.roles import role_size
from autopar.plan import Splitting
from autopar.sharding.time.phases import Phases, find_phases
from autopar.sharding.time.timing import Cut, Question


def split_step(traced: Traced, splitting: Splitting) -> Traced:
    """The step in microbatches (or as a pipeline) and chunks, as loops of its program; it computes what it did.

    Args:
        traced: the step.
        splitting: how many microbatches, and which other dimensions to cut.

    Raises:
        MicrobatchError: a pattern matches nothing, a dimension does not divide, or the step needs the batch as a whole.
    """
    if splitting.chunk:
        traced = replace(traced, program=findable_in_parts(traced.program))
    program = traced.program
    if splitting.stages > 1:
        how = Pipelining(splitting.stages, splitting.microbatches, splitting.rounds)
        program = pipelined_step(traced, batch_arguments(traced, splitting.batch), how).program
    elif splitting.microbatches > 1:
        program = split_over_time(batch_phases(traced, splitting), LOOP_NAME)
    for number, (pattern, dim, count) in enumerate(splitting.chunk):
        if dim is None:
            size = role_size(pattern, traced.program, batch_arguments(traced, splitting.batch))
            value, dim = _largest(program, size, pattern)
        else:
            value = _chosen(program, pattern, dim)
        program = _chunked(program, value, dim, count, f"chunks_{number}")
    check(program)
    return replace(traced, program=program)


def _chunked(program: Program, value: Value, dim: int, count: int, name: str) -> Program:
    """Cuts a value of the program or of the body of one of its scans."""
    taken = {v.name for body in _bodies(program) for v in _values(body)}
    if any(value in eqn.outputs for eqn in program.equations):
        return split_over_time(chunk_phases(program, value, dim, count), name, taken)

    def inside(body: Program) -> Program:
        if any(value in eqn.outputs for eqn in body.equations):
            return split_over_time(
                chunk_phases(body, value, dim, count), name, taken | {v.name for v in _values(program)}
            )
        return replace(body, equations=tuple(map(opened, body.equations)))

    def opened(eqn: Equation) -> Equation:
        made_here = eqn.primitive.name == "scan" and "jaxpr" not in eqn.params  # others run as JAX wrote them
        return replace(eqn, bodies=tuple(map(inside, eqn.bodies))) if made_here else eqn

    return inside(program)


def _bodies(program: Program) -> Iterator[Program]:
    for eqn in program.equations:
        for body in eqn.bodies:
            yield body
            yield from _bodies(body)


def _values(program: Program) -> Iterator[Value]:
    yield from program.inputs
    for eqn in program.equations:
        yield from eqn.outputs


def _made(program: Program) -> Iterator[Value]:
    """What the equations of a program make, and those of loops over microbatches."""
    places = [program, *(b for eqn in program.equations if "jaxpr" not in eqn.params for b in eqn.bodies)]
    return (value for place in places for eqn in place.equations for value in eqn.outputs)


def _largest(program: Program, size: int, name: str) -> tuple[Value, int]:
    """The largest value with a dimension of that size behind its first, and that dimension."""
    found = [(value, value.shape.index(size, 1)) for value in _made(program) if size in value.shape[1:]]
    if not found:
        raise MicrobatchError(
            f"no value of the step has a dimension '{name}' of {size}",
            where="chunk",
            fix="name a value and its dimension",
        )
    return max(found, key=lambda each: each[0].nbytes)


def _chosen(program: Program, pattern: str, dim: int) -> Value:
    """The largest value of that name that has that dimension, in the program or in a loop over microbatches."""
    named = [v for v in _made(program) if re.fullmatch(pattern, v.name)]
    made = [v for v in named if -len(v.shape) <= dim < len(v.shape)]
    if not made:
        raise MicrobatchError(
            f"no value of the step matches '{pattern}' and has a dimension {dim}",
            where="chunk",
            fix="name a value as autopar explain lists them",
        )
    return max(made, key=lambda v: v.nbytes)


def batch_phases(traced: Traced, splitting: Splitting) -> Phases:
    """What each loop over the microbatches runs and keeps, and what runs once.

    Args:
        traced: the step.
        splitting: ``microbatches``, ``batch`` and ``allow``.

    Raises:
        MicrobatchError: as for ``split_step``.
    """
    steps, values = splitting.microbatches, batch_arguments(traced, splitting.batch)
    for value in values:
        if value.shape[0] % steps:
            raise MicrobatchError(
                f"{steps} microbatches do not divide the batch of {value.shape[0]}",
                where=f"argument {value.name}, shape {value.shape}",
                fix="choose a divisor of the batch",
            )
    question = Question(traced.program, steps, {value: Cut(0) for value in values})
    return find_phases(question, frozenset(splitting.allow))


def batch_arguments(traced: Traced, pattern: str = "") -> list[Value]:
    """The arguments that have the batch as dimension 0: those that the pattern matches.

    Without a pattern, of the arguments that the step does not return for the most part (or of the last one, if it
    does), those leaves that share the most common first dimension. A wrong guess costs time, never exactness.
    """
    program = traced.program
    if pattern:
        found = [value for value in program.arguments if value.shape and re.fullmatch(pattern, value.name)]
        if not found:
            raise MicrobatchError(
                f"no argument matches '{pattern}'",
                where=f"arguments: {', '.join(value.name for value in program.arguments[-5:])}",
                fix="give batch= a regular expression of argument names",
            )
        return found
    data = [value for value in _data(traced) if value.shape]
    if not data:
        raise MicrobatchError(
            "the step has no batch: it returns every argument updated",
            fix="name the arguments of the batch with batch='pattern'",
        )
    (size, _), *_ = Counter(value.shape[0] for value in data).most_common(1)
    return [value for value in data if value.shape[0] == size]


def _data(traced: Traced) -> list[Value]:
    """The leaves of the arguments of which the step returns at most half; those of the last one of several if none."""
    returned, start, spans = {i for i, _ in traced.state}, 0, []
    for tree in traced.in_tree.children():
        spans.append(range(start, start + tree.num_leaves))
        start = spans[-1].stop
    data = [span for span in spans if 2 * len(returned.intersection(span)) <= len(span)] or spans[1:][-1:]
    return [traced.program.arguments[i] for span in data for i in span]


def chunk_phases(program: Program, value: Value, dim: int, count: int) -> Phases:
    """The loops that make a value in ``count`` parts of its dimension ``dim``, never whole.

    Only equations that read a part of it, or of a value as large, run in the loops; they may run again in each.

    Raises:
        MicrobatchError: the dimension cannot be cut.
    """
    cut = Cut(dim % len(value.shape))
    if value.shape[cut.dim] % count:
        raise MicrobatchError(
            f"{count} chunks do not divide dimension {cut.dim} of {value.name}",
            where=f"shape {value.shape}",
            fix="choose a divisor",
        )
    question = Question(program, count, {value: cut})
    wide = find_phases(question, frozenset({"recompute"}))
    return find_phases(replace(question, only=_as_large(wide, value)), frozenset({"recompute"}))


def _as_large(phases: Phases, value: Value) -> frozenset[Value]:
    """Split values that are as large as ``value`` themselves, or on the way to one that is."""
    found: set[Value] = set()
    of = phases.timings.of
    for eqn in reversed(phases.question.program.equations):
        for output in eqn.outputs:
            if of[output].cut and (output.nbytes >= value.nbytes or output in found):
                found.update(atom for atom in eqn.operands if of[atom].cut)
                found.add(output)
    return frozenset(found)
