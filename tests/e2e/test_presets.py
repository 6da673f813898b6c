"""The presets send what the literature says; planned only."""

import functools
from collections import Counter
from typing import Any

import pytest

from autopar.api import Options, plan_prepared, traced_in_time
from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.errors import PresetError
from autopar.ir.arguments import adapt
from autopar.ir.trace import Traced
from autopar.lowering.instructions import Move
from autopar.lowering.local_program import build_local_program
from autopar.plan import Plan
from autopar.planner.search import Prepared, prepare
from benchmarks.cases import make

LAYERS, WIDTH, BATCH, SEQ = 2, 1024, 64, 256
SETTINGS = {"layers": LAYERS, "width": WIDTH, "heads": 16, "batch": BATCH, "seq": SEQ, "vocab": 8192}
KERNEL_BYTES = 4 * WIDTH * WIDTH  # of a query kernel, the smallest matrix
EXPERTS = 8


def v5e(mesh: str) -> RooflineCost:
    return RooflineCost(hardware("v5e"), Mesh.parse(mesh))


@functools.cache
def traced(model: str) -> Traced:
    extra = {"experts": EXPERTS} if model == "moe" else {}
    step, *arguments = make(model, abstract=True, **SETTINGS, **extra)
    return traced_in_time(adapt(step, arguments))[0]


@functools.cache
def prepared(model: str, mesh: str) -> Prepared:
    return prepare(traced(model), v5e(mesh))


def planned(model: str, mesh: str, preset: str) -> Plan:
    cost = v5e(mesh)
    return plan_prepared(prepared(model, mesh), cost, Options(cost=cost, preset=preset))


def sent(plan: Plan, model: str, at_least_bytes: float = KERNEL_BYTES) -> Counter[tuple[Any, ...]]:
    """How often a plan sends (kind, axes, bytes), for collectives of at least some bytes."""
    local = build_local_program(traced(model).program, plan, v5e(str(plan.mesh)))
    steps = [s for move in local.instructions if isinstance(move, Move) for s in move.resharding.steps]
    big = [step for step in steps if step.nbytes >= at_least_bytes]
    return Counter((step.kind, tuple(sorted(step.axes)), step.nbytes) for step in big)


def parameter_bytes(model: str) -> Counter[int]:
    """How many parameters have how many bytes, from `KERNEL_BYTES` on."""
    inputs = traced(model).program.inputs
    return Counter(v.nbytes for v in inputs if v.name.startswith("params") and v.nbytes >= KERNEL_BYTES)


def kinds(found: Counter[tuple[Any, ...]]) -> set[str]:
    return {kind for kind, _, _ in found}


ALL = ("data", "tensor")


def test_dp_sums_every_gradient_once_and_sends_nothing_else() -> None:
    found = sent(planned("gpt", "data=2,tensor=4", "dp"), "gpt")
    assert found == {("all_reduce", ALL, nbytes): count for nbytes, count in parameter_bytes("gpt").items()}


def scattered(model: str) -> Counter[tuple[Any, ...]]:
    """Every gradient reduced and scattered over both axes, one after the other."""
    found: Counter[tuple[Any, ...]] = Counter()
    for nbytes, count in parameter_bytes(model).items():
        found["reduce_scatter", ("data",), nbytes] += count
        found["reduce_scatter", ("tensor",), nbytes / 2] += count
    return found


@pytest.mark.parametrize("preset", ["zero1", "zero2"])
def test_zero_scatters_every_gradient_and_gathers_every_parameter(preset: str) -> None:
    found = sent(planned("gpt", "data=2,tensor=4", preset), "gpt", KERNEL_BYTES / 2)
    gathered = Counter({("all_gather", ALL, n): count for n, count in parameter_bytes("gpt").items()})
    assert found == gathered + scattered("gpt")


