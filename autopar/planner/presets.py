"""The strategies of the literature, each a function that restricts the search. None is a second code path."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from autopar.errors import PresetError
from autopar.ir.program import Value
from autopar.planner.flow import Flow, flow_of
from autopar.planner.graph import HEAVY, Graph, Unit
from autopar.planner.piping import PIPE
from autopar.planner.space import Space
from autopar.sharding.strategies import Split

Masks = Mapping[Unit, np.ndarray]
Preset = Callable[[Graph, Space], Masks]
Row = dict[str, Split]
"""What each axis does under a choice: split "batch", "seq", "stream", "expert" or "other"; a linear group; None."""

PRODUCTS = (*HEAVY, "gather", "scatter-add")
"""Equations that meet a weight matrix: contractions, and lookups in a table and their gradients."""


def _axes(space: Space) -> tuple[str, ...]:
    """The axes that presets speak of: all but the one that holds the stages of pipelines."""
    return tuple(name for name in space.mesh.names if name != PIPE) or space.mesh.names


class _Draft:
    """Masks under construction; a restriction that would leave a unit nothing is not applied to it."""

    def __init__(self, graph: Graph, space: Space) -> None:
        self.graph, self.space, self.flow = graph, space, flow_of(graph)
        self.masks: dict[Unit, np.ndarray] = {}
        self.kinds = {unit: self.flow.kinds(graph, space, unit) for unit in graph.units}
        self.touching = [unit for unit in graph.units if self.flow.touches(graph, unit)]
        self.apart = [unit for unit in graph.units if not self.flow.touches(graph, unit)]
        self.products = [unit for unit in self.touching if self._is_product(unit)]

    def _is_product(self, unit: Unit) -> bool:
        return unit.kind == "equation" and self.graph.program.equations[unit.position].primitive.name in PRODUCTS

    def keep(self, units: Iterable[Unit], allowed: Callable[[Row], bool]) -> None:
        """Keeps the choices whose axes ``allowed`` accepts."""
        for unit in units:
            self._narrow(unit, np.array([allowed(row) for row in self.kinds[unit]]))

    def most(self, units: Iterable[Unit], score: Callable[[Row], float]) -> None:
        """Keeps the choices of the highest score."""
        for unit in units:
            scores = np.array([score(row) for row in self.kinds[unit]])
            allowed = self.masks.get(unit, np.ones(len(scores), bool))
            self._narrow(unit, scores == scores[allowed].max())

    def _narrow(self, unit: Unit, mask: np.ndarray) -> None:
        mask = mask & self.masks.get(unit, np.ones(len(mask), bool))
        if mask.any():
            self.masks[unit] = mask

    def batch_on(self, units: Iterable[Unit], axes: tuple[str, ...]) -> None:
        """Splits the batch over as many devices of ``axes`` as it divides, and nothing else over them."""
        units = list(units)
        self.keep(
            units,
            lambda row: all(row[axis] in ("batch", None) or isinstance(row[axis], int) for axis in axes),
        )
        self.split(units, axes, "batch")

    def refuse(self, units: Iterable[Unit], axes: Iterable[str], kinds: Iterable[str]) -> None:
        """Lets no axis split any of ``kinds``."""
        axes, kinds = tuple(axes), frozenset(kinds)
        self.keep(units, lambda row: not any(row[axis] in kinds for axis in axes))

    def whole(self, units: Iterable[Unit], axes: tuple[str, ...]) -> None:
        """Splits nothing over ``axes`` (a partial sum may pass)."""
        self.refuse(units, axes, ("batch", "seq", "stream", "expert", "other"))

    def split(self, units: Iterable[Unit], axes: tuple[str, ...], *kinds: str) -> None:
        """Splits dimensions of ``kinds`` (none named: of any) over as many devices of ``axes`` as they divide."""
        sizes = self.space.sizes

        def devices(row: Row) -> float:
            used = [axis for axis in axes if (row[axis] in kinds if kinds else isinstance(row[axis], str))]
            return float(np.prod([sizes[axis] for axis in used]))

        self.most(units, devices)

    def labelled(self, unit: Unit, label: str) -> bool:
        """Whether some dimension of the unit is ``label``."""
        if unit.kind in ("equation", "cluster"):
            return label in self.flow.factors[unit.position].values()
        return unit.value is not None and label in self.flow.dims.get(unit.value, ())

    def state(self, chosen: Callable[[Value, Flow], bool]) -> list[Unit]:
        """The units of the state arguments that ``chosen`` accepts."""
        values = [self.graph.program.inputs[i] for i, _ in self.graph.state]
        return [self.graph.inputs[v] for v in values if v.shape and chosen(v, self.flow)]


def _parameter(value: Value, flow: Flow) -> bool:
    return value in flow.parameters


def _matrix(value: Value, flow: Flow) -> bool:
    return value in flow.parameters and len(value.shape) > 1


def _moment(value: Value, flow: Flow) -> bool:
    return value not in flow.parameters


def _any(value: Value, flow: Flow) -> bool:
    return True


def dp(graph: Graph, space: Space) -> Masks:
    """Data parallelism: the batch on every axis, everything else replicated (PyTorch DDP, Li et al. 2020)."""
    draft = _Draft(graph, space)
    draft.batch_on(draft.touching, _axes(space))
    draft.whole(draft.apart, _axes(space))
    return draft.masks


def _sharded_update(graph: Graph, space: Space) -> _Draft:
    """The batch on every axis, parameters whole, the optimizer's state in as many pieces as there are devices."""
    draft = _Draft(graph, space)
    draft.batch_on(draft.touching, _axes(space))
    draft.whole(draft.state(_parameter), _axes(space))
    draft.split(draft.state(_moment), _axes(space))
    return draft


