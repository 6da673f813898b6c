"""Layers become stages: all pieces, run one after the other on one device, compute the step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.cost import flops_of
from autopar.ir.layers import cluster_layers, layer_boundary
from autopar.ir.program import Atom, Constant, Equation, Value, check
from autopar.ir.stages import Part, Stages, Tag, cut
from autopar.ir.step import LoopError, around_loop
from autopar.ir.trace import Traced, trace
from autopar.lowering.pipeline.cut import microbatched
from autopar.lowering.time.phased import COMBINE
from autopar.plan import Splitting
from autopar.solver.schedule import Kind, Schedule, dispatch_order, make_schedule

WIDTH, BATCH = 8, 8
O0 = {"xla_backend_optimization_level": 0}
PARTS = {Kind.FORWARD: Part.FORWARD, Kind.BACKWARD: Part.BACKWARD, Kind.WEIGHT: Part.WEIGHTS}


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32) * 0.3


def trained(loss: Callable[..., Any]) -> Callable[..., Any]:
    def step(params: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value

    return step


def chain(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for name in sorted(params):
        x = jnp.tanh(x @ params[name])
    return jnp.mean((x - y) ** 2)


def tied(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    h = x @ params["table"]
    for name in ("w0", "w1"):
        h = jnp.tanh(h @ params[name])
    return jnp.mean((h @ params["table"].T - y) ** 2)


def skipping(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    first = layer_boundary(jnp.tanh(x @ params["w0"]))
    h = layer_boundary(jnp.tanh(first @ params["w1"]))
    h = layer_boundary(jnp.tanh(h @ params["w2"]))
    return jnp.mean(((h * first) @ params["w3"] - y) ** 2)


def masked(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    weights = (x[:, 0] > 0).astype(jnp.float32)
    return (jnp.mean((chained(params, x) - y) ** 2, axis=1) * weights).sum() / weights.sum()


def chained(params: Any, x: jax.Array) -> jax.Array:
    return functools.reduce(lambda h, name: jnp.tanh(h @ params[name]), sorted(params), x)


def dropped(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    key = jax.random.key(3)
    for i, name in enumerate(sorted(params)):
        keep = jax.random.bernoulli(jax.random.fold_in(key, i), 0.8, x.shape)
        x = jnp.where(keep, jnp.tanh(x @ params[name]), 0)
    return jnp.mean((x - y) ** 2)


def rematerialised(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    block = jax.checkpoint(lambda h, w: jnp.tanh(jnp.tanh(h @ w) @ w.T))
    return jnp.mean((functools.reduce(lambda h, name: block(h, params[name]), sorted(params), x) - y) ** 2)


def biased(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for i in range(3):
        x = x + jnp.tanh(x @ params[f"w{i}"] + params[f"b{i}"]) @ params[f"v{i}"] + params[f"c{i}"]
    return jnp.mean((x - y) ** 2)


def clipped(params: Any, x: jax.Array, y: jax.Array) -> Any:
    value, gradients = jax.value_and_grad(chain)(params, x, y)
    norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
    return jax.tree.map(lambda p, g: p - 0.1 * g / jnp.maximum(norm, 0.1), params, gradients), value, norm


def branching(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """Clips by global norm, but only if the loss is large: one cond over the gradients of all stages."""
    value, gradients = jax.value_and_grad(chain)(params, x, y)

    def clip(gradients: Any) -> Any:
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
        return jax.tree.map(lambda g: g / norm, gradients)

    gradients = jax.lax.cond(value > 0.01, clip, lambda g: g, gradients)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), value


def silent(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """Returns no loss: where backward begins is read off the gradients alone."""
    return trained(chain)(params, x, y)[0]


def reporting(params: Any, x: jax.Array, y: jax.Array) -> Any:
    """Returns what every example became, too."""
    new, value = trained(chain)(params, x, y)
    return new, value, chained(params, x)


def weights(*names: str) -> dict[str, jax.Array]:
    return {name: normal(WIDTH, WIDTH) + 0.01 * i for i, name in enumerate(names)}


BIASED = {f"{kind}{i}": normal(*(WIDTH,) * (2 if kind in "wv" else 1)) for kind in "wvbc" for i in range(3)}
W4 = weights("w0", "w1", "w2", "w3")
X, Y = normal(BATCH, WIDTH), normal(WIDTH, BATCH).T
STEPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "chain": (trained(chain), (W4, X, Y)),
    "tied": (trained(tied), (weights("table", "w0", "w1"), X, Y)),
    "skipping": (trained(skipping), (W4, X, Y)),
    "biased": (trained(biased), (BIASED, X, Y)),
    "masked": (trained(masked), (W4, X, Y)),
    "dropped": (trained(dropped), (W4, X, Y)),
    "rematerialised": (trained(rematerialised), (W4, X, Y)),
    "clipped": (clipped, (W4, X, Y)),
    "branching": (branching, (W4, X, Y)),
    "silent": (silent, (W4, X, Y)),
    "reporting": (reporting, (W4, X, Y)),
}


def staged(name: str, schedule: Schedule) -> tuple[Traced, Stages]:
    step, arguments = STEPS[name]
    traced = trace(step, *arguments)
    found = microbatched(traced, Splitting(microbatches=schedule.n_microbatches))
    layers = cluster_layers(found.body, schedule.n_stages, flops_of)
    return traced, cut(found, layers, range(schedule.n_stages), split_weights=bool(schedule.split))


class Serial:
    """Runs stage programs piece by piece, in a schedule's order, with one table of values for each microbatch."""

    def __init__(self, stages: Stages) -> None:
        self.stages, self.step = stages, stages.step
        self.free = {v for eqn in self.step.equations for v in eqn.outputs} - stages.maker.keys()
        self.once: dict[Value, Any] = {}
        self.each: dict[tuple[Value, int], Any] = {}

    def read(self, atom: Atom, microbatch: int) -> Any:
        if isinstance(atom, Constant):
            return jnp.asarray(atom.value, atom.aval.dtype)
        if atom in self.step.slices and microbatch >= 0:
            return self.read(self.step.slices[atom], -1)[microbatch]
        if (atom, microbatch) in self.each:
            return self.each[atom, microbatch]
        if atom not in self.once and atom in self.free:
            self.bind(next(e for e in self.step.equations if atom in e.outputs), -1)
        return self.once[atom]

    def bind(self, eqn: Equation, microbatch: int) -> None:
        operands = [self.read(atom, microbatch) for atom in eqn.inputs]
        results = eqn.primitive.bind(*operands, **{k: v for k, v in eqn.params.items() if k != "group"})
        for value, array in zip(eqn.outputs, results if eqn.primitive.multiple_results else [results], strict=True):
            if microbatch < 0:
                self.once[value] = array
                continue
            self.each[value, microbatch] = array
            if value in self.step.sums and value in self.stages.maker:
                total = self.step.sums[value]
                combine = COMBINE[self.step.monoids[value]]
                self.once[total] = combine(self.once[total], array) if total in self.once else array
                self.once[value] = self.once[total]

    def run(self, stage: int, tag: Tag, microbatch: int = -1) -> None:
        for eqn, own in self.stages.stages[stage].tags.items():
            if own == tag:
                self.bind(eqn, microbatch)


