"""Times a function that runs on every device at once."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "devices"
_MOST_BATCHES, _LEAST_BATCHES = 5, 2
_ENOUGH_S = 0.5  # after this long, the least number of batches will do
_LEAST_S = 2e-3  # a batch of calls lasts at least this long, so that the clock and the dispatch do not count


def device_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """The given devices, or all, as one axis called ``devices``."""
    return Mesh(np.array(devices or jax.devices()), (AXIS,))


def on_every_device(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The program in which each device of ``mesh`` runs ``function`` on its own copy of the arguments.

    Devices that share a host or a memory bus are thus timed under the load that they have in a step.
    """
    everywhere = PartitionSpec()
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False))


def random_operand(shape: tuple[int, ...], dtype: str, mesh: Mesh) -> jax.Array:
    """An array that every device holds whole: floats in [0, 1), else zeros."""
    values = np.zeros(shape)
    if jax.numpy.issubdtype(dtype, np.inexact):
        values = np.random.default_rng(0).random(shape)
    return jax.device_put(values.astype(jax.numpy.dtype(dtype)), NamedSharding(mesh, PartitionSpec()))


def seconds_per_call(function: Callable[..., Any], operands: Sequence[jax.Array]) -> float:
    """The median, over batches of calls, of the seconds that one call takes; compilation is not counted."""
    jax.block_until_ready(function(*operands))
    n_calls = max(1, round(_LEAST_S / max(_batch_s(function, operands, 1), 1e-9)))
    batches_s: list[float] = []
    while len(batches_s) < (_MOST_BATCHES if sum(batches_s) < _ENOUGH_S else _LEAST_BATCHES):
        batches_s.append(_batch_s(function, operands, n_calls))
    return statistics.median(batches_s) / n_calls


def _batch_s(function: Callable[..., Any], operands: Sequence[jax.Array], n_calls: int) -> float:
    start_s = time.perf_counter()
    for _ in range(n_calls):
        result = function(*operands)
        jax.block_until_ready(result)
    return time.perf_counter() - start_s
