"""Rules of what carries values in and out of loops and branches (``autopar.ir.regions``): the layout stays as it is."""

from typing import Any

from autopar.sharding.factors import Layout, ShardingRule, letters, sizes_of
from autopar.sharding.registry import sharding_rule
from autopar.sharding.rules.elementwise import summable


@sharding_rule("loop_carry", "loop_repeat", "loop_exit")
def carry(x: Any) -> ShardingRule:
    """A carry keeps its layout; terms of a sum stay terms from one iteration to the next."""
    layout = letters(x.shape)
    return ShardingRule((layout,), (layout,), sizes_of(layout, x.shape), linear=((0,),) if summable(x.dtype) else ())


@sharding_rule("loop_const", "branch_in", "branch_out")
def same(*operands: Any) -> ShardingRule:
    """Every operand and the result alike."""
    layout = letters(operands[0].shape)
    return ShardingRule((layout,) * len(operands), (layout,), sizes_of(layout, operands[0].shape))


@sharding_rule("loop_slice")
def loop_slice(xs: Any) -> ShardingRule:
    """One iteration's slice; the scanned dimension is whole."""
    inside = letters(xs.shape[1:])
    return ShardingRule((_stacked(inside),), (inside,), sizes_of(inside, xs.shape[1:]))


@sharding_rule("loop_stack")
def loop_stack(y: Any) -> ShardingRule:
    """The slices of all iterations, stacked along a whole first dimension; terms of sums may be, too."""
    inside = letters(y.shape)
    linear = ((0,),) if summable(y.dtype) else ()
    return ShardingRule((inside,), (_stacked(inside),), sizes_of(inside, y.shape), linear=linear)


def _stacked(layout: Layout) -> Layout:
    return ((), *layout)
