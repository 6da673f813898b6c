"""The only importer of JAX's private modules: what autopar needs of them, under names of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax._src import source_info_util
from jax._src.lax.control_flow.loops import scan_p
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.extend.random import threefry2x32_p

__all__ = ["key_impl", "result_shapes", "threefry2x32_p"]


def result_shapes(
    primitive: Primitive, operands: Sequence[jax.ShapeDtypeStruct], params: Mapping[str, Any]
) -> tuple[tuple[int, ...], ...]:
    """Shapes of an equation's results, from the avals of its operands."""
    avals = [ShapedArray(x.shape, x.dtype) for x in operands]
    results, _ = primitive.abstract_eval(*avals, **params)
    return tuple(tuple(aval.shape) for aval in (results if primitive.multiple_results else [results]))


def key_impl(dtype: Any) -> Any:
    """The generator behind a dtype of keys (``.name``, ``.key_shape``), or None for any other dtype."""
    return dtype._impl if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) else None


def source_line(source_info: Any) -> str:
    """The user's ``file:line (function)`` behind an equation's source info; empty if unknown."""
    return source_info_util.summarize(source_info) if source_info else ""


def error_location(error: BaseException) -> str:
    """The last ``file:line`` of an exception's traceback that lies outside JAX and Flax."""
    location = ""
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not any(part in code.co_filename for part in ("site-packages", "autopar/", "<frozen")):
            location = f"{code.co_filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return location


def shape_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and weak type of an array, a Python scalar or a ShapeDtypeStruct."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    aval = jax.typeof(leaf)
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def scan_primitive() -> Primitive:
    """The primitive of ``jax.lax.scan``."""
    return scan_p


def reshaped(aval: Any, shape: Sequence[int]) -> Any:
    """The aval of the same dtype and another shape."""
    return ShapedArray(tuple(shape), aval.dtype, weak_type=getattr(aval, "weak_type", False))


def struct_of(aval: Any) -> jax.ShapeDtypeStruct:
    """The same shape, dtype and weak type as an argument for tracing."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))


def int32_aval(*shape: int) -> Any:
    """The aval of an array of int32."""
    return ShapedArray(shape, jax.numpy.dtype("int32"))


def scan_params(params: Mapping[str, Any], n_operands: int) -> dict[str, Any]:
    """The parameters of a scan with ``num_consts`` and ``num_carry``, which JAX 0.12 keeps in trees."""
    if "ft_in" not in params:
        return dict(params)
    constants, carry, _ = (len(list(part)) for part in params["ft_in"].update(range(n_operands)).unpack())
    kept = {name: value for name, value in params.items() if name not in ("ft_in", "ft_out")}
    return kept | {"num_consts": constants, "num_carry": carry}
