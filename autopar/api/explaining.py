"""Why a value lies as it does, asked of a plan that was just made."""

from typing import Any

from autopar.api.planning import Options, plan_prepared
from autopar.errors import PlanError
from autopar.plan import Plan
from autopar.planner.explain import Explanation, explained
from autopar.planner.pins import restrict


def explain(plan: Plan, name: str, **options: Any) -> Explanation:
    """What each other layout of a value would add to the step: the search again with that layout forced.

    Args:
        plan: as ``autopar.plan`` returned it; ``autopar explain`` does the same for a plan in a file.
        name: of an argument or of any other value, as ``params/h_0/mlp/up/kernel``.
        **options: those of ``Options`` that the plan was made with besides mesh, hardware, preset and pins.

    Raises:
        PlanError: the plan comes from a file, or from a stage that is like this one.
        PinError: no such value, or one without a layout.
    """
    if plan.runtime is None:
        raise PlanError(
            "a plan read from a file, or shared by stages that are alike, does not know its step",
            fix="plan again, ask the command (autopar explain plan.json NAME), or the first of the stages",
        )
    prepared, *_ = plan.runtime
    cost = prepared.formulator.cost
    asked = Options(cost=cost, preset=plan.preset, pins=plan.pins, **options)
    masks = restrict(prepared.graph, prepared.formulator, plan.preset, plan.pins)
    return explained(prepared, plan, name, masks, lambda narrowed: plan_prepared(prepared, cost, asked, narrowed))
