"""The strategies of the literature, each a function that restricts the search. None is a second code path."""

from collections.abc import Callable, Mapping

import numpy as np

from autopar.errors import PresetError
from autopar.ir.program import Value
from autopar.planner.flow import Flow, flow_of
from autopar.planner.graph import Graph, Unit
from autopar.planner.space import Space
from autopar.sharding.strategies import Split

Masks = Mapping[Unit, np.ndarray]
Preset = Callable[[Graph, Space], Masks]


class _Draft:
    """Masks under construction; a restriction that would leave a unit nothing is not applied to it."""

    def __init__(self, graph: Graph, space: Space) -> None:
        self.graph, self.space, self.flow = graph, space, flow_of(graph)
        self.masks: dict[Unit, np.ndarray] = {}
        self.kinds = {unit: self.flow.kinds(graph, space, unit) for unit in graph.units}
        self.touching = [unit for unit in graph.units if self.flow.touches(graph, unit)]
        self.apart = [unit for unit in graph.units if not self.flow.touches(graph, unit)]

    def keep(self, unit: Unit, allowed: Callable[[dict[str, Split]], bool]) -> None:
        """Keeps the choices whose axes ``allowed`` accepts."""
        self.narrow(unit, np.array([allowed(row) for row in self.kinds[unit]]))

    def narrow(self, unit: Unit, mask: np.ndarray) -> None:
        """Keeps the choices that ``mask`` allows, if any are left."""
        mask = mask & self.masks.get(unit, np.ones(len(mask), bool))
        if mask.any():
            self.masks[unit] = mask

    def most(self, unit: Unit, score: Callable[[dict[str, Split]], float]) -> None:
        """Keeps the choices of the highest score."""
        scores = np.array([score(row) for row in self.kinds[unit]])
        allowed = self.masks.get(unit, np.ones(len(scores), bool))
        self.narrow(unit, allowed & (scores == scores[allowed].max()))

    def batch_on(self, axes: tuple[str, ...]) -> None:
        """Splits the batch over as many devices of ``axes`` as it divides, and nothing else over them."""
        sizes = self.space.sizes
        for unit in self.touching:
            self.keep(unit, lambda row: all(row[axis] in ("batch", None) or isinstance(row[axis], int) for axis in axes))
            self.most(unit, lambda row: np.prod([sizes[axis] for axis in axes if row[axis] == "batch"]))

    def whole(self, units: list[Unit], axes: tuple[str, ...]) -> None:
        """Splits nothing over ``axes`` (a partial sum may pass)."""
        for unit in units:
            self.keep(unit, lambda row: all(row[axis] is None or isinstance(row[axis], int) for axis in axes))

    def shard(self, units: list[Unit], axes: tuple[str, ...]) -> None:
        """Splits over as many devices of ``axes`` as the shape divides."""
        sizes = self.space.sizes
        for unit in units:
            self.most(unit, lambda row: np.prod([sizes[axis] for axis in axes if row[axis] is not None]))

    def state(self, chosen: Callable[[Value, Flow], bool]) -> list[Unit]:
        """The units of the state arguments that ``chosen`` accepts."""
        values = [self.graph.program.inputs[i] for i, _ in self.graph.state]
        return [self.graph.inputs[v] for v in values if v.shape and chosen(v, self.flow)]


def _parameter(value: Value, flow: Flow) -> bool:
    return value in flow.parameters


def _moment(value: Value, flow: Flow) -> bool:
    return value not in flow.parameters


def dp(graph: Graph, space: Space) -> Masks:
    """Data parallelism: the batch on every axis, everything else replicated (PyTorch DDP, Li et al. 2020)."""
    draft = _Draft(graph, space)
    draft.batch_on(space.mesh.names)
    draft.whole(draft.apart, space.mesh.names)
    return draft.masks


def zero1(graph: Graph, space: Space) -> Masks:
    """Sharded optimizer state and update (Xu et al. 2020; ZeRO stage 1, Rajbhandari et al. 2020)."""
    draft = _Draft(graph, space)
    draft.batch_on(space.mesh.names)
    draft.whole(draft.state(_parameter), space.mesh.names)
    draft.shard(draft.state(_moment), space.mesh.names)
    return draft.masks


