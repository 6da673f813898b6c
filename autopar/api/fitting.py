"""Memory limits: the solver's rows and the lowered program count a little differently; this closes the difference."""

from collections.abc import Callable

from autopar.errors import InfeasibleError
from autopar.plan import Plan

ROUNDS = 5
"""How often the solver is asked at most."""

CLOSE = 0.01
"""A plan whose peak is this close to the limit, or to the least that can be reached, is not improved further."""


def fitting(
    limit_bytes: float, unlimited: Plan, counted_bytes: Callable[[Plan], float], plan_within: Callable[[float], Plan]
) -> Plan:
    """The cheapest plan found whose lowered program keeps a limit; the smallest plan found if none does.

    Args:
        limit_bytes: memory of a device.
        unlimited: the best plan without a limit, which does not fit.
        counted_bytes: the peak of a plan as the solver counts it.
        plan_within: the best plan whose peak, so counted, is within an amount; raises InfeasibleError.
    """
    found = [unlimited]
    fits_bytes, fails_bytes = 0.0, counted_bytes(unlimited)
    allowed_bytes = limit_bytes + counted_bytes(unlimited) - unlimited.prediction.peak_bytes
    for _ in range(ROUNDS):
        if not fits_bytes < allowed_bytes < fails_bytes:
            allowed_bytes = (fits_bytes + fails_bytes) / 2
        try:
            plan = plan_within(allowed_bytes)
        except InfeasibleError as error:
            if not allowed_bytes < error.least_bytes < fails_bytes:
                break
            fits_bytes, allowed_bytes = error.least_bytes, error.least_bytes * (1 + CLOSE)
            continue
        found.append(plan)
        peak_bytes = plan.prediction.peak_bytes
        if peak_bytes <= limit_bytes:
            fits_bytes = allowed_bytes
        else:
            fails_bytes = allowed_bytes
        if (1 - CLOSE) * limit_bytes <= peak_bytes <= limit_bytes or fails_bytes <= fits_bytes * (1 + CLOSE):
            break
        # The difference between the two counts is that of the last plan, and a little for the next one's.
        allowed_bytes = limit_bytes * (1 - CLOSE / 4) + counted_bytes(plan) - peak_bytes
    fit = [plan for plan in found if plan.prediction.peak_bytes <= limit_bytes]
    if fit:
        return min(fit, key=lambda plan: plan.solution.objective_s)
    return min(found, key=lambda plan: plan.prediction.peak_bytes)
