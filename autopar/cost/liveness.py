"""Which values need memory between their makers and their readers, given what XLA would rather compute again."""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def kept_values(
    steps: Iterable[tuple[bool, Sequence[Item], Sequence[Item]]], nbytes: Callable[[Item], float]
) -> Mapping[Item, frozenset[Item]]:
    """For each value the values that must stay in memory so that it can be read.

    A value whose step fuses stands for the values it is made of where keeping those takes no more memory: XLA
    repeats such steps in every reader rather than write their result (InstructionFusion with duplication).

    Args:
        steps: (whether the step fuses into its readers, inputs, outputs), in order.
        nbytes: size of a value.

    Returns:
        Value -> the values kept in its place, itself if it is kept.
    """
    kept: dict[Item, frozenset[Item]] = {}
    for fuses, inputs, outputs in steps:
        sources: frozenset[Item] = frozenset().union(*(kept.get(item, frozenset((item,))) for item in inputs))
        for item in outputs:
            own = nbytes(item)
            large = sum(size for size in map(nbytes, sources) if 2 * size >= own) if fuses else math.inf
            kept[item] = sources if large <= own else frozenset((item,))
    return kept


LAYOUT = "reshape"
_LAYOUTS = (LAYOUT, "transpose", "squeeze", "expand_dims", "broadcast_in_dim")
_PRODUCTS = ("dot_general", "conv_general_dilated")


def read_by_products(
    steps: Sequence[tuple[str, Iterable[Item], Iterable[Item]]], results: Iterable[Item]
) -> frozenset[Item]:
    """The values that nothing but matrix products reads, through changes of layout perhaps.

    Args:
        steps: (primitive, inputs, outputs), in order; ``LAYOUT`` stands for any step that only moves data.
        results: what the program returns.
    """
    others: set[Item] = set(results)
    read: set[Item] = set()
    for primitive, inputs, outputs in reversed(steps):
        passes = primitive in _LAYOUTS and others.isdisjoint(outputs)
        (read if passes or primitive in _PRODUCTS else others).update(inputs)
    return frozenset(read - others)
