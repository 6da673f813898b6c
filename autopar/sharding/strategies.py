"""Every way to run one equation on a mesh: each axis splits at most one factor, or carries a partial sum."""

import itertools
from dataclasses import dataclass

from autopar.sharding.factors import Layout, ShardingRule
from autopar.spec import Sizes, Spec

Split = str | int | None
"""What one axis does: split the named factor, pass a partial sum through linear group ``int``, or nothing."""


@dataclass(frozen=True)
class Strategy:
    """One way to run an equation.

    Attributes:
        splits: what each mesh axis does, in mesh order, as (axis, split).
        inputs: the spec that each operand must have.
        outputs: the spec that each result then has.
    """

    splits: tuple[tuple[str, Split], ...]
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]

    def axes_of(self, factor: str) -> tuple[str, ...]:
        """The axes that split ``factor``, major first."""
        return tuple(axis for axis, split in self.splits if split == factor)

    def __str__(self) -> str:
        parts = [f"{axis}:{split}" for axis, split in self.splits if split is not None]
        return " ".join(parts) or "replicated"


def _spec(layout: Layout, axes: dict[Split, tuple[str, ...]], partial: set[str]) -> Spec:
    dims = tuple([tuple([axis for factor in dim for axis in axes.get(factor, ())]) for dim in layout])
    return Spec(dims, frozenset(partial))


def _contiguous(layout: Layout, parts: dict[str, int], rule: ShardingRule) -> bool:
    """A minor factor of a dimension can only be split where every major one is split to the end."""
    for dim in layout:
        whole_before = True
        for factor in dim:
            if parts.get(factor, 1) > 1 and not whole_before:
                return False
            whole_before = whole_before and parts.get(factor, 1) == rule.sizes[factor]
    return True


def make_strategy(rule: ShardingRule, splits: dict[str, Split]) -> Strategy:
    """The specs that follow from what each axis (in mesh order) does."""
    reduced = {axis for axis, split in splits.items() if split in rule.reduce}
    carried = {axis: split for axis, split in splits.items() if isinstance(split, int)}
    axes: dict[Split, tuple[str, ...]] = {}
    for axis, split in splits.items():
        axes[split] = (*axes.get(split, ()), axis)
    inputs = []
    for position, layout in enumerate(rule.operands):
        partial = {axis for axis, group in carried.items() if position in rule.linear[group]}
        partial |= reduced if position in rule.accumulators else set()
        inputs.append(_spec(layout, axes, partial))
    outputs = tuple(_spec(layout, axes, reduced | set(carried)) for layout in rule.results)
    return Strategy(tuple(splits.items()), tuple(inputs), outputs)


def strategies(rule: ShardingRule, sizes: Sizes) -> tuple[Strategy, ...]:
    """All strategies of an equation on a mesh, the replicated one first.

    Args:
        rule: the equation's factors.
        sizes: devices per mesh axis, in mesh order. Axes of size 1 do nothing.

    >>> from autopar.sharding.factors import parse
    >>> rule = parse("m k, k n -> m n", reduce={"k": "sum"}, m=8, k=8, n=3)
    >>> [str(s) for s in strategies(rule, {"x": 2})]
    ['replicated', 'x:m', 'x:k']
    """
    factors = [name for name, size in rule.sizes.items() if size > 1]
    carrying = [group for group, operands in enumerate(rule.linear) if operands]
    options: list[list[Split]] = []
    for size in sizes.values():
        fitting = [name for name in factors if rule.sizes[name] % size == 0]
        options.append([None] if size == 1 else [None, *fitting, *carrying])
    found = []
    for choice in itertools.product(*options):
        splits: dict[str, Split] = dict(zip(sizes, choice, strict=True))
        parts: dict[str, int] = {}
        for axis, split in splits.items():
            if isinstance(split, str):
                parts[split] = parts.get(split, 1) * sizes[axis]
        divisible = all(rule.sizes[name] % count == 0 for name, count in parts.items())
        if divisible and all(_contiguous(v, parts, rule) for v in (*rule.operands, *rule.results)):
            found.append(make_strategy(rule, splits))
    return tuple(found)
