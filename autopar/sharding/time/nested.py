"""A scan or cond of the step inside a loop over time: layers stacked by the user, a recurrence, a layer left out.

Its bodies are cut as the program is, with the forms of its operands for seeds. A carry has one form at both ends of the
body: that is found by trying. Nothing in a body may wait for a total: then the region runs outside the loop, whole.
"""

from dataclasses import dataclass

from autopar.ir.program import Equation, Program, Value
from autopar.ir.regions import ScanParts
from autopar.sharding.factors import Layout, ShardingRule
from autopar.sharding.lookup import RuleBook
from autopar.sharding.time.demand import ESTIMATE, TERM, Demand, Form
from autopar.sharding.time.timing import Cut, Inside, Question, Timing, Timings

FACTOR, LATE = "t", "late"


@dataclass(frozen=True, eq=False)
class Nested:
    """The bodies of a region inside a loop over time.

    Attributes:
        demands: what each of them runs.
        inputs: the form of each operand of a body; None for a whole one.
        outputs: the form of each result; None for a whole one.
        n_consts: how many operands are the same in every iteration of a scan.
    """

    demands: tuple[Demand, ...]
    inputs: tuple[Form | None, ...]
    outputs: tuple[Form | None, ...]
    n_consts: int


def region_inside(eqn: Equation, timings: list[Timing], steps: int, rules: RuleBook) -> Inside | None:
    """How a loop runs a scan or cond on parts of its operands; None where it cannot.

    Args:
        eqn: the region.
        timings: of its operands.
        steps: iterations of the loop.
        rules: of its equations.
    """
    return (
        scan_inside(eqn, timings, steps, rules)
        if eqn.primitive.name == "scan"
        else cond_inside(eqn, timings, steps, rules)
    )


def cond_inside(eqn: Equation, timings: list[Timing], steps: int, rules: RuleBook) -> Inside | None:
    """Every branch on the same parts; what one of them makes in parts, all do."""
    inputs: list[Form | None] = [timing.cut for timing in timings[1:]]
    found = [Timings(_question(body, inputs, steps), rules, region_inside) for body in eqn.bodies]
    outputs: list[Form | None] = []
    for k in range(len(eqn.outputs)):
        forms = {_form(each, body.outputs[k]) for each, body in zip(found, eqn.bodies, strict=True)} - {None}
        if len(forms) > 1 or LATE in forms:
            return None
        outputs.append(forms.pop() if forms else None)
    demands = tuple(Demand(each, 0, tuple(outputs)) for each in found)
    if timings[0].cut or any(map(_waits, demands)):
        return None
    return _inside(eqn, Nested(demands, tuple(inputs), tuple(outputs), 0), 1, (len(inputs), len(outputs)))


def scan_inside(eqn: Equation, timings: list[Timing], steps: int, rules: RuleBook) -> Inside | None:
    """The body on parts, with one form for each carry."""
    (body,), parts = eqn.bodies, ScanParts.of(eqn)
    inputs: list[Form | None] = []
    for k, timing in enumerate(timings):
        cut = timing.cut
        if cut and k >= parts.first_x:
            if cut.dim == 0:
                return None
            cut = Cut(cut.dim - 1, cut.inner)
        inputs.append(cut or (TERM if timing.monoid == "sum" and parts.n_consts <= k < parts.first_x else None))
    carries = slice(parts.n_consts, parts.first_x)
    while True:
        found = Timings(_question(body, inputs, steps), rules, region_inside)
        natural = [_form(found, atom) for atom in body.outputs]
        # A carry that waits for a total may be one itself: each iteration over time then carries its own term of it.
        hoped = [TERM if form == LATE and i < parts.n_carry else form for i, form in enumerate(natural)]
        grown = [before or after for before, after in zip(inputs[carries], hoped, strict=False)]
        if grown == inputs[carries]:
            break
        inputs[carries] = grown
    outputs = (*inputs[carries], *natural[parts.n_carry :])
    if LATE in natural or any(a and b and a != b for a, b in zip(outputs, natural, strict=True)):
        return None
    outputs = outputs[: parts.n_carry] + _as_used(Demand(found, 0, outputs), outputs)[parts.n_carry :]
    demand = Demand(found, 0, outputs)
    if _waits(demand):
        return None
    nested = Nested((demand,), tuple(inputs), outputs, parts.n_consts)
    return _inside(eqn, nested, 0, (parts.first_x, parts.n_carry))


def _waits(demand: Demand) -> bool:
    """Whether something in a body needs what an iteration over time does not have."""
    of = demand.timings.of
    late = any(ESTIMATE in forms and of[value].estimate for value, forms in demand.wanted.items())
    return late or bool(demand.combined_in) or any(of[value].ready for value in demand.before)


def _as_used(demand: Demand, outputs: tuple[Form | None, ...]) -> tuple[Form | None, ...]:
    """Whole results (random masks, kept for the backward pass) in the part that the body makes of them anyway."""
    found = []
    for atom, form in zip(demand.timings.question.program.outputs, outputs, strict=True):
        forms = demand.wanted.get(atom, {}) if isinstance(atom, Value) and form is None else {}
        found.append(next((part for part in forms if isinstance(part, Cut)), form))
    return tuple(found)


def _question(body: Program, inputs: list[Form | None], steps: int) -> Question:
    forms = list(zip(body.inputs, inputs, strict=True))
    seeds = {value: form for value, form in forms if isinstance(form, Cut)}
    terms = frozenset(value for value, form in forms if form == TERM)
    return Question(body, steps, seeds, terms=terms, inside=True)


def _form(timings: Timings, atom: object) -> Form | None:
    """The form that a result of the body has by itself; LATE where it waits for a total."""
    if not isinstance(atom, Value):
        return None
    timing = timings.of[atom]
    if timing.loop or timing.monoid not in ("", "sum") or (timing.whole and timing.estimate):
        return LATE
    return timing.cut or (TERM if timing.monoid else None)


def _inside(eqn: Equation, nested: Nested, skipped: int, stacked: tuple[int, int]) -> Inside:
    """The region as an equation with one factor, which stands wherever time cuts an operand or a result.

    Args:
        eqn: the region.
        nested: its bodies.
        skipped: operands that the bodies do not have.
        stacked: the first operand and the first result that have one dimension more outside than inside.
    """
    sizes: dict[str, int] = {FACTOR: 1}  # nobody asks: the factor is never split further

    def layout(shape: tuple[int, ...], form: Form | None, shift: int) -> Layout:
        dims: list[tuple[str, ...]] = [()] * len(shape)
        if isinstance(form, Cut):
            minor = f"i{form.inner}"
            sizes[minor] = form.inner
            dims[form.dim + shift] = (FACTOR, minor)
        return tuple(dims)

    outer: list[Layout] = [((),) * len(atom.aval.shape) for atom in eqn.inputs[:skipped]]
    operands = tuple(outer) + tuple(
        layout(atom.aval.shape, form, int(k >= stacked[0]))
        for k, (atom, form) in enumerate(zip(eqn.inputs[skipped:], nested.inputs, strict=True))
    )
    results = tuple(
        layout(value.shape, form, int(k >= stacked[1]))
        for k, (value, form) in enumerate(zip(eqn.outputs, nested.outputs, strict=True))
    )
    terms = tuple(k for k, form in enumerate(nested.inputs) if form == TERM)
    wholes = tuple(k for k, form in enumerate(nested.outputs) if form is None)
    return Inside(ShardingRule(operands, results, sizes), FACTOR, 1, terms, wholes, nested)