def zero2(graph: Graph, space: Space) -> Masks:
    """ZeRO stage 2: as stage 1, and gradients exist only as shards once they are reduced."""
    draft = _Draft(graph, space)
    draft.batch_on(space.mesh.names)
    draft.whole(draft.state(_parameter), space.mesh.names)
    draft.shard(draft.state(_moment), space.mesh.names)
    shapes = {unit.shape for unit in draft.state(_parameter)}
    updates = [unit for unit in draft.apart if unit.kind == "cluster" and unit.shape in shapes]
    draft.shard(updates, space.mesh.names)
    return draft.masks


def zero3(graph: Graph, space: Space) -> Masks:
    """ZeRO stage 3, FSDP (Zhao et al. 2023): parameters sharded too, gathered where they are used."""
    draft = _Draft(graph, space)
    draft.batch_on(space.mesh.names)
    draft.shard(draft.state(lambda value, flow: True), space.mesh.names)
    return draft.masks


def _model_axis(space: Space, name: str) -> str:
    """The axis called ``name``, else the last of several axes (a mesh of one axis has no room for another)."""
    return name if name in space.mesh.names else space.mesh.names[-1]


def _tensor_parallel(graph: Graph, space: Space, sequence: bool) -> Masks:
    tensor = _model_axis(space, "tensor")
    data = tuple(axis for axis in space.mesh.names if axis != tensor)
    refused = ("batch",) if sequence else ("batch", "seq")
    draft = _Draft(graph, space)
    for unit in draft.touching:
        draft.keep(unit, lambda row: row[tensor] not in refused)
    draft.batch_on(data)
    draft.whole(draft.apart, data)
    draft.shard([unit for unit in draft.state(_parameter) if len(unit.shape) > 1], (tensor,))
    return draft.masks


def megatron(graph: Graph, space: Space) -> Masks:
    """1-D tensor parallelism (Shoeybi et al. 2019): every weight matrix split over ``tensor``, the batch over the rest."""
    return _tensor_parallel(graph, space, sequence=False)


def megatron_sp(graph: Graph, space: Space) -> Masks:
    """Megatron with sequence parallelism (Korthikanti et al. 2022): between the matrices ``tensor`` splits the sequence."""
    return _tensor_parallel(graph, space, sequence=True)


def tp2d(graph: Graph, space: Space) -> Masks:
    """2-D tensor parallelism (Optimus, Xu et al. 2023): every weight matrix lies on the grid of two axes.

    Raises:
        PresetError: the mesh has fewer than two axes.
    """
    if len(space.mesh.names) < 2:
        raise PresetError("preset tp2d needs a mesh of two axes", where=f"mesh {space.mesh}", fix="use data=2,tensor=4")
    tensor = _model_axis(space, "tensor")
    rows = tuple(axis for axis in space.mesh.names if axis != tensor)
    draft = _Draft(graph, space)
    for unit in draft.touching:
        draft.keep(unit, lambda row: row[tensor] not in ("batch", "seq"))
    draft.batch_on(rows)
    matrices = [unit for unit in draft.state(lambda value, flow: True) if len(unit.shape) > 1]
    draft.shard(matrices, space.mesh.names)
    return draft.masks


def gshard(graph: Graph, space: Space) -> Masks:
    """Expert parallelism (Lepikhin et al. 2021): one group of experts on each device of ``expert``, data parallel elsewhere.

    Raises:
        PresetError: the program has no experts.
    """
    draft = _Draft(graph, space)
    if not draft.flow.experts:
        raise PresetError("preset gshard needs expert weights, the step has none", fix="use it on a mixture of experts")
    expert = _model_axis(space, "expert")
    experts = {graph.inputs[value] for value in draft.flow.experts}
    rest = tuple(axis for axis in space.mesh.names if axis != expert)
    arguments = [u for u in draft.touching if u.kind == "input"]
    for unit in arguments:
        draft.most(unit, lambda row: sum(kind == "batch" for kind in row.values()))
    for unit in experts:
        specs = space.specs(unit.shape)
        draft.narrow(unit, np.array([expert in spec.dims[0] and not set(rest) & set(spec.axes) for spec in specs]))
    others = [unit for unit in draft.state(_parameter) if unit not in experts]
    draft.whole(others, space.mesh.names)
    return draft.masks


PRESETS: dict[str, Preset] = {
    "dp": dp,
    "zero1": zero1,
    "zero2": zero2,
    "zero3": zero3,
    "fsdp": zero3,
    "megatron": megatron,
    "megatron_sp": megatron_sp,
    "tp2d": tp2d,
    "gshard": gshard,
}
