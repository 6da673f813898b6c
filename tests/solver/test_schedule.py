"""Schedules against their papers: who holds how much, how long devices idle, and an oracle for the times."""

import dataclasses
import itertools
import math
import xml.dom.minidom
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipelines import chunks, pipelines, priced_pipelines

from autopar.errors import AutoparError
from autopar.solver.schedule import (
    SCHEDULES,
    Kind,
    Schedule,
    ScheduleError,
    Task,
    TaskCosts,
    draw_svg,
    draw_text,
    family,
    make_schedule,
    simulate,
    validate,
)

F, B, W, E, L = Kind

# name -> the paper's bubble as a share of all time, where tF = tB + tW = 1 (unsplit) or tF = tB = tW = 1 (split);
# and the activations that the fullest device holds. Given p, m, v with m a multiple of p, and m >= 2p.
PAPERS = {
    "gpipe": (lambda p, m, v: Fraction(p - 1, m + p - 1), lambda p, m, v: m),
    "1f1b": (lambda p, m, v: Fraction(p - 1, m + p - 1), lambda p, m, v: p),
    "eager_1f1b": (lambda p, m, v: Fraction(p - 1, m + p - 1), lambda p, m, v: 2 * p - 1),
    "interleaved": (lambda p, m, v: Fraction(p - 1, v * m + p - 1), lambda p, m, v: v * p + p - 1),
    "zb_h1": (lambda p, m, v: Fraction(p - 1, 3 * m + p - 1), lambda p, m, v: p),
    "zb_h2": (lambda p, m, v: Fraction(p - 1, 3 * m + p - 1), lambda p, m, v: 2 * p - 1),
    "dualpipe_v": (lambda p, m, v: Fraction(p - 1, 6 * m + p - 1), lambda p, m, v: 2 * p + 1),
    "chimera": (lambda p, m, v: Fraction(p - 2, 2 * m + p - 2), lambda p, m, v: p),
    "wave": (lambda p, m, v: Fraction(p - 1, v * m + p - 1), lambda p, m, v: v * p),
    "bpipe": (lambda p, m, v: Fraction(p - 1, m + p - 1), lambda p, m, v: math.ceil((p + 2) / 2)),
}
SIZES = [(2, 4), (3, 6), (4, 8), (4, 12), (6, 24), (8, 16)]


def every_chunking(name: str, p: int, m: int) -> list[tuple[int, Schedule]]:
    """``(v, schedule)`` for each number of chunks that the pipeline can take."""
    possible = [v for v in chunks(name) if not family(name).complaint(family(name).pipeline(p, m, v))]
    return [(v, make_schedule(name, p, m, v)) for v in possible]


def uniform(schedule: Schedule) -> TaskCosts:
    return TaskCosts.uniform(schedule.n_stages, 1.0, 1.0, 1.0 if schedule.split else 0.0)


def slow_ends(schedule: Schedule, costs: TaskCosts) -> dict[Task, float]:
    """When each task ends if transfers are free: relaxation until nothing changes."""
    tasks = [(order, index) for order in schedule.tasks for index in range(len(order))]
    split = {(t.stage, t.microbatch) for order in schedule.tasks for t in order if t.kind == "W"}
    ends = {order[index]: 0.0 for order, index in tasks}
    seconds = {"F": costs.forward_s, "B": costs.backward_s, "W": costs.weight_s}
    changed = True
    while changed:
        changed = False
        for order, index in tasks:
            task = order[index]
            stage, microbatch = task.stage, task.microbatch
            inputs = [order[index - 1]] if index else []
            if task.kind == "F" and stage:
                inputs.append(Task(stage - 1, microbatch, F))
            if task.kind == "B":
                inputs.append(Task(stage, microbatch, F))
                inputs += [Task(stage + 1, microbatch, B)] * (stage + 1 < schedule.n_stages)
            lasts = 0.0 if task.kind in "EL" else seconds[task.kind][stage]
            if task.kind == "B" and (stage, microbatch) not in split:
                lasts += costs.weight_s[stage]
            end = max((ends[t] for t in inputs), default=0.0) + lasts
            if not math.isclose(end, ends[task], abs_tol=1e-12):
                ends[task], changed = end, True
    return ends


