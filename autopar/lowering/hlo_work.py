"""What a compiled module computes: flops of its products and convolutions, and the TPU compiler's estimated cycles."""

import math
import re
from collections.abc import Iterator

from autopar.cost.compute import Window, valid_positions
from autopar.lowering.hlo import Instruction, Module, executions


def products(module: Module) -> Iterator[tuple[float, int]]:
    """Flops of every matrix product and convolution, and how often a step runs it; XLA's count of each."""
    for computation, instruction, times in executions(module, inside_fusions=True):
        if instruction.opcode in ("dot", "convolution"):
            yield _product_flops(module.computations[computation], instruction), times


def random_flops(module: Module) -> float:
    """What XLA's cost analysis counts for random bits, by the names of the equations that they come from.

    On CPU the rounds of the hash are a loop, which it counts once; and XLA may make the bits again for each reader.
    """
    return sum(
        math.prod(_dims(instruction.shape))
        for _, instruction, _ in executions(module, inside_fusions=True)
        if instruction.opcode in _ELEMENTWISE and _RANDOM.search(instruction.attributes)
    )


_RANDOM = re.compile(r'op_name="[^"]*(?:random_bits|threefry2x32)')
_ELEMENTWISE = (
    *("add", "and", "compare", "convert", "multiply", "not", "or", "select", "subtract", "xor"),
    *("shift-left", "shift-right-arithmetic", "shift-right-logical"),
)


def _product_flops(scope: dict[str, Instruction], product: Instruction) -> float:
    left, right = (_dims(scope[name].shape) for name in product.operands[:2])
    if product.opcode == "convolution":
        return _convolution_flops(product, left, right)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
    summed = math.prod(left[at] for at in _ints(contracted.group(1))) if contracted else 1
    return 2.0 * math.prod(_dims(product.shape)) * summed


def _convolution_flops(product: Instruction, image: list[int], kernel: list[int]) -> float:
    """2 x batch x output features x input features of the kernel x the window positions that meet no padding.

    A TPU writes a batched matrix product as a convolution too: its batch is a spatial dimension whose window meets one
    element only, by padding or dilation.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
    if not labels:
        raise ValueError(f"convolution {product.name} without dim_labels")
    of_image, of_kernel, of_out = labels.groups()
    out = _dims(product.shape)
    positions = 1
    for spatial in filter(str.isdigit, of_out):
        positions *= valid_positions(
            image[of_image.index(spatial)],
            kernel[of_kernel.index(spatial)],
            out[of_out.index(spatial)],
            _window(product.attributes, int(spatial)),
        )
    features = kernel[of_kernel.index("i")] * out[of_out.index("f")]
    return 2.0 * out[of_out.index("b")] * features * positions


def _window(attributes: str, spatial: int) -> Window:
    """What ``window={size=3x3 pad=1_1x1_1 stride=2x2}`` says of one spatial dimension."""

    def said(name: str, otherwise: str) -> str:
        found = re.search(rf"\b{name}=([\d_x\-]+)", attributes[attributes.find("window={") :])
        return found.group(1).split("x")[spatial] if found else otherwise

    low = int(said("pad", "0_0").split("_")[0])
    return Window(int(said("stride", "1")), low, int(said("lhs_dilate", "1")), int(said("rhs_dilate", "1")))


def _dims(shape: str) -> list[int]:
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return _ints(found.group(1)) if found else []


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def estimated_cycles(module: Module) -> int | None:
    """The TPU compiler's ``estimated_cycles``, summed over all that a step runs; None without any.

    Collectives carry no estimate, so this is computation and local data movement. Where the compiler has none, as for a
    product of an mlp on v5e:2x4 that carries on with a collective, it writes the largest int64, which is left out.
    """
    cycles = [
        int(found.group(1)) * times
        for _, instruction, times in executions(module)
        if (found := re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes))
        and int(found.group(1)) < _NO_ESTIMATE
    ]
    return sum(cycles) if cycles else None


_NO_ESTIMATE = 2**63 - 1
