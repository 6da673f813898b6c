"""The two tables of rules: primitive -> factors, and primitive -> local equation.

A primitive is one sharding rule. One whose parameters carry shapes or positions also has a local rule of a few
lines. Both are keyed by the primitive's name, so that a rule outlives the module that JAX keeps it in.

    @sharding_rule("transpose")
    def transpose(x, *, permutation, **_) -> ShardingRule: ...

    @local_rule("iota")
    def iota(shard, *, dtype, shape, dimension, **_): ...

A sharding rule gets the operands' avals (``.shape``, ``.dtype``) and the equation's parameters, and returns a
ShardingRule, or None where this particular equation cannot be split (it is then replicated). A local rule gets a
``Shard``, the local operands and the global parameters, and returns the list of local results.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from autopar.sharding.factors import ShardingRule
from autopar.sharding.moves import Step
from autopar.spec import Sizes

RuleFunction = Callable[..., ShardingRule | None]


class Shard(Protocol):
    """What a local rule may ask about the shard that this device computes."""

    rule: ShardingRule
    operand_shapes: tuple[tuple[int, ...], ...]
    """Local shapes of the operands."""
    result_shapes: tuple[tuple[int, ...], ...]
    """Local shapes of the results (before partial results are combined)."""

    def count(self, factor: str) -> int:
        """Into how many parts the strategy cuts ``factor`` (1: not split)."""
        ...

    def index(self, factor: str) -> Any:
        """Which part of ``factor`` this device computes: a traced int32 scalar, 0 where it is not split."""
        ...

    def axes(self, factor: str) -> tuple[str, ...]:
        """The mesh axes over which the parts of ``factor`` lie, major first; collectives may name them."""
        ...

    def offset(self, dim: int, result: int = 0) -> Any:
        """Where this device's block of dimension ``dim`` of a result starts in the global value (traced int32)."""
        ...

    def operand_offset(self, operand: int, dim: int) -> Any:
        """The same for dimension ``dim`` of an operand."""
        ...

    def positions(self, dim: int, result: int = 0) -> Any:
        """Where in the global value each element of dimension ``dim`` of a result stands (traced int32 vector)."""
        ...

    def locate(self, operand: int, dim: int, position: Any) -> Any:
        """Where position ``position`` of the global dimension ``dim`` of an operand stands in this device's block.

        Outside ``[0, local size)`` where another device has it.
        """
        ...


LocalFunction = Callable[..., Sequence[Any]]

SHARDING_RULES: dict[str, RuleFunction] = {}
LOCAL_RULES: dict[str, LocalFunction] = {}

CollectiveFunction = Callable[[Any, Any, Sizes], tuple[Step, ...]]
"""The collectives in the local rule of a primitive, of its first result's aval, strategy and mesh."""

COLLECTIVES: dict[str, CollectiveFunction] = {}


def sharding_rule(*primitives: str) -> Callable[[RuleFunction], RuleFunction]:
    """Declares the sharding rule of the named primitives."""

    def register(function: RuleFunction) -> RuleFunction:
        SHARDING_RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def local_rule(*primitives: str) -> Callable[[LocalFunction], LocalFunction]:
    """Declares the local equation of the named primitives; others bind themselves on the local operands."""

    def register(function: LocalFunction) -> LocalFunction:
        LOCAL_RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def collectives(*primitives: str) -> Callable[[CollectiveFunction], CollectiveFunction]:
    """Declares what the local rule of the named primitives sends; that of all others sends nothing."""

    def register(function: CollectiveFunction) -> CollectiveFunction:
        COLLECTIVES.update(dict.fromkeys(primitives, function))
        return function

    return register
