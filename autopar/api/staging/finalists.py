"""From a search over stages to the plan of a pipeline: the finalists are planned whole, and the shortest step wins."""

import time
from dataclasses import replace

from autopar.api.planning import Options
from autopar.api.staging.assemble import Planned, plan_pipeline
from autopar.api.staging.search import StagesPlan
from autopar.errors import InfeasibleError
from autopar.ir.trace import Traced
from autopar.solver.slicing import Slicing

CLOSE = 0.02
"""A slicing whose price is this close to the best one's is planned whole too: prices of layers add up only about so."""


def plan_searched(traced: Traced, found: StagesPlan) -> Planned:
    """Plans the stages of the best slicing, and of those close to it; the next best where they do not fit.

    Raises:
        InfeasibleError: none of the slicings fits once its stages are planned whole.
    """
    start = time.process_time()
    best: tuple[Planned, Slicing] | None = None
    refused: InfeasibleError | None = None
    slicings = [found.slicing, *found.slicing.runner_ups]
    for slicing in slicings:
        if best is not None and slicing.total_s > slicings[0].total_s * (1 + CLOSE):
            break
        try:
            planned = _planned(traced, found, slicing)
        except InfeasibleError as error:
            refused = error if refused is None or error.least_bytes < refused.least_bytes else refused
            continue
        if best is None or planned.plan.step_s < best[0].plan.step_s:
            best = planned, slicing
    if best is None:
        assert refused is not None
        raise refused
    planned, chosen = best
    spent = found.seconds.by_part | {"stages": time.process_time() - start}
    return replace(planned, plan=replace(planned.plan, runner_ups=found.runner_ups(chosen), seconds=spent))


def _planned(traced: Traced, found: StagesPlan, slicing: Slicing) -> Planned:
    layout, frugality = found.layout(slicing)
    search = found.search
    options = Options(mesh=layout.meshes[0], hardware=search.hardware, memory_gb=search.memory_gb)
    return plan_pipeline(traced, layout, options, frugality, step=found.layered[slicing.microbatches].step)
