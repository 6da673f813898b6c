"""Factors: the named indices of an equation, and the rule that lays its operands and results out over them.

``m k, k n -> m n`` with ``k`` reduced is a matrix product. A dimension is an ordered product of factors, major
first: ``(a b) -> a b`` is a reshape. A rule is written for one equation without any mesh; strategies, specs and
the local program all follow from it (DESIGN.md 1.2; the notation is einops').
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.errors import RuleError

Dim = tuple[str, ...]
"""One dimension as an ordered product of factors; empty for a dimension that is never split."""

Layout = tuple[Dim, ...]
"""One value: a Dim for each dimension."""

MONOIDS = ("sum", "max", "min", "and", "or")


@dataclass(frozen=True)
class ShardingRule:
    """How one equation may be split.

    Attributes:
        operands: a layout for each operand; a size-1 or unsplittable dimension is ``()``.
        results: a layout for each result.
        sizes: elements along each factor.
        reduce: factors that the equation reduces, with the monoid that combines the parts. Where a mesh axis
            splits such a factor, every result is partial over that axis.
        linear: groups of operands through which a partial sum may pass: if exactly the operands of one
            group are partial over an axis (the others replicated over it), every result is partial over it.
            ``add`` has one group (0, 1), ``mul`` two: (0,) and (1,).
        accumulators: operands that are added into a reduction (the target of a scatter-add): where an axis splits
            a reduced factor, they enter as partial over that axis.
    """

    operands: tuple[Layout, ...]
    results: tuple[Layout, ...]
    sizes: Mapping[str, int]
    reduce: Mapping[str, str] = field(default_factory=dict)
    linear: tuple[tuple[int, ...], ...] = ()
    accumulators: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for layout in (*self.operands, *self.results):
            names = [name for dim in layout for name in dim]
            if len(names) != len(set(names)):
                raise RuleError(f"a factor stands twice in one value of rule {self}")
            for name in names:
                if name not in self.sizes:
                    raise RuleError(f"factor {name} of rule {self} has no size")
        for name, monoid in self.reduce.items():
            if monoid not in MONOIDS:
                raise RuleError(f"factor {name} reduces with '{monoid}', not one of {', '.join(MONOIDS)}")
            if any(name in dim for layout in self.results for dim in layout):
                raise RuleError(f"factor {name} is reduced and stands in a result of rule {self}")

    @property
    def monoid(self) -> str:
        """The monoid of this equation's partial results (one equation never mixes two)."""
        return next(iter(self.reduce.values()), "sum")

    def __str__(self) -> str:
        def dim(names: Dim) -> str:
            return names[0] if len(names) == 1 else f"({' '.join(names)})" if names else "1"

        def side(layouts: tuple[Layout, ...]) -> str:
            return ", ".join(" ".join(map(dim, layout)) for layout in layouts)

        reduced = "".join(f"; {name}: {monoid}" for name, monoid in self.reduce.items())
        return f"{side(self.operands)} -> {side(self.results)}{reduced}"


def parse(text: str, *, reduce: Mapping[str, str] | None = None, **sizes: int) -> ShardingRule:
    """Reads a rule in einops notation; ``1`` is a dimension that is never split.

    >>> str(parse("m k, k n -> m n", reduce={"k": "sum"}, m=4, k=8, n=2))
    'm k, k n -> m n; k: sum'
    >>> parse("(a b) 1 -> a b", a=2, b=3).operands
    ((('a', 'b'), ()),)
    """
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(f"rule '{text}' has no '->'")

    def layout(part: str) -> Layout:
        tokens = re.findall(r"\([^)]*\)|\S+", part)
        return tuple(() if token == "1" else tuple(token.strip("()").split()) for token in tokens)

    def side(part: str) -> tuple[Layout, ...]:
        return tuple(layout(value) for value in part.split(",")) if part.strip() else ()

    return ShardingRule(side(left), side(right), sizes, dict(reduce or {}))


def letters(shape: tuple[int, ...], prefix: str = "d") -> Layout:
    """A layout with one factor per dimension, named ``d0``, ``d1``, ...; size-1 dimensions have none.

    >>> letters((4, 1, 8))
    (('d0',), (), ('d2',))
    """
    return tuple((f"{prefix}{i}",) if size > 1 else () for i, size in enumerate(shape))


def sizes_of(layout: Layout, shape: tuple[int, ...]) -> dict[str, int]:
    """Sizes of the factors of a layout that has at most one factor per dimension."""
    return {dim[0]: size for dim, size in zip(layout, shape, strict=True) if dim}


def check_shapes(rule: ShardingRule, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Raises RuleError unless the factors of every splittable dimension multiply to its size.

    Args:
        rule: the rule of one equation.
        shapes: global shapes of its operands, then of its results.
    """
    layouts = (*rule.operands, *rule.results)
    if len(layouts) != len(shapes):
        raise RuleError(f"rule {rule} has {len(layouts)} values, the equation {len(shapes)}")
    for layout, shape in zip(layouts, shapes, strict=True):
        if len(layout) != len(shape):
            raise RuleError(f"rule {rule} gives {len(layout)} dimensions to a value of shape {shape}")
        for dim, size in zip(layout, shape, strict=True):
            if dim and math.prod(rule.sizes[name] for name in dim) != size:
                raise RuleError(f"rule {rule}: factors {dim} do not multiply to {size} in shape {shape}")
