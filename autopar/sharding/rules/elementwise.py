"""Elementwise primitives: one factor per dimension; scalars and size-1 dimensions broadcast.

A partial sum passes through what is linear in it: ``f(a + b) = f(a) + f(b)`` up to rounding. Groups of
operands that do so together are listed by name below. Two exceptions depend on the dtype. Integer division
truncates. A conversion is linear only to a dtype that holds every value of the old one: rounding each term to
a narrower one before they are added would lose the precision that the program asked for.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from autopar.sharding.factors import Layout, ShardingRule, letters, sizes_of
from autopar.sharding.registry import local_rule, sharding_rule

Shape = tuple[int, ...]
Groups = tuple[tuple[int, ...], ...]

NONLINEAR = """
    abs acos acosh and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz cos cosh
    digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac integer_pow
    is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min ne nextafter not one_minus_square or
    polygamma population_count pow reduce_precision regularized_incomplete_beta rem round rsqrt shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square tan tanh threefry2x32 xor zeta
""".split()  # noqa: SIM905 (a list literal takes a page)

LINEAR: dict[str, Groups] = {
    "add": ((0, 1),),
    "add_any": ((0, 1),),
    "complex": ((0, 1),),
    "conj": ((0,),),
    "copy": ((0,),),
    "device_put": ((0,),),
    "imag": ((0,),),
    "mul": ((0,), (1,)),
    "name": ((0,),),
    "neg": ((0,),),
    "real": ((0,),),
    "stop_gradient": ((0,),),
    "sub": ((0, 1),),
}


def broadcast_shape(shapes: tuple[Shape, ...]) -> Shape:
    """The shape of an elementwise result: scalars and size-1 dimensions stretch, trailing dimensions align.

    >>> broadcast_shape(((4, 1), (4, 8), ()))
    (4, 8)
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((n for n in dims if n != 1), 1) for dims in zip(*padded, strict=True))


def summable(dtype: Any) -> bool:
    """Whether a value of this dtype can be held as terms of a sum (not booleans, nor random keys)."""
    return jnp.issubdtype(dtype, jnp.number)


def elementwise_rule(avals: tuple[Any, ...], groups: Groups = (), n_results: int = 1) -> ShardingRule:
    """The rule of an equation that computes each element of its results from that element of each operand."""
    shape = broadcast_shape(tuple(aval.shape for aval in avals))
    result = letters(shape)

    def layout(operand: Shape) -> Layout:
        aligned = zip(operand, result[len(shape) - len(operand) :], strict=True)
        return tuple(factor if size > 1 else () for size, factor in aligned)

    linear = tuple(group for group in groups if all(summable(avals[i].dtype) for i in group))
    operands = tuple(layout(tuple(aval.shape)) for aval in avals)
    return ShardingRule(operands, (result,) * n_results, sizes_of(result, shape), linear=linear)


def _table_rule(groups: Groups, n_results: int = 1) -> Callable[..., ShardingRule]:
    return lambda *avals, **_: elementwise_rule(avals, groups, n_results)


for _name in NONLINEAR:
    sharding_rule(_name)(_table_rule((), n_results=2 if _name == "threefry2x32" else 1))
for _name, _groups in LINEAR.items():
    sharding_rule(_name)(_table_rule(_groups))


@sharding_rule("div")
def div(x: Any, y: Any, **_: Any) -> ShardingRule:
    """A quotient is linear in its numerator, unless it truncates."""
    return elementwise_rule((x, y), ((0,),) if jnp.issubdtype(x.dtype, jnp.inexact) else ())


@sharding_rule("convert_element_type")
def convert_element_type(x: Any, *, new_dtype: Any, **_: Any) -> ShardingRule:
    """A conversion is linear towards a dtype that holds every value of the old one."""
    inexact = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.issubdtype(new_dtype, jnp.inexact)
    exact = inexact and jnp.promote_types(x.dtype, new_dtype) == new_dtype
    return elementwise_rule((x,), ((0,),) if exact else ())


@sharding_rule("bitcast_convert_type")
def bitcast_convert_type(x: Any, *, new_dtype: Any, **_: Any) -> ShardingRule:
    """Between widths, a trailing dimension appears or goes; it is whole."""
    old, new = jnp.dtype(x.dtype).itemsize, jnp.dtype(new_dtype).itemsize
    if old == new:
        return elementwise_rule((x,))
    kept = x.shape if old > new else x.shape[:-1]
    layout, whole = letters(kept), (*letters(kept), ())
    operand, result = (layout, whole) if old > new else (whole, layout)
    return ShardingRule((operand,), (result,), sizes_of(layout, kept))


@sharding_rule("select_n")
def select_n(which: Any, *cases: Any) -> ShardingRule:
    """A choice is linear in all its cases together."""
    return elementwise_rule((which, *cases), (tuple(range(1, 1 + len(cases))),))


@sharding_rule("optimization_barrier")
def optimization_barrier(*avals: Any, **_: Any) -> ShardingRule:
    """Operands pass through unchanged; dimensions at one position and of one size share a factor."""
    layouts = tuple(
        tuple((f"d{i}of{size}",) if size > 1 else () for i, size in enumerate(aval.shape)) for aval in avals
    )
    sizes = {
        dim[0]: size
        for aval, layout in zip(avals, layouts, strict=True)
        for dim, size in zip(layout, aval.shape, strict=True)
        if dim
    }
    together = all(summable(aval.dtype) for aval in avals)
    return ShardingRule(layouts, layouts, sizes, linear=(tuple(range(len(avals))),) if together else ())


@local_rule("device_put")
def local_device_put(_shard: Any, *operands: Any, **_: Any) -> list[Any]:
    """A local program stays where it is."""
    return list(operands)