def test_zero3_gathers_every_kernel_in_forward_and_backward() -> None:
    found = sent(planned("gpt", "data=2,tensor=4", "zero3"), "gpt", KERNEL_BYTES / 2)
    assert Counter({key: n for key, n in found.items() if key[0] != "all_gather"}) == scattered("gpt")
    for nbytes, count in parameter_bytes("gpt").items():
        # What the forward pass uses last, the backward pass uses first.
        assert 2 * count - 1 <= found["all_gather", ALL, nbytes] <= 2 * count


ACTIVATION_BYTES = 4 * BATCH // 2 * SEQ * WIDTH


def test_megatron_sums_two_activations_forward_and_two_backward_per_block() -> None:
    found = sent(planned("gpt", "data=2,tensor=4", "megatron"), "gpt", ACTIVATION_BYTES)
    embedding = 2  # the lookup in a split table, and the gradient of its use for the logits
    assert found == {("all_reduce", ("tensor",), ACTIVATION_BYTES): 4 * LAYERS + embedding}


def test_megatron_sp_gathers_before_the_matrices_and_scatters_after_them() -> None:
    found = sent(planned("gpt", "data=2,tensor=4", "megatron_sp"), "gpt", ACTIVATION_BYTES)
    assert {axes for _, axes, _ in found} == {("tensor",)}
    assert kinds(found) == {"all_gather", "reduce_scatter"}
    assert found["reduce_scatter", ("tensor",), ACTIVATION_BYTES] == 4 * LAYERS + 2
    # A weight gradient gathers once more what the matrix read (Korthikanti, section 4.2.2).
    assert 4 * LAYERS + 2 <= found["all_gather", ("tensor",), ACTIVATION_BYTES] <= 6 * LAYERS + 2


def test_tp2d_keeps_every_matrix_on_the_grid() -> None:
    plan = planned("gpt", "data=2,tensor=4", "tp2d")
    matrices = [a for a in plan.arguments if a.name.startswith("params") and len(a.shape) > 1]
    assert all(set(argument.spec.axes) == {"data", "tensor"} for argument in matrices)


def test_gshard_exchanges_tokens_twice_forward_and_twice_backward() -> None:
    plan = planned("moe", "data=2,expert=4", "gshard")
    tokens_bytes = 4 * (BATCH // 8) * (2 * SEQ // EXPERTS) * EXPERTS * WIDTH
    found = sent(plan, "moe", 1)
    assert {key: n for key, n in found.items() if key[0] == "all_to_all"} == {
        ("all_to_all", ("expert",), tokens_bytes): 4 * (LAYERS // 2)
    }
    experts = [a for a in plan.arguments if "/experts/up" in a.name or "/experts/down" in a.name]
    assert {argument.spec.dims[0] for argument in experts} == {("expert",)}


def test_gshard_refuses_a_step_without_experts() -> None:
    with pytest.raises(PresetError, match="needs expert weights"):
        planned("gpt", "data=8", "gshard")


def test_tp2d_refuses_a_mesh_of_one_axis() -> None:
    with pytest.raises(PresetError, match="needs a mesh of two axes"):
        planned("gpt", "data=8", "tp2d")


@pytest.mark.parametrize("mesh", ["data=8", "data=2,tensor=4"])
def test_no_preset_beats_the_unrestricted_plan(mesh: str) -> None:
    free = planned("gpt", mesh, "")
    for preset in ("dp", "zero1", "zero3", "megatron", "megatron_sp"):
        found = planned("gpt", mesh, preset)
        assert free.solution.lower_bound_s <= found.solution.objective_s * (1 + 1e-9)
        assert free.prediction.serial_s <= found.prediction.serial_s * (1 + 1e-9)


def test_experts_are_found_without_a_preset() -> None:
    found = sent(planned("moe", "data=2,expert=4", ""), "moe")
    assert sum(count for (kind, _, _), count in found.items() if kind == "all_to_all") >= 4


def test_the_mesh_of_a_plan_is_the_one_asked_for() -> None:
    assert planned("gpt", "data=8", "dp").mesh == Mesh.parse("data=8")
