"""Factorizations, triangular solves, Fourier transforms: batch dimensions pass through, the matrix is whole.

A row of ``MATRIX_RANKS`` says how many trailing dimensions of each operand and result belong to one matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from autopar.sharding.factors import Layout, ShardingRule, letters, sizes_of
from autopar.sharding.registry import sharding_rule

Ranks = tuple[tuple[int, ...], tuple[int, ...]]
"""Trailing whole dimensions of the operands, and of the results."""

MATRIX_RANKS: dict[str, Ranks | Callable[[dict[str, Any]], Ranks]] = {
    "cholesky": ((2,), (2,)),
    "lu": ((2,), (2, 1, 1)),
    "lu_pivots_to_permutation": ((1,), (1,)),
    "qr": lambda p: ((2,), (2, 2, 1) if p["pivoting"] else (2, 2)),
    "householder_product": ((2, 1), (2,)),
    "eigh": ((2,), (2, 1)),
    "eig": lambda p: (
        (2,),
        (1,) + (2,) * (p["compute_left_eigenvectors"] + p["compute_right_eigenvectors"]),
    ),
    "svd": lambda p: ((2,), (1, 2, 2) if p["compute_uv"] else (1,)),
    "schur": lambda p: ((2,), (2, 2) if p["compute_schur_vectors"] else (2,)),
    "hessenberg": ((2,), (2, 1)),
    "tridiagonal": ((2,), (2, 1, 1, 1)),
}


def _batched(operands: tuple[Any, ...], ranks: Ranks) -> ShardingRule:
    """One factor per batch dimension, which all operands share; every other dimension is whole."""
    first = operands[0].shape
    batch = letters(first[: len(first) - ranks[0][0]])
    layouts = [tuple((*batch, *((),) * rank) for rank in side) for side in ranks]
    return ShardingRule(layouts[0], layouts[1], sizes_of(batch, first[: len(batch)]))


def _factorization(name: str, *operands: Any, **params: Any) -> ShardingRule:
    ranks = MATRIX_RANKS[name]
    return _batched(operands, ranks(params) if callable(ranks) else ranks)


for _name in MATRIX_RANKS:
    sharding_rule(_name)(partial(_factorization, _name))


@sharding_rule("fft")
def fft(x: Any, *, fft_lengths: tuple[int, ...], **_: Any) -> ShardingRule:
    """The transformed dimensions are the last ones; linear."""
    n = len(fft_lengths)
    rule = _batched((x,), ((n,), (n,)))
    return ShardingRule(rule.operands, rule.results, rule.sizes, linear=((0,),))


def _solved(a: Any, b: Any, free: int) -> tuple[Layout, dict[str, int]]:
    """The layout of the right-hand sides ``b``, of which dimension ``free`` counts them."""
    batch = a.ndim - 2
    layout = tuple(dim if i < batch or i == free else () for i, dim in enumerate(letters(b.shape)))
    return layout, sizes_of(layout, b.shape)


@sharding_rule("triangular_solve")
def triangular_solve(a: Any, b: Any, *, left_side: bool, **_: Any) -> ShardingRule:
    """``a x = b``: each right-hand side is solved for on its own; linear in ``b``."""
    layout, sizes = _solved(a, b, b.ndim - 1 if left_side else b.ndim - 2)
    matrix = (*layout[: a.ndim - 2], (), ())
    return ShardingRule((matrix, layout), (layout,), sizes, linear=((1,),))


@sharding_rule("tridiagonal_solve")
def tridiagonal_solve(lower: Any, diagonal: Any, upper: Any, b: Any, **_: Any) -> ShardingRule:
    """The same with a tridiagonal matrix, given by its three diagonals."""
    del diagonal, upper
    batch = letters(lower.shape[:-1])
    layout = (*batch, (), *letters(b.shape)[-1:])
    bands = (*batch, ())
    return ShardingRule((bands, bands, bands, layout), (layout,), sizes_of(layout, b.shape), linear=((3,),))
