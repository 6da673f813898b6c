"""Why a value lies as it does: the search again with each of its other layouts forced."""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.errors import AutoparError, InfeasibleError, PinError
from autopar.ir.program import Value
from autopar.plan import Plan
from autopar.plan.terminal import as_text
from autopar.planner.graph import Graph
from autopar.planner.pins import Masks, narrow
from autopar.planner.search import Prepared
from autopar.spec import Spec

Replan = Callable[[Masks], Plan]
"""Plans under masks, as the explained plan was planned otherwise."""


@dataclass(frozen=True)
class Alternative:
    """A layout that the value could have, with the best plan that gives it.

    Attributes:
        spec: the layout.
        chosen: whether it is that of the plan.
        objective_s, compute_s, communication_s: seconds more than the plan takes.
        peak_bytes: bytes more at the peak of a device.
        refused: why no plan has it; empty where one has.
    """

    spec: Spec
    chosen: bool
    objective_s: float = 0.0
    compute_s: float = 0.0
    communication_s: float = 0.0
    peak_bytes: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Explanation:
    """Why a value lies as it does.

    Attributes:
        plan: the plan.
        name: of the value.
        readers: names of the equations that read it.
        alternatives: the layouts that it could have, the cheapest first.
    """

    plan: Plan
    name: str
    readers: tuple[str, ...]
    alternatives: tuple[Alternative, ...]

    def __rich__(self) -> Any:
        from autopar.planner import pages

        return pages.explanation_page(self)

    def __str__(self) -> str:
        return as_text(self.__rich__())


def explained(
    prepared: Prepared,
    plan: Plan,
    name: str,
    masks: Masks,
    replan: Replan,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Explanation:
    """The explanation of one value; arguments and errors as for ``alternatives``."""
    value, found = find_value(prepared.graph, name), list[Alternative]()
    total = len(specs_of(prepared, value))
    on_progress(f"alternative 1 of {total - 1}")
    for one in alternatives(prepared, plan, name, masks, replan):
        found.append(one)
        on_progress(f"alternative {len(found)} of {total - 1}")
    ordered = sorted(found, key=lambda one: (bool(one.refused), one.objective_s))
    return Explanation(plan, name, readers_of(prepared.graph, value), tuple(ordered))


def find_value(graph: Graph, name: str) -> Value:
    """The value of a name.

    Raises:
        PinError: there is none, or it has no layout of its own (every reader makes its piece).
    """
    made = [value for eqn in graph.program.equations for value in eqn.outputs]
    known = {value.name: value for value in (*graph.program.inputs, *made)}
    if name not in known:
        holding = [other for other in known if name in other]
        close = (holding or difflib.get_close_matches(name, known, cutoff=0.0))[:3]
        raise PinError(f"no value is called '{name}'", where=f"close to it: {', '.join(close)}", fix="name one of them")
    if graph.unit(known[name]) is None:
        raise PinError(
            f"{name} has no layout: it depends on no argument, so every device makes the piece that it reads",
            fix="name a value that depends on an argument",
        )
    return known[name]


def readers_of(graph: Graph, value: Value) -> tuple[str, ...]:
    """Names of the equations that read a value, in program order."""
    equations = graph.program.equations
    uses = (use.position for group in graph.groups.get(value, ()) for use in group.uses)
    return tuple(dict.fromkeys(equations[position].name for position in uses if position < len(equations)))


def specs_of(prepared: Prepared, value: Value) -> tuple[Spec, ...]:
    """Every layout that the value can have, in the order of the choices that give it."""
    unit = prepared.graph.unit(value)
    assert unit is not None
    return tuple(dict.fromkeys(prepared.formulator.space.output(unit, value)))


def alternatives(prepared: Prepared, plan: Plan, name: str, masks: Masks, replan: Replan) -> Iterator[Alternative]:
    """Solves again for each layout of a value, the plan's own first.

    Args:
        prepared: the step on the plan's mesh.
        plan: the plan to explain.
        name: of the value.
        masks: the restrictions that the plan was made under.
        replan: solves under masks.

    Raises:
        PinError: no such value, or one without a layout.
    """
    value = find_value(prepared.graph, name)
    unit = prepared.graph.unit(value)
    assert unit is not None
    port = prepared.formulator.space.output(unit, value)
    own = plan.values.get(name)
    yield from (Alternative(spec, True) for spec in specs_of(prepared, value) if spec == own)
    for spec in specs_of(prepared, value):
        if spec == own:
            continue
        narrowed = dict(masks)
        narrow(narrowed, unit, np.array([choice == spec for choice in port]))
        if not narrowed[unit].any():
            yield Alternative(spec, False, refused="the preset or a pin excludes it")
            continue
        try:
            yield _compared(spec, replan(narrowed), plan)
        except (InfeasibleError, PinError) as error:
            yield Alternative(spec, False, refused=_reason(error))


def _compared(spec: Spec, other: Plan, plan: Plan) -> Alternative:
    mine, theirs = plan.prediction, other.prediction
    return Alternative(
        spec,
        False,
        objective_s=other.solution.objective_s - plan.solution.objective_s,
        compute_s=theirs.compute_s - mine.compute_s,
        communication_s=theirs.communication_s - mine.communication_s,
        peak_bytes=theirs.peak_bytes - mine.peak_bytes,
    )


def _reason(error: AutoparError) -> str:
    return error.what if isinstance(error, InfeasibleError) else "no plan has it"
