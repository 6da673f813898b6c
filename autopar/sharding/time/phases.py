"""A program cut at its time axis: what is hoisted, what each loop runs and keeps, what runs once (DESIGN.md 1.4).

A loss takes one loop; a statistic that it needs first takes a short loop before it. Equations that two loops need run
in both if they are light. Where that would repeat a contraction (batch norm: the statistics of a batch need all the
layers before), small values are stacked instead, or the step is refused.
"""

import logging
from dataclasses import dataclass, replace

from autopar import compat
from autopar.errors import MicrobatchError
from autopar.ir.program import Equation, Value
from autopar.sharding.lookup import RuleBook
from autopar.sharding.time.demand import TERM, Demand, Form, Run, demand_of
from autopar.sharding.time.nested import region_inside
from autopar.sharding.time.timing import HEAVY, Cut, Inside, Question, Timings

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Loop:
    """One pass over the parts.

    Attributes:
        runs: the body, in program order.
        slices: whole values of which every iteration takes a part.
        totals: values whose terms it adds up, with the monoid.
        stacks: values whose parts it puts together.
        estimates: totals that every iteration also estimates from its own term.
    """

    runs: tuple[Run, ...]
    slices: tuple[tuple[Value, Cut], ...]
    totals: tuple[tuple[Value, str], ...]
    stacks: tuple[tuple[Value, Cut], ...]
    estimates: tuple[Value, ...] = ()


@dataclass(frozen=True, eq=False)
class Phases:
    """A program over time.

    Attributes:
        question: the program, its steps and its seeds.
        timings: the form of every value.
        loops: in order.
        sections: the equations that run once: those before each loop (the first are hoisted), and those after the last.
    """

    question: Question
    timings: Timings
    loops: tuple[Loop, ...]
    sections: tuple[tuple[Equation, ...], ...]

    @property
    def hoisted(self) -> tuple[Equation, ...]:
        """What runs once before the first loop."""
        return self.sections[0]

    @property
    def once(self) -> tuple[Equation, ...]:
        """What runs once after the last loop."""
        return self.sections[-1]


def find_phases(question: Question, allow: frozenset[str] = frozenset()) -> Phases:
    """Cuts a program at the time axis.

    Args:
        question: the program, the steps and what they split.
        allow: "recompute": repeat contractions and stack large values where nothing else is exact;
            "ghost_batch_norm": else let every iteration estimate a total that layers need from its own examples.

    Raises:
        MicrobatchError: a total is needed before the loop that makes it can end, or a part has to be whole.
    """
    rules = RuleBook()
    while True:
        timings = Timings(question, rules, region_inside)
        demand = demand_of(timings)
        repeated = _repeated(demand)
        if "recompute" in allow or not repeated:
            break
        late = _late(demand)
        if "ghost_batch_norm" in allow and late:
            totals = {total for _, _, waits in late for total in _totals_behind(demand, waits)}
            if not totals <= question.estimated:
                question = replace(question, estimated=question.estimated | totals)
                continue
        room = question.small_bytes - sum(value.nbytes for value in question.whole)
        stacked = {value for _, value, _ in late}
        if not stacked or sum(value.nbytes for value in stacked) > room:
            raise _refused_total(demand, late, repeated)
        question = replace(question, whole=question.whole | stacked)
    if "recompute" not in allow:
        _check_stacks(demand)
    if demand.estimates:
        names = ", ".join(_where(demand.producer[value]) for value in demand.estimates)
        log.warning("every microbatch takes its own statistics instead of those of the batch: %s", names)
    return _phases(demand)


def _repeated(demand: Demand) -> list[Equation]:
    """Heavy equations that run more than once."""
    counts = dict.fromkeys((eqn for eqn in demand.once), 1)
    for run, loops in demand.runs:
        counts[run.equation] = counts.get(run.equation, 0) + len(loops)
    return [eqn for eqn, count in counts.items() if count > 1 and eqn.primitive.name in HEAVY]


def _late(demand: Demand) -> list[tuple[Equation, Value, Value]]:
    """Equations of a later loop that read a part made by heavy equations in an earlier one, and what they wait for."""
    timings = demand.timings
    heavy: set[Value] = set()
    found = []
    for run, _ in reversed(demand.runs):
        eqn, inside = run.equation, run.inside
        if inside is None or timings.inside.get(eqn.name) is not inside:
            continue
        if eqn.primitive.name in HEAVY or any(atom in heavy for atom in eqn.operands):
            heavy.update(eqn.outputs)
        loop = timings.of[eqn.outputs[0]].loop
        waits = [v for k, v in enumerate(eqn.inputs) if isinstance(v, Value) and _waits(timings, inside, k, v, loop)]
        for k, atom in enumerate(eqn.inputs):
            if not isinstance(atom, Value) or atom not in heavy or not waits:
                continue
            if timings.of[atom].loop < loop and timings.of[atom].cut == inside.cut(inside.rule.operands[k]) is not None:
                found.append((eqn, atom, waits[0]))
    return found


