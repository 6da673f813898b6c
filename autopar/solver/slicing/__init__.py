"""Stage slicing: layers to stages, submeshes, microbatches, rematerialisation and a schedule. No JAX."""

from autopar.solver.slicing.data import Slicing, SlicingProblem, StageCost, StageCosts, StagePlan, Submesh
from autopar.solver.slicing.layer_costs import Layer, LayerCosts
from autopar.solver.slicing.search import slice_stages
from autopar.solver.slicing.tables import TabulatedCosts
from autopar.solver.slicing.timeline import simulated_step_s, timeline

__all__ = [
    "Layer",
    "LayerCosts",
    "Slicing",
    "SlicingProblem",
    "StageCost",
    "StageCosts",
    "StagePlan",
    "Submesh",
    "TabulatedCosts",
    "simulated_step_s",
    "slice_stages",
    "timeline",
]
