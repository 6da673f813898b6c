"""Moves a state from the layout of one plan to that of another: other axes, another mesh, other devices.

Every block of the new layout is put together on its own device from the parts of old blocks that overlap it, sent
from device to device: nothing is gathered, and no host holds a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autopar.errors import PlanError

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

    Args:
        tree: a pytree of arrays, such as the train state of a run under another plan.
        shardings: a pytree of ``jax.sharding.Sharding`` of the same structure, such as ``plan.shardings[0]``.
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


def _moved(array: Any, sharding: jax.sharding.Sharding, donate: bool) -> jax.Array:
    if not isinstance(array, jax.Array) or not array.is_fully_addressable or not sharding.is_fully_addressable:
        return jax.device_put(array, sharding)  # JAX itself moves between processes
    if array.sharding == sharding:
        return array
    keys = jnp.issubdtype(array.dtype, jax.dtypes.extended)  # a few words
    if keys or array.sharding.is_equivalent_to(sharding, array.ndim):
        return jax.device_put(array, sharding)
    shards = {_box(shard.index, array.shape): shard for shard in array.addressable_shards}
    boxes, blocks = list(shards), []
    for device, index in sharding.addressable_devices_indices_map(array.shape).items():
        assert index is not None  # every device of a sharding holds a part
        target = _box(index, array.shape)
        sent = []
        for part in parts(target, boxes):
            source = boxes[part.source]
            block = shards[source].data[_within(part.box, source)]
            sent.append((part.box, jax.device_put(block, device)))
        blocks.append(_joined(sent, 0))
    moved = jax.make_array_from_single_device_arrays(array.shape, sharding, blocks)
    if donate:
        jax.block_until_ready(moved)
        array.delete()
    return moved


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
