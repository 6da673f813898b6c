"""From an equation to its rule, once per distinct signature: a large step has many equations and few signatures."""

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

from autopar.errors import RuleError
from autopar.ir.program import Constant, Equation
from autopar.sharding import rules as _families  # noqa: F401  fills the tables
from autopar.sharding.factors import ShardingRule, check_shapes
from autopar.sharding.registry import SHARDING_RULES
from autopar.sharding.strategies import Split, Strategy, make_strategy, strategies
from autopar.spec import Sizes


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
    """The rules of equations and what follows from them, found once per signature; programs that are alike share it."""

    def __init__(self) -> None:
        self._found: dict[Hashable, ShardingRule | None] = {}
        self._replicated: dict[Hashable, ShardingRule] = {}
        self._of: dict[Equation, ShardingRule | None] = {}
        self._rules: dict[Equation, ShardingRule] = {}
        self._narrowed: dict[tuple[int, tuple[bool, ...]], ShardingRule] = {}
        self._monoids: dict[object, str] = {}
        self._made: dict[tuple[int, tuple[tuple[str, Split], ...]], Strategy] = {}
        self._all: dict[tuple[int, tuple[tuple[str, int], ...]], tuple[Strategy, ...]] = {}

    def find(self, eqn: Equation) -> ShardingRule | None:
        """The rule, or None where the equation must be replicated."""
        if eqn not in self._of:
            key = signature(eqn)
            if key not in self._found:
                self._found[key] = find_rule(eqn)
            self._of[eqn] = self._found[key]
        return self._of[eqn]

    def rule(self, eqn: Equation) -> ShardingRule:
        """The rule, that of a replicated equation where there is none; equal signatures get the same object."""
        if eqn in self._rules:
            return self._rules[eqn]
        rule = self.find(eqn)
        if rule is None:
            rule = self._replicated.setdefault(signature(eqn), replicated_rule(eqn))
        if rule.monoid != "sum":
            self._monoids.update(dict.fromkeys(eqn.outputs, rule.monoid))
        self._rules[eqn] = rule
        return rule

    def narrowed(self, rule: ShardingRule, useful: tuple[bool, ...]) -> ShardingRule:
        """One of these rules with only the useful ones of its linear groups; equal ones are the same object."""
        key = (id(rule), useful)
        if key not in self._narrowed:
            linear = tuple(group if kept else () for group, kept in zip(rule.linear, useful, strict=True))
            self._narrowed[key] = replace(rule, linear=linear)
        return self._narrowed[key]

    def strategy(self, eqn: Equation, splits: Mapping[str, Split]) -> Strategy:
        """The strategy of an equation in which each axis does what ``splits`` says, in mesh order."""
        rule = self.rule(eqn)
        key = (id(rule), tuple(splits.items()))
        if key not in self._made:
            self._made[key] = make_strategy(rule, dict(splits))
        return self._made[key]

    def strategies(self, rule: ShardingRule, sizes: Sizes) -> tuple[Strategy, ...]:
        """Every strategy of one of these rules on a mesh, the replicated one first."""
        key = (id(rule), tuple(sizes.items()))
        if key not in self._all:
            self._all[key] = strategies(rule, sizes)
        return self._all[key]

    def monoid(self, value: object) -> str:
        """How the terms of a value combine, once the rule of the equation that makes it was asked for."""
        return self._monoids.get(value, "sum")
