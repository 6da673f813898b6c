"""Layers: the forward equations cut into runs of equal work where little crosses; the backward ones follow.

Which equations are forward is read off the dataflow: what the values that the step reports (its loss) need. The rest of
the body needs their results, and belongs to the layer whose activations and parameters it reads (Alpa, section 5.2.1,
cuts the forward pass in the same way: by dynamic programming on bytes that cross, under a bound on the work).

A scan is one equation and so one layer at most: a loop over stacked layers is not cut open.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from autopar.errors import AutoparError
from autopar.ir.body import Body, ancestors, free_values, line_of
from autopar.ir.layers_backward import follow
from autopar.ir.program import Equation, Value

MARK = "autopar/layer_boundary"
"""The name of the identity that ``layer_boundary`` leaves in a program."""

_CUTS_PER_LAYER = 16
"""How many places to cut are considered for each layer: the narrowest in each sixteenth of a layer's work."""


class LayerError(AutoparError, ValueError):
    """A step that cannot be cut into the layers asked for."""


@dataclass(frozen=True, eq=False)
class Layers:
    """The layer of every equation of a body.

    Attributes:
        n_layers: how many.
        of: the layer of each equation; what depends on nothing is missing: every reader makes its own copy.
        forward: the equations of the forward pass. Layers do not fall from one to the next that reads it; among the
            other equations they do not rise.
    """

    n_layers: int
    of: Mapping[Equation, int]
    forward: frozenset[Equation]


def layer_boundary(tree: Any) -> Any:
    """The same arrays, with a mark that says: a layer ends here. Never needed; an identity on one device.

    >>> import jax.numpy as jnp
    >>> float(jax.grad(lambda x: 2 * layer_boundary(x))(jnp.float32(3)))
    2.0
    """
    return jax.tree.map(lambda x: checkpoint_name(x, MARK), tree)


def is_mark(eqn: Equation) -> bool:
    """Whether the equation is a ``layer_boundary``."""
    return eqn.primitive.name == "name" and eqn.params["name"] == MARK


def cluster_layers(
    body: Body, n_layers: int | None, flops: Callable[[Equation], float], *, tolerance: float = 0.5
) -> Layers:
    """Cuts a body into layers.

    Args:
        body: the equations of one microbatch.
        n_layers: how many layers; None for as many as its marks make.
        flops: operations of an equation.
        tolerance: how far from its share of the operations a layer may be; raised until that is possible.

    Raises:
        LayerError: there are fewer places to cut than asked for, or forward and backward cannot be told apart.
    """
    free = free_values(body.program.equations, body.program.outputs)
    forward = _ordered(body, _forward(body), free)
    marks = _marks(forward)
    wanted = n_layers if n_layers is not None else len(marks) + 1
    work = np.array([flops(eqn) for eqn in forward])
    cuts = _cuts(work, _crossing_bytes(forward, free), wanted, tolerance, marks)
    of = {eqn: int(np.searchsorted(cuts, i, side="right")) for i, eqn in enumerate(forward)}
    early = follow(body, of, wanted, free)
    return Layers(wanted, of, frozenset(forward) | early)


# -- forward


def _forward(body: Body) -> set[Equation]:
    equations = body.program.equations
    reported = {v for v in body.program.outputs if isinstance(v, Value) and v not in body.gradients}
    read = {value for eqn in ancestors(equations, body.gradients) for value in eqn.operands}
    constant = read & set(body.program.inputs) - body.batch
    return ancestors(equations, reported or _turning_point(body, constant).outputs)


def _turning_point(body: Body, parameters: Collection[Value]) -> Equation:
    """The first equation that depends on every parameter and on which every gradient depends."""
    equations = body.program.equations
    roots = {value: [*line_of(body, value)][-1] for value in parameters}
    bits = {root: 1 << i for i, root in enumerate(dict.fromkeys(roots.values()))}
    depends = {value: bits[root] for value, root in roots.items()}
    reaches = dict(zip(body.gradients, (1 << i for i in range(len(body.gradients))), strict=True))
    for eqn in equations:
        depends.update(dict.fromkeys(eqn.outputs, _union(depends, eqn.operands)))
    for eqn in reversed(equations):
        onward = _union(reaches, eqn.outputs)
        reaches.update({value: reaches.get(value, 0) | onward for value in eqn.operands})
    for eqn in equations:
        everything = (1 << len(bits)) - 1, (1 << len(body.gradients)) - 1
        if (_union(depends, eqn.outputs), _union(reaches, eqn.outputs)) == everything:
            return eqn
    raise LayerError(
        "forward and backward equations cannot be told apart",
        where=f"{len(equations)} equations, none between all parameters and all gradients",
        fix="let the step return its loss",
    )


def _union(bits: Mapping[Value, int], values: Collection[Value] | Iterator[Value]) -> int:
    total = 0
    for value in values:
        total |= bits.get(value, 0)
    return total


