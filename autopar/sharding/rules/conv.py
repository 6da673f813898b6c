"""Convolutions: ``n c s, o c p -> n o s`` with ``c`` summed, and ``g`` groups of features (or of the batch).

A spatial dimension is split only where windows do not overlap: ``(s p), p -> s`` (patches; pointwise if ``p``
is 1), and in the gradient of such a kernel, ``(s p), s -> p``. Any other would need its neighbours' edges.
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from autopar.sharding.factors import Dim, Layout, ShardingRule
from autopar.sharding.registry import Shard, local_rule, sharding_rule


def _layout(spec: Sequence[int], dims: Sequence[Dim]) -> Layout:
    """Puts ``dims`` (batch or output feature, feature, then spatial) where ``spec`` says they stand."""
    placed: list[Dim] = [()] * len(dims)
    for position, dim in zip(spec, dims, strict=True):
        placed[position] = dim
    return tuple(placed)


def _spatial(lhs: Any, rhs: Any, params: dict[str, Any]) -> tuple[list[list[Dim]], dict[str, int]]:
    """Factors of the spatial dimensions of lhs, rhs and result, and their sizes."""
    numbers, sizes = params["dimension_numbers"], {}
    sides: list[list[Dim]] = [[], [], []]
    for i, (left, right) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True)):
        size, window, s, p = lhs.shape[left], rhs.shape[right], f"s{i}", f"p{i}"
        stride, spread = params["window_strides"][i], params["rhs_dilation"][i]
        tight = params["padding"][i] == (0, 0) and params["lhs_dilation"][i] == 1
        dims: tuple[Dim, Dim, Dim] = ((), (), ())
        if tight and spread == 1 and (stride == window or size == window) and size % window == 0:
            dims, sizes[s], sizes[p] = ((s, p), (p,), (s,)), size // window, window
        elif tight and stride == 1 and size == window * spread:
            dims, sizes[s], sizes[p] = ((s, p), (s,), (p,)), window, spread
        for side, dim in zip(sides, dims, strict=True):
            side.append(dim)
    return sides, sizes


@sharding_rule("conv_general_dilated")
def conv(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> ShardingRule:
    """Batch and output features pass through, input features are summed, groups pass through; bilinear."""
    params["dimension_numbers"] = numbers = dimension_numbers
    groups, batch_groups = params["feature_group_count"], params["batch_group_count"]
    batch, (out_features, in_features) = numbers.lhs_spec[0], numbers.rhs_spec[:2]
    sizes = {
        "g": max(groups, batch_groups),
        "n": lhs.shape[batch] // batch_groups,
        "c": rhs.shape[in_features],
        "o": rhs.shape[out_features] // max(groups, batch_groups),
    }
    (left, right, result), spatial = _spatial(lhs, rhs, params)
    sizes |= spatial
    n: Dim = ("g", "n") if batch_groups > 1 else ("n",)
    c: Dim = ("g", "c") if groups > 1 else ("c",)
    layouts = (
        _layout(numbers.lhs_spec, [n, c, *left]),
        _layout(numbers.rhs_spec, [("g", "o"), ("c",), *right]),
        _layout(numbers.out_spec, [("n",), ("g", "o"), *result]),
    )
    lhs_dims, rhs_dims, out_dims = (
        tuple(tuple(name for name in dim if sizes[name] > 1) for dim in layout) for layout in layouts
    )
    kept = {name for dim in out_dims for name in dim}
    sizes = {name: size for name, size in sizes.items() if size > 1}
    return ShardingRule(
        operands=(lhs_dims, rhs_dims),
        results=(out_dims,),
        sizes=sizes,
        reduce={name: "sum" for name in sizes if name not in kept},
        linear=((0,), (1,)),
    )


@local_rule("conv_general_dilated")
def local_conv(shard: Shard, lhs: Any, rhs: Any, **params: Any) -> list[Any]:
    """The same convolution of the local blocks, with the groups that this device holds."""
    held = shard.count("g") if "g" in shard.rule.sizes else 1
    for name in ("feature_group_count", "batch_group_count"):
        params[name] = params[name] // held if params[name] > 1 else 1
    return [lax.conv_general_dilated_p.bind(lhs, rhs, **params)]
