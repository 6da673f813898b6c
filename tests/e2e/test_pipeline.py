"""Pipelines on 8 CPU devices: every schedule trains the models as one device does, and holds what it says."""

import pytest

from benchmarks.pipelines import Case, cases, outcome

FAST = {Case("gpt", "1f1b", 2, "data=2"), Case("gpt", "interleaved", 2, "data=1")}


def table() -> list[object]:
    marked = ((case, () if case in FAST else pytest.mark.slow) for case in cases())
    return [pytest.param(case, marks=marks, id=str(case)) for case, marks in marked]


@pytest.mark.parametrize("case", table())
def test_a_pipeline_trains_as_one_device_does(case: Case) -> None:
    found = outcome(case, steps=3)
    assert found.loss_error <= 1e-5
    assert found.parameter_error <= 1e-4
    assert found.held == found.allowed
