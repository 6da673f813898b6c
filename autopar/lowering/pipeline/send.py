"""Sends arrays between submeshes without waiting for them.

``jax.device_put`` fetches an array to the host, and waits for it, where source and target are several devices. Here it
only ever copies from one device to one: submeshes of one shape exchange blocks after the source has laid the array out
as the target wants it; between different shapes, the source gathers the array and each target device gets its slice.

Between processes, all of them send in one order; what a process has no part in is an array without blocks there.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from autopar.lowering.morph import rearranged
from autopar.lowering.processes import absent, from_every_process, in_one_process, is_here, on, one_at_a_time

Slices = tuple[tuple[int, int], ...]
"""First and last element (exclusive) along each dimension."""


def send(array: Any, place: NamedSharding) -> jax.Array:
    """The array at another place; the same object if it is there already.

    Args:
        array: a JAX array, or anything that ``jax.device_put`` takes.
        place: where it is wanted.
    """
    source = getattr(array, "sharding", None)
    if source == place:
        return array
    if jax.process_count() == 1:
        return _inside(array, place)
    if not isinstance(source, NamedSharding):
        return from_every_process(array, place)
    return _between_processes(array, source, place)


def _between_processes(array: jax.Array, source: NamedSharding, place: NamedSharding) -> jax.Array:
    if in_one_process(source, place):
        return _inside(array, place) if is_here(place) else absent(array.shape, array.dtype, place)
    if _devices(source) == _devices(place):
        return on(place, _same, array)(array)
    there = NamedSharding(source.mesh, place.spec) if _shape(source) == _shape(place) else source
    if there != source:
        array = on(there, _same, array)(array)
    return rearranged(array, place)


def _inside(array: Any, place: NamedSharding) -> jax.Array:
    source = getattr(array, "sharding", None)
    one_to_one = source is not None and len(source.device_set) == len(place.device_set) == 1
    if not isinstance(source, NamedSharding) or one_to_one or jax.numpy.issubdtype(array.dtype, jax.dtypes.extended):
        return jax.device_put(array, place)
    if _devices(source) == _devices(place):
        return _laid_out(place)(array)
    if _shape(source) == _shape(place):
        blocks = _blocks(array, NamedSharding(source.mesh, place.spec))
    else:
        whole = _blocks(array, NamedSharding(source.mesh, PartitionSpec()))
        wanted = _slices(place, array.shape)
        blocks = [_slice(whole[i % len(whole)], each) for i, each in enumerate(wanted)]
    devices = _devices(place)
    return jax.make_array_from_single_device_arrays(array.shape, place, jax.device_put(blocks, devices))


def _shape(place: NamedSharding) -> tuple[tuple[str, int], ...]:
    return tuple(place.mesh.shape.items())


def _devices(place: NamedSharding) -> list[Any]:
    return list(np.asarray(place.mesh.devices).flat)


def _blocks(array: jax.Array, place: NamedSharding) -> list[jax.Array]:
    """The blocks of an array laid out anew on its own devices, in the order of their mesh."""
    if array.sharding != place:
        array = _laid_out(place)(array)
    block_of = {shard.device: shard.data for shard in array.addressable_shards}
    return [block_of[device] for device in _devices(place)]


@functools.cache
def _laid_out(place: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return one_at_a_time(place, jax.jit(_same, out_shardings=place))


def _same(array: jax.Array) -> jax.Array:
    return array


def _slices(place: NamedSharding, shape: Sequence[int]) -> list[Slices]:
    """What each device of a place holds, in the order of its mesh."""
    found = place.devices_indices_map(tuple(shape))
    spans = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True)) for device, index in found.items()
    }
    return [spans[device] for device in _devices(place)]


@functools.partial(jax.jit, static_argnums=1)
def _slice(whole: jax.Array, spans: Slices) -> jax.Array:
    return whole[tuple(slice(*span) for span in spans)]
