"""What the results of a program need from its loops, followed backwards over its equations.

``autopar.sharding.time.timing`` says what could run in which loop; the demand says what must, as late as possible: an
equation of the first loop whose total nobody needs before the end joins the last one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from autopar.ir.program import Atom, Equation, Value
from autopar.sharding.time.timing import HEAVY, Cut, Inside, Timing, Timings

TERM, COPY, ESTIMATE = "term", "copy", "estimate"
Form = Cut | str
"""What an iteration has of a value: the part along a cut, a TERM of its total, a COPY of all of it, or an ESTIMATE."""


@dataclass(frozen=True, eq=False)
class Run:
    """One equation in the body of a loop.

    Attributes:
        equation: the equation of the whole program.
        inside: how it is split; None for a copy or an estimate.
        forms: what it makes of each result.
    """

    equation: Equation
    inside: Inside | None
    forms: tuple[Form, ...]


@dataclass
class Demand:
    """What loops must run and combine.

    Attributes:
        timings: the form of every value.
        last: the number of the last loop.
        results: the forms that one iteration owes (of the body of a scan); None where all results must be whole.
        wanted: the forms of a value that loops need, with the loops.
        before: before which loop a value must be whole.
        combined_in: the loop that makes a value whole.
        slices: the whole values of which loops take parts.
        runs: what loops run, in reverse program order, with the loops.
        once: what runs outside, in reverse program order.
        estimates: totals that iterations estimate, with the loops.
    """

    timings: Timings
    last: int
    results: tuple[Form | None, ...] | None = None
    wanted: dict[Value, dict[Form, set[int]]] = field(default_factory=dict)
    before: dict[Value, int] = field(default_factory=dict)
    combined_in: dict[Value, int] = field(default_factory=dict)
    slices: dict[tuple[Value, Cut], set[int]] = field(default_factory=dict)
    runs: list[tuple[Run, frozenset[int]]] = field(default_factory=list)
    once: list[Equation] = field(default_factory=list)
    estimates: dict[Value, set[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        timings, program = self.timings, self.timings.question.program
        self.producer = timings.producer
        self.free = _free(program.equations)
        for k, atom in enumerate(program.outputs):
            form = self.results[k] if self.results is not None else None
            if isinstance(atom, Value) and form is not None:
                self._owed(atom, form, {self.last})
            elif isinstance(atom, Value) and self.results is not None and self.timings.of[atom].ready:
                self._form(atom, ESTIMATE, {self.last})
            else:
                self._whole(atom, self.last + (self.results is None))
        for eqn in reversed(program.equations):
            self._equation(eqn)

    def natural(self, eqn: Equation, k: int) -> Form:
        """The form in which a loop makes a result."""
        inside = self.timings.inside[eqn.name]
        return inside.cut(inside.rule.results[k]) or TERM

    def _equation(self, eqn: Equation) -> None:
        once = False
        for k, value in enumerate(eqn.outputs):
            if value not in self.before:
                continue
            if self.timings.of[value].gathered:
                loop = self.combined_in[value] = self.before[value] - 1
                self._form(value, self.natural(eqn, k), {loop})
                continue
            once = True
            for atom in eqn.inputs:
                self._whole(atom, self.before[value])
        if once:
            self.once.append(eqn)
        for k, value in enumerate(eqn.outputs):
            if self.timings.of[value].gathered and ESTIMATE in self.wanted.get(value, {}):
                self.estimates[value] = loops = self.wanted[value].pop(ESTIMATE)
                self._form(value, self.natural(eqn, k), loops)
        for run, loops in self._variants(eqn):
            self.runs.append((run, frozenset(loops)))
            for k, atom in enumerate(eqn.inputs):
                self._operand(run, k, atom, loops)

    def _variants(self, eqn: Equation) -> Iterator[tuple[Run, set[int]]]:
        """The ways in which loops run an equation: as its operands come, in pieces of whole operands, or as a copy."""
        found: dict[object, tuple[Run, set[int]]] = {}
        for k, value in enumerate(eqn.outputs):
            for form, loops in self.wanted.get(value, {}).items():
                inside = self._inside(eqn, k, form)
                key = (inside.factor, inside.inner) if inside else form
                if key not in found:
                    found[key] = Run(eqn, inside, _forms(eqn, inside, form)), set()
                found[key][1].update(loops)
        yield from found.values()

    def _inside(self, eqn: Equation, k: int, form: Form) -> Inside | None:
        natural = self.timings.inside.get(eqn.name)
        if form in (COPY, ESTIMATE):
            return natural if form == ESTIMATE and natural and k in natural.wholes else None
        if eqn.name in self.timings.inside and self.natural(eqn, k) == form:
            return self.timings.inside[eqn.name]
        assert isinstance(form, Cut)
        inside = self.timings.piece(eqn, k, form)
        assert inside is not None
        return inside

    def _owed(self, value: Value, form: Form, loops: set[int]) -> None:
        """Asks for a form of a value that a loop may have to make from the whole."""
        timing = self.timings.of[value]
        if self.comes_as(value, form, timing) if isinstance(form, Cut) else timing.monoid == "sum":
            self._form(value, form, loops)
            return
        if isinstance(form, Cut):
            self.slices.setdefault((value, form), set()).update(loops)
        self._whole(value, min(loops))

    def _operand(self, run: Run, k: int, atom: Atom, loops: set[int]) -> None:
        """What a run in the given loops needs of one operand."""
        if not isinstance(atom, Value):
            return
        timing, inside = self.timings.of[atom], run.inside
        cut = inside.cut(inside.rule.operands[k]) if inside else None
        if cut is not None:
            self._owed(atom, cut, loops)
        elif inside and k in inside.terms and timing.monoid == "sum":
            self._form(atom, TERM, loops)
        elif atom in self.free:
            self._form(atom, COPY, loops)
        else:
            early = {loop for loop in loops if loop < timing.ready}
            if early:
                self._form(atom, ESTIMATE, early)
            if loops - early:
                self._whole(atom, min(loops - early))

    def comes_as(self, value: Value, cut: Cut, timing: Timing) -> bool:
        """Whether the loop makes this part of a value itself, rather than slicing the whole."""
        eqn = self.producer.get(value)
        if timing.cut == cut:
            return eqn is not None or self.timings.question.inside
        return eqn is not None and self.timings.generated(value, cut)

    def _form(self, value: Value, form: Form, loops: set[int]) -> None:
        self.wanted.setdefault(value, {}).setdefault(form, set()).update(loops)

    def _whole(self, atom: Atom, before: int) -> None:
        if isinstance(atom, Value):
            self.before[atom] = min(before, self.before.get(atom, before))


def _forms(eqn: Equation, inside: Inside | None, form: Form) -> tuple[Form, ...]:
    """What a run makes of each result."""
    if inside is None:
        return (form,) * len(eqn.outputs)
    layouts = enumerate(inside.rule.results)
    return tuple(ESTIMATE if k in inside.wholes else inside.cut(layout) or TERM for k, layout in layouts)


def _free(equations: tuple[Equation, ...]) -> frozenset[Value]:
    """What depends on no argument and is light to make: every loop makes it by itself."""
    found: set[Value] = set()
    for eqn in equations:
        if eqn.primitive.name not in HEAVY and all(atom in found for atom in eqn.operands):
            found.update(eqn.outputs)
    return frozenset(found)


def demand_of(timings: Timings) -> Demand:
    """What the results need, in as few loops as can be."""
    last = max((timing.loop for timing in timings.of.values()), default=0)
    while True:
        demand = Demand(timings, last)
        needed = max((timings.of[value].loop for value in demand.combined_in), default=0)
        if needed >= last:
            return demand
        last = needed
