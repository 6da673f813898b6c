"""Stages that compute their activations again: the same step, with less kept between forward and backward."""

import jax
import numpy as np
import pytest

from autopar.ir.program import Value, check
from autopar.ir.remat import rematerialised
from autopar.ir.stages import Part, Stages, Tag
from autopar.solver.schedule import make_schedule
from tests.ir.test_stages import STEPS, Serial, assert_computes_the_step, staged

TABLE = [
    ("chain", "1f1b", 2),
    ("tied", "1f1b", 2),
    ("skipping", "gpipe", 4),
    ("dropped", "1f1b", 2),
    ("rematerialised", "1f1b", 2),
    ("biased", "zb_h1", 3),
]


def kept(stages: Stages, index: int) -> set[Value]:
    """What the forward part of a stage makes and its other parts read."""
    tags = stages.stages[index].tags
    made = {v for eqn, tag in tags.items() if tag.part == Part.FORWARD for v in eqn.outputs}
    later = (Part.BACKWARD, Part.WEIGHTS)
    return made & {v for eqn, tag in tags.items() if tag.part in later for v in eqn.operands}


@pytest.mark.parametrize(("name", "schedule", "p"), TABLE, ids=[f"{row[0]}-{row[1]}" for row in TABLE])
def test_stages_that_compute_again_compute_the_step_and_keep_nothing(name: str, schedule: str, p: int) -> None:
    order = make_schedule(schedule, p, 2, 1)
    traced, plain = staged(name, order)
    stages = rematerialised(plain, range(p))
    for index, stage in enumerate(stages.stages):
        check(stage.program)
        assert not kept(stages, index)
    assert any(kept(plain, index) for index in range(p))
    assert_computes_the_step(stages, order, traced, name)


@pytest.mark.parametrize("name", ["dropped", "masked"])
def test_what_is_computed_again_is_the_same_bits(name: str) -> None:
    order = make_schedule("1f1b", 2, 2, 1)
    traced, plain = staged(name, order)
    stages, pairs = rematerialised(plain, range(2)), []
    for before, after in zip(plain.stages, stages.stages, strict=True):
        forward = {eqn.name: eqn for eqn, tag in before.tags.items() if tag.part == Part.FORWARD}
        copies = (eqn for eqn in after.tags if eqn.name.endswith("/again"))
        pairs += [
            p for e in copies for p in zip(forward[e.name.removesuffix("/again")].outputs, e.outputs, strict=True)
        ]
    serial = Serial(stages)
    leaves = [*jax.tree.leaves(STEPS[name][1]), *traced.program.constants]
    serial.once.update(zip(stages.step.inputs, leaves, strict=True))
    for stage in (0, 1):
        serial.run(stage, Tag(Part.PROLOGUE))
    for task in (Tag(Part.FORWARD), Tag(Part.BACKWARD)):
        for stage in (0, 1) if task.part == Part.FORWARD else (1, 0):
            serial.run(stage, task, 0)
    assert pairs
    for value, copy in pairs:
        np.testing.assert_array_equal(serial.each[copy, 0], serial.each[value, 0])


def test_only_the_chosen_stages_compute_again() -> None:
    _, plain = staged("chain", make_schedule("1f1b", 2, 2, 1))
    found = rematerialised(plain, [1])
    assert found.stages[0] is plain.stages[0] and len(kept(found, 0)) == len(kept(plain, 0)) > 0
