"""Stage slicing against brute force, against the event simulator, and on models whose best slicing is known."""

import contextlib
import dataclasses
import math
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_slicing import ALIKE, MIXED, as_slice, brute_force, price, problems

from autopar.errors import InfeasibleError, ProblemError
from autopar.solver.schedule import SCHEDULES, ScheduleError, make_schedule
from autopar.solver.slicing import (
    Layer,
    LayerCosts,
    SlicingProblem,
    StageCost,
    StageCosts,
    Submesh,
    simulated_step_s,
    slice_stages,
    timeline,
)

LAYER = Layer(forward_s=8.0, state_bytes=16.0, gradient_bytes=2.0, activation_bytes=64.0, boundary_bytes=8.0)
ONE = (Submesh("1x1", 1),)


def check_against_brute_force(problem: SlicingProblem) -> None:
    best, least_bytes = brute_force(problem)
    if not best:
        message = "whatever their memory" if math.isinf(least_bytes) else f"is {least_bytes:.6g} bytes"
        with pytest.raises(InfeasibleError, match=message):
            slice_stages(problem)
        return
    slicing = slice_stages(problem)
    assert slice_stages(problem, n_runner_ups=0).total_s == pytest.approx(slicing.total_s)
    found = [slicing, *slicing.runner_ups]
    assert [one.total_s for one in found] == pytest.approx(sorted(best.values())[:4])
    for one in found:
        step_s, peak_bytes = price(problem, as_slice(one))
        assert one.total_s == pytest.approx(step_s)
        assert max(stage.peak_bytes for stage in one.stages) == pytest.approx(peak_bytes)
        assert peak_bytes <= problem.memory_bytes


@settings(max_examples=200, deadline=None)
@given(problems(MIXED))
def test_slicing_equals_brute_force_on_any_submeshes(problem):
    check_against_brute_force(problem)


@settings(max_examples=150, deadline=None)
@given(problems(ALIKE))
def test_slicing_equals_brute_force_where_devices_hold_several_stages(problem):
    check_against_brute_force(problem)


@settings(max_examples=50, deadline=None)
@given(problems((*MIXED, *ALIKE)))
def test_slicing_equals_brute_force_over_all_schedules(problem):
    check_against_brute_force(problem)


@dataclasses.dataclass(frozen=True)
class OneByOne:
    """The same costs without their table."""

    whole: StageCosts

    def cost(self, first_layer, last_layer, submesh, microbatches, remat) -> StageCost:
        return self.whole.cost(first_layer, last_layer, submesh, microbatches, remat)

    def transfer_s(self, boundary, sender, receiver, microbatches) -> float:
        return self.whole.transfer_s(boundary, sender, receiver, microbatches)


@dataclasses.dataclass(frozen=True)
class Synchronised(OneByOne):
    """One layer takes a second to synchronise."""

    layer: int

    def cost(self, first_layer, last_layer, submesh, microbatches, remat) -> StageCost:
        plain = super().cost(first_layer, last_layer, submesh, microbatches, remat)
        return dataclasses.replace(plain, sync_s=float(first_layer <= self.layer <= last_layer))


def model(*layers: Layer, n_devices: int = 4, **settings) -> SlicingProblem:
    """Layers on single devices, perfectly efficient; 8 microbatches unless said otherwise."""
    tied, bandwidth_Bps = settings.pop("tied", ()), settings.pop("bandwidth_Bps", 1e9)
    submeshes = settings.pop("submeshes", ONE)
    costs = LayerCosts(layers, {submesh.name: 1.0 for submesh in submeshes}, bandwidth_Bps, tied)
    return SlicingProblem(
        costs, len(layers), n_devices, submeshes, **{"microbatches": (8,), "remats": ("none", "full"), **settings}
    )


def lengths(slicing) -> list[int]:
    return [stage.last_layer - stage.first_layer + 1 for stage in slicing.stages]


