"""Dimensions that a step has under names of the field: the vocabulary, the sequence."""

from collections.abc import Callable, Collection, Mapping

from autopar.errors import MicrobatchError
from autopar.ir.program import Program, Value

Role = Callable[[Program, Collection[Value]], int]
"""The size of a dimension, read off a whole step and its batch; 0 where there is no such dimension."""


def vocabulary(program: Program, batch: Collection[Value]) -> int:
    """The longest dimension along which integers of the batch look something up: an embedding, a label's logit."""
    indices, longest = {value for value in batch if _is_integer(value)}, 0
    for eqn in program.equations:
        if indices.isdisjoint(eqn.operands):
            continue
        if eqn.primitive.name == "gather" and eqn.inputs[1] in indices:
            along = eqn.params["dimension_numbers"].start_index_map
            longest = max(longest, *(eqn.inputs[0].aval.shape[dim] for dim in along))
        indices.update(filter(_is_integer, eqn.outputs))
    return longest


def sequence(program: Program, batch: Collection[Value]) -> int:
    """The second dimension of the longest argument that has the batch as its first."""
    return max((value.shape[1] for value in batch if len(value.shape) > 1), default=0)


ROLES: Mapping[str, Role] = {"vocab": vocabulary, "seq": sequence}


def role_size(name: str, program: Program, batch: Collection[Value]) -> int:
    """The size of the dimension that a name stands for.

    Raises:
        MicrobatchError: an unknown name, or the step has no such dimension.
    """
    if name not in ROLES:
        raise MicrobatchError(
            f"chunk '{name}' says no dimension",
            fix=f"write {', '.join(ROLES)}, or a value's name and dimension, as chunk={{'.*head/dot_general[2]': 8}}",
        )
    size = ROLES[name](program, batch)
    if not size:
        raise MicrobatchError(
            f"the step has no dimension '{name}'",
            where="chunk",
            fix="name a value and its dimension, as chunk={'.*head/dot_general[2]': 8}",
        )
    return size


def _is_integer(value: Value) -> bool:
    return value.dtype.kind in "iu"
