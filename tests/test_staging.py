"""Pipelines planned from traced steps: layers of a kind are found, their costs add up, the search is exact."""

import functools
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

import pytest

import autopar
from autopar.api.planning import traced_in_time
from autopar.api.staging.costs import Priced
from autopar.api.staging.kinds import Part, layer_kinds, tied_arguments
from autopar.api.staging.links import apart
from autopar.api.staging.search import (
    Layered,
    Search,
    StagesPlan,
    search_traced,
    submeshes,
)
from autopar.api.staging.stored import timeline_of
from autopar.api.staging.tables import AGAIN, KEEP, LayerTables
from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.errors import InfeasibleError
from autopar.ir.arguments import adapt
from autopar.ir.remat import rematerialised
from autopar.ir.stages import cut
from autopar.ir.trace import Traced
from autopar.lowering.pipeline.cut import microbatched
from autopar.plan import Splitting
from autopar.solver.slicing import Slicing, SlicingProblem, slice_stages
from benchmarks.cases import make

TINY: dict[str, Any] = {"layers": 4, "width": 256, "heads": 4, "seq": 64, "batch": 16, "abstract": True}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {**TINY, "vocab": 128, "optimizer": "sgd"},
    "bert": {**TINY, "vocab": 512, "optimizer": "sgd"},
}
M = 4


@functools.cache
def traced(model: str) -> Traced:
    step, *args = make(model, **MODELS[model])
    return traced_in_time(adapt(step, args))[0]


@functools.cache
def layered(model: str, n_layers: int = 4) -> Layered:
    return Layered.of(microbatched(traced(model), Splitting(microbatches=M)), n_layers)


@functools.cache
def planned(model: str) -> StagesPlan:
    search = Search(
        devices=4,
        hardware="v100",
        microbatches=(M,),
        schedules=("1f1b", "gpipe", "zb_h1"),
        layers=4,
        stage_devices=(1, 4),
    )
    return search_traced(traced(model), 0.0, search)


@pytest.mark.parametrize(("model", "n_layers", "kinds"), [("gpt", 4, (0, 1, 1, 2)), ("bert", 4, (0, 1, 1, 2))])
def test_layers_with_equal_equations_are_of_one_kind(model, n_layers, kinds):
    found = layered(model, n_layers)
    assert found.kinds == kinds
    assert set(found.parts) == {(0,), (1,), (2,), (1, 1)}


def test_rematerialised_layers_are_alike_though_their_barriers_are_numbered():
    step, *args = make("gpt", **MODELS["gpt"], remat=True)
    found = Layered.of(microbatched(traced_in_time(adapt(step, args))[0], Splitting(microbatches=M)), 4)
    assert layer_kinds(found.step, found.layers) == (0, 1, 1, 2)


def test_the_residual_stream_is_what_crosses_and_the_table_is_tied():
    found = layered("gpt")
    tokens, width = TINY["batch"] // M * TINY["seq"], TINY["width"]
    assert found.boundary_bytes == (4 * tokens * width,) * 3
    (tied,) = tied_arguments(found.step, found.layers)
    assert (tied.layers, tied.nbytes) == ((0, 3), 4 * 128 * width)


@pytest.mark.parametrize("mesh", ["data=1,tensor=1", "data=2,tensor=2"])
@pytest.mark.parametrize("run", [(1, 2), (0, 1), (0, 2)])
def test_costs_of_layers_add_up_to_those_of_a_stage_planned_whole(mesh, run):
    found, plan = layered("gpt"), planned("gpt")
    name = next(name for name, other in plan.variants.items() if str(other.mesh) == mesh and not other.frugality)
    first, last = run
    numbered = [0 if layer < first else 1 if layer <= last else 2 for layer in range(4)]
    numbered = [number - numbered[0] for number in numbered]
    stages = cut(found.step, found.layers, numbered, split_weights=True)
    cost = RooflineCost(hardware("v100"), Mesh.parse(mesh))
    (whole,) = Priced.of(Part(stages, numbered[first]), cost, M).costs(cost, [0.0])
    summed = plan.problem.costs.cost(first, last, plan.variants[name].submesh, M, "none")
    for field in ("state_bytes", "activation_bytes_per_microbatch"):  # plans of equal speed differ in what they keep
        assert getattr(summed, field) == pytest.approx(getattr(whole, field), rel=0.25)
    passes = [c.forward_s + c.backward_s + c.weight_s for c in (summed, whole)]
    assert passes[0] == pytest.approx(passes[1], rel=0.03)


