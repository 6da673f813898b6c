"""Moves a state from the layout of one plan to that of another: other axes, another mesh, other devices.

Every block of the new layout is put together on its own device from the parts of old blocks that overlap it, sent
from device to device: nothing is gathered, and no host holds a copy. Between processes too, where every process calls
``morph`` with arrays and shardings of the same devices (``autopar.lowering.processes`` says what an array means there).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, Sharding

from autopar.errors import PlanError
from autopar.lowering.processes import absent, exchange, from_every_process, in_one_process, is_here, on

Interval = tuple[int, int]
Box = tuple[Interval, ...]
"""A block of an array: start and stop of each dimension."""


@dataclass(frozen=True)
class Part:
    """What one old block gives to a new block.

    Attributes:
        source: number of the old block.
        box: the part, in coordinates of the whole array.
    """

    source: int
    box: Box


def parts(target: Box, sources: Sequence[Box]) -> tuple[Part, ...]:
    """Parts of ``sources``, disjoint blocks that cover the array, that make up ``target``; in row-major order.

    >>> parts(((2, 6),), [((0, 4),), ((4, 8),)])
    (Part(source=0, box=((2, 4),)), Part(source=1, box=((4, 6),)))
    """
    found = []
    for number, source in enumerate(sources):
        box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(target, source, strict=True))
        if all(start < stop for start, stop in box):
            found.append(Part(number, box))
    return tuple(sorted(found, key=lambda part: part.box))


def morph(tree: Any, shardings: Any, *, donate: bool = False) -> Any:
    """``tree`` with every array laid out as the sharding at its place in ``shardings``.

    An array that lies there already is passed on as it is: a step that donates the result frees it in ``tree`` too.

    Args:
        tree: a pytree of arrays, such as the train state of a run under another plan.
        shardings: a pytree of ``jax.sharding.Sharding`` of the same structure, such as ``plan.shardings[0]``, or
            of a pipeline ``step.compiled(state, batch).shardings[0]``.
        donate: free each array of ``tree`` once it has been moved, so that at most one lies on the devices twice.

    Raises:
        PlanError: the structures differ.
    """
    leaves, structure = jax.tree.flatten(tree)
    wanted, expected = jax.tree.flatten(shardings)
    if structure != expected:
        raise PlanError(
            f"the state and the shardings differ in structure: {len(leaves)} and {len(wanted)} leaves",
            fix="take the shardings of a plan that was made for this step and state: plan.shardings",
        )
    return jax.tree.unflatten(structure, [_moved(x, to, donate) for x, to in zip(leaves, wanted, strict=True)])


def _moved(array: Any, sharding: Sharding, donate: bool) -> jax.Array:
    if not isinstance(array, jax.Array):
        return from_every_process(array, sharding)
    if array.sharding == sharding:
        return array
    moved = rearranged(array, sharding)
    if donate and not (_are_keys(array) or array.sharding.is_equivalent_to(sharding, array.ndim)):  # same buffers
        jax.block_until_ready(moved)
        array.delete()
    return moved


def rearranged(array: jax.Array, place: Sharding) -> jax.Array:
    """The array at another place, on devices of any processes: each block is sent in parts, and nothing is gathered.

    Where devices of several processes are concerned, each of these processes calls it, in the same order.
    """
    source, alone = array.sharding, in_one_process(array.sharding, place)
    if not alone and not isinstance(source, NamedSharding):
        return from_every_process(array, place)
    if alone and not is_here(place):
        return absent(array.shape, array.dtype, place)
    if alone and (_are_keys(array) or source.is_equivalent_to(place, array.ndim)):
        return jax.device_put(array, place)
    if _are_keys(array):
        return _rearranged_keys(array, place)
    sent = _sent(_routes(source, place, array.shape), array)
    if not is_here(place):
        return absent(array.shape, array.dtype, place)
    joined = [_joined(sorted(found, key=lambda part: part[0]), 0) for found in sent.values()]
    return jax.make_array_from_single_device_arrays(array.shape, place, joined)


def _are_keys(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _rearranged_keys(keys: jax.Array, place: Sharding) -> jax.Array:
    """Keys are sent as the words that they are made of."""
    shape = jax.eval_shape(jax.random.key_data, keys)
    source, target = (NamedSharding(p.mesh, p.spec) for p in (keys.sharding, place) if isinstance(p, NamedSharding))
    words = on(source, jax.random.key_data, shape)(keys)
    wrap = _wrapping(jax.random.key_impl(keys))
    return on(target, wrap, jax.ShapeDtypeStruct(keys.shape, keys.dtype))(rearranged(words, target))


@functools.cache
def _wrapping(impl: Any) -> Callable[[jax.Array], jax.Array]:
    return functools.partial(jax.random.wrap_key_data, impl=impl)


# -- routes


@dataclass(frozen=True)
class _Route:
    """A part of a block on its way: ``box`` of the block ``whole``, from device to device."""

    source: Any
    target: Any
    box: Box
    whole: Box

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the part."""
        return tuple(stop - start for start, stop in self.box)

    def part(self, block: jax.Array) -> jax.Array:
        """The part of the block of the source, in a buffer of its own where it stays on its device."""
        if self.box != self.whole:
            return block[_within(self.box, self.whole)]
        return jnp.copy(block) if self.source == self.target else block


