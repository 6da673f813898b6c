"""A traced step whose scans over layers are pipelines: one program, for any mesh that has the stages on an axis."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.errors import MicrobatchError
from autopar.ir.program import Atom, Constant, Equation, Program, Value, check
from autopar.ir.trace import Traced
from autopar.lowering.pipelined.loop import Kept, whole_layers
from autopar.lowering.pipelined.order import Order
from autopar.lowering.pipelined.sink import sunk
from autopar.lowering.pipelined.ticks import Ticks
from autopar.lowering.pipelined.trunk import Trunk, find_trunks
from autopar.lowering.rolling.roll import roll
from autopar.lowering.rolling.trunk import RollError
from autopar.lowering.time.iteration import Writer, named


@dataclass(frozen=True)
class Pipelining:
    """How scans over layers become pipelines.

    Attributes:
        stages: of every pipeline.
        microbatches: of the batch.
        rounds: how often a microbatch goes through all stages: 1 is GPipe order, more the circular one.
    """

    stages: int
    microbatches: int
    rounds: int = 1


def pipelined_step(traced: Traced, batch: Sequence[Value], how: Pipelining) -> Traced:
    """The step with its layers as pipelines; layers that are written out one by one become a scan first.

    Args:
        traced: the whole step.
        batch: the arguments whose dimension 0 is the batch.
        how: stages, microbatches and rounds.

    Raises:
        MicrobatchError: there is no scan over layers and no layers are alike, a number does not divide, or layers mix
            the batch's examples.
    """
    _check(batch, how)
    program = sunk(traced.program)
    trunks = tuple(find_trunks(program, batch, how.microbatches))
    if not trunks:
        positions = [traced.program.inputs.index(value) for value in batch]
        try:
            traced = roll(traced)
        except RollError as error:
            raise MicrobatchError(
                f"the step has no scan over layers to pipeline, and its layers do not make one: {error.what}",
                where=error.where,
                fix=_FIX,
            ) from error
        program = sunk(traced.program)
        trunks = tuple(find_trunks(program, [program.inputs[at] for at in positions], how.microbatches))
    return replace(traced, program=_written(program, trunks, how))


_FIX = "stack the layers with flax.linen.scan or jax.lax.scan, or plan without an axis 'pipe'"


def _written(program: Program, trunks: Sequence[Trunk], how: Pipelining) -> Program:
    if not trunks:
        raise MicrobatchError("the step has no scan over layers to pipeline", fix=_FIX)
    found = _Pipelined(program, {trunk.equation: trunk for trunk in trunks}, how).program()
    check(found)
    return found


def _check(batch: Sequence[Value], how: Pipelining) -> None:
    for value in batch:
        if value.shape[0] % how.microbatches:
            raise MicrobatchError(
                f"{how.microbatches} microbatches do not divide the batch of {value.shape[0]}",
                where=f"argument {value.name}, shape {value.shape}",
                fix="choose a divisor of the batch",
            )
    if how.rounds > 1 and how.microbatches % how.stages:
        raise MicrobatchError(
            f"{how.rounds} rounds of {how.stages} stages need a multiple of {how.stages} microbatches, "
            f"not {how.microbatches}",
            fix="choose such a number of microbatches, or rounds=1",
        )


class _Pipelined:
    """The program in the making."""

    def __init__(self, program: Program, trunks: dict[Equation, Trunk], how: Pipelining) -> None:
        self.old, self.trunks, self.how = program, trunks, how
        self.writer = Writer(dict.fromkeys(_names(program, set(trunks)), 1))
        self.env: dict[Atom, Atom] = {value: value for value in program.inputs}
        self.kept: dict[Value, Kept] = {}
        self.used = {atom for eqn in program.equations for atom in eqn.inputs} | set(program.outputs)

    def program(self) -> Program:
        """The new program."""
        for eqn in self.old.equations:
            if eqn in self.trunks:
                self._pipeline(self.trunks[eqn])
                continue
            self.writer.equations.append(replace(eqn, inputs=tuple(map(self.whole, eqn.inputs))))
            self.env.update(zip(eqn.outputs, eqn.outputs, strict=True))
        outputs = tuple(map(self.whole, self.old.outputs))
        return Program(self.old.inputs, outputs, tuple(self.writer.equations), self.old.constants)

    def whole(self, atom: Atom) -> Atom:
        """A value of the old program in the new one."""
        if isinstance(atom, Constant):
            return atom
        if atom not in self.env:
            kept = self.kept[atom]
            (self.env[atom],) = self.writer.write(whole_layers(kept), [kept.value], named(atom.name, atom.aval))
        return self.env[atom]

    def _pipeline(self, trunk: Trunk) -> None:
        eqn, how = trunk.equation, self.how
        order = Order(how.stages, how.microbatches, how.rounds, trunk.parts.length, eqn.params["reverse"])
        if order.layers % (how.stages * how.rounds):
            of = f"{how.stages} stages" + (f" in {how.rounds} rounds" if how.rounds > 1 else "")
            raise MicrobatchError(
                f"{of} do not divide the {order.layers} layers of {eqn.name}", fix="choose a divisor, or other layers"
            )
        operands = [self._operand(trunk, k, atom, order) for k, atom in enumerate(eqn.inputs)]
        used = [value in self.used for value in eqn.outputs]
        results = Ticks(trunk, order, operands, self.writer, used).write()
        for k, value in enumerate(eqn.outputs):
            found = results.get(k)
            if isinstance(found, Kept):
                self.kept[value] = found
            elif found is not None:
                self.env[value] = found

    def _operand(self, trunk: Trunk, k: int, atom: Atom, order: Order) -> Atom | Kept:
        """An operand of a trunk: as another pipeline kept it, if this one has its layers at the same ticks."""
        kept = self.kept.get(atom) if isinstance(atom, Value) else None
        if kept is not None and k in trunk.scanned and trunk.form(k) is not None:
            alike = replace(order, reverse=False) == replace(kept.order, reverse=False)
            if alike and kept.cut == _outer(trunk, k):
                return kept
        return self.whole(atom)


def _outer(trunk: Trunk, k: int) -> object:
    form = trunk.form(k)
    return replace(form, dim=form.dim + 1) if form is not None and not isinstance(form, str) else None


def _names(program: Program, gone: set[Equation]) -> list[str]:
    """Names in use outside of the scans that go."""
    found = [value.name for value in program.inputs]
    for eqn in program.equations:
        if eqn not in gone:
            found += [eqn.name, *(value.name for value in eqn.outputs)]
            for body in eqn.bodies:
                found += _names(body, set())
    return found
