"""The simulated step: no resource does two things at once, nothing runs before its operands are there."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import autopar
from autopar.api import Options, equation_seconds
from autopar.lowering.instructions import Loop, Move, Run, Slot
from autopar.lowering.local_program import build_local_program
from autopar.lowering.simulate import hidden_s, simulate


def f32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def dense_step(params, batch):
    def loss(params):
        x = batch
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return (x**2).mean()

    return [p - 0.1 * g for p, g in zip(params, jax.grad(loss)(params), strict=True)]


def scan_step(kernels, batch):
    def loss(kernels):
        return (lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), batch, kernels)[0] ** 2).mean()

    return kernels - 0.1 * jax.grad(loss)(kernels)


STEPS = {
    "dense": (dense_step, ([f32(512, 512)] * 4, f32(256, 512))),
    "scan": (scan_step, (f32(4, 512, 512), f32(256, 512))),
}


def lowered(step: str, preset: str):
    function, arguments = STEPS[step]
    mesh = "data=2,tensor=4"
    plan = autopar.plan(function, *arguments, mesh=mesh, hardware="v5e", preset=preset)
    prepared, formulation, choice = plan.runtime
    local = build_local_program(prepared.traced.program, plan, Options(mesh=mesh, hardware="v5e").cost_model(plan.mesh))
    return plan, local, equation_seconds(formulation, choice)


@pytest.mark.parametrize("preset", ["", "dp", "zero3", "megatron"])
@pytest.mark.parametrize("step", list(STEPS))
def test_a_simulated_step_is_a_schedule(step, preset):
    _plan, local, seconds = lowered(step, preset)
    timeline = simulate(local, seconds, overlap=True)
    assert sorted(map(id, local.instructions)) == sorted(id(e.instruction) for e in timeline.events)
    for moves in (True, False):
        own = [e for e in timeline.events if isinstance(e.instruction, Move) == moves]
        assert all(a.stop_s <= b.start_s + 1e-12 for a, b in itertools.pairwise(own))
    made_s = dict.fromkeys(local.inputs, 0.0)
    for event in timeline.events:
        i = event.instruction
        made_s.update(dict.fromkeys((i.target,) if isinstance(i, Move) else i.outputs, event.stop_s))
    for event in timeline.events:
        i = event.instruction
        reads = (i.source,) if isinstance(i, Move) else [x for x in i.inputs if isinstance(x, Slot)]
        assert all(made_s[slot] <= event.start_s + 1e-12 for slot in reads)


@pytest.mark.parametrize("preset", ["", "dp", "zero3", "megatron"])
@pytest.mark.parametrize("step", list(STEPS))
def test_the_step_lies_between_its_longer_half_and_the_sum_of_both(step, preset):
    found = lowered(step, preset)[0].prediction
    longer_s = max(found.compute_s, found.communication_s)
    assert longer_s * (1 - 1e-9) <= found.step_s <= (found.compute_s + found.communication_s) * (1 + 1e-9)


def test_without_overlap_a_step_takes_the_sum_of_its_parts():
    plan, local, seconds = lowered("dense", "zero3")
    assert simulate(local, seconds, overlap=False).makespan_s == pytest.approx(plan.solution.objective_s)
    assert hidden_s(local, seconds, overlap=False) == 0


def test_gradients_are_reduced_while_earlier_layers_are_computed():
    plan, local, seconds = lowered("dense", "dp")
    events = simulate(local, seconds, overlap=True).events
    first = min(e.start_s for e in events if isinstance(e.instruction, Move) and e.stop_s > e.start_s)
    products = [e for e in events if isinstance(e.instruction, Run) and "dot_general" in e.instruction.equation.name]
    last_product = max(e.stop_s for e in products)
    assert first < last_product
    assert plan.prediction.step_s < plan.solution.objective_s


def test_at_most_one_gathered_parameter_waits_for_its_reader():
    _, local, seconds = lowered("dense", "zero3")
    events = simulate(local, seconds, overlap=True).events
    moves = [(e.instruction, e.start_s) for e in events if isinstance(e.instruction, Move)]
    gathers = [(move, start_s) for move, start_s in moves if move.source in local.inputs]
    started = {
        slot: e.start_s
        for e in reversed(events)
        if not isinstance(e.instruction, Move)
        for slot in e.instruction.inputs
        if isinstance(slot, Slot)
    }
    for (before, _), (_, start_s) in itertools.pairwise(gathers):
        assert start_s >= started[before.target] - 1e-12


def test_a_loop_takes_its_length_times_its_body():
    _, local, seconds = lowered("scan", "dp")
    events = simulate(local, seconds, overlap=False).events
    loops = [(e.instruction, e.stop_s - e.start_s) for e in events if isinstance(e.instruction, Loop)]
    assert len(loops) == 2
    for loop, taken_s in loops:
        body_s = simulate(loop.body, seconds, overlap=False).makespan_s
        assert taken_s == pytest.approx(4 * body_s) and body_s > 0
