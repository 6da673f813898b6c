"""Which values need memory between their makers and their readers, given what XLA would rather compute again."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item", bound=Hashable)


def kept_values(
    steps: Iterable[tuple[bool, Sequence[Item], Sequence[Item]]], nbytes: Callable[[Item], float]
) -> Mapping[Item, frozenset[Item]]:
    """For each value the values that must stay in memory so that it can be read.

    A value whose step is cheap enough to repeat in every reader stands for the values it is made of, unless more than
    one of them is large: then keeping the result is what saves memory (XLA's ComputeGloballyUnfusible).

    Args:
        steps: (whether XLA repeats the step in its readers, inputs, outputs), in order.
        nbytes: size of a value.

    Returns:
        Value -> the values kept in its place, itself if it is kept.
    """
    kept: dict[Item, frozenset[Item]] = {}
    for repeats, inputs, outputs in steps:
        sources: frozenset[Item] = frozenset().union(*(kept.get(item, frozenset((item,))) for item in inputs))
        for item in outputs:
            large = sum(2 * nbytes(source) >= nbytes(item) for source in sources)
            kept[item] = sources if repeats and large <= 1 else frozenset((item,))
    return kept