def zero1(graph: Graph, space: Space) -> Masks:
    """Sharded optimizer state and update (Xu et al. 2020; ZeRO stage 1, Rajbhandari et al. 2020)."""
    return _sharded_update(graph, space).masks


def zero2(graph: Graph, space: Space) -> Masks:
    """ZeRO stage 2: as stage 1, and gradients exist only as shards once they are reduced."""
    draft = _sharded_update(graph, space)
    shapes = {unit.shape for unit in draft.state(_parameter)}
    updates = [unit for unit in draft.apart if unit.kind == "cluster" and unit.shape in shapes]
    draft.split(updates, _axes(space))
    return draft.masks


def zero3(graph: Graph, space: Space) -> Masks:
    """ZeRO stage 3, FSDP (Zhao et al. 2023): parameters sharded too, gathered where they are used."""
    draft = _Draft(graph, space)
    draft.batch_on(draft.touching, _axes(space))
    draft.split(draft.state(_any), _axes(space))
    return draft.masks


def _model_axis(space: Space, name: str) -> str:
    """The axis called ``name``, else the last of several axes (a mesh of one axis has no room for another)."""
    return name if name in _axes(space) else _axes(space)[-1]


def _tensor_parallel(graph: Graph, space: Space) -> tuple[_Draft, str]:
    """What both forms of Megatron share: ``tensor`` splits every matrix, but not along the residual stream."""
    tensor = _model_axis(space, "tensor")
    data = tuple(axis for axis in _axes(space) if axis != tensor)
    draft = _Draft(graph, space)
    draft.refuse(draft.touching, (tensor,), ("batch", "stream"))
    draft.refuse(draft.products, (tensor,), ("seq",))
    draft.batch_on(draft.touching, data)
    draft.split(draft.products, (tensor,), "other", "expert")
    draft.whole(draft.apart, data)
    draft.refuse(draft.apart, (tensor,), ("stream", "seq"))
    draft.split(draft.state(_matrix), (tensor,))
    return draft, tensor