@pytest.mark.parametrize("mesh", ["data=1,tensor=1", "data=2,tensor=2"])
@pytest.mark.parametrize("run", [(1, 2), (3, 3)])
def test_a_stage_planned_whole_to_compute_again_takes_no_more_than_its_layers_say(mesh, run):
    found, plan = layered("gpt"), planned("gpt")
    name = next(name for name, other in plan.variants.items() if str(other.mesh) == mesh and not other.frugality)
    first, last = run
    numbered = [(layer >= first) + (layer > last) - (first == 0) for layer in range(4)]
    stages = rematerialised(cut(found.step, found.layers, numbered, split_weights=True), [numbered[first]])
    cost = RooflineCost(hardware("v100"), Mesh.parse(mesh))
    (whole,) = Priced.of(Part(stages, numbered[first]), cost, M).costs(cost, [0.0])
    kept, again = (
        plan.problem.costs.cost(first, last, plan.variants[name].submesh, M, remat) for remat in (KEEP, AGAIN)
    )
    assert again.activation_bytes_per_microbatch == whole.activation_bytes_per_microbatch
    assert again.activation_bytes_per_microbatch < 0.05 * kept.activation_bytes_per_microbatch
    assert again.left_bytes_per_microbatch == pytest.approx(whole.left_bytes_per_microbatch, rel=0.15)
    for name, much in (("state_bytes", 1.25), ("peak_extra_bytes", 1.5)):
        assert getattr(whole, name) <= 1.001 * getattr(again, name) <= much * getattr(whole, name)
    passes = [c.forward_s + c.backward_s + c.weight_s for c in (kept, whole, again)]
    assert passes[0] < passes[1] <= passes[2] <= 1.05 * passes[1]


def test_gradients_are_added_up_at_the_price_of_reading_terms_and_sums_and_writing_sums():
    found = layered("gpt")
    stages = cut(found.step, found.layers, [0, 0, 1, 1], split_weights=True)
    mesh = Mesh.parse("data=1,tensor=1")
    cost, part = RooflineCost(hardware("v100"), mesh), Part(stages, 0)
    (alone,), (adding,) = (Priced.of(part, cost, count).costs(cost, [0.0]) for count in (1, M))
    added_s = adding.backward_s + adding.weight_s - alone.backward_s - alone.weight_s
    assert added_s == pytest.approx(cost.memory_s(3 * sum(value.nbytes for value in part.stage.summed)))
    assert adding.forward_s == alone.forward_s


def test_layers_that_compute_again_by_themselves_gain_nothing_from_a_stage_that_does():
    step, *args = make("gpt", **MODELS["gpt"], remat=True)
    search = Search(devices=4, hardware="v100", microbatches=(M,), layers=4, stage_devices=(1,))
    problem = search_traced(traced_in_time(adapt(step, args))[0], 0.0, search).problem
    one = problem.submeshes[0]
    for layer in (1, 2):  # the others have embeddings and the loss besides
        kept, again = (problem.costs.cost(layer, layer, one, M, remat) for remat in (KEEP, AGAIN))
        assert again.backward_s == kept.backward_s
        assert again.activation_bytes_per_microbatch == kept.activation_bytes_per_microbatch
    assert {stage.remat for stage in slice_stages(problem).stages} == {KEEP}