def test_equal_layers_are_cut_evenly_and_a_heavy_one_gets_less_company():
    assert lengths(slice_stages(model(*[LAYER] * 8))) == [2, 2, 2, 2]
    heavy = dataclasses.replace(LAYER, forward_s=24.0)
    *others, last = lengths(slice_stages(model(*[LAYER] * 7, heavy)))
    assert (max(others), last) == (3, 1)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_prediction_is_what_the_simulator_finds_for_equal_stages(name):
    problem = model(*[LAYER] * 8, schedules=(name,), remats=("none",))
    slicing = slice_stages(problem)
    assert slicing.total_s == pytest.approx(simulated_step_s(problem, slicing), rel=1e-6)
    assert slicing.total_s - slicing.once_s == pytest.approx(timeline(problem, slicing).makespan_s, rel=1e-6)
    assert slicing.schedule == name


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=8, max_size=10), st.sampled_from(["gpipe", "1f1b", "zb_h1", "zb_h2"]))
def test_the_prediction_is_near_the_simulator_for_uneven_layers(sizes, name):
    layers = [dataclasses.replace(LAYER, forward_s=float(size)) for size in sizes]
    problem = model(*layers, schedules=(name,), remats=("none",), microbatches=(32,))
    slicing = slice_stages(problem)
    assert slicing.total_s == pytest.approx(simulated_step_s(problem, slicing), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(problems(ALIKE))
def test_a_device_with_several_stages_takes_no_more_memory_than_as_many_of_the_worst_of_them(problem):
    with contextlib.suppress(InfeasibleError):
        slicing = slice_stages(problem)
        m = slicing.microbatches
        schedule = make_schedule(slicing.schedule, slicing.n_pipeline_devices, m, slicing.n_chunks)
        costs = [problem.costs.cost(s.first_layer, s.last_layer, s.submesh, m, s.remat) for s in slicing.stages]
        fields = ("state_bytes", "activation_bytes_per_microbatch", "left_bytes_per_microbatch", "peak_extra_bytes")
        state, kept, left, extra = (max(getattr(cost, name) for cost in costs) for name in fields)
        for device, peak_bytes in enumerate(timeline(problem, slicing).peak_bytes):
            held = sum(row.count(device) for row in schedule.placements)
            each = max(kept, left) if schedule.split else kept
            assert peak_bytes <= held * state + schedule.in_flight_bounds[device] * each + extra + 1e-9


def test_synchronisation_is_hidden_where_a_device_is_done_early():
    # Only the last stage has gradients to synchronise; it is done while the others still drain.
    problem = model(*[LAYER] * 4, n_devices=4)
    late = dataclasses.replace(problem, costs=Synchronised(problem.costs, layer=3))
    slicing = slice_stages(late)
    assert slicing.once_s == 1.0
    assert simulated_step_s(late, slicing) == pytest.approx(slicing.total_s - 1.0)
    first = dataclasses.replace(problem, costs=Synchronised(problem.costs, layer=0))
    assert simulated_step_s(first, slice_stages(first)) == pytest.approx(slicing.total_s)


def test_cuts_go_where_little_is_sent():
    thin = dataclasses.replace(LAYER, boundary_bytes=1e-3)
    slicing = slice_stages(model(LAYER, thin, LAYER, LAYER, LAYER, thin, n_devices=2, bandwidth_Bps=0.1))
    assert lengths(slicing) == [2, 4]


def test_tied_layers_stay_together_when_their_gradients_are_dear():
    far = slice_stages(model(*[LAYER] * 4, n_devices=2))
    tied = slice_stages(model(*[LAYER] * 4, n_devices=2, tied=(((0, 3), 1e12),)))
    assert lengths(far) == [2, 2]
    assert lengths(tied) == [4]
    cheap = slice_stages(model(*[LAYER] * 4, n_devices=2, tied=(((0, 3), 1e9),)))
    assert lengths(cheap) == [2, 2]
    assert cheap.once_s == pytest.approx(far.once_s + 2.0)


def test_early_stages_of_1f1b_recompute_when_memory_is_short_and_late_ones_do_not():
    plenty = slice_stages(model(*[LAYER] * 8))
    assert {stage.remat for stage in plenty.stages} == {"none"}
    # A stage of two layers holds 32 bytes of state and 16 per activation: 2 of the 4 in flight do not fit.
    short = slice_stages(model(*[LAYER] * 8, memory_bytes=70.0))
    remats = [stage.remat for stage in short.stages]
    assert remats == sorted(remats)
    assert remats[0] == "full"
    assert remats[-1] == "none"
    assert max(stage.peak_bytes for stage in short.stages) <= 70.0
    assert short.total_s > plenty.total_s


def test_memory_decides_between_schedules():
    names = ("gpipe", "1f1b", "zb_h2")
    assert slice_stages(model(*[LAYER] * 8, schedules=names, remats=("none",))).schedule == "zb_h2"
    assert slice_stages(model(*[LAYER] * 8, schedules=names, remats=("none",), memory_bytes=100.0)).schedule == "1f1b"


def test_stages_get_submeshes_of_different_sizes_when_layers_differ():
    wide = (Submesh("1x1", 1), Submesh("1x2", 2))
    heavy = dataclasses.replace(LAYER, forward_s=16.0)
    slicing = slice_stages(model(heavy, LAYER, n_devices=3, submeshes=wide))
    assert [stage.submesh.n_devices for stage in slicing.stages] == [2, 1]


def test_the_parts_of_every_stage_add_up_to_the_step():
    problem = model(*[LAYER] * 9, n_devices=3, schedules=("1f1b",))
    slicing = slice_stages(problem)
    for stage in slicing.stages:
        cost = problem.costs.cost(stage.first_layer, stage.last_layer, stage.submesh, 8, stage.remat)
        once = cost.sync_s + cost.optimizer_s
        assert stage.busy_s == pytest.approx(8 * (cost.forward_s + cost.backward_s + cost.weight_s))
        assert stage.busy_s + stage.bubble_s + once == pytest.approx(slicing.total_s)
    assert [stage.sent_bytes for stage in slicing.stages] == [8.0, 8.0, 0.0]
    assert [stage.device for stage in slicing.stages] == [0, 1, 2]


def test_runner_ups_are_the_best_of_other_schedules_and_microbatches():
    problem = model(*[LAYER] * 8, schedules=("gpipe", "1f1b", "interleaved", "zb_h1"), microbatches=(4, 8, 16))
    slicing = slice_stages(problem, n_runner_ups=5)
    ranked = [slicing, *slicing.runner_ups]
    assert len(ranked) == 6
    assert len({(one.schedule, one.microbatches) for one in ranked}) == 6
    assert [one.total_s for one in ranked] == sorted(one.total_s for one in ranked)
    assert slice_stages(problem, n_runner_ups=0) == dataclasses.replace(slicing, runner_ups=())


def test_a_table_of_costs_gives_the_same_as_asking_for_every_stage():
    problem = model(*[LAYER] * 6, n_devices=4, submeshes=(*ONE, Submesh("1x2", 2)), tied=(((0, 5), 7.0),))
    assert isinstance(problem.costs, LayerCosts)
    assert slice_stages(problem) == slice_stages(dataclasses.replace(problem, costs=OneByOne(problem.costs)))


@settings(max_examples=60, deadline=None)
@given(problems(MIXED + ALIKE))
def test_more_memory_and_more_devices_never_make_it_slower(problem):
    def total_s(**changes) -> float:
        try:
            return slice_stages(dataclasses.replace(problem, **changes)).total_s
        except InfeasibleError:
            return math.inf

    assert total_s(memory_bytes=problem.memory_bytes * 1.5) <= total_s() * (1 + 1e-9)
    assert total_s(n_devices=problem.n_devices + 1) <= total_s() * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(problems(MIXED + ALIKE))
def test_the_least_memory_that_the_error_names_is_enough_and_no_byte_less(problem):
    with pytest.raises(InfeasibleError, match="no slicing") as caught:
        slice_stages(dataclasses.replace(problem, memory_bytes=0.0))
        # Stages that need nothing at all fit, too.
        raise InfeasibleError("no slicing of 0 bytes, whatever their memory")
    if "whatever their memory" not in str(caught.value):
        least = float(re.search(r"one needs is ([0-9.e+]+) bytes", str(caught.value))[1])  # pyright: ignore
        slice_stages(dataclasses.replace(problem, memory_bytes=least))
        with pytest.raises(InfeasibleError, match="no slicing"):
            slice_stages(dataclasses.replace(problem, memory_bytes=least - 0.01))


def test_what_does_not_fit_is_refused_with_the_least_memory_and_the_stage():
    with pytest.raises(
        InfeasibleError, match=r"(?s)the least that one needs is 48 bytes.*stage 0 of 4 \(layers 0 to 1 on"
    ):
        slice_stages(model(*[LAYER] * 8, memory_bytes=30.0))
    with pytest.raises(InfeasibleError, match="no slicing of 2 layers for 1 devices, whatever their memory"):
        slice_stages(model(LAYER, LAYER, n_devices=1, submeshes=(Submesh("1x2", 2),)))


MALFORMED = {
    "no submesh": ({"submeshes": ()}, ProblemError, "submeshes is empty"),
    "no microbatch": ({"microbatches": ()}, ProblemError, "microbatches is empty"),
    "half a microbatch": ({"microbatches": (0,)}, ProblemError, "must all be at least 1"),
    "unknown schedule": ({"schedules": ("best",)}, ScheduleError, "no schedule is called 'best'"),
}


@pytest.mark.parametrize("row", MALFORMED)
def test_a_malformed_problem_is_refused(row):
    changes, error, message = MALFORMED[row]
    with pytest.raises(error, match=message):
        dataclasses.replace(model(LAYER), **changes)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Every stage costs the same."""

    forward_s: float

    def cost(self, *_) -> StageCost:
        return StageCost(self.forward_s, 1.0, 1.0)

    def transfer_s(self, *_) -> float:
        return 0.0


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_costs_that_are_no_costs_are_refused(value):
    problem = dataclasses.replace(model(LAYER), costs=Constant(value))
    with pytest.raises(ProblemError, match=r"(?s)forward_s is (nan|-1.0) at .*return costs that are numbers"):
        slice_stages(problem)


def test_a_model_of_48_layers_on_64_devices_is_sliced_in_seconds():
    sizes = tuple(Submesh(f"1x{n}", n) for n in (1, 2, 4, 8, 16, 32, 64))
    head = dataclasses.replace(LAYER, forward_s=11.0)
    problem = model(*[LAYER] * 47, head, n_devices=64, submeshes=sizes, microbatches=(16, 64), memory_bytes=60.0)
    start_s = time.process_time()
    slicing = slice_stages(problem)
    assert time.process_time() - start_s < 10.0
    assert sum(lengths(slicing)) == 48
    assert sum(stage.submesh.n_devices for stage in slicing.stages) <= 64
