"""Through which equations of a program partial sums may travel: those that one can reach."""

from dataclasses import replace

from autopar.ir.program import Program, Value
from autopar.ir.regions import LOOP_CARRY, LOOP_REPEAT
from autopar.sharding.factors import ShardingRule


def useful_linear_groups(
    program: Program, rules: tuple[ShardingRule, ...], totals: dict[Value, Value]
) -> tuple[ShardingRule, ...]:
    """Empties the linear groups that no partial sum reaches: reductions make one, linear equations pass it on.

    The carry of a loop is one if what is added to it is: that is known after a first pass over the body.
    """
    reached, _ = _linear_groups(program, rules, frozenset())
    carried = frozenset(before for before, after in totals.items() if after in reached)
    return _linear_groups(program, rules, carried | {totals[before] for before in carried})[1]


def _linear_groups(
    program: Program, rules: tuple[ShardingRule, ...], carried: frozenset[Value]
) -> tuple[set[Value], tuple[ShardingRule, ...]]:
    capable: set[Value] = set()
    memo: dict[tuple[int, tuple[bool, ...]], ShardingRule] = {}
    found = []
    for eqn, rule in zip(program.equations, rules, strict=True):
        if eqn.primitive is LOOP_CARRY:
            useful = tuple(eqn.outputs[0] in carried for _ in rule.linear)
        elif eqn.primitive is LOOP_REPEAT:
            useful = tuple(eqn.inputs[0] in carried for _ in rule.linear)
        else:
            useful = tuple(any(eqn.inputs[k] in capable for k in group) for group in rule.linear)
        if any(useful) or (rule.reduce and rule.monoid == "sum"):
            capable.update(eqn.outputs)
        key = (id(rule), useful)
        if key not in memo:
            linear = tuple(g if u else () for g, u in zip(rule.linear, useful, strict=True))
            memo[key] = replace(rule, linear=linear)
        found.append(memo[key])
    return capable, tuple(found)
