"""One traced step, one mesh: the cheapest plan within a memory limit, with its certificate."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from autopar import compat
from autopar.cost import CostModel
from autopar.errors import InfeasibleError, PinError, UnknownPrimitiveError
from autopar.ir.fingerprint import fingerprint
from autopar.ir.program import Program
from autopar.ir.trace import Traced
from autopar.plan import Argument, Plan, Prediction, Solution
from autopar.planner.decide import Decisions
from autopar.planner.graph import Graph, Unit, build_graph
from autopar.planner.intra import Formulation, Formulator
from autopar.sharding.lookup import RuleBook, has_rule
from autopar.solver import Choice, NoChoiceError, Problem, Progress, Start, Warm, solve

UNKNOWN = Prediction(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, ())

Masks = Mapping[Unit, np.ndarray]
"""Which choices of which units stay allowed."""


class Solved:
    """Choices of the problems solved so far: stages that are alike pose the same one.

    Args:
        warm: what solves of problems that are only nearly the same leave each other; None where few are to follow.
    """

    def __init__(self, warm: Warm | None = None) -> None:
        self.warm = warm
        self._known: list[tuple[Problem, float, Choice]] = []

    def find(self, problem: Problem, relative_gap: float) -> Choice | None:
        """The choice of an equal problem without memory rows, found within the same gap."""
        for known, gap, choice in self._known:
            if gap == relative_gap and _equal(known, problem):
                return choice
        return None

    def add(self, problem: Problem, relative_gap: float, choice: Choice) -> None:
        """Keeps a choice."""
        if problem.limit is None:
            self._known.append((problem, relative_gap, choice))


def _equal(one: Problem, other: Problem) -> bool:
    if (len(one.nodes), len(one.edges), one.limit) != (len(other.nodes), len(other.edges), other.limit):
        return False
    nodes = all(map(np.array_equal, one.nodes, other.nodes))
    pairs = zip(one.edges, other.edges, strict=True)
    return nodes and all(a[:2] == b[:2] and np.array_equal(a[2], b[2]) for a, b in pairs)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A traced step ready to be planned on one mesh; presets and pins share it.

    Attributes:
        traced: the program and its trees.
        graph: its units.
        formulator: their choices and prices on a mesh.
        fingerprint: of the program.
        build_s: seconds spent so far.
        rules: the rules looked up so far, for the lowering of one plan after another.
        solved: the problems solved so far.
    """

    traced: Traced
    graph: Graph
    formulator: Formulator
    fingerprint: str
    build_s: float
    rules: RuleBook = field(default_factory=RuleBook)
    solved: Solved = field(default_factory=Solved)


@dataclass(frozen=True)
class Limits:
    """What a search may use.

    Attributes:
        memory_bytes: of one device; None for no limit.
        seconds: for the solver.
        relative_gap: the solver may stop when it is this close to the bound.
        on_progress: called while solving.
    """

    memory_bytes: float | None = None
    seconds: float = 60.0
    relative_gap: float = 1e-6
    on_progress: Callable[[Progress], None] | None = None


def prepare(traced: Traced, cost: CostModel, *, strict: bool = False, rules: RuleBook | None = None) -> Prepared:
    """Builds the graph and the classes of choices of a traced step; ``rules`` are those that others looked up.

    Raises:
        UnknownPrimitiveError: under ``strict``, a primitive has no sharding rule.
    """
    start = time.process_time()
    rules = rules or RuleBook()
    graph = build_graph(traced.program, traced.state, rules)
    missing = [eqn for eqn in graph.unruled if not has_rule(eqn)]
    if strict and missing:
        raise UnknownPrimitiveError(
            f"primitive {missing[0].primitive.name} has no sharding rule",
            where=f"{missing[0].name}, {compat.source_line(missing[0].source)}",
            fix="declare one with autopar.sharding_rule, or plan with strict=False to replicate it",
        )
    key = fingerprint(traced.program)
    return Prepared(traced, graph, Formulator(graph, cost), key, time.process_time() - start, rules)


