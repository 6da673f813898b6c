"""What a loop over layers keeps for the loops after it: as few bytes as allow them to compute the rest again.

Written out one by one, a layer's residuals are whatever the compiler likes: it repeats elementwise equations in the
backward pass rather than keep their results. A loop's results are all kept. So the choice is made here: a minimum cut
between what only the forward loop has and what later loops read, as PyTorch's AOTAutograd makes it
(``min_cut_rematerialization_partition``). Nothing expensive is computed again, and random bits never.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ortools.graph.python import max_flow

from autopar.cost.compute import fusible
from autopar.lowering.rolling.unit import Carried, Inner, Place, Scanned, Unit

Residual = Place | int
"""What a later loop reads: a result of a copy, or the carry of that number as it enters the copy."""

_NEVER = 1 << 60
"""Bytes that no cut takes."""


@dataclass(frozen=True)
class Saved:
    """The results and the carries, as they enter, of which the values of all copies are kept."""

    results: frozenset[Place]
    entering: frozenset[int]


def least_saved(unit: Unit, wanted: Collection[Residual], anyway: Collection[Place], derived: Collection[int]) -> Saved:
    """What to keep so that later loops have what they want.

    Args:
        unit: of the loop.
        wanted: what later loops read.
        anyway: results that are kept whatever this says.
        derived: scanned operands that are not there as they are, but computed again themselves.
    """
    number: dict[Residual, int] = {}
    flow = max_flow.SimpleMaxFlow()
    waiting = list(wanted)
    while waiting:
        item = waiting.pop()
        if item in number:
            continue
        node = number[item] = 2 + 2 * len(number)
        flow.add_arc_with_capacity(node, node + 1, 0 if item in anyway else nbytes(unit, item))
        if _again(unit, item, derived):
            waiting += sources_of(unit, item)
        else:
            flow.add_arc_with_capacity(0, node, _NEVER)
    for item, node in number.items():
        if item in wanted:
            flow.add_arc_with_capacity(node + 1, 1, _NEVER)
        if _again(unit, item, derived):
            for source in sources_of(unit, item):
                flow.add_arc_with_capacity(number[source] + 1, node, _NEVER)
    assert flow.solve(0, 1) == flow.OPTIMAL
    late = set(flow.get_sink_side_min_cut())
    kept = [item for item, node in number.items() if node + 1 in late and node not in late]
    results = frozenset(item for item in kept if isinstance(item, tuple))
    return Saved(results | frozenset(anyway), frozenset(item for item in kept if isinstance(item, int)))


def nbytes(unit: Unit, item: Residual) -> int:
    """Bytes of one copy's value."""
    i, o = item if isinstance(item, tuple) else unit.carries[item].at
    return max(unit.copies[0][i].outputs[o].nbytes, 1)


def sources_of(unit: Unit, item: Residual) -> Iterator[Residual]:
    """What a result is computed from, of what the copy alone has."""
    assert isinstance(item, tuple)
    for source in unit.operands[item[0]]:
        if isinstance(source, Inner) and source.at[0] not in unit.invariant:
            yield source.at
        elif isinstance(source, Carried):
            yield source.number


def _again(unit: Unit, item: Residual, derived: Collection[int]) -> bool:
    """Whether a later loop may compute it again."""
    if not isinstance(item, tuple):
        return False
    eqn, sources = unit.copies[0][item[0]], unit.operands[item[0]]
    here = all(source.number not in derived for source in sources if isinstance(source, Scanned))
    return here and not eqn.bodies and fusible(eqn.primitive.name)
