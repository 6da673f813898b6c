"""Hash-consed cost tables: equal tables have one id, and every operation on ids is remembered.

A deep train step repeats its layers, so the same few tables meet in the same few ways thousands of times.
Work on an id is a dictionary look-up after the first time. Costs are whole multiples of a quantum
(``quantize``): float64 adds them exactly, in any order, so layers that are equal on paper are equal in bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

SMALL_BYTES = 4096
# Sums of largest entries stay below 2**46 quanta, which leaves 7 bits of the 53-bit mantissa for prices on
# usage; without prices, one bit for differences and one to spare suffice.
QUANTA_BITS, FREE_QUANTA_BITS = 46, 51


class TooManyEntries(Exception):
    """The store was asked to hold more numbers than it may."""


class Tables:
    """A store of read-only arrays by id, with a memory of the operations done on them.

    ``poll`` is called before each operation that is really computed; it may raise to stop the work.

    ``misses`` counts the operations really computed (tests see by it that repetition is free), ``entries``
    the numbers held; ``most_entries`` bounds them, by ``TooManyEntries``. ``compiled`` tells that so much is to be
    computed that compiled kernels are worth loading.
    """

    def __init__(self, poll: Callable[[], None] | None = None) -> None:
        self.arrays: list[np.ndarray] = []
        self.misses = 0
        self.entries = 0
        self.most_entries: float = math.inf
        self.poll = poll
        self.compiled = False
        self._of_object: dict[int, int] = {}
        self._of_content: dict[Hashable, int] = {}
        self._memo: dict[Hashable, Any] = {}

    def __getitem__(self, table: int) -> np.ndarray:
        return self.arrays[table]

    def intern(self, array: np.ndarray) -> int:
        """The id of an array: at once for one that this store gave out, else by content."""
        table = self._of_object.get(id(array))
        if table is not None:
            return table
        content = np.ascontiguousarray(array)
        if content.dtype == np.float64:
            # Turns -0.0 into 0.0, so that equal values have equal bytes.
            content = content + 0.0
        raw = content.tobytes()
        digest = raw if len(raw) <= SMALL_BYTES else hashlib.blake2b(raw, digest_size=16).digest()
        table = self._of_content.setdefault((content.shape, content.dtype.str, digest), len(self.arrays))
        if table == len(self.arrays):
            content = content.copy() if content is array else content
            content.flags.writeable = False
            self.arrays.append(content)
            self._of_object[id(content)] = table
            self.entries += content.size
            if self.entries > self.most_entries:
                raise TooManyEntries
        return table

    def shared(self, array: np.ndarray) -> np.ndarray:
        """The one array with this content."""
        return self.arrays[self.intern(array)]

    def memo(self, function: Callable[..., Any], *arguments: Hashable) -> Any:
        """``function(self, *arguments)``, computed the first time; arguments are ids and other hashables."""
        key = (function, arguments)
        try:
            return self._memo[key]
        except KeyError:
            self.misses += 1
            if self.poll is not None:
                self.poll()
            result = self._memo[key] = function(self, *arguments)
            return result

    def mark(self) -> tuple[int, int]:
        """Where the store stands now, for ``forget``."""
        return len(self.arrays), len(self._memo)

    def forget(self, mark: tuple[int, int]) -> None:
        """Drop tables and results newer than a mark; their ids must not be used again."""
        # Dictionaries pop the newest item first, and each table has one item in each.
        while len(self._memo) > mark[1]:
            self._memo.popitem()
        while len(self.arrays) > mark[0]:
            array = self.arrays.pop()
            self.entries -= array.size
            self._of_content.popitem()
            del self._of_object[id(array)]

    @contextmanager
    def at_most(self, entries: float) -> Iterator[None]:
        """Within, holding more numbers than this raises ``TooManyEntries``."""
        before, self.most_entries = self.most_entries, entries
        try:
            yield
        finally:
            self.most_entries = before

    def transpose(self, table: int) -> int:
        """The transposed matrix."""
        return self.memo(_transpose, table)

    def add(self, a: int, b: int) -> int:
        """The sum of two tables of one shape."""
        return self.memo(_add, a, b) if a <= b else self.memo(_add, b, a)

    def take(self, table: int, kept: int) -> int:
        """The rows of a table listed by an index table."""
        return self.memo(_take, table, kept)


def _transpose(tables: Tables, table: int) -> int:
    return tables.intern(tables[table].T)


def _add(tables: Tables, a: int, b: int) -> int:
    return tables.intern(tables[a] + tables[b])


def _take(tables: Tables, table: int, kept: int) -> int:
    return tables.intern(tables[table][tables[kept]])


def quantum_of(largest: float, bits: int = QUANTA_BITS) -> float:
    """The power of two of which costs that sum to at most ``largest`` are taken as whole multiples."""
    if largest == 0.0 or not math.isfinite(largest):
        return 1.0
    return 2.0 ** (math.frexp(largest)[1] - bits)


def largest_finite(array: np.ndarray) -> float:
    """The largest magnitude among an array's finite entries, 0 when there is none."""
    finite = array[np.isfinite(array)]
    return float(np.abs(finite).max()) if finite.size else 0.0


def quantize(array: np.ndarray, quantum: float) -> np.ndarray:
    """Costs in whole quanta; ``inf`` stays."""
    return np.rint(array / quantum)
