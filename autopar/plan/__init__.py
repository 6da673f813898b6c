"""The plan: all that was decided, as plain data to read, diff, edit, save and run again. No JAX."""

from autopar.plan.data import VERSION, Argument, Collective, Plan, Prediction, Route, Solution, Splitting, View
from autopar.plan.pipeline import PipelinePlan, PlannedStage, RunnerUp, StagePrediction, load_plan

__all__ = [
    "VERSION",
    "Argument",
    "Collective",
    "PipelinePlan",
    "Plan",
    "PlannedStage",
    "Prediction",
    "Route",
    "RunnerUp",
    "Solution",
    "Splitting",
    "StagePrediction",
    "View",
    "load_plan",
]
