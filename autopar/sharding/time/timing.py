"""A factor split over time: when each value of a program can be made, and in which form (DESIGN.md 1.4).

A loop of ``steps`` iterations is a virtual mesh axis. Its values are *split* along one dimension (each iteration holds
a part), *partial* (each iteration holds a term of a total), or *whole*. The sharding rules say what follows from what.
What costs communication between devices costs something else here: the total of a partial value, and a split value in
one piece, exist only after the loop. So every value also has a number: the first loop in which it can be made.

    split   meets a split of the same factor, or a whole value (which is sliced): the equation runs in the loop
    partial goes through linear equations; for anything else its total must come first
    whole   with whole: the equation runs once, outside
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.sharding.factors import Layout, ShardingRule
from autopar.sharding.lookup import RuleBook

HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general", "scan", "while", "cond"})
"""Equations that are never run twice to spare a value."""

CONTIGUOUS = frozenset({"ragged_dot_general"})
"""Primitives whose local rule wants contiguous blocks: time takes every ``steps``-th element."""


GROWTH = 4
"""By how much a value must be larger than the operands that are cut for loops to make its parts, not take them."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How time cuts one dimension: iteration t holds the elements whose ``index // inner % steps`` is t.

    Taking every ``steps``-th example leaves contiguous blocks to the devices: slicing a batch that is sharded over
    them moves nothing.
    """

    dim: int
    inner: int = 1


@dataclass(frozen=True, slots=True)
class Timing:
    """The form of one value inside a loop, and when it exists whole.

    Attributes:
        cut: set where each iteration holds a part of it.
        monoid: set where each iteration holds a term of it: sum, max, min, and, or.
        loop: the first loop in which its part or term can be made.
        ready: the first loop before which it can exist whole.
        nbytes: what the loops must keep so that it exists whole: totals and stacks.
        gathered: whether it is made whole by combining its parts or terms; else by its equation, from whole operands.
        estimate: the first loop whose iterations can estimate it from their own examples; ``ready`` where none may.
    """

    cut: Cut | None = None
    monoid: str = ""
    loop: int = 0
    ready: int = 0
    nbytes: int = 0
    gathered: bool = False
    estimate: int = 0

    @property
    def whole(self) -> bool:
        """Whether loops have no part or term of it."""
        return self.cut is None and not self.monoid


@dataclass(frozen=True, slots=True)
class Inside:
    """How one iteration runs an equation.

    Attributes:
        rule: its sharding rule.
        factor: the factor that time splits; None where terms pass through it.
        inner: consecutive elements of that factor that stay together.
        terms: operands that enter as terms of a total.
        wholes: results that every iteration has whole, and alike.
        nested: how the bodies of a scan or cond run (``autopar.sharding.time.nested.Nested``).
    """

    rule: ShardingRule
    factor: str | None
    inner: int = 1
    terms: tuple[int, ...] = ()
    wholes: tuple[int, ...] = ()
    nested: Any = None

    def cut(self, layout: Layout) -> Cut | None:
        """Where time cuts a value of that layout."""
        for dim, names in enumerate(layout):
            if self.factor in names:
                minor = names[names.index(self.factor) + 1 :]
                return Cut(dim, self.inner * math.prod(self.rule.sizes[name] for name in minor))
        return None


def factor_of(rule: ShardingRule, layout: Layout, cut: Cut, steps: int) -> Inside | None:
    """The factor of an equation that a cut of one of its values splits; None where it cannot."""
    below = 1
    for name in reversed(layout[cut.dim]):
        size = rule.sizes[name]
        if below <= cut.inner < below * size:
            inner, rest = divmod(cut.inner, below)
            return None if rest or size % (inner * steps) else Inside(rule, name, inner)
        below *= size
    return None


def total_nbytes(value: Value) -> int:
    """Bytes in which a total of this shape is kept: narrow floats are summed in float32."""
    narrow = jnp.issubdtype(value.dtype, jnp.floating) and value.itemsize < 4
    return value.nbytes * (4 // value.itemsize) if narrow else value.nbytes


@dataclass(frozen=True)
class Question:
    """What is to be split.

    Attributes:
        program: the program.
        steps: iterations of the loops.
        seeds: the values whose dimension is cut: arguments, or values that loops must never hold whole.
        whole: values that loops have no part of, though they could: they are stacked.
        only: where given, equations that read a part of none of these run outside.
        terms: arguments that are terms of a sum.
        inside: whether the program is the body of a scan in a loop: what is cut exists nowhere whole.
        estimated: totals that iterations may estimate from their own examples: ghost batch normalisation.

    A seed that is an argument exists whole anyway; one that an equation makes is one that shall never exist whole.
    """

    program: Program
    steps: int
    seeds: Mapping[Value, Cut]
    whole: frozenset[Value] = frozenset()
    only: frozenset[Value] | None = None
    estimated: frozenset[Value] = frozenset()
    terms: frozenset[Value] = frozenset()
    inside: bool = False

    @cached_property
    def large_bytes(self) -> float:
        """From which size on loops make parts of whole values even by contractions: that of a chunked value."""
        return min((v.nbytes for v in self.seeds if v not in self.program.inputs), default=math.inf)

    @cached_property
    def small_bytes(self) -> int:
        """What may be stacked, or made whole a second time: no more than the arguments that are cut."""
        return 0 if self.inside else sum(v.nbytes for v in self.seeds if v in self.program.inputs)


RegionRule = Callable[[Equation, list[Timing], int, RuleBook], Inside | None]
"""How a loop runs a scan or cond of the program (``autopar.sharding.time.nested.region_inside``)."""


class Timings:
    """The timing of every value, found in one pass over the equations.

    Attributes:
        of: by value.
        inside: how the loops run an equation, by name; only those that they can run.
        producer: the equation that makes a value.
    """

    def __init__(self, question: Question, rules: RuleBook, region: RegionRule) -> None:
        self.question, self.rules, self.region = question, rules, region
        self.of: dict[Value, Timing] = {}
        self.inside: dict[str, Inside] = {}
        self.producer: dict[Value, Equation] = {}
        self._generated: dict[tuple[Value, Cut], bool] = {}
        for value in question.program.inputs:
            cut, monoid = question.seeds.get(value), "sum" if value in question.terms else ""
            late = int(question.inside and bool(cut or monoid))
            self.of[value] = Timing(cut, monoid, ready=late, estimate=late)
        self.zeros: set[Value] = set()
        for eqn in question.program.equations:
            self._equation(eqn)

    def timing(self, atom: Atom) -> Timing:
        """That of an operand; literals are whole."""
        return self.of[atom] if isinstance(atom, Value) else Timing()

    def is_zero(self, atom: Atom) -> bool:
        """Whether an operand is known to be zero everywhere: a term of any total."""
        if isinstance(atom, Constant):
            return bool(jnp.issubdtype(atom.aval.dtype, jnp.number)) and not atom.value
        return atom in self.zeros

    def piece(self, eqn: Equation, k: int, cut: Cut) -> Inside | None:
        """How a loop makes a part of a whole result; None where it cannot, or had better not."""
        heavy = eqn.primitive.name in HEAVY and eqn.outputs[k].nbytes < self.question.large_bytes
        rule = None if heavy else self.rules.find(eqn)
        return None if rule is None else piece_of(rule, rule.results[k], cut, self.question.steps)

    def generated(self, value: Value, cut: Cut) -> bool:
        """Whether to make a part of a whole value in the loop: of much smaller operands, counts, or random bits."""
        key = (value, cut)
        if key not in self._generated:
            eqn, timing = self.producer.get(value), self.of[value]
            inside = None
            if eqn is not None and timing.cut is None and not timing.gathered:
                inside = self.piece(eqn, eqn.outputs.index(value), cut)
            self._generated[key] = inside is not None and all(
                atom.nbytes * GROWTH <= value.nbytes or self.generated(atom, wanted)
                for k, atom in enumerate(eqn.inputs if eqn else ())
                if isinstance(atom, Value) and (wanted := inside.cut(inside.rule.operands[k])) is not None
            )
        return self._generated[key]

    def _equation(self, eqn: Equation) -> None:
        self.producer.update(dict.fromkeys(eqn.outputs, eqn))
        if eqn.primitive.name == "broadcast_in_dim" and self.is_zero(eqn.inputs[0]):
            self.zeros.update(eqn.outputs)
        timings = [self.timing(atom) for atom in eqn.inputs]
        seeded = next((v for v in eqn.outputs if v in self.question.seeds), None)
        inside = self._seeded(eqn, seeded) if seeded is not None else self._inside(eqn, timings)
        once = Timing(
            ready=max((t.ready for t in timings), default=0),
            nbytes=sum({atom: self.of[atom].nbytes for atom in eqn.operands}.values()),
            estimate=max((t.estimate for t in timings), default=0),
        )
        if inside is None:
            self.of.update(dict.fromkeys(eqn.outputs, once))
            return
        self.inside[eqn.name] = inside
        loop = max([self._needed(inside, k, atom) for k, atom in enumerate(eqn.inputs)], default=0)
        for k, value in enumerate(eqn.outputs):
            self.of[value] = self._result(eqn, inside, k, replace(once, loop=loop))

    def _result(self, eqn: Equation, inside: Inside, k: int, once: Timing) -> Timing:
        """The form of a result, and the better way to have it whole: combined, or computed from whole operands."""
        value, cut = eqn.outputs[k], inside.cut(inside.rule.results[k])
        if k in inside.wholes:
            # Any iteration has all of it; outside it would take a second run.
            return replace(once, loop=0, ready=max(once.ready, once.loop + 1), estimate=once.loop)
        combined = (once.loop + 1, value.nbytes if cut else total_nbytes(value))
        # A second computation outside must be light; a linear equation on totals is not a second one.
        light = eqn.primitive.name not in HEAVY and max(value.nbytes, once.nbytes) <= self.question.small_bytes
        allowed = inside.factor is None or (light and value not in self.question.seeds)
        better = combined <= (once.ready, once.nbytes) if cut else combined < (once.ready, once.nbytes)
        if value in self.question.whole or not allowed or better:
            estimate = once.loop if value in self.question.estimated else combined[0]
            once = replace(once, ready=combined[0], nbytes=combined[1], gathered=True, estimate=estimate)
        if value in self.question.whole:
            return once
        return replace(once, cut=cut, monoid="" if cut else inside.rule.monoid)

    def _needed(self, inside: Inside, k: int, atom: Atom) -> int:
        """The first loop in which an operand is there in the form that the equation wants."""
        wanted, timing = inside.cut(inside.rule.operands[k]), self.timing(atom)
        if wanted is not None and timing.cut == wanted:
            return timing.loop
        if k in inside.terms and timing.monoid == "sum":
            return timing.loop
        if wanted is not None and isinstance(atom, Value) and not self.generated(atom, wanted):
            return timing.ready
        return timing.estimate

    def _inside(self, eqn: Equation, timings: list[Timing]) -> Inside | None:
        """How the loops run an equation that reads parts or terms; None where they cannot, or need not."""
        split = [k for k, timing in enumerate(timings) if timing.cut]
        partial = {k for k, timing in enumerate(timings) if timing.monoid}
        only = self.question.only
        if only is not None and split and not any(eqn.inputs[k] in only for k in split):
            return None
        if eqn.primitive.name in ("scan", "cond") and eqn.bodies and split:
            return self.region(eqn, timings, self.question.steps, self.rules)
        rule = self.rules.find(eqn) if split or partial else None
        if rule is None:
            return None
        if split:
            return self._split(eqn, rule, [(k, timings[k].cut) for k in split])
        if eqn.primitive.name in HEAVY:  # once on the total is cheaper than on every term
            return None
        sums = {k for k in partial if timings[k].monoid == "sum"}
        for group in rule.linear:
            terms = set(group)
            if partial == sums <= terms and all(self.is_zero(eqn.inputs[k]) for k in terms - sums):
                return Inside(rule, None, terms=group)
        return None

    def _split(self, eqn: Equation, rule: ShardingRule, cuts: Iterable[tuple[int, Cut | None]]) -> Inside | None:
        ways = [factor_of(rule, rule.operands[k], cut, self.question.steps) for k, cut in cuts if cut is not None]
        inside = ways[0]
        if inside is None or any(way != inside for way in ways) or eqn.primitive.name in CONTIGUOUS:
            return None
        if inside.factor in rule.reduce:
            return replace(inside, terms=rule.accumulators)
        kept = all(inside.cut(layout) is not None for layout in rule.results)
        return inside if kept else None

    def _seeded(self, eqn: Equation, value: Value) -> Inside | None:
        """How the loops make a value that they must never hold whole."""
        rule = self.rules.find(eqn)
        cut = self.question.seeds[value]
        return (
            None if rule is None else piece_of(rule, rule.results[eqn.outputs.index(value)], cut, self.question.steps)
        )


def piece_of(rule: ShardingRule, layout: Layout, cut: Cut, steps: int) -> Inside | None:
    """How to run an equation so that a result of that layout comes out cut; every other result must be cut too."""
    inside = factor_of(rule, layout, cut, steps)
    if inside is None or any(inside.cut(result) is None for result in rule.results):
        return None
    return inside
