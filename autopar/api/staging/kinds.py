"""Which layers of a step are alike, and the stages that hold one of a kind: planning one of them is planning all."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autopar.ir.layers import Layers, free_values
from autopar.ir.program import Atom, Constant, Equation, Value
from autopar.ir.stages import Stage, Stages, cut, sink_sums
from autopar.ir.step import Step

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, eq=False)
class Part:
    """A run of layers as the one stage of a cut that holds them.

    Attributes:
        stages: the step, cut so that one stage is this run.
        index: of that stage.
    """

    stages: Stages
    index: int

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self.stages.stages[self.index]

    def scattering(self) -> "Part":
        """The same stage, whose gradients are scattered in every microbatch."""
        stages = list(self.stages.stages)
        stages[self.index] = replace(self.stage, scatters=True)
        return Part(replace(self.stages, stages=tuple(stages)), self.index)


@dataclass(frozen=True)
class Tied:
    """An argument that several layers read.

    Attributes:
        layers: these layers.
        nbytes: of the argument, and so of its gradient.
    """

    layers: tuple[int, ...]
    nbytes: int


# -- kinds


def layer_kinds(step: Step, layers: Layers) -> tuple[int, ...]:
    """The kind of each layer, numbered as they appear: layers of one kind run equal equations on equal shapes.

    Compared are the equations of the loop and those that follow from its gradients alone (the update), up to names
    and literals.
    """
    known: dict[str, int] = {}
    shown: dict[int, str] = {}
    members = _members(step, layers)
    return tuple(known.setdefault(structure(equations, shown)[0], len(known)) for equations in members)


def _members(step: Step, layers: Layers) -> list[list[Equation]]:
    members: list[list[Equation]] = [[] for _ in range(layers.n_layers)]
    owner: dict[Value, int] = {}
    for eqn in step.body.program.equations:
        if eqn in layers.of:
            members[layers.of[eqn]].append(eqn)
            owner.update(dict.fromkeys(eqn.outputs, layers.of[eqn]))
    owner = {whole: owner[part] for part, whole in step.sums.items() if part in owner}
    for eqn in step.after:
        owners = {owner[value] for value in eqn.operands if value.shape and value in owner}
        if len(owners) == 1:
            (layer,) = owners
            members[layer].append(eqn)
            owner.update(dict.fromkeys(eqn.outputs, layer))
    return members


def structure(equations: Iterable[Equation], shown: dict[int, str]) -> tuple[str, dict[Value, int]]:
    """A hash of equations that forgets names and all of literals but whether they are zero, as plans do.

    Args:
        equations: in order.
        shown: what parameters and avals look like, by identity, as far as that was asked before.

    Returns:
        The hash, and the number that stands for each value.
    """
    digest, number = hashlib.sha256(), dict[Value, int]()

    def text(item: object) -> str:
        if id(item) not in shown:
            shown[id(item)] = _ADDRESS.sub("", repr(item))
        return shown[id(item)]

    def atom(a: Atom) -> str:
        if isinstance(a, Constant):
            return f"{'literal' if np.any(a.value) else 'zero'}:{text(a.aval)}"
        return f"{number.setdefault(a, len(number))}:{text(a.aval)}"

    groups: dict[object, int] = {}
    for eqn in equations:
        own = dict(eqn.params)
        if "group" in own:  # of the rematerialised block that a barrier belongs to: a name
            own["group"] = groups.setdefault(own["group"], len(groups))
        params = ",".join(f"{key}={own[key] if key == 'group' else text(own[key])}" for key in own)
        ends = " ".join(map(atom, (*eqn.inputs, *eqn.outputs)))
        digest.update(f"{eqn.primitive.name}[{params}]{ends}\n".encode())
    return digest.hexdigest(), number


# -- parts


def parts_of_kinds(step: Step, layers: Layers, kinds: Sequence[int]) -> dict[tuple[int, ...], Part]:
    """For every kind one such layer as a stage; for a kind that follows itself, two of them as a stage."""
    first: dict[tuple[int, ...], int] = {}
    for layer, kind in reversed(list(enumerate(kinds))):
        first[(kind,)] = layer
        if layer + 1 < len(kinds) and kinds[layer + 1] == kind:
            first[kind, kind] = layer
    found: dict[tuple[int, ...], Part] = {}
    waiting = {run: range(layer, layer + len(run)) for run, layer in first.items()}
    while waiting:
        chosen = _disjoint(waiting)
        number = _numbered(chosen.values(), len(kinds))
        stages = cut(step, layers, number, split_weights=True)
        for run, span in chosen.items():
            found[run] = Part(stages, number[span.start])
            del waiting[run]
    return found


def _disjoint(spans: Mapping[tuple[int, ...], range]) -> dict[tuple[int, ...], range]:
    chosen: dict[tuple[int, ...], range] = {}
    free = -1
    for run, span in sorted(spans.items(), key=lambda item: (item[1].stop, item[1].start)):
        if span.start > free:
            chosen[run] = span
            free = span.stop - 1
    return chosen


def _numbered(spans: Collection[range], n_layers: int) -> tuple[int, ...]:
    """The stage of each layer, where each of the spans is a stage and what lies between them too."""
    starts = {0, *(span.start for span in spans), *(span.stop for span in spans)} - {n_layers}
    number, found = -1, []
    for layer in range(n_layers):
        number += layer in starts
        found.append(number)
    return tuple(found)


# -- what passes between layers


def crossing_bytes(step: Step, layers: Layers) -> tuple[int, ...]:
    """For each boundary between layers, the bytes that one microbatch sends across it, the larger of both ways."""
    of = dict(layers.of)
    sink_sums(step, of)  # shares of one gradient are sent once per step
    free = free_values(step.body.program.equations, step.body.program.outputs)
    made = {v: layer for eqn, layer in of.items() for v in eqn.outputs if v not in free}
    ends = dict(made)
    up, down = ([0] * (layers.n_layers - 1) for _ in range(2))
    for value, reader in _reads(of, made):
        rises, reach = reader > made[value], ends[value]
        if rises and reader > reach:
            _add(up, range(max(reach, made[value]), reader), value.nbytes)
            ends[value] = reader
        elif not rises and reader < reach:
            _add(down, range(reader, reach), value.nbytes)
            ends[value] = reader
    return tuple(map(max, up, down))


def _reads(of: Mapping[Equation, int], made: Mapping[Value, int]) -> Iterator[tuple[Value, int]]:
    for eqn, layer in of.items():
        for value in eqn.operands:
            if value in made and made[value] != layer:
                yield value, layer


def _add(totals: list[int], boundaries: range, nbytes: int) -> None:
    for boundary in boundaries:
        totals[boundary] += nbytes


def tied_arguments(step: Step, layers: Layers) -> tuple[Tied, ...]:
    """The arguments of more than one dimension that several layers read, directly or as a copy made before the loop."""
    arguments = {step.inputs[i] for i, _ in step.state}
    readers: dict[Value, set[int]] = {}
    for eqn, layer in layers.of.items():
        for value in eqn.operands:
            while value in step.body.origin:
                value = step.body.origin[value]
            if value in arguments and len(value.shape) > 1:
                readers.setdefault(value, set()).add(layer)
    return tuple(Tied(tuple(sorted(where)), v.nbytes) for v, where in readers.items() if len(where) > 1)