@pytest.mark.parametrize("share", [1.0, 0.8, 0.55])
def test_the_plan_is_that_of_brute_force_over_the_same_costs_within_any_memory(share):
    whole = replace(planned("gpt").problem, schedules=("1f1b",))
    peak_bytes = max(stage.peak_bytes for stage in slice_stages(whole).stages)
    problem = replace(whole, memory_bytes=share * peak_bytes)
    fitting = (cuts for cuts in _slicings(problem) if _peak_bytes(problem, cuts) <= problem.memory_bytes)
    found = min(_total_s(problem, cuts) for cuts in fitting)
    assert slice_stages(problem).total_s == pytest.approx(found, rel=1e-9)


def test_stages_compute_again_where_that_is_the_faster_way_to_less_memory():
    problem = replace(planned("gpt").problem, schedules=("1f1b",))
    plenty = slice_stages(problem)
    tight = replace(problem, memory_bytes=0.8 * max(stage.peak_bytes for stage in plenty.stages))
    found, frugal = slice_stages(tight), slice_stages(replace(tight, remats=(KEEP,)))
    assert {stage.remat for stage in plenty.stages} == {KEEP} and AGAIN in {stage.remat for stage in found.stages}
    assert plenty.total_s < found.total_s < frugal.total_s


def _slicings(problem: SlicingProblem):
    n = problem.n_layers
    for n_cuts in range(n):
        for cuts in combinations(range(1, n), n_cuts):
            spans = list(zip((0, *cuts), (*cuts, n), strict=True))
            yield from _with_submeshes(problem, spans, problem.n_devices)


def _with_submeshes(problem, spans, devices):
    if not spans:
        yield []
        return
    for submesh in problem.submeshes:
        if submesh.n_devices <= devices:
            for rest in _with_submeshes(problem, spans[1:], devices - submesh.n_devices):
                yield from ([(*spans[0], submesh, remat), *rest] for remat in problem.remats)


def _total_s(problem: SlicingProblem, cuts) -> float:
    """1F1B: the busiest stage runs m microbatches, the others fill; each send and its way back is waited for."""
    costs, m = problem.costs, M
    stages = [costs.cost(first, end - 1, submesh, m, remat) for first, end, submesh, remat in cuts]
    sends = [costs.transfer_s(one[1] - 1, one[2], other[2], m) for one, other in pairwise(cuts)]
    work = [cost.forward_s + cost.backward_s + cost.weight_s for cost in stages]
    busy = [(m - 1) * (each + 2.0 * send) for each, send in zip(work, [*sends, 0.0], strict=True)]
    return max(busy) + sum(work) + 2.0 * sum(sends) + max(cost.sync_s + cost.optimizer_s for cost in stages)


def _peak_bytes(problem: SlicingProblem, cuts) -> float:
    """1F1B: a stage holds as many microbatches as there are stages from it on."""
    stages = [problem.costs.cost(first, end - 1, submesh, M, remat) for first, end, submesh, remat in cuts]
    held = [min(M, len(stages) - index) for index in range(len(stages))]
    return max(
        cost.state_bytes + n * cost.activation_bytes_per_microbatch + cost.peak_extra_bytes
        for n, cost in zip(held, stages, strict=True)
    )


def test_more_devices_are_never_slower():
    problem = planned("gpt").problem
    steps = [slice_stages(replace(problem, n_devices=n)).total_s for n in (1, 2, 3, 4, 8)]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < steps[0]


def test_less_memory_is_kept_to_and_never_faster():
    plan = planned("gpt")
    peak_bytes = max(stage.peak_bytes for stage in plan.slicing.stages)
    tight = slice_stages(replace(plan.problem, memory_bytes=0.8 * peak_bytes))
    assert max(stage.peak_bytes for stage in tight.stages) <= 0.8 * peak_bytes
    assert tight.total_s >= plan.step_s


def test_too_little_memory_is_refused_with_the_least_that_would_do():
    problem = replace(planned("gpt").problem, n_devices=1, memory_bytes=1e5)
    with pytest.raises(
        InfeasibleError, match=r"(?s)no slicing fits 100000 bytes per device: the least .*\(layers 0 to 3"
    ):
        slice_stages(problem)