def _waits(timings: Timings, inside: Inside, k: int, value: Value, loop: int) -> bool:
    """Whether an equation runs in that loop because it needs this operand whole."""
    timing = timings.of[value]
    natural = timing.cut == inside.cut(inside.rule.operands[k]) is not None or (k in inside.terms and timing.monoid)
    return not natural and timing.ready == loop


def _totals_behind(demand: Demand, value: Value) -> list[Value]:
    """The combined values that a whole value depends on and that are ready no earlier, first ones first."""
    ready, found, seen, todo = demand.timings.of[value].ready, [], set(), [value]
    while todo:
        value = todo.pop()
        if value in seen or demand.timings.of[value].ready < ready:
            continue
        seen.add(value)
        if demand.timings.of[value].gathered:
            found.append(value)
        elif value in demand.producer:
            todo.extend(demand.producer[value].operands)
    return found[::-1]


def _where(eqn: Equation | None) -> str:
    if eqn is None:
        return ""
    return f"{eqn.name}, {compat.source_line(eqn.source)}" if eqn.source else eqn.name


def _refused_total(
    demand: Demand, late: list[tuple[Equation, Value, Value]], repeated: list[Equation]
) -> MicrobatchError:
    eqn, _, waits = late[0] if late else (repeated[-1], None, None)
    totals = _totals_behind(demand, waits) if waits is not None else []
    stacked = next((total for total in totals if isinstance(_form_in_loop(demand, total), Cut)), None)
    if stacked is not None:
        return _mixed(demand, stacked)
    behind = demand.producer[totals[0]] if totals else eqn
    return MicrobatchError(
        f"{eqn.name} needs {behind.name} of the whole batch, which is complete only after every microbatch has run",
        where=_where(behind),
        fix="plan with microbatches=1, allow=('ghost_batch_norm',) for statistics of each microbatch, "
        "or allow=('recompute',) to run the layers before it again",
    )


def _check_stacks(demand: Demand) -> None:
    """Refuses where equations that cannot run in parts need large values whole, or are most of the work."""
    question = demand.timings.question
    batch: dict[Value, Equation | None] = dict.fromkeys(question.seeds)
    for eqn in reversed(demand.once):
        read = [value for value in eqn.operands if value in batch]
        if not read or demand.timings.of[eqn.outputs[0]].ready:
            continue
        mixing = batch[read[0]] or (None if eqn.name in demand.timings.inside else eqn)
        if mixing is not None and eqn.primitive.name in HEAVY:
            raise _mixed(demand, next(value for value in mixing.operands if value in batch))
        batch.update(dict.fromkeys(eqn.outputs, mixing))
    results = {atom for atom in question.program.outputs if isinstance(atom, Value)}
    large = [v for v in demand.combined_in if v not in results and isinstance(_form_in_loop(demand, v), Cut)]
    if sum(value.nbytes for value in large) <= question.small_bytes:
        return
    raise _mixed(demand, max(large, key=lambda v: v.nbytes))


def _mixed(demand: Demand, value: Value) -> MicrobatchError:
    """The error for an equation that cannot run on a part of a value."""
    readers = [eqn for eqn in demand.timings.question.program.equations if value in eqn.inputs]
    reader = next((eqn for eqn in readers if eqn.name not in demand.timings.inside), readers[0])
    return MicrobatchError(
        f"{reader.name} ({reader.primitive.name}) needs all of {value.name} at once: it mixes the examples of a batch",
        where=_where(reader),
        fix="plan with microbatches=1, or allow=('recompute',) to keep that value for the whole batch",
    )


def _form_in_loop(demand: Demand, value: Value) -> Form:
    eqn = demand.producer[value]
    return demand.natural(eqn, eqn.outputs.index(value))


def _phases(demand: Demand) -> Phases:
    """Demand as loops and sections; loops that combine nothing are dropped."""
    timings, program = demand.timings, demand.timings.question.program
    used = sorted(set(demand.combined_in.values()))
    number = {loop: i for i, loop in enumerate(used)}
    loops = []
    for loop in used:
        combined = [v for v, where in demand.combined_in.items() if where == loop]
        forms = {v: _form_in_loop(demand, v) for v in combined}
        loops.append(
            Loop(
                runs=tuple(run for run, where in reversed(demand.runs) if loop in where),
                slices=tuple(key for key, where in demand.slices.items() if loop in where),
                totals=tuple(
                    (v, timings.inside[demand.producer[v].name].rule.monoid) for v in combined if forms[v] == TERM
                ),
                stacks=tuple((v, cut) for v in combined if isinstance(cut := forms[v], Cut)),
                estimates=tuple(v for v, where in demand.estimates.items() if loop in where),
            )
        )
    sections: list[list[Equation]] = [[] for _ in range(len(used) + 1)]
    exists: dict[Value, int] = dict.fromkeys(program.inputs, 0)
    exists |= {value: number[loop] + 1 for value, loop in demand.combined_in.items()}
    once = set(demand.once)
    for eqn in program.equations:
        if eqn in once:
            section = max((exists[atom] for atom in eqn.operands), default=0)
            sections[section].append(eqn)
            for value in eqn.outputs:
                exists.setdefault(value, section)
    return Phases(timings.question, timings, tuple(loops), tuple(map(tuple, sections)))
