"""The axis of a mesh that holds the stages of pipelines, and what that says about the equations of a tick."""

import numpy as np

from autopar.ir.program import Value
from autopar.planner.flow import stages_of
from autopar.planner.graph import Graph, Unit
from autopar.planner.space import Space
from autopar.sharding.strategies import Split

PIPE = "pipe"
"""The name of the axis."""

Masks = dict[Unit, np.ndarray]


def staged(graph: Graph, space: Space) -> Masks:
    """The choices of a program with pipelines: each device of the axis has its stages, in every equation of a tick.

    Shifts split their stages over the axis, and nothing else over it; so does whatever runs in a tick and has the
    dimension of the stages. What has not, such as the microbatch that enters, is alike on all of them. Outside of
    ticks the axis is one like any other.
    """
    if PIPE not in space.mesh.names:
        return {}
    ticks, factors = _ticks(graph), stages_of(graph)
    masks: Masks = {}
    for unit in graph.units:
        if unit.kind not in ("equation", "cluster") or not any(unit.position in tick for tick in ticks):
            continue
        stages = factors[unit.position]
        rows = _splits(graph, space, unit)
        on_axis = np.array([_only(row, stages) for row in rows])
        if on_axis.any():
            masks[unit] = on_axis
    return masks


def _ticks(graph: Graph) -> list[range]:
    """The bodies of loops that shift what they carry, as positions of their equations."""
    ends = {carry.position: repeat.position for repeat, carry in graph.ties}
    shifts = [eqn for eqn in graph.program.equations if eqn.primitive.name == "stage_shift"]
    starts = {graph.producer[eqn.inputs[0]] for eqn in shifts if isinstance(eqn.inputs[0], Value)}
    return [range(start + 1, ends[start]) for start in starts]


def _only(row: dict[Split, tuple[str, ...]], stages: frozenset[str]) -> bool:
    """Whether the axis splits the stages and nothing else does; nothing over the axis where there are none."""
    if not stages:
        return not any(PIPE in axes for axes in row.values())
    return all(axes == (PIPE,) if split in stages else PIPE not in axes for split, axes in row.items()) and bool(
        stages & row.keys()
    )


def _splits(graph: Graph, space: Space, unit: Unit) -> list[dict[Split, tuple[str, ...]]]:
    """For every choice of a unit the axes that split each factor."""
    if unit.kind == "cluster":
        specs = space.specs(unit.shape)
        return [{f"d{i}": axes for i, axes in enumerate(spec.dims) if axes} for spec in specs]
    found = []
    for strategy in space.strategies(graph.rules[unit.position]):
        row: dict[Split, tuple[str, ...]] = {}
        for axis, split in strategy.splits:
            if split is not None:
                row[split] = (*row.get(split, ()), axis)
        found.append(row)
    return found
