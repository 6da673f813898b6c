"""Regions laid flat for planning: a scan's body appears once, between equations that carry values in and out.

The planner then sees one program: a body's equations are priced as often as they run, a loop constant is moved once
before the loop, and a carry has one layout at both ends of the body. The lowering keeps the regions as they were.

    loop_const  x      -> x inside          moved once, before the loop
    loop_carry  init   -> carry inside      the layout in which the loop carries it
    loop_slice  xs     -> one slice inside  the scanned dimension is never split
    loop_repeat carry' -> ()                tied to the layout of its loop_carry, paid every iteration
    loop_stack  y      -> ys outside        likewise
    loop_exit   carry  -> result outside
    branch_in   x      -> x inside a branch of a cond
    branch_out  y0, y1 -> result of the cond
"""

from dataclasses import dataclass, field

from jax.extend.core import Primitive

from autopar.ir.program import Atom, Equation, Program, Value

LOOP_CONST, LOOP_CARRY, LOOP_SLICE = Primitive("loop_const"), Primitive("loop_carry"), Primitive("loop_slice")
LOOP_REPEAT, LOOP_STACK, LOOP_EXIT = Primitive("loop_repeat"), Primitive("loop_stack"), Primitive("loop_exit")
BRANCH_IN, BRANCH_OUT = Primitive("branch_in"), Primitive("branch_out")
AS_MADE = frozenset({LOOP_REPEAT, LOOP_STACK, LOOP_EXIT, BRANCH_IN, BRANCH_OUT})
"""What reads a value as it was made, never a view of it: at these edges the lowering moves it itself."""
IN_PLACE = frozenset({LOOP_CONST, LOOP_CARRY, LOOP_SLICE, LOOP_REPEAT, LOOP_EXIT})
"""What moves nothing: buffers of a loop that stay where they are, slices that whoever reads them takes."""


@dataclass(frozen=True, eq=False)
class FlatProgram:
    """A program without regions.

    Attributes:
        program: the equations, those of scan and cond bodies among them.
        times: how often each equation runs in a step.
        ties: pairs (position of a loop_repeat, position of its loop_carry) that share a layout.
    """

    program: Program
    times: tuple[int, ...]
    ties: tuple[tuple[int, int], ...]


@dataclass
class _Flat:
    equations: list[Equation] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    ties: list[tuple[int, int]] = field(default_factory=list)

    def add(self, primitive: Primitive, inputs: tuple[Atom, ...], output: Value, owner: Equation, times: int) -> int:
        eqn = Equation(
            primitive, inputs, (output,), {}, f"{output.name}@{primitive.name}", owner.source, owner.backward
        )
        self.equations.append(eqn)
        self.times.append(times)
        return len(self.equations) - 1

    def body(self, program: Program, times: int) -> None:
        for eqn in program.equations:
            name = eqn.primitive.name
            if name == "scan" and eqn.bodies:
                self.scan(eqn, times)
            elif name == "cond" and eqn.bodies:
                self.cond(eqn, times)
            else:
                self.equations.append(eqn)
                self.times.append(times)

    def scan(self, eqn: Equation, times: int) -> None:
        (body,) = eqn.bodies
        parts = ScanParts.of(eqn)
        carries = []
        for i, (atom, inside) in enumerate(zip(eqn.inputs, body.inputs, strict=True)):
            kind = LOOP_CONST if i < parts.n_consts else LOOP_CARRY if i < parts.first_x else LOOP_SLICE
            position = self.add(kind, (atom,), inside, eqn, times)
            if kind is LOOP_CARRY:
                carries.append(position)
        inner = times * parts.length
        self.body(body, inner)
        for i, atom in enumerate(body.outputs):
            if i < parts.n_carry:
                repeated = Value(f"{eqn.name}/repeat_{i}", atom.aval)
                self.ties.append((self.add(LOOP_REPEAT, (atom,), repeated, eqn, inner), carries[i]))
                carry = body.inputs[parts.n_consts + i]
                self.add(LOOP_EXIT, (carry,), eqn.outputs[i], eqn, times)
            else:
                self.add(LOOP_STACK, (atom,), eqn.outputs[i], eqn, inner)

    def cond(self, eqn: Equation, times: int) -> None:
        for body in eqn.bodies:
            for atom, inside in zip(eqn.inputs[1:], body.inputs, strict=True):
                self.add(BRANCH_IN, (atom,), inside, eqn, times)
            self.body(body, times)
        for i, output in enumerate(eqn.outputs):
            self.add(BRANCH_OUT, tuple(body.outputs[i] for body in eqn.bodies), output, eqn, times)


@dataclass(frozen=True)
class ScanParts:
    """How the operands and results of a scan divide: constants, carries, scanned."""

    n_consts: int
    n_carry: int
    length: int

    @staticmethod
    def of(eqn: Equation) -> "ScanParts":
        """Reads the parameters of a scan equation."""
        params = eqn.params
        return ScanParts(params["num_consts"], params["num_carry"], params["length"])

    @property
    def first_x(self) -> int:
        """The first scanned operand."""
        return self.n_consts + self.n_carry


def flatten_regions(program: Program) -> FlatProgram:
    """The program with the bodies of its scans and conds laid flat."""
    flat = _Flat()
    flat.body(program, 1)
    laid = Program(program.inputs, program.outputs, tuple(flat.equations), program.constants)
    return FlatProgram(laid, tuple(flat.times), tuple(flat.ties))