def run_serially(stages: Stages, schedule: Schedule, leaves: list[Any]) -> list[Any]:
    serial = Serial(stages)
    serial.once.update(zip(stages.step.inputs, leaves, strict=True))
    rounds = sorted({(tag, i) for i, s in enumerate(stages.stages) for tag in s.tags.values()})
    for tag, stage in rounds:
        if tag.part == Part.PROLOGUE:
            serial.run(stage, tag)
    for task in (dispatch.task for dispatch in dispatch_order(schedule) if not dispatch.sends):
        serial.run(task.stage, Tag(PARTS[task.kind]), task.microbatch)
    for part, whole in stages.step.stacks.items():
        serial.once[whole] = jnp.stack([serial.each[part, k] for k in range(schedule.n_microbatches)])
    for tag, stage in rounds:
        if tag.part == Part.UPDATE:
            serial.run(stage, tag)
    return [serial.read(atom, -1) for atom in stages.step.outputs]


def assert_computes_the_step(stages: Stages, order: Schedule, traced: Traced, name: str) -> None:
    step, arguments = STEPS[name]
    leaves = [*jax.tree.leaves(arguments), *traced.program.constants]
    found = jax.jit(lambda leaves: run_serially(stages, order, leaves), compiler_options=O0)(leaves)
    expected = jax.tree.leaves(jax.jit(step, compiler_options=O0)(*arguments))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


TABLE = [
    ("chain", "gpipe", 2, 1, 1),
    ("chain", "interleaved", 2, 2, 2),
    ("tied", "1f1b", 2, 2, 1),
    ("skipping", "1f1b", 4, 2, 1),
    ("biased", "zb_h1", 3, 2, 1),
    ("masked", "zb_h1", 2, 4, 1),
    ("dropped", "interleaved", 2, 2, 2),
    ("rematerialised", "zb_h1", 2, 2, 1),
    ("clipped", "1f1b", 4, 2, 1),
    ("branching", "1f1b", 2, 2, 1),
    ("silent", "gpipe", 2, 2, 1),
    ("reporting", "1f1b", 2, 4, 1),
]


