"""Why no plan fits: the least memory that was reached, and the values that make it."""

from autopar.cost import CostModel, rounds_products
from autopar.errors import InfeasibleError
from autopar.lowering import predict
from autopar.lowering.local_program import build_local_program
from autopar.plan import Plan
from autopar.plan.figures import nbytes

NAMED_VALUES = 5


def too_little_memory(limit_bytes: float, smallest: Plan, cost: CostModel) -> InfeasibleError:
    """The error for a limit that no plan keeps.

    Args:
        limit_bytes: what the user allows a device.
        smallest: of the plans found, the one whose peak is lowest; as ``plan_prepared`` made it.
        cost: what it was planned with.
    """
    needs_bytes = smallest.prediction.peak_bytes
    return InfeasibleError(
        f"no plan was found that fits {nbytes(limit_bytes)} a device: the smallest needs {nbytes(needs_bytes)}",
        where=f"mesh {smallest.mesh}; largest at its peak: {', '.join(largest_at_peak(smallest, cost))}",
        fix=f"raise --memory-gb to {needs_bytes * 1.005 / 1e9:.3g}, use more devices, or make the batch smaller",
        least_bytes=needs_bytes,
    )


def largest_at_peak(plan: Plan, cost: CostModel) -> list[str]:
    """Name and bytes of the largest values that a device holds at the peak of a plan that was just made."""
    prepared, *_ = plan.runtime
    local = build_local_program(prepared.traced.program, plan, cost, prepared.rules)
    buffers = predict.live_buffers(local, rounds_products=rounds_products(cost))
    _, at = predict.peak(buffers)
    held_bytes: dict[str, float] = {}
    for buffer in buffers:
        if buffer.start <= at < buffer.stop:
            held_bytes[buffer.name] = held_bytes.get(buffer.name, 0.0) + buffer.nbytes
    largest = sorted(held_bytes.items(), key=lambda item: -item[1])[:NAMED_VALUES]
    return [f"{name} {nbytes(size)}" for name, size in largest]
