"""Hash-consed cost tables: equal tables have one id, and every operation on ids is remembered.

A deep train step repeats its layers, so the same few tables meet in the same few ways thousands of times. Work on an
id is a dictionary look-up after the first time. Costs are whole multiples of a quantum (``quantize``): float64 adds
them exactly, in any order, so layers that are equal on paper are equal in bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

SMALL_BYTES = 4096
# Sums of largest entries stay below 2**46 quanta, which leaves 7 bits of the 53-bit mantissa for prices on usage.
QUANTA_BITS = 46


class Tables:
    """A store of read-only arrays by id, with a memory of the operations done on them.

    ``misses`` counts the operations that were really computed (tests use it to see that repetition is free), and
    ``entries`` the numbers held.
    """

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.misses = 0
        self.entries = 0
        self._of_object: dict[int, int] = {}
        self._of_content: dict[Hashable, int] = {}
        self._kept: list[np.ndarray] = []
        self._memo: dict[Hashable, Any] = {}

    def __getitem__(self, table: int) -> np.ndarray:
        return self.arrays[table]

    def intern(self, array: np.ndarray) -> int:
        """The id of an array: by object first, by content when the object is new."""
        table = self._of_object.get(id(array))
        if table is not None:
            return table
        # Adding 0.0 turns -0.0 into 0.0, so that equal values have equal bytes.
        content = (
            np.ascontiguousarray(array) + 0.0 if array.dtype == np.float64 else np.ascontiguousarray(array)
        )
        raw = content.tobytes()
        digest = raw if len(raw) <= SMALL_BYTES else hashlib.blake2b(raw, digest_size=16).digest()
        table = self._of_content.setdefault((content.shape, content.dtype.str, digest), len(self.arrays))
        if table == len(self.arrays):
            content.flags.writeable = False
            self.arrays.append(content)
            self.entries += content.size
            self._of_object[id(content)] = table
        # The caller's object stays alive with the store: its id() must not be given to another array.
        self._kept.append(array)
        self._of_object[id(array)] = table
        return table

    def shared(self, array: np.ndarray) -> np.ndarray:
        """The one array with this content."""
        return self.arrays[self.intern(array)]

    def memo(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The remembered result under a key, computed the first time."""
        try:
            return self._memo[key]
        except KeyError:
            self.misses += 1
            result = self._memo[key] = compute()
            return result

    def transpose(self, table: int) -> int:
        """The transposed matrix."""
        return self.memo(("transpose", table), lambda: self.intern(self.arrays[table].T))

    def add(self, a: int, b: int) -> int:
        """The sum of two tables of one shape."""
        a, b = (a, b) if a <= b else (b, a)
        return self.memo(("add", a, b), lambda: self.intern(self.arrays[a] + self.arrays[b]))


def quantum_of(largest: float) -> float:
    """The power of two of which costs that sum to at most ``largest`` are taken as whole multiples."""
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** (math.frexp(largest)[1] - QUANTA_BITS)


def largest_finite(array: np.ndarray) -> float:
    """The largest magnitude among an array's finite entries, 0 when there is none."""
    finite = array[np.isfinite(array)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def quantize(array: np.ndarray, quantum: float) -> np.ndarray:
    """Costs in whole quanta; ``inf`` stays."""
    return np.rint(array / quantum)
