"""The instructions of a local program: what one device does, with the layouts that it reads and makes."""

from dataclasses import dataclass

from autopar.cluster import Mesh
from autopar.ir.program import Constant, Equation, Value
from autopar.sharding.factors import ShardingRule
from autopar.sharding.reshard import NOTHING, Resharding
from autopar.sharding.strategies import Strategy
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
        repeat: how often the same move was made before.
    """

    source: Slot
    target: Slot
    resharding: Resharding
    after: Slot | None = None
    repeat: int = 0

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """What it reads, as every instruction has it."""
        return (self.source,)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """What it makes, as every instruction has it."""
        return (self.target,)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Moves of one collective each, of the same kind over the same axes, that are sent as one."""

    moves: tuple[Move, ...]

    @property
    def inputs(self) -> tuple[Slot, ...]:
        """What it reads, as every instruction has it."""
        return tuple(move.source for move in self.moves)

    @property
    def outputs(self) -> tuple[Slot, ...]:
        """What it makes, as every instruction has it."""
        return tuple(move.target for move in self.moves)


@dataclass(frozen=True, eq=False)
class Run:
    """Runs one equation on local operands, once the slot ``after`` is there where it is set; ``sent``: inside it."""

    equation: Equation
    rule: ShardingRule
    strategy: Strategy
    inputs: tuple[Operand, ...]
    outputs: tuple[Slot, ...]
    after: Slot | None = None
    sent: Resharding = NOTHING


@dataclass(frozen=True, eq=False)
class Barrier:
    """Keeps the compiler from merging what follows with what came before (a rematerialised block starts here)."""

    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]


@dataclass(frozen=True, eq=False)
class Loop:
    """A scan whose body is a local program; the layouts of its inputs and outputs are those of the body.

    Attributes:
        equation: the scan.
        body: the local program of one iteration.
        inputs: constants, carries, scanned values.
        outputs: carries, stacked results.
        length: iterations.
    """

    equation: Equation
    body: "LocalProgram"
    inputs: tuple[Operand, ...]
    outputs: tuple[Slot, ...]
    length: int


@dataclass(frozen=True, eq=False)
class Branch:
    """A cond whose branches are local programs that take and return the same layouts."""

    equation: Equation
    bodies: "tuple[LocalProgram, ...]"
    inputs: tuple[Operand, ...]
    outputs: tuple[Slot, ...]


Instruction = Move | Bundle | Run | Barrier | Loop | Branch


def reads(instruction: Instruction) -> tuple[Slot, ...]:
    """The slots that an instruction reads, one for each operand that is no constant."""
    return tuple([operand for operand in instruction.inputs if isinstance(operand, Slot)])


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