def _ordered(body: Body, forward: set[Equation], free: frozenset[Value]) -> tuple[Equation, ...]:
    """Program order, but what no microbatch changes (keys, transposed parameters) stands right before its reader."""
    varies = set(body.batch)
    for eqn in body.program.equations:
        if eqn in forward and any(value in varies for value in eqn.operands):
            varies.update(eqn.outputs)
    equations = [eqn for eqn in body.program.equations if eqn in forward and not free.issuperset(eqn.outputs)]
    first_use: dict[Value, int] = {}
    place: dict[Equation, tuple[int, int]] = {}
    for i, eqn in reversed(list(enumerate(equations))):
        used = min((first_use.get(value, len(equations)) for value in eqn.outputs), default=i)
        at = i if not varies.isdisjoint(eqn.outputs) else max(i, used)
        place[eqn] = (at, i - len(equations) if at > i else i)
        for value in eqn.operands:
            first_use[value] = min(first_use.get(value, at), at)
    return tuple(sorted(equations, key=place.__getitem__))


def _marks(forward: Sequence[Equation]) -> np.ndarray:
    """Where marks allow a cut: behind the last of marks that stand together."""
    at = [i for i, eqn in enumerate(forward) if is_mark(eqn)]
    return np.array([i + 1 for i in at if i + 1 not in at and i + 1 < len(forward)], dtype=int)


def _crossing_bytes(forward: Sequence[Equation], free: frozenset[Value]) -> np.ndarray:
    """For each i, the bytes of the values made before equation i that equations from i on read."""
    last_use = {value: i for i, eqn in enumerate(forward) for value in eqn.operands}
    change = np.zeros(len(forward) + 2)
    for i, eqn in enumerate(forward):
        for value in eqn.outputs:
            if value in last_use and value not in free:
                change[i + 1] += value.nbytes
                change[last_use[value] + 1] -= value.nbytes
    return np.cumsum(change)[: len(forward) + 1]


# -- where to cut


def _cuts(
    work: np.ndarray, crossing_bytes: np.ndarray, n_layers: int, tolerance: float, marks: np.ndarray
) -> np.ndarray:
    """The n_layers - 1 positions where layers begin, the first layer's left out."""
    done = np.concatenate([[0.0], np.cumsum(work)])
    places = marks if len(marks) else _narrowest(done, crossing_bytes, n_layers * _CUTS_PER_LAYER)
    if n_layers < 1 or len(places) < n_layers - 1:
        raise LayerError(
            f"{n_layers} layers are asked for, the forward pass has {len(places)} places to cut",
            where=f"{len(work)} forward equations" + (f", {len(marks)} boundaries marked" if len(marks) else ""),
            fix="ask for fewer layers or stages (a scan over layers is one layer)",
        )
    places = np.concatenate([[0], places, [len(work)]])
    share = max(done[-1] / n_layers, 1.0)
    unit = max(float(np.median(crossing_bytes[places[1:-1]])), 1.0) if len(places) > 2 else 1.0
    while True:
        found = _best_cuts(done[places] / share, crossing_bytes[places] / unit, n_layers, tolerance)
        if found is not None:
            return places[found]
        tolerance *= 1.25


def _narrowest(done: np.ndarray, crossing_bytes: np.ndarray, n_buckets: int) -> np.ndarray:
    """The first of the narrowest places in each of ``n_buckets`` equal parts of the work."""
    inner = np.arange(1, len(done) - 1)
    total = max(done[-1], 1.0)
    bucket = np.minimum((done[inner] / total * n_buckets).astype(int), n_buckets - 1)
    order = np.lexsort((inner, crossing_bytes[inner], bucket))
    first = np.unique(bucket[order], return_index=True)[1]
    return np.sort(inner[order[first]])


def _best_cuts(done: np.ndarray, crossing: np.ndarray, n_layers: int, tolerance: float) -> np.ndarray | None:
    """Dynamic programming over layers; None if not all can be within ``tolerance`` of their share of the work.

    The cost of a layer is the bytes that enter it, in those of an ordinary cut, plus its squared imbalance: one share
    too many weighs as much as an ordinary cut.
    """
    shares = done[None, :] - done[:, None]
    allowed = (abs(shares - 1) <= tolerance) & (np.tri(len(done), k=-1).T > 0)
    cost = np.where(allowed, (shares - 1) ** 2 + crossing[:, None], np.inf)
    best = cost[0]
    back = []
    for _ in range(n_layers - 1):
        through = best[:, None] + cost
        back.append(through.argmin(axis=0))
        best = through.min(axis=0)
    if not np.isfinite(best[-1]):
        return None
    found = [len(done) - 1]
    for row in reversed(back):
        found.append(int(row[found[-1]]))
    return np.array(found[:0:-1], dtype=int)
