"""The moves between specs: which single collective takes a value from one spec to another.

all_gather          [a·b] -> [a] or [-]         drops minor axes of a dimension
slice               [a] -> [a·b]                keeps one block of a replicated dimension; no communication
all_reduce          [-] +a +b -> [-] +b or [-]  combines partial values
reduce_scatter      [-] +a -> [a]               combines them and keeps one block (sums only)
all_to_all          [a·b, -] -> [a, b]          moves minor axes to another dimension
collective_permute  [a·b] -> [b·a]              moves whole blocks between devices; local shapes stay
mask                [-] -> [-] +a               puts zeros but on index 0 of an axis (sums only)
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from autopar.spec import Sizes, Spec

Axes = tuple[tuple[str, int], ...]
"""Names and sizes of the mesh axes, major first; all sizes above 1."""

FREE_KINDS = ("slice", "mask")
"""Kinds of steps that communicate nothing."""


@dataclass(frozen=True, slots=True)
class Step:
    """One move of a resharding.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce, all_to_all, collective_permute, slice or mask.
        axes: the mesh axes that it spans, in the order in which their indices are combined, major first.
        dim: the dimension that is gathered, scattered or sliced, or that an all_to_all splits.
        from_dim: the dimension that an all_to_all concatenates.
        nbytes: bytes per device of the larger of its input and output; 0 where nothing is communicated.
        monoid: how reductions combine: sum, max, min, and, or.
        permutation: (sender, receiver) pairs of indices over ``axes``, for a collective_permute.
    """

    kind: str
    axes: tuple[str, ...]
    dim: int | None = None
    from_dim: int | None = None
    nbytes: float = 0.0
    monoid: str = "sum"
    permutation: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        where = "" if self.dim is None else f" dim {self.dim}"
        where = where if self.from_dim is None else f" dim {self.from_dim} to {self.dim}"
        size = f" {self.nbytes:.0f} B" if self.nbytes else ""
        return f"{self.kind}({', '.join(self.axes)}){where}{size}"


@dataclass(frozen=True, eq=False)
class SpecGraph:
    """Every spec of one rank on a mesh, and every move between two of them.

    Attributes:
        axes: the mesh axes.
        specs: the nodes.
        index: the position of each.
        parts: into how many parts each spec cuts each dimension, (nodes, rank).
        steps: the moves, without their bytes and permutations.
        ends: source and target node of each move, (moves, 2).
        edge: the move from one node to another, -1 where there is none, (nodes, nodes).
        prices: the distinct (kind, axes in mesh order, shards of the larger buffer).
        price_of: the price of each move, and at the end -1 for no move, (moves + 1,).
    """

    axes: Axes
    specs: tuple[Spec, ...]
    index: dict[Spec, int]
    parts: np.ndarray
    steps: tuple[Step, ...]
    ends: np.ndarray
    edge: np.ndarray
    prices: tuple[tuple[str, tuple[str, ...], int], ...]
    price_of: np.ndarray

    def move(self, source: int, target: int, nbytes: float) -> Step:
        """The move between two neighbouring nodes of a value of ``nbytes`` in all."""
        edge = self.edge[source, target]
        step, (_, _, shards) = self.steps[edge], self.prices[self.price_of[edge]]
        if step.kind in FREE_KINDS:
            return step
        pairs = ()
        if step.kind == "collective_permute":
            pairs = permutation(self.specs[source], self.specs[target], step.axes, dict(self.axes))
        return replace(step, nbytes=nbytes / shards, permutation=pairs)


@functools.lru_cache(maxsize=64)
def spec_graph(rank: int, axes: Axes, monoid: str) -> SpecGraph:
    """The graph of the specs of values of ``rank`` dimensions, whose partial terms combine by ``monoid``.

    >>> [str(step) for step in spec_graph(1, (("x", 2),), "max").steps]
    ['all_gather(x) dim 0', 'all_reduce(x)', 'slice(x) dim 0']
    """
    sizes = dict(axes)
    specs = tuple(_specs(rank, tuple(sizes)))
    index = {spec: position for position, spec in enumerate(specs)}
    moves = [
        (position, index[target], step)
        for position, spec in enumerate(specs)
        for target, step in _moves(spec, tuple(sizes), monoid)
    ]
    moves += [(index[source], index[target], step) for source, target, step in _permutes(specs, sizes)]
    steps = tuple(step for _, _, step in moves)
    ends = np.array([(source, target) for source, target, _ in moves], np.int64).reshape(-1, 2)
    edge = np.full((len(specs), len(specs)), -1)
    edge[ends[:, 0], ends[:, 1]] = np.arange(len(steps))
    shards = np.array([spec.shards(sizes) for spec in specs])
    order = list(sizes)
    prices: dict[tuple[str, tuple[str, ...], int], int] = {}
    price_of = [
        prices.setdefault((step.kind, tuple(sorted(step.axes, key=order.index)), int(count)), len(prices))
        for step, count in zip(steps, _buffer_shards(steps, shards[ends]), strict=True)
    ]
    parts = np.array([[math.prod(sizes[a] for a in dim) for dim in spec.dims] for spec in specs], np.int64)
    return SpecGraph(
        axes,
        specs,
        index,
        parts.reshape(len(specs), rank),
        steps,
        ends,
        edge,
        tuple(prices),
        np.array([*price_of, -1]),
    )


def permutation(source: Spec, target: Spec, axes: tuple[str, ...], sizes: Sizes) -> tuple[tuple[int, int], ...]:
    """Who sends to whom, over ``axes``, so that blocks of ``source`` land where ``target`` wants them.

    A device that already holds its block keeps it. Both specs must have the same local shape, and the axes
    that are not named must do the same in both.
    """
    devices = list(itertools.product(*(range(sizes[axis]) for axis in axes)))
    held, wanted = (_blocks(spec, axes, sizes, devices) for spec in (source, target))
    moved = [device for device in range(len(devices)) if held[device] != wanted[device]]
    senders = defaultdict(list)
    for device in reversed(moved):
        senders[held[device]].append(device)
    received = {device: senders[wanted[device]].pop() for device in moved}
    return tuple(sorted((received.get(device, device), device) for device in range(len(devices))))


def _blocks(spec: Spec, axes: tuple[str, ...], sizes: Sizes, devices: list[tuple[int, ...]]) -> list[tuple]:
    """The index along each dimension of the block on each device, as far as ``axes`` decide it."""
    strides = _strides(spec, sizes)
    blocks = []
    for device in devices:
        block = [0] * len(spec.dims)
        for axis, coordinate in zip(axes, device, strict=True):
            if axis in strides:
                dim, stride = strides[axis]
                block[dim] += coordinate * stride
        blocks.append(tuple(block))
    return blocks


def _strides(spec: Spec, sizes: Sizes) -> dict[str, tuple[int, int]]:
    """For each axis its dimension, and by how many blocks a step along the axis moves there."""
    strides = {}
    for position, dim in enumerate(spec.dims):
        stride = 1
        for axis in reversed(dim):
            strides[axis] = (position, stride)
            stride *= sizes[axis]
    return strides


def _specs(rank: int, axes: tuple[str, ...]) -> Iterator[Spec]:
    """Every way to give each axis to a dimension, in every order, to the partial axes, or to nothing."""
    for places in itertools.product(range(rank + 2), repeat=len(axes)):
        where = [tuple(a for a, at in zip(axes, places, strict=True) if at == place) for place in range(rank + 1)]
        for dims in itertools.product(*(itertools.permutations(group) for group in where[:rank])):
            yield Spec(tuple(dims), frozenset(where[rank]))


def _moves(spec: Spec, axes: tuple[str, ...], monoid: str) -> Iterator[tuple[Spec, Step]]:
    """All moves from ``spec`` but the permutes."""
    partial = tuple(axis for axis in axes if axis in spec.partial)
    idle = tuple(axis for axis in axes if axis not in spec.partial and axis not in spec.axes)
    linear = monoid == "sum"
    for dim, names in enumerate(spec.dims):
        for some in _some(itertools.permutations, idle):
            yield _with(spec, dim, names + some), Step("slice", some, dim)
        for kept in range(len(names)):
            gathered = _with(spec, dim, names[:kept])
            yield gathered, Step("all_gather", names[kept:], dim)
            for to in (other for other in range(len(spec.dims)) if other != dim):
                target = _with(gathered, to, spec.dims[to] + names[kept:])
                yield target, Step("all_to_all", names[kept:], to, from_dim=dim)
    for some in _some(itertools.combinations, partial):
        yield Spec(spec.dims, spec.partial - set(some)), Step("all_reduce", some, monoid=monoid)
    # One axis at a time: XLA's TPU compiler turns a reduce_scatter over the whole mesh into an all_reduce and a slice.
    for axis in partial if linear else ():
        for dim, names in enumerate(spec.dims):
            target = _with(Spec(spec.dims, spec.partial - {axis}), dim, (*names, axis))
            yield target, Step("reduce_scatter", (axis,), dim)
    for some in _some(itertools.combinations, idle) if linear else ():
        yield Spec(spec.dims, spec.partial | set(some)), Step("mask", some)


def _some(choose: Callable[..., Iterator], axes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Every choice of one or more of ``axes``."""
    return itertools.chain.from_iterable(choose(axes, count) for count in range(1, len(axes) + 1))


def _with(spec: Spec, dim: int, names: tuple[str, ...]) -> Spec:
    return Spec((*spec.dims[:dim], names, *spec.dims[dim + 1 :]), spec.partial)


def _permutes(specs: tuple[Spec, ...], sizes: Sizes) -> Iterator[tuple[Spec, Spec, Step]]:
    """The moves between specs of the same local shape and the same partial axes."""
    groups = defaultdict(list)
    for spec in specs:
        parts = tuple(math.prod(sizes[axis] for axis in dim) for dim in spec.dims)
        groups[parts, spec.partial].append(spec)
    for group in groups.values():
        for source, target in itertools.permutations(group, 2):
            before, after = _strides(source, sizes), _strides(target, sizes)
            moved = tuple(axis for axis in sizes if before.get(axis) != after.get(axis))
            yield source, target, Step("collective_permute", moved)


def _buffer_shards(steps: tuple[Step, ...], shards: np.ndarray) -> np.ndarray:
    """Into how many shards the buffer is cut that a move is priced by: its larger one; a slice's result."""
    slices = np.array([step.kind == "slice" for step in steps], bool)
    return np.where(slices, shards[:, 1], shards.min(axis=1)) if len(steps) else np.zeros(0, int)
