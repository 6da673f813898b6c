"""Specs: how one value is laid out over the axes of a mesh."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from autopar.errors import SpecError

Sizes = Mapping[str, int]
"""Devices per mesh axis, by axis name."""


@dataclass(frozen=True, slots=True)
class Spec:
    """For each dimension the mesh axes that split it, plus the axes over which the value is partial.

    Axes of one dimension are ordered, major first: ``("data", "tensor")`` cuts the dimension into
    ``data`` blocks and each of them into ``tensor`` blocks. A value is *replicated* over every axis that
    appears nowhere, and *partial* over an axis when the devices along it hold terms to be combined.

    >>> spec = Spec((("data",), ()), frozenset({"tensor"}))
    >>> str(spec)
    '[data, -] +tensor'
    >>> spec.local_shape((8, 6), {"data": 2, "tensor": 4})
    (4, 6)
    """

    dims: tuple[tuple[str, ...], ...]
    partial: frozenset[str] = frozenset()

    @staticmethod
    def replicated(rank: int) -> "Spec":
        """The spec of a value of ``rank`` dimensions that every device holds whole."""
        return Spec(((),) * rank)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that split a dimension, in the order of the dimensions."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def complete(self) -> "Spec":
        """The same layout without its partial axes."""
        return Spec(self.dims) if self.partial else self

    def shards(self, sizes: Sizes) -> int:
        """Into how many pieces the value is cut."""
        return math.prod([sizes[axis] for dim in self.dims for axis in dim])

    def local_shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        """The shape that one device holds of a value of global ``shape``.

        Raises:
            SpecError: the rank differs, or a dimension is not divisible by its axes.
        """
        if len(shape) != len(self.dims):
            raise SpecError(f"spec {self} has {len(self.dims)} dimensions, the value {len(shape)}: {shape}")
        parts = [math.prod(sizes[axis] for axis in dim) for dim in self.dims]
        for size, part in zip(shape, parts, strict=True):
            if size % part:
                raise SpecError(f"spec {self} cuts a dimension of {size} into {part}, in shape {shape}")
        return tuple(size // part for size, part in zip(shape, parts, strict=True))

    def fits(self, shape: tuple[int, ...], sizes: Sizes) -> bool:
        """Whether every dimension of ``shape`` is divisible by the axes that split it."""
        return all(
            size % math.prod(sizes[axis] for axis in dim) == 0 for size, dim in zip(shape, self.dims, strict=True)
        )

    def __str__(self) -> str:
        dims = ", ".join("·".join(dim) or "-" for dim in self.dims)
        partial = "".join(f" +{axis}" for axis in sorted(self.partial))
        return f"[{dims}]{partial}"


def canonical(dims: Iterable[Iterable[str]], order: tuple[str, ...], partial: Iterable[str] = ()) -> Spec:
    """A spec whose axes within each dimension follow ``order`` (that of the mesh), major first."""
    return Spec(tuple(tuple(sorted(dim, key=order.index)) for dim in dims), frozenset(partial))