@dataclass(frozen=True)
class _Routes:
    """All parts of an array: those that stay in their process, and rounds of those that do not.

    In a round all parts have one shape, and a device sends and gets one at most.
    """

    inside: tuple[_Route, ...]
    rounds: tuple[tuple[_Route, ...], ...]


@functools.cache
def _routes(source: Sharding, place: Sharding, shape: tuple[int, ...]) -> _Routes:
    """The same in every process."""
    holders: dict[Box, list[Any]] = {}
    for device, index in source.devices_indices_map(shape).items():
        holders.setdefault(_box(index, shape), []).append(device)
    boxes, inside, rounds = list(holders), list[_Route](), list[list[_Route]]()
    for number, (device, index) in enumerate(place.devices_indices_map(shape).items()):
        for part in parts(_box(index, shape), boxes):
            whole = boxes[part.source]
            route = _Route(_nearest(holders[whole], device, number), device, part.box, whole)
            if route.source.process_index == device.process_index:
                inside.append(route)
            else:
                _into_a_round(route, rounds)
    return _Routes(tuple(inside), tuple(map(tuple, rounds)))


def _nearest(holders: Sequence[Any], device: Any, number: int) -> Any:
    """Of devices that hold a block, the target itself, else one of its process, else each in turn."""
    inside = [holder for holder in holders if holder.process_index == device.process_index]
    return device if device in holders else (inside or holders)[number % len(inside or holders)]


def _into_a_round(route: _Route, rounds: list[list[_Route]]) -> None:
    for found in rounds:
        busy = any(route.source == other.source or route.target == other.target for other in found)
        if found[0].shape == route.shape and not busy:
            found.append(route)
            return
    rounds.append([route])


def _sent(routes: _Routes, array: jax.Array) -> dict[Any, list[tuple[Box, jax.Array]]]:
    """The parts that arrive at each device of this process."""
    blocks = {shard.device: shard.data for shard in array.addressable_shards}
    sent: dict[Any, list[tuple[Box, jax.Array]]] = {}
    for route in routes.inside:
        if route.source in blocks:
            block = jax.device_put(route.part(blocks[route.source]), route.target)
            sent.setdefault(route.target, []).append((route.box, block))
    for crossing in routes.rounds:
        given = {route.source: route.part(blocks[route.source]) for route in crossing if route.source in blocks}
        like = jax.ShapeDtypeStruct(crossing[0].shape, array.dtype)
        arrived = exchange([(route.source, route.target) for route in crossing], given, like)
        for route in crossing:
            if route.target in arrived:
                sent.setdefault(route.target, []).append((route.box, arrived[route.target]))
    return sent


def _box(index: tuple[slice, ...], shape: Sequence[int]) -> Box:
    return tuple(cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True))


def _within(box: Box, block: Box) -> tuple[slice, ...]:
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(box, block, strict=True))


def _joined(sent: Sequence[tuple[Box, jax.Array]], dim: int) -> jax.Array:
    """The block that the parts tile: they form a grid, joined one dimension after another."""
    if len(sent) == 1:
        return sent[0][1]
    rows: dict[Interval, list[tuple[Box, jax.Array]]] = {}
    for box, block in sent:
        rows.setdefault(box[dim], []).append((box, block))
    joined = [_joined(row, dim + 1) for row in rows.values()]
    return joined[0] if len(joined) == 1 else jnp.concatenate(joined, axis=dim)
