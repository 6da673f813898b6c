"""Whatever a network looks like, no piece of a stage runs before what it reads is there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autopar.cost import flops_of
from autopar.ir.layers import cluster_layers
from autopar.ir.program import Value
from autopar.ir.stages import Part, Stages, Tag, cut
from autopar.ir.trace import trace
from autopar.lowering.pipeline.cut import microbatched
from autopar.lowering.pipeline.order import PARTS
from autopar.plan import Splitting
from autopar.solver.schedule import Schedule, dispatch_order, make_schedule

WIDTH, BATCH, WEIGHTS = 8, 8, 4
Node = tuple[str, int, int]
"""An operation, the activation that it reads (from the end), and a weight or a second activation."""

NODES = st.tuples(
    st.sampled_from(["dense", "dense", "tied", "add", "mul", "remat", "stop"]), st.integers(1, 3), st.integers(0, 3)
)


def network(nodes: list[Node], clip: bool, report: bool) -> Callable[..., Any]:
    def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = [jnp.tanh(x @ params["w0"])]
        for kind, back, other in nodes:
            h, w = made[-min(back, len(made))], params[f"w{other}"]
            made.append(
                {
                    "dense": lambda h=h, w=w: jnp.tanh(h @ w),
                    "tied": lambda h=h, w=w: jnp.sin(h @ w.T),
                    "add": lambda h=h, other=other: h + made[-min(other + 1, len(made))],
                    "mul": lambda h=h, other=other: h * made[-min(other + 1, len(made))],
                    "remat": lambda h=h, w=w: jax.checkpoint(lambda h, w: jnp.tanh(jnp.sin(h @ w) @ w))(h, w),
                    "stop": lambda h=h, w=w: h + jax.lax.stop_gradient(h @ w),
                }[kind]()
            )
        return jnp.mean((made[-1] - y) ** 2), made[-1]

    def step(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> Any:
        (value, out), gradients = jax.value_and_grad(loss, has_aux=True)(params, x, y)
        if clip:
            norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients)))
            gradients = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), gradients)
        new = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        return (new, value, out) if report else (new, value)

    return step


def unavailable(stages: Stages, schedule: Schedule) -> list[str]:
    """What pieces read before it is made, in the order of dispatch."""
    step, missing = stages.step, []
    free = {v for eqn in step.equations for v in eqn.outputs} - stages.maker.keys()
    known: set[tuple[Value, int]] = {(v, -1) for v in (*step.inputs, *free)}

    def run(stage: int, tag: Tag, microbatch: int = -1) -> None:
        for eqn, own in stages.stages[stage].tags.items():
            if own != tag:
                continue
            here = {value for value in eqn.operands if {(value, microbatch), (value, -1)} & known}
            unread = set(eqn.operands) - here - step.slices.keys()
            missing.extend(f"{tag} of stage {stage}, microbatch {microbatch}: {value}" for value in unread)
            known.update((value, microbatch) for value in eqn.outputs)

    rounds = sorted({(tag, i) for i, stage in enumerate(stages.stages) for tag in stage.tags.values()})
    for tag, stage in rounds:
        if tag.part == Part.PROLOGUE:
            run(stage, tag)
    for task in (dispatch.task for dispatch in dispatch_order(schedule) if not dispatch.sends):
        run(task.stage, Tag(PARTS[task.kind]), task.microbatch)
    for part, whole in (*step.sums.items(), *step.stacks.items()):
        if all((part, k) in known or (part, -1) in known for k in range(schedule.n_microbatches)):
            known |= {(whole, -1), (part, -1)}
    for tag, stage in rounds:
        if tag.part == Part.UPDATE:
            run(stage, tag)
    results = (v for v in step.outputs if isinstance(v, Value))
    return missing + [f"result {v}" for v in results if (v, -1) not in known]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(NODES, min_size=3, max_size=8),
    st.booleans(),
    st.booleans(),
    st.sampled_from([("1f1b", 2), ("zb_h1", 3), ("gpipe", 4), ("zb_h2", 2)]),
)
def test_no_piece_runs_before_what_it_reads(
    nodes: list[Node], clip: bool, report: bool, order: tuple[str, int]
) -> None:
    name, p = order
    shape = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    params = {f"w{i}": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for i in range(WEIGHTS)}
    traced = trace(network(nodes, clip, report), params, shape, shape)
    found = microbatched(traced, Splitting(microbatches=2))
    schedule = make_schedule(name, p, 2)
    layers = cluster_layers(found.body, p, flops_of)
    stages = cut(found, layers, range(p), split_weights=bool(schedule.split))
    assert unavailable(stages, schedule) == []
    for stage in stages.stages:
        parts = {value: tag.part for eqn, tag in stage.tags.items() for value in eqn.outputs}
        for eqn, tag in stage.tags.items():
            assert all(parts.get(v, tag.part) <= tag.part for v in eqn.operands)