def test_every_schedule_has_a_row_of_its_paper():
    assert sorted(PAPERS) == sorted(SCHEDULES)


@pytest.mark.parametrize("name", sorted(PAPERS))
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_the_bubble_is_the_one_of_the_paper(name, p, m):
    for v, schedule in every_chunking(name, p, m):
        timeline = simulate(schedule, uniform(schedule))
        assert timeline.bubble_fraction == pytest.approx(float(PAPERS[name][0](p, m, v)), abs=1e-12)


@pytest.mark.parametrize("name", sorted(PAPERS))
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_the_fullest_device_holds_what_the_paper_says(name, p, m):
    for v, schedule in every_chunking(name, p, m):
        peak = max(simulate(schedule, uniform(schedule)).peak_in_flight)
        assert peak == max(schedule.in_flight_bounds)
        assert (
            peak <= PAPERS[name][1](p, m, v) if name in ("interleaved", "bpipe") else peak == PAPERS[name][1](p, m, v)
        )


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("times", [(1.0, 1.0, 1.0), (2.0, 2.0, 1.0), (2.0, 3.0, 1.0), (3.0, 2.0, 2.0)])
def test_zero_bubble_leaves_the_papers_idle_time(p, m, times):
    f, b, w = times
    h1, h2 = (make_schedule(name, p, m) for name in ("zb_h1", "zb_h2"))
    costs = TaskCosts.uniform(p, f, b, w)
    idle = simulate(h1, costs).makespan_s - m * (f + b + w)
    assert idle == pytest.approx((p - 1) * (f + b - w))
    spans = simulate(h2, costs).span_s
    assert max(spans) - m * (f + b + w) <= (p - 1) * max(0.0, f + b - 2 * w) + 1e-9


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_zb_h2_keeps_every_device_busy_from_its_first_to_its_last_task(p, m):
    timeline = simulate(make_schedule("zb_h2", p, m), TaskCosts.uniform(p, 1.0, 1.0, 1.0))
    assert timeline.span_s == timeline.busy_s


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_dualpipe_v_idles_no_longer_than_deepseeks_formula(p, m):
    f, b, w = 1.0, 1.0, 1.0
    timeline = simulate(make_schedule("dualpipe_v", p, m), TaskCosts.uniform(2 * p, f, b, w))
    whole, fused = b + w, f + b + w
    assert timeline.makespan_s - 2 * m * (f + b + w) <= (p - 1) * (fused + whole - 3 * w)


def test_the_best_orders_of_one_model_come_in_the_order_of_the_literature():
    def step_s(name, v=1):
        schedule = make_schedule(name, 4, 8, v if v > 1 else None)
        share = 1.0 / schedule.pipeline.v
        return simulate(schedule, TaskCosts.uniform(schedule.n_stages, share, share, share)).makespan_s

    assert step_s("gpipe") == step_s("1f1b") > step_s("interleaved", 2) > step_s("interleaved", 4)
    assert step_s("1f1b") > step_s("zb_h1") == step_s("zb_h2") > step_s("dualpipe_v")
    assert step_s("1f1b") > step_s("chimera")


@settings(max_examples=300, deadline=None)
@given(pipelines())
def test_every_schedule_is_valid_whatever_its_sizes(schedule):
    validate(schedule)


@settings(max_examples=60, deadline=None)
@given(priced_pipelines())
def test_the_simulator_agrees_with_relaxation_where_transfers_are_free(priced):
    schedule, costs = priced
    free = dataclasses.replace(costs, transfer_s=(), move_s=())
    timeline = simulate(schedule, free)
    ends = slow_ends(schedule, free)
    assert {event.task: event.end_s for event in timeline.tasks} == pytest.approx(
        {task: end for task, end in ends.items() if task.kind not in "EL"}
    )


