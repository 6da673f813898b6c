"""The local program: what one device does under a plan, instruction by instruction.

Everything is explicit: which layout of which value an equation reads, and every resharding in between. The
prediction counts these instructions and the execution runs them, so that what is planned is what runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from autopar.cluster import Mesh
from autopar.errors import PlanError
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.plan import Plan, View
from autopar.sharding.factors import ShardingRule
from autopar.sharding.lookup import RuleBook
from autopar.sharding.reshard import CommunicationCost, Resharding, plan_reshard
from autopar.sharding.strategies import Split, Strategy, make_strategy, strategies
from autopar.spec import Spec


@dataclass(frozen=True, eq=False)
class Slot:
    """One layout of one value on a device; two slots are the same only if they are the same object."""

    value: Value
    spec: Spec

    def __repr__(self) -> str:
        return f"{self.value.name}{self.spec}"


Operand = Slot | Constant


@dataclass(frozen=True, eq=False)
class Move:
    """Reshards ``source`` into ``target``.

    Attributes:
        source, target: two layouts of one value.
        resharding: the steps.
        after: set where the same move was made before: it must wait for this slot, lest the compiler merge the two
            and keep the copy alive in between.
    """

    source: Slot
    target: Slot
    resharding: Resharding
    after: Slot | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """Runs one equation on local operands."""

    equation: Equation
    rule: ShardingRule
    strategy: Strategy
    inputs: tuple[Operand, ...]
    outputs: tuple[Slot, ...]


@dataclass(frozen=True, eq=False)
class Barrier:
    """Keeps the compiler from merging what follows with what came before (a rematerialised block starts here)."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]


Instruction = Move | Run | Barrier


@dataclass(frozen=True, eq=False)
class LocalProgram:
    """The program of every device.

    Attributes:
        inputs: the layout in which each program input arrives.
        outputs: the layout in which each result leaves.
        instructions: in order.
        mesh: the axes that the instructions name.
    """

    inputs: tuple[Slot, ...]
    outputs: tuple[Operand, ...]
    instructions: tuple[Instruction, ...]
    mesh: Mesh


def build_local_program(program: Program, plan: Plan, cost: CommunicationCost) -> LocalProgram:
    """Lowers a plan to instructions.

    Args:
        program: the program that the plan was made for.
        plan: specs, strategies and views by name.
        cost: prices the alternatives of a resharding; that of the planner, so that both take the same.

    Raises:
        PlanError: the plan does not cover the program.
    """
    return _Builder(program, plan, cost).build()


