"""From an equation to its rule, once per distinct signature: a large step has many equations and few signatures."""

from collections.abc import Hashable
from typing import Any

from autopar.errors import RuleError
from autopar.ir.program import Constant, Equation
from autopar.sharding import rules as _families  # noqa: F401  fills the tables
from autopar.sharding.factors import ShardingRule, check_shapes
from autopar.sharding.registry import SHARDING_RULES


def signature(eqn: Equation) -> Hashable:
    """Equal for equations that any rule treats alike: primitive, parameters, operand shapes and dtypes."""
    avals = tuple((atom.aval.shape, str(atom.aval.dtype), isinstance(atom, Constant)) for atom in eqn.inputs)
    return eqn.primitive.name, tuple((key, _hashable(value)) for key, value in eqn.params.items()), avals


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def find_rule(eqn: Equation) -> ShardingRule | None:
    """The rule of an equation, checked against its shapes; None where it must be replicated.

    Raises:
        RuleError: the rule contradicts the equation's shapes (a defect of the rule).
    """
    function = SHARDING_RULES.get(eqn.primitive.name)
    if function is None or eqn.bodies:
        return None
    rule = function(*(atom.aval for atom in eqn.inputs), **eqn.params)
    if rule is None:
        return None
    try:
        check_shapes(rule, tuple(atom.aval.shape for atom in (*eqn.inputs, *eqn.outputs)))
    except RuleError as error:
        raise RuleError(error.what, where=f"primitive {eqn.primitive.name}, equation {eqn.name}") from error
    return rule


def replicated_rule(eqn: Equation) -> ShardingRule:
    """The rule of an equation that nothing may split: every operand gathered, run whole."""
    return ShardingRule(
        tuple(((),) * len(atom.aval.shape) for atom in eqn.inputs),
        tuple(((),) * len(value.shape) for value in eqn.outputs),
        {},
    )


def has_rule(eqn: Equation) -> bool:
    """Whether the primitive is in the table at all (an equation of it may still be unsplittable)."""
    return eqn.primitive.name in SHARDING_RULES


class RuleBook:
    """The rules of one program's equations, found once per signature."""

    def __init__(self) -> None:
        self._found: dict[Hashable, ShardingRule | None] = {}
        self._replicated: dict[Hashable, ShardingRule] = {}
        self._monoids: dict[object, str] = {}

    def find(self, eqn: Equation) -> ShardingRule | None:
        """The rule, or None where the equation must be replicated."""
        key = signature(eqn)
        if key not in self._found:
            self._found[key] = find_rule(eqn)
        return self._found[key]

    def rule(self, eqn: Equation) -> ShardingRule:
        """The rule, that of a replicated equation where there is none; equal signatures get the same object."""
        rule = self.find(eqn)
        if rule is None:
            rule = self._replicated.setdefault(signature(eqn), replicated_rule(eqn))
        if rule.monoid != "sum":
            self._monoids.update(dict.fromkeys(eqn.outputs, rule.monoid))
        return rule

    def monoid(self, value: object) -> str:
        """How the terms of a value combine, once the rule of the equation that makes it was asked for."""
        return self._monoids.get(value, "sum")
