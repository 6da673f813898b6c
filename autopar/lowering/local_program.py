"""The local program: what one device does under a plan, instruction by instruction.

Everything is explicit: which layout of which value an equation reads, and every resharding in between. The
prediction counts these instructions and the execution runs them, so that what is planned is what runs.
"""

from collections.abc import Sequence
from dataclasses import replace

from autopar.errors import PlanError
from autopar.ir.program import Atom, Constant, Equation, Program, Value
from autopar.ir.regions import LOOP_CARRY, LOOP_CONST, LOOP_SLICE, ScanParts
from autopar.lowering.instructions import (
    Barrier,
    Branch,
    Instruction,
    LocalProgram,
    Loop,
    Move,
    Operand,
    Run,
    Slot,
)
from autopar.plan import Plan, View
from autopar.sharding.lookup import RuleBook
from autopar.sharding.reshard import CommunicationCost, Resharding, follow, plan_reshard, sent_inside
from autopar.sharding.strategies import Split, Strategy
from autopar.spec import Spec


def build_local_program(
    program: Program, plan: Plan, cost: CommunicationCost, rules: RuleBook | None = None
) -> LocalProgram:
    """Lowers a plan to instructions.

    Args:
        program: the program that the plan was made for.
        plan: specs, strategies and views by name.
        cost: prices reshardings; where the plan has no route for one (it is in the making, or was edited), the
            cheapest is taken.
        rules: the rules of this program as far as they were looked up before; saves time.

    Raises:
        PlanError: the plan does not cover the program.
    """
    arrive = tuple(_planned(plan, value) for value in program.inputs)
    return _Builder(plan, cost, rules or RuleBook()).build(program, arrive, plan.outputs)


def _planned(plan: Plan, value: Value) -> Spec:
    spec = plan.values.get(value.name)
    if spec is None:
        raise PlanError(f"the plan has no spec for {value.name}", fix="plan this program again")
    return spec


