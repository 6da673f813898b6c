"""The plan: everything that was decided, as plain data that can be read, diffed, edited, saved and run again. No JAX."""

from autopar.plan.data import VERSION, Argument, Collective, Plan, Prediction, Solution, View

__all__ = ["VERSION", "Argument", "Collective", "Plan", "Prediction", "Solution", "View"]
