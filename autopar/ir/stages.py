"""Stage programs: a step cut into what each stage of a pipeline runs, with every value that passes between them.

    prologue  P   once per step, before the microbatches: casts of parameters, keys
    forward   F   once per microbatch, on the way up the stages
    backward  B   on the way down; with ``split_weights`` only what the stage below waits for (Qi et al. 2023)
    weights   W   the rest of the backward pass: the gradients of the stage's own parameters
    update    U   once per step, after the microbatches

Prologue and update run in *rounds*: a value that comes from the same part of another stage starts a new one, so that a
global norm is three rounds (each stage's share, their sum, the updates that it scales).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from autopar.ir.body import ancestors, free_values
from autopar.ir.layers import Layers
from autopar.ir.program import Atom, Equation, Program, Value
from autopar.ir.step import Step


class Part(IntEnum):
    """The parts of a stage, in the order in which a stage runs them."""

    PROLOGUE = 0
    FORWARD = 1
    BACKWARD = 2
    WEIGHTS = 3
    UPDATE = 4

    @property
    def letter(self) -> str:
        """As schedules write it."""
        return "PFBWU"[self]

    @property
    def per_microbatch(self) -> bool:
        """Whether it runs once per microbatch, not once per step."""
        return self in (Part.FORWARD, Part.BACKWARD, Part.WEIGHTS)


class Tag(NamedTuple):
    """A part of a stage, and the round in it."""

    part: Part
    round: int = 0


@dataclass(frozen=True, eq=False)
class Stage:
    """What one stage runs in one step.

    Attributes:
        program: its equations, part by part. Inputs are arguments and microbatches, or come from other stages; outputs
            are results of the step or go to other stages. The update reads gradients as the body makes them: whoever
            runs the program adds them up in between.
        tags: the part and round of each equation; those of no operand are missing, every part makes its own copy.
        state: pairs (input, output) that carry state of which this stage is the home.
        summed: values of the body that are combined over the microbatches before others read them, and how.
        sent: values that other stages read as they are made, not summed.
        scatters: whether gradients are reduced and scattered over the stage's devices in every microbatch, so that
            only shards are summed; else once, after the loop.
        rematerialised: whether its backward part runs the forward part again, and keeps only what it was sent.
    """

    program: Program
    tags: Mapping[Equation, Tag]
    state: tuple[tuple[int, int], ...]
    summed: Mapping[Value, str]
    sent: frozenset[Value]
    scatters: bool = False
    rematerialised: bool = False


@dataclass(frozen=True, eq=False)
class Stages:
    """A step in stages.

    Attributes:
        stages: their programs.
        step: what was cut (with sums of two stages moved behind the loop).
        home: the stage that keeps each argument that carries state.
        maker: the stage that makes a value, for every result of an equation that is not free.
        varying: values of which there is one for each microbatch.
    """

    stages: tuple[Stage, ...]
    step: Step
    home: Mapping[Value, int]
    maker: Mapping[Value, int]
    varying: frozenset[Value]


def cut(step: Step, layers: Layers, stage_of_layer: Sequence[int], *, split_weights: bool = False) -> Stages:
    """Cuts a step into stages.

    Args:
        step: the step around its loop.
        layers: the layer of each equation of its body.
        stage_of_layer: the stage of each layer, rising.
        split_weights: whether backward is split in an input and a weight part.
    """
    n_stages = stage_of_layer[-1] + 1
    of = {eqn: stage_of_layer[layer] for eqn, layer in layers.of.items()}
    step = sink_sums(step, of)
    free = free_values(step.equations, step.body.program.outputs)
    maker = {value: of[eqn] for eqn in step.body.program.equations if eqn in of for value in eqn.outputs}
    maker.update({whole: maker[part] for part, whole in (*step.sums.items(), *step.stacks.items())})
    _place_after([eqn for eqn in step.after if not free.issuperset(eqn.outputs)], of, maker)
    first = _first_readers(step, of)
    home = _homes(step, maker, first)
    _place_by_reader([eqn for eqn in step.before if not free.issuperset(eqn.outputs)], first, of, maker)
    cutting = _Cut(step, of, maker, home, _tags(step, layers, of, maker, split_weights), free)
    stages = tuple(cutting.stage(i) for i in range(n_stages))
    made = {value for eqn in step.body.program.equations for value in eqn.outputs}
    return Stages(stages, step, home, maker, frozenset(made | step.slices.keys()))


# -- sums of gradients from two stages

_SUMS = ("add_any", "add")
_LINEAR = ("transpose", "reshape", "neg", "convert_element_type", "squeeze", "expand_dims", "copy")


def sink_sums(step: Step, of: dict[Equation, int]) -> Step:
    """Moves additions of two stages' shares of a gradient behind the loop: each stage then sends its share once.

    So is a weight that two stages share: its gradient is a sum of what each of them makes.

    Args:
        step: the step.
        of: the stage of each equation of its body; sunk equations are dropped from it.
    """
    equations = list(step.body.program.equations)
    sums, after = dict(step.sums), list(step.after)
    monoids = dict(step.monoids)
    outputs = [v for v in step.body.program.outputs if isinstance(v, Value)]
    producer = {value: eqn for eqn in equations for value in eqn.outputs}
    reads: dict[Value, int] = {}
    for value in [v for eqn in equations for v in eqn.operands] + outputs:
        reads[value] = reads.get(value, 0) + 1
    gradients, waiting = set(step.body.gradients), list(outputs)
    while waiting:
        value = waiting.pop()
        eqn = producer.get(value)
        if eqn is None or reads[value] != 1 or monoids.get(value) != "sum" or not _sinks(eqn, producer, of):
            continue
        parts = {v: sums[v] if v in sums else Value(f"{v.name}/share", v.aval) for v in dict.fromkeys(eqn.operands)}
        after.insert(0, replace(eqn, inputs=_renamed(eqn.inputs, parts), outputs=(sums.pop(value),)))
        equations.remove(eqn)
        of.pop(eqn, None)
        outputs.remove(value)
        outputs += [v for v in parts if v not in sums]
        waiting += parts
        gradients |= set(parts) if value in gradients else set()
        sums.update(parts)
        monoids.update(dict.fromkeys(parts, "sum"))
    program = replace(step.body.program, equations=tuple(equations), outputs=tuple(outputs))
    body = replace(step.body, program=program, gradients=frozenset(gradients & set(outputs)))
    return replace(step, body=body, sums=sums, monoids=monoids, after=tuple(after))


def _sinks(eqn: Equation, producer: Mapping[Value, Equation], of: Mapping[Equation, int]) -> bool:
    """Whether the equation adds values of two stages, or passes such a sum on."""
    makers = [producer.get(value) for value in eqn.inputs if isinstance(value, Value)]
    if eqn.primitive.name in _SUMS and len(makers) == 2:
        stages = {of.get(maker) for maker in makers if maker is not None}
        return None not in makers and None not in stages and len(stages) == 2
    if eqn.primitive.name not in _LINEAR or len(makers) != 1 or makers[0] is None:
        return False
    return _sinks(makers[0], producer, of)


# -- where the equations outside of the loop run

_GLUE = 0
"""The stage of scalars that come from several stages."""


def _place_after(after: Sequence[Equation], of: dict[Equation, int], maker: dict[Value, int]) -> None:
    """The update of a parameter runs where its gradient is; what reads only arguments, where its reader is."""
    waiting = []
    for eqn in after:
        known = [value for value in eqn.operands if value in maker]
        if known:
            _put(eqn, _heaviest(known, maker), of, maker)
        else:
            waiting.append(eqn)
    first: dict[Value, int] = {}
    _read(after, of, first)
    _place_by_reader(waiting, first, of, maker)


def _heaviest(values: Sequence[Value], maker: Mapping[Value, int]) -> int:
    """The stage from which most bytes come, the first of equals; scalars count only where there is nothing else."""
    arrays = [value for value in values if value.shape]
    nbytes: dict[int, int] = {}
    for value in arrays or values:
        nbytes[maker[value]] = nbytes.get(maker[value], 0) + value.nbytes
    if len(nbytes) > 1 and not arrays:
        return _GLUE
    return min(nbytes, key=lambda stage: (-nbytes[stage], stage))


def _read(equations: Sequence[Equation], of: Mapping[Equation, int], first: dict[Value, int]) -> None:
    """Notes the first stage that reads each value."""
    for eqn in equations:
        for value in eqn.operands if eqn in of else ():
            first[value] = min(first.get(value, of[eqn]), of[eqn])


def _first_readers(step: Step, of: Mapping[Equation, int]) -> dict[Value, int]:
    first: dict[Value, int] = {}
    _read((*step.body.program.equations, *step.after), of, first)
    for part, whole in step.slices.items():
        first[whole] = min(first.get(whole, first[part]), first[part])
    return first


def _place_by_reader(
    waiting: Sequence[Equation], first: dict[Value, int], of: dict[Equation, int], maker: dict[Value, int]
) -> None:
    """Puts equations where their results are read first."""
    for eqn in reversed(waiting):
        _put(eqn, min((first[value] for value in eqn.outputs if value in first), default=_GLUE), of, maker)
        _read([eqn], of, first)


def _put(eqn: Equation, stage: int, of: dict[Equation, int], maker: dict[Value, int]) -> None:
    of[eqn] = stage
    maker.update(dict.fromkeys(eqn.outputs, stage))


def _homes(step: Step, maker: Mapping[Value, int], first: Mapping[Value, int]) -> dict[Value, int]:
    """State stays where its new value is made; what no step changes, where it is read first."""
    home = {}
    for i, o in step.state:
        value, result = step.inputs[i], step.outputs[o]
        made = maker.get(result) if isinstance(result, Value) else None
        home[value] = made if made is not None else first.get(value, _GLUE)
    return home


# -- tags


def _tags(
    step: Step, layers: Layers, of: Mapping[Equation, int], maker: Mapping[Value, int], split_weights: bool
) -> dict[Equation, Tag]:
    tags: dict[Equation, Tag] = {}
    body = [eqn for eqn in step.body.program.equations if eqn in of]
    for eqn in body:
        tags[eqn] = Tag(Part.FORWARD if eqn in layers.forward else Part.BACKWARD)
    if split_weights:
        tags.update(dict.fromkeys(_weight_parts(step, body, tags, of, maker), Tag(Part.WEIGHTS)))
    for part, equations in ((Part.PROLOGUE, step.before), (Part.UPDATE, step.after)):
        rounds: dict[Value, int] = {}
        for eqn in (eqn for eqn in equations if eqn in of):
            inner = (rounds[v] + (maker[v] != of[eqn]) for v in eqn.operands if v in rounds)
            tags[eqn] = Tag(part, max(inner, default=0))
            rounds.update(dict.fromkeys(eqn.outputs, tags[eqn].round))
    return tags


def _weight_parts(
    step: Step, body: Sequence[Equation], tags: Mapping[Equation, Tag], of: Mapping[Equation, int], maker: Mapping
) -> set[Equation]:
    """The backward equations that no stage below waits for.

    The first stage sends nothing down: there it is those that serve one gradient alone.
    """
    backward = [eqn for eqn in body if tags[eqn].part == Part.BACKWARD]
    sent = {v for eqn in backward for v in eqn.operands if v in maker and maker[v] != of[eqn]}
    found = set(backward) - ancestors(backward, sent)
    made = {v for eqn in backward for v in eqn.outputs}
    for stage in {of[eqn] for eqn in backward} - {maker[v] for v in sent & made}:
        own = [eqn for eqn in backward if of[eqn] == stage]
        found -= set(own) - _of_one_result(own, step.sums)
    return found


def _of_one_result(equations: Sequence[Equation], results: Mapping[Value, Value]) -> set[Equation]:
    serves: dict[Value, frozenset[Value]] = {}
    found = set()
    for eqn in reversed(equations):
        served = frozenset().union(*(serves.get(v, frozenset()) | ({v} & results.keys()) for v in eqn.outputs))
        if len(served) <= 1:
            found.add(eqn)
        for value in eqn.operands:
            serves[value] = serves.get(value, frozenset()) | served
    return found


# -- the program of a stage


@dataclass(frozen=True, eq=False)
class _Cut:
    """Where every equation runs."""

    step: Step
    of: Mapping[Equation, int]
    maker: Mapping[Value, int]
    home: Mapping[Value, int]
    tags: Mapping[Equation, Tag]
    free: frozenset[Value]

    @cached_property
    def _equations(self) -> dict[int, list[Equation]]:
        """What each stage runs."""
        found: dict[int, list[Equation]] = {}
        for eqn in self.step.equations:
            if eqn in self.of:
                found.setdefault(self.of[eqn], []).append(eqn)
        return found

    @cached_property
    def _readers(self) -> tuple[dict[Value, int], set[Value]]:
        """A stage that reads each value, and the values that several read."""
        first, shared = dict[Value, int](), set[Value]()
        for index, equations in self._equations.items():
            for eqn in equations:
                shared.update(value for value in eqn.operands if first.setdefault(value, index) != index)
        return first, shared

    @cached_property
    def _free_equations(self) -> list[Equation]:
        return [eqn for eqn in self.step.equations if self.free.issuperset(eqn.outputs)]

    def stage(self, index: int) -> Stage:
        """The program of one stage."""
        step, tags = self.step, self.tags
        alias = {total: part for part, total in step.sums.items() if self.maker[part] == index}
        mine = sorted(self._equations.get(index, ()), key=tags.__getitem__)
        own = {_aliased(eqn, alias): tags[eqn] for eqn in mine}
        equations = (*self._needed_free(own), *own)
        made = {value for eqn in equations for value in eqn.outputs}
        inputs = tuple(dict.fromkeys(value for eqn in equations for value in eqn.operands if value not in made))
        sent, carried = self._leaving(index, made, alias)
        outputs = tuple(v for eqn in equations for v in eqn.outputs if v in carried)
        read, returned = ({value: i for i, value in enumerate(values)} for values in (inputs, outputs))
        state = tuple(
            (read[arg], returned[new])
            for arg, new in self._carried_state(index, alias)
            if arg in read and new in returned
        )
        summed = {part: step.monoids[part] for part in step.sums if self.maker[part] == index}
        return Stage(Program(inputs, outputs, equations), own, state, summed, sent)

    def _leaving(
        self, index: int, made: set[Value], alias: Mapping[Value, Value]
    ) -> tuple[frozenset[Value], set[Value]]:
        """What other stages, or slices and stacks, read as it is made; that and what is summed or a result."""
        step = self.step
        first, shared = self._readers
        abroad = {v for v in (*made, *alias) if v in shared or first.get(v, index) != index}
        sent = frozenset(made & (abroad | set(step.slices.values()) | step.stacks.keys()) & self.maker.keys())
        results = {alias.get(v, v) for v in step.outputs if isinstance(v, Value)}
        summed = {alias[v] for v in abroad if v in alias}
        return sent, made & self.maker.keys() & (sent | results | summed)

    def _carried_state(self, index: int, alias: Mapping[Value, Value]) -> Iterator[tuple[Value, Value]]:
        for i, o in self.step.state:
            arg, new = self.step.inputs[i], self.step.outputs[o]
            if self.home[arg] == index and isinstance(new, Value):
                yield arg, alias.get(new, new)

    def _needed_free(self, mine: Mapping[Equation, Tag]) -> list[Equation]:
        """What the stage's equations read that depends on nothing; each stage makes its own copy."""
        needed = ancestors(self._free_equations, {value for eqn in mine for value in eqn.operands} & self.free)
        return [eqn for eqn in self._free_equations if eqn in needed]


def _aliased(eqn: Equation, alias: Mapping[Value, Value]) -> Equation:
    """The equation with sums over microbatches read under the names that the body gives them."""
    if not any(value in alias for value in eqn.operands):
        return eqn
    return replace(eqn, inputs=_renamed(eqn.inputs, alias))


def _renamed(atoms: Sequence[Atom], names: Mapping[Value, Value]) -> tuple[Atom, ...]:
    return tuple(names.get(atom, atom) if isinstance(atom, Value) else atom for atom in atoms)