@pytest.mark.parametrize(("name", "schedule", "p", "m", "v"), TABLE, ids=[f"{row[0]}-{row[1]}" for row in TABLE])
def test_the_pieces_of_all_stages_in_schedule_order_compute_the_step(
    name: str, schedule: str, p: int, m: int, v: int
) -> None:
    order = make_schedule(schedule, p, m, v)
    traced, stages = staged(name, order)
    for stage in stages.stages:
        check(stage.program)
    assert_computes_the_step(stages, order, traced, name)


def received(stages: Stages, index: int, part: Part) -> list[Value]:
    """What a part of a stage reads that the loops of other stages make, or their prologues."""
    tags = stages.stages[index].tags
    read = {v for eqn, tag in tags.items() if tag.part == part for v in eqn.operands}
    return [v for v in read if stages.maker.get(v, index) != index]


def test_neighbours_exchange_one_activation_and_one_gradient() -> None:
    _, stages = staged("chain", make_schedule("1f1b", 4, 2))
    for i in range(4):
        assert [v.shape for v in received(stages, i, Part.FORWARD)] == [(BATCH // 2, WIDTH)] * (i > 0)
        assert [v.shape for v in received(stages, i, Part.BACKWARD)] == [(BATCH // 2, WIDTH)] * (i < 3)
        assert received(stages, i, Part.UPDATE) == []


def test_a_skip_connection_is_sent_past_the_stages_that_do_not_read_it() -> None:
    _, stages = staged("skipping", make_schedule("gpipe", 4, 2))
    makers = [{stages.maker[v] for v in received(stages, i, Part.FORWARD)} for i in range(4)]
    assert makers == [set(), {0}, {1}, {0, 2}]


def test_a_tied_weight_lives_on_its_first_stage_and_its_gradients_meet_once_per_step() -> None:
    _, stages = staged("tied", make_schedule("gpipe", 2, 4))
    table = next(v for v in stages.home if v.name == "table")
    assert stages.home[table] == 0
    assert table in stages.stages[1].program.inputs
    assert [v.shape for v in received(stages, 0, Part.UPDATE)] == [table.shape]


def test_a_global_norm_crosses_the_stages_as_scalars_in_three_rounds() -> None:
    _, stages = staged("clipped", make_schedule("gpipe", 2, 2))
    rounds = [sorted({t.round for t in s.tags.values() if t.part == Part.UPDATE}) for s in stages.stages]
    assert rounds == [[0, 1], [0, 2]]
    assert {v.shape for i in range(2) for v in received(stages, i, Part.UPDATE)} == {()}


@pytest.mark.parametrize("p", [2, 3])
def test_a_parameter_lives_where_the_forward_pass_reads_it(p: int) -> None:
    _, stages = staged("biased", make_schedule("1f1b", p, 2))
    for index, stage in enumerate(stages.stages):
        assert {stages.home[v] for v in stage.program.inputs if v in stages.home} == {index}


def test_an_update_behind_a_branch_stays_on_the_stage_of_its_parameter() -> None:
    _, stages = staged("branching", make_schedule("gpipe", 2, 2))
    assert {v.name: home for v, home in stages.home.items()} == {"w0": 0, "w1": 0, "w2": 1, "w3": 1}
    assert {v.shape for i in range(2) for v in received(stages, i, Part.UPDATE)} == {()}


def test_splitting_backward_leaves_every_gradient_of_a_weight_to_w() -> None:
    _, stages = staged("chain", make_schedule("zb_h1", 2, 2))
    for stage in stages.stages:
        tags = {value: tag.part for eqn, tag in stage.tags.items() for value in eqn.outputs}
        sums = [v for v in stage.summed if v.shape]
        assert sums and {tags[v] for v in sums} == {Part.WEIGHTS}
    last = {tag.part for tag in stages.stages[1].tags.values()}
    assert Part.BACKWARD in last


def test_every_equation_of_the_step_runs_in_one_place() -> None:
    _, stages = staged("chain", make_schedule("1f1b", 2, 2))
    placed = [eqn.name for stage in stages.stages for eqn in stage.tags]
    assert len(placed) == len(set(placed))


def test_a_loop_that_is_no_sum_is_refused_by_the_name_of_its_carry() -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda h, row: (jnp.tanh(h * row), None), w, x)[0]

    traced = trace(step, normal(WIDTH), X)
    (loop,) = [eqn for eqn in traced.program.equations if eqn.primitive.name == "scan"]
    with pytest.raises(LoopError, match="is no sum over the iterations"):
        around_loop(traced.program, traced.state, loop)
