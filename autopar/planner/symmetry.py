"""Interchangeable mesh axes, of equal size and speed: every plan has a mirror image of the same cost."""

import itertools
from collections.abc import Mapping

import numpy as np

from autopar.cost import COLLECTIVES, CostModel
from autopar.planner.graph import HEAVY, Graph, Unit
from autopar.planner.space import Space
from autopar.sharding.strategies import Strategy

_SIZES_BYTES = (1.0, 1e3, 1e6, 1e9)

Permutation = Mapping[str, str]


def interchangeable(cost: CostModel) -> list[Permutation]:
    """The permutations of axes, identity left out, under which every collective costs the same."""
    names, sizes = cost.mesh.names, cost.mesh.sizes
    subsets = [s for n in range(1, len(names) + 1) for s in itertools.combinations(names, n)]
    prices = {
        frozenset(s): [cost.collective_s(kind, nbytes, s) for kind in COLLECTIVES for nbytes in _SIZES_BYTES]
        for s in subsets
    }
    found = []
    for order in itertools.permutations(names):
        mirror = dict(zip(names, order, strict=True))
        same_size = all(sizes[a] == sizes[b] for a, b in mirror.items())
        if (
            order != names
            and same_size
            and all(
                np.allclose(prices[frozenset(s)], prices[frozenset(mirror[a] for a in s)], rtol=1e-12) for s in subsets
            )
        ):
            found.append(mirror)
    return found


def break_symmetry(graph: Graph, space: Space, cost: CostModel) -> dict[Unit, np.ndarray]:
    """Keeps of each set of mirrored choices of the first contraction one; empty where no two axes are alike.

    What is lost is the order of axes that share a dimension, which the mirror image of a plan exchanges and the space
    of specs keeps as that of the mesh. On gpt with 12 layers the solver took 1.6 s in place of 12 s, with the same
    optimum.
    """
    mirrors = interchangeable(cost)
    contractions = [
        unit
        for unit in graph.units
        if unit.kind == "equation" and graph.program.equations[unit.position].primitive.name in HEAVY
    ]
    if not mirrors or not contractions:
        return {}
    unit = min(contractions, key=lambda u: u.position)
    chosen = space.strategies(graph.rules[unit.position])
    place = {_key(strategy, {}): i for i, strategy in enumerate(chosen)}
    first = [all(i <= place[_key(s, mirror)] for mirror in mirrors) for i, s in enumerate(chosen)]
    return {unit: np.array(first)}


def _key(strategy: Strategy, mirror: Permutation) -> object:
    return frozenset((mirror.get(axis, axis), split) for axis, split in strategy.splits)
