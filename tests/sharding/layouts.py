"""What specs mean, for the tests: blocks of values on simulated devices, without the code under test."""

import functools
import itertools
import math
from collections.abc import Iterator

import numpy as np

from autopar.spec import Spec

MESHES = {"8": {"x": 8}, "2x4": {"a": 2, "b": 4}, "2x2x2": {"a": 2, "b": 2, "c": 2}}


@functools.cache
def specs(rank: int, axes: tuple[str, ...]) -> tuple[Spec, ...]:
    """Every spec: each axis in a dimension (in any order), partial, or unused."""
    found = set()
    for order in itertools.permutations(axes):
        for places in itertools.product(range(rank + 2), repeat=len(axes)):
            held = [tuple(a for a, p in zip(order, places, strict=True) if p == d) for d in range(rank + 1)]
            found.add(Spec(tuple(held[:rank]), frozenset(held[rank])))
    return tuple(sorted(found, key=str))


def devices(sizes: dict[str, int]) -> Iterator[dict[str, int]]:
    for index in itertools.product(*map(range, sizes.values())):
        yield dict(zip(sizes, index, strict=True))


def block(value: np.ndarray, spec: Spec, device: dict[str, int], sizes: dict[str, int]) -> np.ndarray:
    """The part of ``value`` that ``spec`` puts on ``device``: each axis, major first, cuts again."""
    for dim, axes in enumerate(spec.dims):
        for axis in axes:
            value = np.split(value, sizes[axis], axis=dim)[device[axis]]
    return value


def distribute(value: np.ndarray, spec: Spec, sizes: dict[str, int], combine: np.ufunc = np.add) -> np.ndarray:
    """Local values, indexed by the mesh axes and then the local shape; partial terms are random."""
    rng, rows = np.random.default_rng(0), [sizes[axis] for axis in sorted(spec.partial)]
    terms = _terms(value, math.prod(rows), combine, rng).reshape(*rows, *value.shape)
    local = [
        block(terms[tuple(device[axis] for axis in sorted(spec.partial))], spec, device, sizes)
        for device in devices(sizes)
    ]
    return np.stack(local).reshape(*sizes.values(), *local[0].shape)


def _terms(value: np.ndarray, count: int, combine: np.ufunc, rng: np.random.Generator) -> np.ndarray:
    """``count`` arrays that combine to ``value``."""
    if count == 1:
        return value[None]
    if combine is np.add:
        others = rng.integers(0, 9, (count - 1, *value.shape)).astype(value.dtype)
        return np.concatenate([others, value[None] - others.sum(0, dtype=value.dtype)])
    # For max, min, and, or: every term is the value combined the other way with noise, but one is the value.
    opposite = {
        np.maximum: np.minimum,
        np.minimum: np.maximum,
        np.bitwise_and: np.bitwise_or,
        np.bitwise_or: np.bitwise_and,
    }[combine]
    noise = rng.integers(0, 2, (count - 1, *value.shape)).astype(value.dtype)
    return np.concatenate([opposite(noise, value), value[None]])


def is_laid_out(
    local: np.ndarray, value: np.ndarray, spec: Spec, sizes: dict[str, int], combine: np.ufunc = np.add
) -> bool:
    """Whether the local values are ``value`` under ``spec``: terms combine to its block on every device."""
    summed = tuple(i for i, axis in enumerate(sizes) if axis in spec.partial)
    complete = local
    for axis in reversed(summed):
        complete = combine.reduce(complete, axis=axis, keepdims=True, dtype=local.dtype)
    complete = np.broadcast_to(complete, local.shape)
    return all(
        np.array_equal(complete[tuple(device.values())], block(value, spec, device, sizes)) for device in devices(sizes)
    )