def test_frugal_plans_of_a_layer_keep_less():
    plan = planned("gpt")
    costs = plan.problem.costs
    assert isinstance(costs, LayerTables)
    for name in plan.variants:
        if "frugal" in name:
            lean, fast = (costs.runs[key, M][1,] for key in (name, name.partition(" frugal")[0]))
            assert lean.state_bytes <= fast.state_bytes


def test_submeshes_are_powers_of_two_in_a_host_and_whole_hosts():
    search = Search(devices=24, frugality=())
    found = {variant.submesh.name for variant in submeshes(hardware("v100"), search)}
    assert found == {
        "1x1 data=1,tensor=1", "1x2 data=2,tensor=1", "1x4 data=2,tensor=2", "1x8 data=2,tensor=4",
        "2x8 data=4,tensor=4", "2x8 data=2,tensor=8", "3x8 data=6,tensor=4", "3x8 data=3,tensor=8",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "devices_per_host", "pairs"),
    [
        ((4, 4), 8, ()),
        ((4, 4), 0, ()),
        ((4, 4), 4, ((0, 1),)),
        ((2, 2, 2, 2), 4, ((0, 2), (0, 3), (1, 2), (1, 3))),
        ((2, 4, 2), 4, ((0, 1), (0, 2), (1, 2))),
        ((8, 8), 4, ((0, 1),)),
    ],
)
def test_submeshes_are_apart_unless_one_process_drives_both(sizes, devices_per_host, pairs):
    meshes = [Mesh((("data", size),)) for size in sizes]
    assert apart(meshes, devices_per_host) == {ends for pair in pairs for ends in (pair, pair[::-1])}


def test_stages_in_processes_of_their_own_wait_for_each_other():
    step, *args = make("gpt", **MODELS["gpt"])
    cluster, mesh = hardware("v100"), Mesh.parse("data=1")
    alone, together = (
        autopar.pipeline(
            step,
            submeshes=2,
            schedule="zb_h1",
            mesh=mesh,
            cost=RooflineCost(replace(cluster, devices_per_host=devices), mesh),
        ).plan(*args)
        for devices in (1, 2)
    )
    assert alone.step_s > together.step_s and alone.devices_per_host == 1
    for plan in (alone, together):
        once_s = max(stage.prediction.once_s for stage in plan.stages)
        assert timeline_of(plan).makespan_s <= plan.step_s <= timeline_of(plan).makespan_s + once_s


def test_a_slicing_says_how_to_run_it_and_what_came_close():
    plan = planned("gpt")
    layout, frugality = plan.layout()
    assert layout.schedule.n_stages == len(plan.slicing.stages) == len(frugality)
    assert [mesh.n_devices for mesh in layout.meshes] == [s.submesh.n_devices for s in plan.slicing.stages]
    assert len(layout.stage_of_layer) == 4 and layout.splitting.microbatches == M
    others = plan.runner_ups(plan.slicing)
    assert [other.step_s for other in others] == [other.total_s for other in plan.slicing.runner_ups]
    assert all("schedule" in other.differences[0] for other in others)
    assert plan.slicing.total_s in [other.step_s for other in plan.runner_ups(plan.slicing.runner_ups[0])]


def test_planning_takes_shapes_and_says_what_it_spent():
    step, *args = make("gpt", **MODELS["gpt"])
    search = Search(devices=2, hardware="v100", microbatches=(2,), layers=2, stage_devices=(1,))
    plan = search_traced(*traced_in_time(adapt(step, args)), search)
    assert isinstance(plan.slicing, Slicing) and plan.seconds.total > plan.seconds.intra > 0


@pytest.mark.parametrize(("batch", "numbers"), [(16, (4, 8, 16)), (8, (4, 8)), (6, (3,)), (7, (1,))])
def test_numbers_of_microbatches_divide_the_batch(batch, numbers):
    step, *args = make("mlp", layers=1, width=8, batch=batch, abstract=True)
    assert Search(devices=2).numbers(traced_in_time(adapt(step, args))[0]) == numbers