@settings(max_examples=60, deadline=None)
@given(priced_pipelines())
def test_inputs_arrive_before_tasks_start_and_nothing_does_two_things_at_once(priced):
    schedule, costs = priced
    for overlap in (True, False):
        timeline = simulate(schedule, costs, overlap=overlap)
        starts = {event.task: event.start_s for event in timeline.tasks}
        assert len(starts) == len(timeline.tasks) == sum(t.kind in "FBW" for order in schedule.tasks for t in order)
        for event in timeline.transfers:
            reader = {F: event.task.stage + 1, B: event.task.stage - 1}.get(event.task.kind)
            if reader is not None:
                assert starts[dataclasses.replace(event.task, stage=reader)] >= event.end_s
            if event.task.kind == "L":
                assert starts[dataclasses.replace(event.task, kind=B)] >= event.end_s
        lanes = [*timeline.by_device]
        lanes += [
            [e for e in timeline.transfers if (e.device, e.receiver) == ends]
            for ends in {(e.device, e.receiver) for e in timeline.transfers}
        ]
        for lane in lanes:
            assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(lane))


@settings(max_examples=60, deadline=None)
@given(priced_pipelines())
def test_no_device_holds_more_than_claimed_however_long_tasks_take(priced):
    schedule, costs = priced
    for overlap in (True, False):
        peaks = simulate(schedule, costs, overlap=overlap).peak_in_flight
        assert all(peak <= claimed for peak, claimed in zip(peaks, schedule.in_flight_bounds, strict=True))


@settings(max_examples=50, deadline=None)
@given(priced_pipelines())
def test_transfers_cost_time_and_hiding_them_saves_some(priced):
    schedule, costs = priced
    free = simulate(schedule, dataclasses.replace(costs, transfer_s=(), move_s=())).makespan_s
    assert free <= simulate(schedule, costs).makespan_s + 1e-9
    assert free <= simulate(schedule, costs, overlap=False).makespan_s + 1e-9


@settings(max_examples=200, deadline=None)
@given(pipelines(), st.sampled_from([(1, 1, 1), (1, 1, 0), (2, 2, 1), (2, 1, 1), (3, 2, 1), (2, 2, 3), (1, 0.5, 0.5)]))
def test_the_fill_formula_is_the_simulated_step_of_equal_stages(schedule, times):
    s, found = schedule.pipeline, family(schedule.name)
    formula = s.m * s.v * sum(times) + max(s.p - found.traits.slowest, 0) * found.fill(s, *times)
    simulated = simulate(schedule, TaskCosts.uniform(schedule.n_stages, *times)).makespan_s
    if schedule.name in ("zb_h1", "zb_h2") and s.m < 2 * s.p - 1:
        assert simulated <= formula + 1e-9
    else:
        assert simulated == pytest.approx(formula)


def test_eager_1f1b_hides_transfers_that_1f1b_waits_for():
    costs = dataclasses.replace(TaskCosts.uniform(4, 1.0, 1.0, 1.0), transfer_s=(1.0, 1.0, 1.0))
    waits, hides = (simulate(make_schedule(name, 4, 16), costs).makespan_s for name in ("1f1b", "eager_1f1b"))
    assert hides < waits < simulate(make_schedule("1f1b", 4, 16), costs, overlap=False).makespan_s


def test_a_transfer_costs_its_sender_time_only_where_it_does_not_overlap():
    costs = dataclasses.replace(TaskCosts.uniform(2, 1.0, 1.0, 0.0), transfer_s=(2.0,))
    schedule = make_schedule("gpipe", 2, 2)
    assert draw_text(simulate(schedule, costs)) == (
        "device 0 |F0 F1 .  .  .  .  .  .  .  B0 .  B1\ndevice 1 |.  .  .  F0 .  F1 B0 B1 .  .  .  ."
    )
    assert draw_text(simulate(schedule, costs, overlap=False)) == (
        "device 0 |F0 .  .  F1 .  .  .  .  .  .  B0 .  .  B1\ndevice 1 |.  .  .  F0 .  .  F1 B0 .  .  B1 .  .  ."
    )


