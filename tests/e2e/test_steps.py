"""Every model x mesh x preset on 8 CPU devices: the losses of one device, the collectives of the plan."""

import pytest

from benchmarks.cases import Built, Case, cases, reference_losses

STEPS = 4
DEFAULT = {
    Case("mlp", "a=2,b=2,c=2"),
    Case("gpt", "data=2,tensor=4"),
    Case("gpt", "data=8", "zero3"),
    Case("moe", "data=2,tensor=4", "gshard"),
    Case("wide_resnet", "data=8", "dp"),
}
"""What the default run takes; the rest is slow."""

TABLE = [pytest.param(case, id=str(case), marks=() if case in DEFAULT else pytest.mark.slow) for case in cases()]


@pytest.mark.parametrize("case", TABLE)
def test_a_planned_step_equals_one_device_and_sends_what_its_plan_predicts(case: Case) -> None:
    built = Built(case)
    assert built.losses(STEPS) == pytest.approx(reference_losses(case.model, STEPS), rel=1e-5)
    assert built.differences() == ()
    everything, products = built.flops_ratios()
    if case.model == "wide_resnet":  # the count of products takes no notice of a convolution's padding
        assert everything == pytest.approx(1, abs=0.07)  # XLA's fusions repeat arithmetic between tiny convolutions
    else:  # XLA on CPU counts random bits too low, so that everything is no measure
        assert products == pytest.approx(1, abs=0.03)
