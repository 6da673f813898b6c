"""Floating-point operations of an equation, counted as XLA's cost analysis does, and which equations fuse.

Source: ``HloCostAnalysis`` in XLA (xla/service/hlo_cost_analysis.cc). Names are those of JAX's primitives;
the parameters are the equation's; shapes are whatever is asked about, global or local.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from autopar.ir.program import Equation

Shape = tuple[int, ...]
Shapes = Sequence[Shape]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TRANSCENDENTAL = _names(
    """acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log
    log1p log2 logistic pow rsqrt sin sinh sqrt tan tanh"""
)
"""One per element, counted apart from flops."""

ARITHMETIC = _names(
    """abs add add_any and ceil clamp clz complex conj convert_element_type div eq eq_to floor ge gt imag integer_pow
    is_finite le le_to lt lt_to max min mul ne neg nextafter not or one_minus_square population_count real
    reduce_precision rem round select_and_gather_add select_n shift_left shift_right_arithmetic shift_right_logical sign
    square sub xor"""
)
"""Elementwise, one operation per element."""

MOVING = _names(
    """bitcast_convert_type broadcast_in_dim copy copy_p device_put dynamic_slice expand_dims iota
    optimization_barrier pad pvary random_unwrap random_wrap reshape rev slice split squeeze stop_gradient
    transpose"""
)
"""No arithmetic, and (save across an optimization barrier) nothing but an index map for whoever reads it."""

REDUCTIONS = _names("""argmax argmin reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor""")
SCANS = _names("cumlogsumexp cummax cummin cumprod cumsum")

# Threefry-2x32 makes two words from 20 rounds of add, rotate (2 shifts, or) and xor, and 5 key injections
# of 3 additions (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): 115 operations.
# random_bits folds the two words into one (JAX's partitionable threefry), with 2 more.
_FLOPS_PER_THREEFRY = 115


def fusible(primitive: str) -> bool:
    """Whether the primitive fuses into its producer or consumer and pays no memory traffic by itself.

    >>> fusible("add"), fusible("broadcast_in_dim"), fusible("dot_general"), fusible("reduce_sum")
    (True, True, False, False)
    """
    return primitive in ARITHMETIC or primitive in TRANSCENDENTAL or primitive in _FUSED_MOVES


_FUSED_MOVES = MOVING - {"optimization_barrier", "device_put"}


def equation_flops(primitive: str, params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    """Floating-point operations of one equation, without transcendentals; 0 for those that only move data.

    A call counts as its body, at the shapes that the body has; a scan as often as it is long, a while loop
    once, a conditional as its largest branch.

    >>> params = {"dimension_numbers": (((1,), (0,)), ((), ()))}
    >>> equation_flops("dot_general", params, [(8, 16), (16, 4)], [(8, 4)])
    1024.0
    """
    if primitive in _REGIONS:
        return _region(params)
    if primitive in _COUNTS:
        return float(_COUNTS[primitive](params, operands, results))
    if primitive in ARITHMETIC:
        return float(math.prod(results[0]))
    if primitive in REDUCTIONS:
        return float(math.prod(operands[0]) - math.prod(results[0]))
    return 0.0


def flops_of(eqn: Equation) -> float:
    """Floating-point operations of a whole equation, as ``equation_flops`` counts them."""
    if not eqn.outputs:
        return 0.0
    operands, results = ([tuple(atom.aval.shape) for atom in atoms] for atoms in (eqn.inputs, eqn.outputs))
    return equation_flops(eqn.primitive.name, eqn.params, operands, results)


def equation_transcendentals(primitive: str, results: Shapes) -> float:
    """Transcendental operations of one equation: one per element of the result."""
    return float(math.prod(results[0])) if primitive in TRANSCENDENTAL else 0.0


def _dot(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * math.prod(results[0]) * math.prod(operands[0][dim] for dim in contracted)


def _convolution(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    """2 x batch x output features x input features per group x the window positions that meet no padding."""
    numbers, image, kernel, out = params["dimension_numbers"], operands[0], operands[1], results[0]
    positions = 1
    for dim in range(len(out) - 2):
        positions *= valid_positions(
            image[numbers.lhs_spec[dim + 2]],
            kernel[numbers.rhs_spec[dim + 2]],
            out[numbers.out_spec[dim + 2]],
            Window(
                params["window_strides"][dim],
                params["padding"][dim][0],
                params["lhs_dilation"][dim],
                params["rhs_dilation"][dim],
            ),
        )
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * batch * features * kernel[numbers.rhs_spec[1]] * positions


class Window(NamedTuple):
    """How a convolution steps along one dimension: stride, padding below, dilation of image and of kernel."""

    stride: int
    low: int
    image_dilation: int
    kernel_dilation: int


def valid_positions(image: int, kernel: int, out: int, window: Window) -> int:
    """Pairs (output, kernel position) along one dimension that read an image element, not padding.

    >>> valid_positions(4, 3, 4, Window(1, 1, 1, 1))
    10
    """
    span = (image - 1) * window.image_dilation + 1
    return sum(
        0 <= at < span and at % window.image_dilation == 0
        for place in range(out)
        for tap in range(kernel)
        for at in (place * window.stride - window.low + tap * window.kernel_dilation,)
    )


def _sort(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    elements = math.prod(operands[0])
    return elements * math.ceil(math.log2(max(elements, 1)))


def _scatter(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    return math.prod(operands[2])


def _windows(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    return math.prod(results[0]) * (math.prod(params["window_dimensions"]) - 1)


def _power(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    """By repeated squaring, as JAX lowers it."""
    exponent = abs(params["y"])
    multiplications = max(exponent.bit_length() - 1 + exponent.bit_count() - 1, 0)
    return math.prod(results[0]) * (multiplications + (params["y"] < 0))


def _per_element(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    return math.prod(operands[0])


def _random(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    return (_FLOPS_PER_THREEFRY + 2) * math.prod(results[0])


def _threefry(params: Mapping[str, Any], operands: Shapes, results: Shapes) -> float:
    return _FLOPS_PER_THREEFRY * math.prod(results[0])


_REGIONS = _names(
    """checkpoint closed_call cond core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr jit pjit
    remat remat2 scan while"""
)


def _region(params: Mapping[str, Any]) -> float:
    if branches := params.get("branches"):
        return max(map(_body, branches))
    bodies = [params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr") if name in params]
    return params.get("length", 1) * sum(map(_body, bodies))


def _body(jaxpr: Any) -> float:
    """Flops of a jaxpr, open or closed."""
    return sum(
        equation_flops(
            eqn.primitive.name,
            eqn.params,
            [atom.aval.shape for atom in eqn.invars],
            [variable.aval.shape for variable in eqn.outvars],
        )
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns
    )


_COUNTS: dict[str, Callable[[Mapping[str, Any], Shapes, Shapes], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "sort": _sort,
    "top_k": _sort,
    "integer_pow": _power,
    "random_bits": _random,
    "threefry2x32": _threefry,
    **dict.fromkeys(SCANS, _per_element),
    **dict.fromkeys(("scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter_add"), _scatter),
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _windows),
}
