"""audit: what the compiler built beside what the plan predicted."""

import os
from typing import Any

import jax

from autopar import api
from autopar.cli.console import progress, show, show_json
from autopar.cli.options import Auditing
from autopar.cli.planning import devices_for, force_devices, read_target
from autopar.cli.printing import collective_json
from autopar.cluster import Mesh
from autopar.lowering.audit import Audit, Collective, Difference, compare
from autopar.lowering.audit import audit as read_compiled
from autopar.lowering.spmd import device_mesh, lower
from autopar.lowering.topology import TPU_ENVIRONMENT, tpu_mesh
from autopar.plan import Plan
from autopar.plan.figures import flops, nbytes
from autopar.plan.terminal import table


def audit(request: Auditing) -> None:
    """Compiles the plan's program and shows both sides."""
    plan = Plan.load(request.plan)
    target = read_target(request.target, request.set)
    if request.topology:
        _prepare_libtpu()
    force_devices(plan.mesh.n_devices)
    with progress(f"lowering {target.text} for mesh {plan.mesh}") as update:
        step, state, batch = target.abstract()
        program = api.compile(step, plan).compiled(state, batch)
        mesh = _devices(plan.mesh, request.topology)
        update(f"compiling for {request.topology or 'the devices at hand'}")
        jitted = lower(program.local, mesh, program.donated)
        found = read_compiled(jitted.lower(*_shapes(program)).compile(), plan.mesh)
    if request.json:
        show_json(_as_json(plan, found))
    else:
        differences = compare(plan.prediction.collectives, found, plan.mesh)
        show(_figures_table(plan, found), _collectives_table(plan, found, differences))


def _devices(mesh: Mesh, topology: str | None) -> jax.sharding.Mesh:
    """The devices to compile for: those of a TPU topology, or those at hand."""
    return tpu_mesh(topology, mesh) if topology else device_mesh(mesh, devices_for(mesh))


def _prepare_libtpu() -> None:
    """Sets what libtpu must find in the environment when JAX starts; the caller's own settings stay."""
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def _shapes(program: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in program.local.inputs]


def _as_json(plan: Plan, found: Audit) -> dict[str, Any]:
    predicted = plan.prediction
    return {
        "collectives": {
            "predicted": [collective_json(c) for c in predicted.collectives],
            "compiled": [collective_json(c) | {"dtype": c.dtype} for c in found.collectives],
        },
        "flops": {"predicted": predicted.flops, "compiled": found.flops},
        "peak_bytes": {"predicted": predicted.peak_bytes, "compiled": found.peak_bytes},
    }


def _figures_table(plan: Plan, found: Audit) -> Any:
    shown = table("a device and step", "|predicted|compiled|ratio", "predicted|compiled|ratio")
    predicted = plan.prediction
    rows = (
        ("work", predicted.flops, found.flops, flops),
        ("peak memory", predicted.peak_bytes, found.peak_bytes, nbytes),
        ("arguments", predicted.state_bytes, found.argument_bytes, nbytes),
    )
    for name, before, after, text in rows:
        shown.add_row(name, text(before), text(after), f"{after / before:.3f}" if before else "")
    if found.estimated_cycles is not None:
        shown.add_row("cycles", "", f"{found.estimated_cycles / 1e6:.3f} M", "")
    return shown


def _collectives_table(plan: Plan, found: Audit, differences: tuple[Difference, ...]) -> Any:
    shown = table("collectives", "kind|axes|predicted|compiled|verdict", "predicted|compiled")
    different = {(d.kind, d.axes): d for d in differences}
    compiled = _totals(found.collectives)
    for one in plan.prediction.collectives:
        if (one.kind, one.axes) in different:
            continue
        sent = compiled.get((one.kind, one.axes), (0.0, 0))
        shown.add_row(one.kind, "·".join(one.axes), _amount(one.nbytes, one.count), _amount(*sent), "equal")
    for d in differences:
        predicted, built = (
            _amount(d.predicted_bytes, d.predicted_count),
            _amount(d.compiled_bytes, d.compiled_count),
        )
        shown.add_row(d.kind, "·".join(d.axes), predicted, built, d.explanation or "NOT EXPLAINED")
    return shown


def _totals(collectives: tuple[Collective, ...]) -> dict[tuple[str, tuple[str, ...]], tuple[float, int]]:
    """Bytes and count by kind and axes, over all dtypes."""
    totals: dict[tuple[str, tuple[str, ...]], tuple[float, int]] = {}
    for one in collectives:
        total, count = totals.get((one.kind, one.axes), (0.0, 0))
        totals[one.kind, one.axes] = (total + one.nbytes, count + one.count)
    return totals


def _amount(total: float, count: int) -> str:
    return f"{nbytes(total)} in {count}"
