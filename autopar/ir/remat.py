"""Stages that run their forward part again at the start of their backward part, and keep only what they were sent.

Chen et al. 2016, "Training deep nets with sublinear memory cost"; in pipelines: Huang et al. 2019 (GPipe), section 2.3.
"""

from collections.abc import Collection
from dataclasses import replace

from autopar.ir.body import ancestors
from autopar.ir.program import Equation, Value
from autopar.ir.stages import Part, Stage, Stages, Tag


def rematerialised(stages: Stages, which: Collection[int]) -> Stages:
    """The stages, of which some compute their activations again where the backward part needs them.

    Args:
        stages: a step in stages.
        which: the stages that shall.
    """
    made: set[Value] = set()
    found = [_again(stage, made) if index in which else stage for index, stage in enumerate(stages.stages)]
    return replace(stages, stages=tuple(found), varying=stages.varying | made)


def _again(stage: Stage, made: set[Value]) -> Stage:
    """A stage whose backward equations read copies of the forward ones; ``made`` takes what the copies make."""
    backward = [eqn for eqn, tag in stage.tags.items() if tag.part in (Part.BACKWARD, Part.WEIGHTS)]
    forward = [eqn for eqn, tag in stage.tags.items() if tag.part == Part.FORWARD]
    needed = ancestors(forward, {value for eqn in backward for value in eqn.operands})
    copies: dict[Value, Value] = {}
    again = [_copy(eqn, copies) for eqn in forward if eqn in needed]
    made.update(copies.values())
    equations: list[Equation] = []
    tags: dict[Equation, Tag] = {}
    for eqn in stage.program.equations:
        tag = stage.tags.get(eqn)
        if again and tag is not None and tag.part > Part.FORWARD:
            equations += again
            tags.update(dict.fromkeys(again, Tag(Part.BACKWARD)))
            again = []
        own = _reading(eqn, copies) if tag is not None and tag.part in (Part.BACKWARD, Part.WEIGHTS) else eqn
        equations.append(own)
        if tag is not None:
            tags[own] = tag
    program = replace(stage.program, equations=tuple(equations))
    return replace(stage, program=program, tags=tags, rematerialised=True)


def _copy(eqn: Equation, copies: dict[Value, Value]) -> Equation:
    eqn = _reading(eqn, copies)
    outputs = tuple(Value(f"{value.name}/again", value.aval) for value in eqn.outputs)
    copies.update(zip(eqn.outputs, outputs, strict=True))
    return replace(eqn, outputs=outputs, name=f"{eqn.name}/again")


def _reading(eqn: Equation, copies: dict[Value, Value]) -> Equation:
    inputs = tuple(copies.get(atom, atom) if isinstance(atom, Value) else atom for atom in eqn.inputs)
    return eqn if inputs == eqn.inputs else replace(eqn, inputs=inputs)
