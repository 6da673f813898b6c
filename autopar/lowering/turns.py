"""The order that the TPU compiler must be told so that it needs no more memory than the plan says.

Its scheduler works backwards from the end of the step. What nobody waits for before the end, it puts off, and keeps
whatever that reads.
"""

from dataclasses import replace

from autopar.lowering.instructions import Branch, Instruction, LocalProgram, Loop, Move, Run, Slot, reads

PRODUCTS = ("dot_general", "conv_general_dilated")
_LARGE = (*PRODUCTS, "scatter-add")
"""What makes the gradients of matrices and tables; those of vectors are small, and the compiler combines them."""


def in_turn(local: LocalProgram) -> LocalProgram:
    """The program in which some equations wait, at no cost, for results that would else be put off.

    The equation that makes a whole gradient waits until the one before is scattered, which overlaps with what lies in
    between: no more than one waits to be scattered. And the next product waits for what the loss alone picks from its
    logits, so that they are not kept for it.
    """
    scatters = _scatters(local)
    makers, picks = set(scatters.values()), _picks(local)
    ordered: list[Instruction] = []
    scattered: Slot | None = None
    picked: Slot | None = None
    for instruction in local.instructions:
        if isinstance(instruction, Run):
            if picked is not None and instruction.equation.primitive.name in PRODUCTS:
                instruction, picked = replace(instruction, after=picked), None
            elif instruction in makers:
                instruction = replace(instruction, after=scattered)
            elif instruction in picks:
                picked = instruction.outputs[0]
        elif isinstance(instruction, Move) and instruction in scatters:
            scattered = instruction.target
        ordered.append(instruction)
    return replace(local, instructions=tuple(ordered))


def _scatters(local: LocalProgram) -> dict[Move, Run]:
    """The moves that scatter a large gradient, with what makes it."""
    makers = {slot: i for i in local.instructions if isinstance(i, Run) for slot in i.outputs}
    return {
        move: makers[move.source]
        for move in local.instructions
        if isinstance(move, Move)
        and move.source in makers
        and makers[move.source].equation.primitive.name in _LARGE
        and any(step.kind == "reduce_scatter" for step in move.resharding.steps)
    }


def _picks(local: LocalProgram) -> set[Run]:
    """The gathers that no product needs."""
    return {i for i in at_leisure(local) if isinstance(i, Run) and i.equation.primitive.name == "gather"}


def at_leisure(local: LocalProgram) -> set[Instruction]:
    """The instructions whose results no product needs, not even by way of others: they may run at any time."""
    needed: set[Slot] = set()
    found: set[Instruction] = set()
    for instruction in reversed(local.instructions):
        name = instruction.equation.primitive.name if isinstance(instruction, Run) else ""
        if name in PRODUCTS or isinstance(instruction, Loop | Branch) or not needed.isdisjoint(instruction.outputs):
            needed.update(reads(instruction))
        else:
            found.add(instruction)
    return found
