"""The plan: all that was decided, as plain data to read, diff, edit, save and run again. No JAX."""

from autopar.plan.data import VERSION, Argument, Collective, Plan, Prediction, Route, Solution, Splitting, View

__all__ = ["VERSION", "Argument", "Collective", "Plan", "Prediction", "Route", "Solution", "Splitting", "View"]