def megatron(graph: Graph, space: Space) -> Masks:
    """1-D tensor parallelism (Shoeybi et al. 2019): every matrix split over ``tensor``, the batch over the rest."""
    draft, tensor = _tensor_parallel(graph, space)
    draft.refuse(draft.touching, (tensor,), ("seq",))
    return draft.masks


def megatron_sp(graph: Graph, space: Space) -> Masks:
    """Megatron, with the sequence split between the matrices (Korthikanti et al. 2022)."""
    draft, tensor = _tensor_parallel(graph, space)
    others = [u for u in draft.touching if u.kind in ("equation", "cluster") and u not in set(draft.products)]
    stream = {unit for unit in others if draft.labelled(unit, "stream")}
    carrying = {unit for unit in stream if any(isinstance(row[tensor], int) for row in draft.kinds[unit])}
    draft.split(stream - carrying, (tensor,), "seq")
    draft.keep(carrying, lambda row: row[tensor] == "seq" or isinstance(row[tensor], int))
    draft.refuse([unit for unit in others if unit not in stream], (tensor,), ("seq",))
    return draft.masks


def tp2d(graph: Graph, space: Space) -> Masks:
    """2-D tensor parallelism (Optimus, Xu et al. 2023): every weight matrix lies on the grid of two axes.

    Raises:
        PresetError: the mesh has fewer than two axes.
    """
    if len(_axes(space)) < 2:
        raise PresetError("preset tp2d needs a mesh of two axes", where=f"mesh {space.mesh}", fix="use data=2,tensor=4")
    tensor = _model_axis(space, "tensor")
    rows = tuple(axis for axis in _axes(space) if axis != tensor)
    draft = _Draft(graph, space)
    draft.refuse(draft.touching, (tensor,), ("batch", "seq"))
    draft.batch_on(draft.touching, rows)
    draft.split([unit for unit in draft.state(_any) if len(unit.shape) > 1], _axes(space))
    return draft.masks


def gshard(graph: Graph, space: Space) -> Masks:
    """Expert parallelism (Lepikhin et al. 2021): experts on the axis ``expert``, data parallel on every axis elsewhere.

    Raises:
        PresetError: the program has no experts.
    """
    draft = _Draft(graph, space)
    if not draft.flow.experts:
        raise PresetError("preset gshard needs expert weights, the step has none", fix="use it on a mixture of experts")
    expert = _model_axis(space, "expert")
    rest = tuple(axis for axis in _axes(space) if axis != expert)
    experts = {graph.inputs[value] for value in draft.flow.experts}
    inside = [unit for unit in draft.touching if draft.flow.one_per_expert(graph, unit)]
    draft.split(inside, (expert,), "expert")
    draft.batch_on(inside, rest)
    between = _neighbours(draft, inside)  # the activation function, in the layout of the products around it
    draft.batch_on([unit for unit in draft.touching if unit not in between], _axes(space))
    draft.batch_on(between, rest)
    draft.split(experts, (expert,), "expert")
    draft.refuse(draft.apart, _axes(space), ("stream", "seq", "other"))
    draft.refuse(draft.apart, rest, ("expert",))
    shapes = {unit.shape for unit in experts}
    draft.whole([u for u in draft.apart if u.kind == "cluster" and u.shape not in shapes], _axes(space))
    draft.whole([unit for unit in draft.state(_parameter) if unit not in experts], _axes(space))
    return draft.masks


def _neighbours(draft: _Draft, units: list[Unit]) -> set[Unit]:
    """The units themselves, and all but other products that they read or that read them."""
    equations, products = draft.graph.program.equations, set(draft.products)

    def values(unit: Unit) -> set[Value]:
        own = {unit.value} if unit.value is not None else set()
        return own | {value for i in unit.equations for value in (*equations[i].operands, *equations[i].outputs)}

    near = set().union(*map(values, units))
    return {*units, *(unit for unit in draft.touching if unit not in products and values(unit) & near)}


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
