"""Through which equations of a program partial sums may travel: those that one can reach."""

from autopar.ir.program import Program, Value
from autopar.ir.regions import LOOP_CARRY, LOOP_REPEAT
from autopar.sharding.factors import ShardingRule
from autopar.sharding.lookup import RuleBook


def useful_linear_groups(
    program: Program, rules: tuple[ShardingRule, ...], totals: dict[Value, Value], book: RuleBook
) -> tuple[ShardingRule, ...]:
    """Empties the linear groups that no partial sum reaches: reductions make one, linear equations pass it on.

    The carry of a loop is one if what is added to it is: that is known after a first pass over the body.
    """
    reached, _ = _linear_groups(program, rules, frozenset(), book)
    carried = frozenset(before for before, after in totals.items() if after in reached)
    return _linear_groups(program, rules, carried | {totals[before] for before in carried}, book)[1]


def _linear_groups(
    program: Program, rules: tuple[ShardingRule, ...], carried: frozenset[Value], book: RuleBook
) -> tuple[set[Value], tuple[ShardingRule, ...]]:
    capable: set[Value] = set()
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
        found.append(book.narrowed(rule, useful))
    return capable, tuple(found)
