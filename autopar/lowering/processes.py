"""Arrays that several processes share, and blocks that pass from the devices of one to those of another.

One rule says what an array means: under a ``NamedSharding`` it is one array of all processes, of which each holds the
blocks on its own devices, maybe none; anything else (a NumPy array, a number, a JAX array on one device) is the same
whole array in every process.

Between processes blocks pass through a jitted ``ppermute`` over the devices concerned: it works on every backend
(``jax.device_put`` between processes works on some, and wants a socket address on others). Every process that has one
of these devices dispatches it. All of them dispatch in one order, and a device waits only for what was dispatched
before, so none waits for ever. CPUs need more for that: see ``one_at_a_time``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from autopar.compat import shape_struct

AXIS = "devices"
"""The axis of a mesh of devices in a row."""


def in_one_process(*places: Sharding) -> bool:
    """Whether all devices of all places belong to one process."""
    return len({device.process_index for place in places for device in place.device_set}) == 1


def is_here(place: Sharding) -> bool:
    """Whether this process has a device of the place."""
    return bool(place.addressable_devices)


def absent(shape: Sequence[int], dtype: Any, place: Sharding) -> jax.Array:
    """An array that lies on devices of other processes alone."""
    return jax.make_array_from_single_device_arrays(tuple(shape), place, [], dtype=dtype)


def on(place: NamedSharding, function: Callable[..., jax.Array], like: Any) -> Callable[..., jax.Array]:
    """The function, jitted, where this process has devices of the place of its result; elsewhere an absent array.

    Args:
        place: of the result; the arguments are on the same devices.
        function: of arrays.
        like: shape and dtype of the result.
    """
    if is_here(place):
        return one_at_a_time(place, jax.jit(function, out_shardings=place))
    return lambda *_: absent(like.shape, like.dtype, place)


def one_at_a_time(place: Sharding, function: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted function on the devices of a place; on CPUs of several processes it waits for arguments and results.

    A device that is not a CPU runs what it is given in order. On CPUs what is ready runs first, and a collective keeps
    its thread while it waits for others: a later one could keep all the threads that an earlier one needs. So at most
    one program with collectives is on its way in each process, and it is the same in all that it concerns.
    """
    alone = jax.process_count() == 1 or len(place.device_set) == 1
    if alone or next(iter(place.device_set)).platform != "cpu":
        return function

    @functools.wraps(function)
    def waiting(*arrays: Any) -> Any:
        jax.block_until_ready(arrays)
        return jax.block_until_ready(function(*arrays))

    return waiting


def from_every_process(array: Any, place: Sharding) -> jax.Array:
    """An array that every process has whole, each giving its own devices their blocks; nothing is sent.

    Args:
        array: a NumPy array, a number, or a JAX array on a device of this process.
        place: where it is wanted; devices of any processes.
    """
    if place.is_fully_addressable:
        return jax.device_put(array, place)
    like = shape_struct(array)
    if not is_here(place):
        return absent(like.shape, like.dtype, place)
    whole = array if isinstance(array, jax.Array) else np.asarray(array)
    return jax.make_array_from_callback(like.shape, place, lambda index: whole[index], dtype=like.dtype)


def exchange(
    pairs: Sequence[tuple[Any, Any]], blocks: Mapping[Any, jax.Array], like: jax.ShapeDtypeStruct
) -> dict[Any, jax.Array]:
    """Sends a block along each pair of devices, all blocks of one shape.

    Args:
        pairs: sources and targets, the same in every process; a device is one source and one target at most.
        blocks: the block of each source of this process.
        like: shape and dtype of the blocks.

    Returns:
        The block of each target of this process.
    """
    devices = tuple(dict.fromkeys(device for pair in pairs for device in pair))
    row = _in_a_row(devices)
    if not is_here(row):
        return {}
    number = {device: i for i, device in enumerate(devices)}
    permuted = _permuted(row, tuple((number[source], number[target]) for source, target in pairs))
    targets = {target for _, target in pairs}
    sent = permuted(_as_one(row, blocks, like))
    return {shard.device: shard.data for shard in sent.addressable_shards if shard.device in targets}


def everywhere(arrays: Sequence[jax.Array], devices: Sequence[Any]) -> list[jax.Array]:
    """Arrays that lie whole on some devices, whole on all: readable in every process.

    Args:
        arrays: numbers, of replicated shardings, from any processes.
        devices: those of all processes.
    """
    row = _in_a_row(tuple(devices))
    return _added(row)([_as_one(row, _first_block(array), array) for array in arrays])


def agreed(text: str, devices: Sequence[Any]) -> str:
    """The text of the process of the first device, in all processes that have a device; each of them asks."""
    mine = text.encode()
    size = int(_told(np.asarray(len(mine), np.int32), devices))
    return _told(np.frombuffer(mine.ljust(size)[:size], np.uint8), devices).tobytes().decode()


def is_the_same(text: str, devices: Sequence[Any]) -> bool:
    """Whether the text is the same in all processes that have a device; each of them asks."""
    differs = np.asarray(agreed(text, devices) != text, np.int32)
    row = _in_a_row(tuple(devices))
    blocks = {device: jax.device_put(differs, device) for device in row.addressable_devices}
    (total,) = _added(row)([_as_one(row, blocks, differs)])
    return int(total) == 0


def _told(value: np.ndarray, devices: Sequence[Any]) -> np.ndarray:
    row = _in_a_row(tuple(devices))
    blocks = {devices[0]: jax.device_put(value, devices[0])} if devices[0] in row.addressable_devices else {}
    (told,) = _added(row)([_as_one(row, blocks, value)])
    return np.asarray(told)


def _first_block(array: jax.Array) -> dict[Any, jax.Array]:
    """The block of the first of all devices that have one, if it is here."""
    first = min(array.sharding.device_set, key=lambda device: device.id)
    return {shard.device: shard.data for shard in array.addressable_shards if shard.device == first}


def _as_one(row: NamedSharding, blocks: Mapping[Any, jax.Array], like: Any) -> jax.Array:
    """One array over devices in a row, each with its own block; zeros where there is none."""
    mine = row.addressable_devices
    given = [blocks[d] if d in blocks else jnp.zeros(like.shape, like.dtype, device=d) for d in mine]
    return jax.make_array_from_single_device_arrays(like.shape, row, given)


@functools.cache
def _in_a_row(devices: tuple[Any, ...]) -> NamedSharding:
    return NamedSharding(jax.sharding.Mesh(np.array(devices), (AXIS,)), PartitionSpec())


@functools.cache
def _permuted(row: NamedSharding, pairs: tuple[tuple[int, int], ...]) -> Callable[[jax.Array], jax.Array]:
    return _on_each(row, lambda block: lax.ppermute(block, AXIS, pairs))


@functools.cache
def _added(row: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    return _on_each(row, lambda blocks: [lax.psum(b, AXIS).astype(b.dtype) for b in blocks])


def _on_each(row: NamedSharding, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Runs on the block of each device; in_specs call them copies of one, which nothing checks."""
    mapped = jax.shard_map(function, mesh=row.mesh, in_specs=row.spec, out_specs=row.spec, check_vma=False)
    return one_at_a_time(row, jax.jit(mapped, in_shardings=row, out_shardings=row))
