"""Where a list of equations repeats itself: the same primitives on the same shapes, over and over.

Equations are compared by signature: everything but what their operands are (values or literals) and the number
of a rematerialised block. Whether copies of a repeat are wired alike is the dataflow's question
(``autopar.lowering.rolling.unit``).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autopar.ir.program import Atom, Constant, Equation, Program, Value

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
"""What makes equations a layer: an update of parameters repeats itself too, but contracts nothing."""

_BODIES = ("jaxpr", "branches", "cond_jaxpr", "body_jaxpr")

_TRIED = 64
"""How many distances between alike contractions are tried as the length of a layer, the most frequent first."""


@dataclass(frozen=True)
class Repeat:
    """A stretch of equations that repeats itself.

    Attributes:
        start: position of its first equation.
        stop: position behind its last one.
        period: after how many equations it repeats; whole copies may begin at ``start`` or up to ``slack`` later.
    """

    start: int
    stop: int
    period: int

    @property
    def count(self) -> int:
        """Whole copies."""
        return (self.stop - self.start) // self.period

    @property
    def slack(self) -> int:
        """By how much the first copy may begin later without a copy less."""
        return (self.stop - self.start) % self.period

    @property
    def saved(self) -> int:
        """How many equations go when one copy stands for all."""
        return (self.count - 1) * self.period


def signatures(equations: Sequence[Equation]) -> np.ndarray:
    """A number for each equation; equations of one number differ in names and literals only."""
    known: dict[object, int] = {}
    found, group = [], None
    for eqn in equations:
        own = eqn.params.get("group")
        found.append(known.setdefault((_signature(eqn), own is not None and own == group), len(known)))
        group = own
    return np.array(found, dtype=np.int64)


def _signature(eqn: Equation) -> object:
    params = {name: value for name, value in eqn.params.items() if name != "group"}
    if eqn.bodies:
        params = {name: value for name, value in params.items() if name not in _BODIES}
    inputs = tuple(atom.aval.str_short() for atom in eqn.inputs)
    outputs = tuple(value.aval.str_short() for value in eqn.outputs)
    return eqn.primitive.name, repr(params), inputs, outputs, tuple(map(_body_text, eqn.bodies))


def _body_text(body: Program) -> str:
    """A nested program with its values numbered, literals and all."""
    number: dict[Value, int] = {}

    def text(atom: Atom) -> str:
        return repr(atom) if isinstance(atom, Constant) else f"{number.setdefault(atom, len(number))}"

    lines = [" ".join(map(text, body.inputs))]
    for eqn in body.equations:
        ends = " ".join(map(text, (*eqn.inputs, *eqn.outputs)))
        lines.append(f"{_signature(eqn)} {ends}")
    return "\n".join([*lines, " ".join(map(text, body.outputs))])


def contracts(eqn: Equation) -> bool:
    """Whether an equation multiplies matrices, or convolves, or a body of it does."""
    return eqn.primitive.name in CONTRACTIONS or any(contracts(e) for body in eqn.bodies for e in body.equations)


def repeats(equations: Sequence[Equation]) -> list[Repeat]:
    """The stretches that repeat themselves and contract something, those that save most equations first."""
    signs = signatures(equations)
    anchors = np.array([i for i, eqn in enumerate(equations) if contracts(eqn)], dtype=np.int64)
    found = [each for period in _periods(signs, anchors) for each in _stretches(signs, period)]
    heavy = np.zeros(len(equations) + 1, dtype=np.int64)
    heavy[anchors + 1] = 1
    so_far = np.cumsum(heavy)
    found = [each for each in found if so_far[each.start + each.period] > so_far[each.start]]
    return sorted(found, key=lambda each: (-each.saved, each.period, each.start))


def _periods(signs: np.ndarray, anchors: np.ndarray) -> list[int]:
    """The distances at which alike contractions follow each other most often."""
    distances: Counter[int] = Counter()
    for step in range(1, len(anchors) // 2 + 1):
        alike = signs[anchors[:-step]] == signs[anchors[step:]]
        distances.update((anchors[step:] - anchors[:-step])[alike].tolist())
    return [period for period, _ in distances.most_common(_TRIED)]


def _stretches(signs: np.ndarray, period: int) -> list[Repeat]:
    """The longest stretches that repeat themselves after ``period`` equations, at least once in full."""
    same = np.concatenate([[False], signs[:-period] == signs[period:], [False]])
    edges = np.flatnonzero(same[1:] != same[:-1])
    starts, stops = edges[::2], edges[1::2]
    long = stops - starts >= period
    return [Repeat(int(a), int(b) + period, period) for a, b in zip(starts[long], stops[long], strict=True)]