class _Builder:
    """One pass over the equations of a program or of a region's body, with the slots made so far."""

    def __init__(self, plan: Plan, cost: CommunicationCost, rules: RuleBook) -> None:
        self.plan, self.cost, self.rules = plan, cost, rules
        self.routes = {(r.shape, r.itemsize, r.monoid, r.specs[0], r.specs[-1]): r.specs for r in plan.routes}
        self.sizes = plan.mesh.sizes
        self.axes = plan.mesh.names
        self.instructions: list[Instruction] = []
        self.slots: dict[Value, Slot] = {}
        self.views: dict[int, Slot] = {}
        self.made: dict[tuple[Value, Spec, Spec], int] = {}
        self.free: dict[Value, Equation] = {}
        self.pieces: dict[tuple[Value, Spec], Slot] = {}
        self.wanted: dict[Value, Spec] = {}
        self.view_of: dict[tuple[str, str], View] = {
            (name, reader): view for name, views in plan.views.items() for view in views for reader in view.readers
        }

    def build(self, program: Program, arrive: Sequence[Spec | None], leave: Sequence[Spec]) -> LocalProgram:
        """The instructions of a program whose inputs (None: made already) and results have the given specs."""
        arriving = zip(program.inputs, arrive, strict=True)
        inputs = tuple(Slot(value, spec) for value, spec in arriving if spec is not None)
        self.slots.update((slot.value, slot) for slot in inputs)
        for value, spec in self.wanted.items():
            if self.slots[value].spec != spec:
                self.slots[value] = self._move(self.slots[value], spec, None)
        waiting: list[Equation] = []
        for eqn in program.equations:
            group = eqn.params.get("group") if eqn.primitive.name == "optimization_barrier" else None
            if waiting and (group is None or waiting[-1].params["group"] != group):
                self._barrier(waiting)
                waiting = []
            if group is not None and eqn.name in self.plan.equations:
                waiting.append(eqn)
            else:
                self._equation(eqn)
        if waiting:
            self._barrier(waiting)
        outputs = tuple(self._result(atom, spec) for atom, spec in zip(program.outputs, leave, strict=True))
        return LocalProgram(inputs, outputs, self._hoisted(), self.plan.mesh)

    def _hoisted(self) -> tuple[Instruction, ...]:
        """The instructions, with every move that shrinks a value right behind the equation that makes it.

        A gradient is scattered when it is there, not when the optimizer asks for it; a gather waits for its reader.
        """
        early: dict[Slot, list[Move]] = {}
        for i in self.instructions:
            if isinstance(i, Move) and i.source.spec.shards(self.sizes) < i.target.spec.shards(self.sizes):
                early.setdefault(i.source, []).append(i)
        made = {slot for i in self.instructions if not isinstance(i, Move) for slot in i.outputs}
        hoisted = {move for slot, moves in early.items() if slot in made for move in moves}
        ordered: list[Instruction] = []
        for i in self.instructions:
            if i in hoisted:
                continue
            ordered.append(i)
            for slot in () if isinstance(i, Move) else i.outputs:
                ordered += [
                    replace(move, after=None) for move in early.get(slot, [])
                ]  # it would wait for what is not made
        return tuple(ordered)

    def _equation(self, eqn: Equation) -> None:
        if eqn.primitive.name in ("scan", "cond") and eqn.bodies:
            self._scan(eqn) if eqn.primitive.name == "scan" else self._cond(eqn)
            return
        splits = self.plan.equations.get(eqn.name)
        if splits is None:
            self.free[eqn.outputs[0]] = eqn
            return
        self._run(eqn, self.rules.strategy(eqn, self._all_axes(splits)))

    def _all_axes(self, splits: Sequence[tuple[str, Split]]) -> dict[str, Split]:
        given = dict(splits)
        return given | {axis: None for axis in self.axes if axis not in given}

    def _run(self, eqn: Equation, strategy: Strategy) -> tuple[Slot, ...]:
        inputs = self._operands(eqn, strategy.inputs)
        outputs = tuple(Slot(value, spec) for value, spec in zip(eqn.outputs, strategy.outputs, strict=True))
        sent = sent_inside(eqn, strategy, self.cost)
        self.instructions.append(Run(eqn, self.rules.rule(eqn), strategy, inputs, outputs, sent=sent))
        for slot in outputs:
            self.slots.setdefault(slot.value, slot)
        return outputs

    def _barrier(self, eqns: list[Equation]) -> None:
        inputs: list[Slot] = []
        for eqn in eqns:
            strategy = self.rules.strategy(eqn, self._all_axes(self.plan.equations[eqn.name]))
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
                assert isinstance(atom, Value)
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
        resharding = self._resharding(value, source.spec, spec)
        key = (value, source.spec, spec)
        repeat = self.made.get(key, 0) if any(step.nbytes for step in resharding.steps) else 0
        self.made[key] = repeat + 1
        target = Slot(value, spec)
        after = (anchor or self._latest()) if repeat else None
        self.instructions.append(Move(source, target, resharding, after, repeat))
        return target

    def _latest(self) -> Slot | None:
        """What the last equation made."""
        return next((i.outputs[0] for i in reversed(self.instructions) if isinstance(i, Run)), None)

    def _resharding(self, value: Value, source: Spec, target: Spec) -> Resharding:
        monoid = self.rules.monoid(value)
        route = self.routes.get((value.shape, value.itemsize, monoid, source, target))
        if route is None:
            return plan_reshard(source, target, value.shape, value.itemsize, self.cost, monoid)
        return follow(route, value.shape, value.itemsize, self.cost, monoid)

    def _piece(self, value: Value, spec: Spec) -> Slot:
        """A free value made in the spec where it is needed."""
        slot = self.pieces.get((value, spec))
        if slot is None:
            eqn = self.free[value]
            fitting = [s for s in self.rules.strategies(self.rules.rule(eqn), self.sizes) if s.outputs[0] == spec]
            strategy = fitting[0] if fitting else self.rules.strategy(eqn, self._all_axes(()))
            (slot,) = self._run(eqn, strategy)
            if slot.spec != spec:
                slot = self._move(slot, spec, None)
            self.pieces[value, spec] = slot
        return slot

    def _result(self, atom: Atom, spec: Spec) -> Operand:
        if isinstance(atom, Constant):
            return atom
        if atom in self.free:
            return self._piece(atom, spec)
        source = self.slots[atom]
        return source if source.spec == spec else self._move(source, spec, None)

    # -- regions: their bodies carry layouts in and out through the equations of autopar.ir.regions

    def _scan(self, eqn: Equation) -> None:
        (body,) = eqn.bodies
        parts = ScanParts.of(eqn)
        inside = [_planned(self.plan, value) for value in body.inputs]
        arrive = [spec if i < parts.first_x else Spec(((), *spec.dims)) for i, spec in enumerate(inside)]
        kinds = [LOOP_CONST] * parts.n_consts + [LOOP_CARRY] * parts.n_carry
        kinds += [LOOP_SLICE] * (len(inside) - parts.first_x)
        readers = [f"{value.name}@{kind.name}" for value, kind in zip(body.inputs, kinds, strict=True)]
        inputs = self._entering(eqn.inputs, arrive, readers)
        carried = inside[parts.n_consts : parts.first_x]
        stacked = [_planned(self.plan, value) for value in eqn.outputs[parts.n_carry :]]
        leave = [*carried, *(Spec(spec.dims[1:], spec.partial) for spec in stacked)]
        local = _Builder(self.plan, self.cost, self.rules).build(body, inside, leave)
        outputs = tuple(Slot(v, spec) for v, spec in zip(eqn.outputs, [*carried, *stacked], strict=True))
        self.instructions.append(Loop(eqn, local, inputs, outputs, parts.length))
        self._leaving(outputs)

    def _cond(self, eqn: Equation) -> None:
        (index,) = self._entering(eqn.inputs[:1], [Spec(())], [eqn.name])
        sources = [self.slots.get(atom, atom) for atom in eqn.inputs[1:]]  # type: ignore[arg-type]
        leave = [_planned(self.plan, value) for value in eqn.outputs]
        bodies = tuple(self._branch(body, sources, leave) for body in eqn.bodies)
        outputs = tuple(Slot(value, spec) for value, spec in zip(eqn.outputs, leave, strict=True))
        entering = [source for source in sources if not isinstance(source, Value)]
        self.instructions.append(Branch(eqn, bodies, (index, *entering), outputs))
        self._leaving(outputs)

    def _branch(self, body: Program, sources: Sequence[Operand | Value], leave: Sequence[Spec]) -> LocalProgram:
        """A branch takes operands as they come, moves them and makes free values itself: only the one taken pays."""
        builder = _Builder(self.plan, self.cost, self.rules)
        builder.wanted = {value: _planned(self.plan, value) for value in body.inputs}
        builder.free = dict(self.free)
        for value, source in zip(body.inputs, sources, strict=True):
            if isinstance(source, Value):
                builder.slots[value] = builder._piece(source, builder.wanted[value])
        arrive = [None if isinstance(s, Value) else s.spec if isinstance(s, Slot) else Spec(()) for s in sources]
        return builder.build(body, arrive, leave)

    def _entering(self, atoms: Sequence[Atom], specs: Sequence[Spec], readers: Sequence[str]) -> tuple[Operand, ...]:
        found: list[Operand] = []
        for atom, spec, reader in zip(atoms, specs, readers, strict=True):
            source = atom if isinstance(atom, Constant) else self._source(atom, reader)
            if source is None:
                assert isinstance(atom, Value)
                source = self._piece(atom, spec)
            elif isinstance(source, Slot) and source.spec != spec:
                source = self._move(source, spec, None)
            found.append(source)
        return tuple(found)

    def _leaving(self, outputs: tuple[Slot, ...]) -> None:
        """What follows reads the results in the layout that their loop_exit or branch_out has."""
        for slot in outputs:
            wanted = _planned(self.plan, slot.value)
            self.slots[slot.value] = slot if slot.spec == wanted else self._move(slot, wanted, None)