class _Builder:
    """One pass over the equations, with the slots made so far."""

    def __init__(self, program: Program, plan: Plan, cost: CommunicationCost) -> None:
        self.program, self.plan, self.cost = program, plan, cost
        self.sizes = plan.mesh.sizes
        self.rules = RuleBook()
        self.instructions: list[Instruction] = []
        self.slots: dict[Value, Slot] = {}
        self.views: dict[int, Slot] = {}
        self.made: dict[tuple[Value, Spec, Spec], int] = {}
        self.free: dict[Value, Equation] = {}
        self.pieces: dict[tuple[Value, Spec], Slot] = {}
        self.view_of: dict[tuple[str, str], View] = {
            (name, reader): view for name, views in plan.views.items() for view in views for reader in view.readers
        }

    def build(self) -> LocalProgram:
        for value in self.program.inputs:
            self.slots[value] = Slot(value, self._planned(value))
        inputs = tuple(self.slots[value] for value in self.program.inputs)
        waiting: list[Equation] = []
        for eqn in self.program.equations:
            group = eqn.params.get("group") if eqn.primitive.name == "optimization_barrier" else None
            if waiting and (group is None or waiting[-1].params["group"] != group):
                self._barrier(waiting)
                waiting = []
            if group is not None and eqn.name in self.plan.equations:
                waiting.append(eqn)
            else:
                self._equation(eqn)
        outputs = tuple(self._result(k, atom) for k, atom in enumerate(self.program.outputs))
        return LocalProgram(inputs, outputs, tuple(self.instructions), self.plan.mesh)

    def _planned(self, value: Value) -> Spec:
        spec = self.plan.values.get(value.name)
        if spec is None:
            raise PlanError(f"the plan has no spec for {value.name}", fix="plan this program again")
        return spec

    def _equation(self, eqn: Equation) -> None:
        splits = self.plan.equations.get(eqn.name)
        if splits is None:
            self.free[eqn.outputs[0]] = eqn
            return
        rule = self.rules.rule(eqn)
        strategy = make_strategy(rule, self._all_axes(dict(splits)))
        self._run(eqn, rule, strategy)

    def _all_axes(self, splits: Mapping[str, Split]) -> dict[str, Split]:
        return {axis: splits.get(axis) for axis in self.plan.mesh.names}

    def _run(self, eqn: Equation, rule: ShardingRule, strategy: Strategy) -> tuple[Slot, ...]:
        inputs = self._operands(eqn, strategy.inputs)
        outputs = tuple(Slot(value, spec) for value, spec in zip(eqn.outputs, strategy.outputs, strict=True))
        self.instructions.append(Run(eqn, rule, strategy, inputs, outputs))
        for slot in outputs:
            self.slots.setdefault(slot.value, slot)
        return outputs

    def _barrier(self, eqns: list[Equation]) -> None:
        inputs: list[Slot] = []
        for eqn in eqns:
            rule = self.rules.rule(eqn)
            strategy = make_strategy(rule, self._all_axes(dict(self.plan.equations[eqn.name])))
            (operand,) = self._operands(eqn, strategy.inputs)
            assert isinstance(operand, Slot)
            inputs.append(operand)
            self.slots[eqn.outputs[0]] = Slot(eqn.outputs[0], strategy.outputs[0])
        outputs = tuple(self.slots[eqn.outputs[0]] for eqn in eqns)
        self.instructions.append(Barrier(tuple(inputs), outputs))

    def _operands(self, eqn: Equation, specs: tuple[Spec, ...]) -> tuple[Operand, ...]:
        """Slots of every operand in the spec that the strategy needs."""
        wanted = list(zip(eqn.inputs, specs, strict=True))
        sources = [atom if isinstance(atom, Constant) else self._source(atom, eqn.name) for atom in eqn.inputs]
        ready = [s for s, (_, spec) in zip(sources, wanted, strict=True) if isinstance(s, Slot) and s.spec == spec]
        anchor = ready[-1] if ready else None
        moved: dict[tuple[int, Spec], Slot] = {}
        found: list[Operand] = []
        for source, (atom, spec) in zip(sources, wanted, strict=True):
            if source is None:
                found.append(self._piece(atom, spec))
            elif isinstance(source, Constant) or source.spec == spec:
                found.append(source)
            else:
                key = (id(source), spec)
                if key not in moved:
                    moved[key] = self._move(source, spec, anchor)
                found.append(moved[key])
        return tuple(found)

    def _source(self, value: Value, reader: str) -> Slot | None:
        """The slot that an equation reads a value from: its view, or the value as it was made; None if it is free."""
        if value in self.free:
            return None
        view = self.view_of.get((value.name, reader))
        if view is None:
            return self.slots[value]
        slot = self.views.get(id(view))
        if slot is None:
            made = self.slots[value]
            slot = made if made.spec == view.spec else self._move(made, view.spec, None)
            self.views[id(view)] = slot
        return slot

    def _move(self, source: Slot, spec: Spec, anchor: Slot | None) -> Slot:
        value = source.value
        monoid = self.rules.monoid(value)
        resharding = plan_reshard(source.spec, spec, value.shape, value.itemsize, self.cost, monoid)
        key = (value, source.spec, spec)
        again = self.made.get(key, 0) > 0 and any(step.nbytes for step in resharding.steps)
        self.made[key] = self.made.get(key, 0) + 1
        target = Slot(value, spec)
        self.instructions.append(Move(source, target, resharding, anchor if again else None))
        return target

    def _piece(self, value: Value, spec: Spec) -> Slot:
        """A free value made in the spec where it is needed."""
        slot = self.pieces.get((value, spec))
        if slot is None:
            eqn = self.free[value]
            rule = self.rules.rule(eqn)
            fitting = [s for s in strategies(rule, self.sizes) if s.outputs[0] == spec]
            strategy = fitting[0] if fitting else make_strategy(rule, self._all_axes({}))
            (slot,) = self._run(eqn, rule, strategy)
            if slot.spec != spec:
                slot = self._move(slot, spec, None)
            self.pieces[value, spec] = slot
        return slot

    def _result(self, index: int, atom: Atom) -> Operand:
        spec = self.plan.outputs[index]
        if isinstance(atom, Constant):
            return atom
        if atom in self.free:
            return self._piece(atom, spec)
        source = self.slots[atom]
        return source if source.spec == spec else self._move(source, spec, None)
