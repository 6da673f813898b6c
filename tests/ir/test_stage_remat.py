"""Stages that compute their activations again: the same step, with less kept between forward and backward."""

import pytest

from autopar.ir.program import Value, check
from autopar.ir.remat import rematerialised
from autopar.ir.stages import Part, Stages
from autopar.solver.schedule import make_schedule
from tests.ir.test_stages import assert_computes_the_step, staged

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


def test_only_the_chosen_stages_compute_again() -> None:
    _, plain = staged("chain", make_schedule("1f1b", 2, 2, 1))
    found = rematerialised(plain, [1])
    assert found.stages[0] is plain.stages[0] and len(kept(found, 0)) == len(kept(plain, 0)) > 0