def test_peak_memory_counts_state_activations_and_what_weight_parts_keep():
    costs = dataclasses.replace(
        TaskCosts.uniform(2), activation_bytes=(10.0, 20.0), kept_bytes=(3.0, 4.0), state_bytes=(100.0, 200.0)
    )
    assert simulate(make_schedule("1f1b", 2, 4), costs).peak_bytes == (120.0, 220.0)
    assert simulate(make_schedule("gpipe", 2, 4), costs).peak_bytes == (140.0, 280.0)
    assert simulate(make_schedule("zb_h1", 2, 4), costs).peak_bytes == (120.0, 224.0)
    # Two replicas of both stages on each device.
    assert simulate(make_schedule("chimera", 2, 4), costs).peak_bytes == (330.0, 330.0)


def test_bpipe_evens_out_memory_and_costs_no_time_if_moves_are_hidden():
    costs = dataclasses.replace(TaskCosts.uniform(8), activation_bytes=(1.0,) * 8, move_s=(0.5,) * 8)
    plain, even = (simulate(make_schedule(name, 8, 16), costs) for name in ("1f1b", "bpipe"))
    assert plain.peak_bytes == (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
    assert max(even.peak_bytes) == 5.0
    assert even.makespan_s == plain.makespan_s
    assert simulate(even.schedule, costs, overlap=False).makespan_s > plain.makespan_s


def test_devices_hold_the_stages_that_the_papers_give_them():
    assert make_schedule("interleaved", 3, 3, 2).placements == ((0, 1, 2, 0, 1, 2),)
    assert make_schedule("wave", 3, 3, 4).placements == ((0, 1, 2, 2, 1, 0, 0, 1, 2, 2, 1, 0),)
    assert make_schedule("dualpipe_v", 2, 4).placements == ((0, 1, 1, 0),)
    assert make_schedule("chimera", 4, 4).placements == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert make_schedule("chimera", 4, 4).stages_of(1) == (1, 2)
    assert make_schedule("bpipe", 4, 4).partners == (3, 2, 1, 0)


REFUSED = {
    "unknown": (("fastest", 2, 2), "no schedule is called 'fastest'.*choose one of 1f1b"),
    "no device": (("1f1b", 0, 2), "p=0 devices"),
    "chunks of a plain schedule": (("gpipe", 2, 2, 2), "v=2 virtual stages per device: it has 1"),
    "interleaved in parts": (("interleaved", 4, 6), "m=6 microbatches: not a multiple of p=4"),
    "interleaved of one": (("interleaved", 4, 8, 1), "v=1 virtual stage per device: use 1f1b"),
    "half a wave": (("wave", 4, 8, 3), "a wave goes there and back, so v is even"),
    "a wave in parts": (("wave", 4, 6), "m=6 microbatches: not a multiple of p=4"),
    "odd chimera": (("chimera", 3, 6), "p=3 devices: two directions need an even number"),
    "chimera in parts": (("chimera", 4, 6), "m=6 microbatches: not a multiple of p=4"),
    "few microbatches": (("dualpipe_v", 4, 7), "m=7 microbatches: it needs at least 2p=8"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_a_pipeline_that_a_schedule_cannot_take_is_refused(row):
    arguments, message = REFUSED[row]
    with pytest.raises(ScheduleError, match=f"(?s){message}"):
        make_schedule(*arguments)
    assert issubclass(ScheduleError, AutoparError)
    assert issubclass(ScheduleError, ValueError)


def changed(schedule: Schedule, device: int, edit) -> Schedule:
    tasks = [list(order) for order in schedule.tasks]
    tasks[device] = edit(tasks[device])
    return dataclasses.replace(schedule, tasks=tuple(map(tuple, tasks)))


PLAIN, BALANCED = make_schedule("1f1b", 2, 2), make_schedule("bpipe", 8, 8)
BROKEN = {
    "missing": (changed(PLAIN, 0, lambda order: order[:-1]), r"B\(stage 0, microbatch 1\) occurs 0 times"),
    "twice": (changed(PLAIN, 0, lambda order: [*order, order[-1]]), r"B\(stage 0, microbatch 1\) occurs 2 times"),
    "two weight parts": (
        changed(PLAIN, 0, lambda order: [*order, *[Task(0, 0, W)] * 2]),
        r"W\(stage 0, microbatch 0\) occurs 2 times",
    ),
    "outside": (changed(PLAIN, 0, lambda order: [*order, Task(2, 0, W)]), "outside of the pipeline"),
    "elsewhere": (
        changed(PLAIN, 1, lambda order: [*order, Task(0, 0, W)]),
        r"W\(stage 0, microbatch 0\) is listed on device 1, but placed on 0",
    ),
    "deadlock": (
        changed(PLAIN, 1, lambda order: order[::-1]),
        r"deadlock: B\(stage 0, microbatch 0\), B\(stage 1, microbatch 1\) wait",
    ),
    "greedy": (
        changed(PLAIN, 1, lambda order: sorted(order, key=lambda t: t.kind != F)),
        "device 1 holds 2 activations, but schedule '1f1b' claims 1",
    ),
    "no partner": (dataclasses.replace(BALANCED, partners=()), "has no partner device"),
    "never loaded": (
        changed(BALANCED, 0, lambda order: [t for t in order if t.kind != L]),
        "has no partner device or no task L to match",
    ),
    "used while away": (
        changed(BALANCED, 0, lambda order: sorted(order, key=lambda t: t.kind == L)),
        r"deadlock: B\(stage 0, microbatch 4\)",
    ),
}


@pytest.mark.parametrize("row", BROKEN)
def test_the_validator_names_what_is_wrong(row):
    schedule, message = BROKEN[row]
    with pytest.raises(ScheduleError, match=f"(?s){message}"):
        validate(schedule)


def test_the_simulator_refuses_costs_of_another_pipeline_and_notices_a_deadlock():
    with pytest.raises(ScheduleError, match="another number of stages than the 2"):
        simulate(PLAIN, TaskCosts.uniform(3))
    for apart in ((), ((0, 1), (1, 0))):
        with pytest.raises(ScheduleError, match=r"(?s)stops with a deadlock.*validate\(schedule\)"):
            simulate(BROKEN["deadlock"][0], TaskCosts.uniform(2), apart=apart)


def test_the_drawing_of_1f1b_is_the_one_of_its_paper():
    timeline = simulate(make_schedule("1f1b", 3, 4), TaskCosts.uniform(3, 1.0, 1.0, 0.0))
    assert draw_text(timeline).splitlines() == [
        "device 0 |F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3",
        "device 1 |.  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .",
        "device 2 |.  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .",
    ]


def test_a_long_timeline_is_drawn_on_few_columns_and_chunks_name_their_stage():
    timeline = simulate(make_schedule("interleaved", 2, 100), TaskCosts.uniform(4, 1.0, 1.0, 0.0))
    assert max(map(len, draw_text(timeline).splitlines())) < 2000
    assert "F0.2" in draw_text(timeline, column_s=1.0)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_svg_has_one_box_per_task_and_says_when_it_ran(name):
    schedule = make_schedule(name, 2, 4)
    document = xml.dom.minidom.parseString(draw_svg(simulate(schedule, TaskCosts.uniform(schedule.n_stages))))
    n_tasks = sum(task.kind in "FBW" for order in schedule.tasks for task in order)
    assert len(document.getElementsByTagName("rect")) == n_tasks
    assert "F(stage 0, microbatch 0): 0 s to 1 s" in document.toxml()