def search(prepared: Prepared, limits: Limits, masks: Masks | None = None) -> tuple[Plan, Formulation, Choice]:
    """The cheapest plan under limits and masks; its prediction is still to be filled in.

    Raises:
        InfeasibleError: nothing fits the memory; bears the least that a plan needs, as the solver counts it.
        PinError: the masks exclude every plan.
    """
    start = time.process_time()
    for unit, mask in (masks or {}).items():
        if not mask.any():
            name = unit.value.name if unit.value else prepared.graph.program.equations[unit.position].name
            raise PinError(
                f"nothing is left to choose for {name}",
                where=f"shape {unit.shape}, mesh {prepared.formulator.cost.mesh}",
                fix="loosen the pins or the preset that restrict it",
            )
    formulation = prepared.formulator.formulate(limits.memory_bytes, masks)
    built = time.process_time()
    try:
        choice = prepared.solved.find(formulation.problem, limits.relative_gap) or solve(
            formulation.problem,
            seconds=limits.seconds,
            relative_gap=limits.relative_gap,
            on_progress=limits.on_progress,
            start=Start(warm=prepared.solved.warm),
        )
    except NoChoiceError as error:
        raise _explained(error, limits) from error
    prepared.solved.add(formulation.problem, limits.relative_gap, choice)
    plan = _plan(prepared, formulation, choice)
    seconds = (prepared.build_s + built - start, time.process_time() - built)
    return plan_with_times(plan, *seconds), formulation, choice


def plan_with_times(plan: Plan, build_s: float, solve_s: float) -> Plan:
    """The plan with the seconds that building and solving took."""
    return replace(plan, solution=replace(plan.solution, build_s=build_s, solve_s=solve_s))


def _explained(error: NoChoiceError, limits: Limits) -> InfeasibleError | PinError:
    least_bytes, limit_bytes = error.least_bytes, limits.memory_bytes
    if limit_bytes is None or least_bytes == np.inf:
        return PinError("the pins exclude every plan", fix="loosen the pins or the preset")
    if least_bytes == -np.inf:
        what = f"no plan within {limit_bytes / 1e9:.4g} GB a device was found in {limits.seconds:.3g} s"
        return InfeasibleError(what, fix="give more --seconds, raise --memory-gb, or use more devices")
    return InfeasibleError(
        f"no plan fits {limit_bytes / 1e9:.4g} GB a device: any plan needs at least {least_bytes / 1e9:.4g} GB",
        fix="raise --memory-gb, use more devices, or make the batch smaller",
        least_bytes=least_bytes,
    )


def _plan(prepared: Prepared, formulation: Formulation, choice: Choice) -> Plan:
    graph, program = prepared.graph, prepared.graph.program
    decisions = Decisions(graph, formulation, choice.strategies)
    return Plan(
        fingerprint=prepared.fingerprint,
        mesh=prepared.formulator.cost.mesh,
        hardware=getattr(getattr(prepared.formulator.cost, "cluster", None), "name", ""),
        arguments=_arguments(program, decisions, {i for i, _ in graph.state}),
        outputs=decisions.outputs(),
        values=decisions.values(),
        equations=decisions.equations(),
        views=decisions.views(),
        prediction=UNKNOWN,
        solution=Solution(
            objective_s=choice.objective,
            lower_bound_s=choice.lower_bound,
            proven_optimal=choice.proven,
            n_equations=program.n_equations,
            n_nodes=len(formulation.units),
            replicated_primitives=_replicated(graph),
        ),
    )


def _arguments(program: Program, decisions: Decisions, state: set[int]) -> tuple[Argument, ...]:
    found = []
    for i, value in enumerate(program.inputs):
        spec = decisions.spec(value)
        assert spec is not None
        found.append(Argument(value.name, tuple(value.shape), str(value.dtype), spec, i in state))
    return tuple(found)


def _replicated(graph: Graph) -> tuple[tuple[str, str], ...]:
    """Primitives that no rule splits, each with the source line of its first use."""
    first: dict[str, str] = {}
    for eqn in graph.unruled:
        if any(value.shape for value in eqn.outputs):
            first.setdefault(eqn.primitive.name, compat.source_line(eqn.source))
    return tuple(first.items())
