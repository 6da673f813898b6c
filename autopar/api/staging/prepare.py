"""A stage of a pipeline as the intra-operator planner takes it."""

from collections.abc import Sequence
from dataclasses import replace

from autopar.cost import CostModel
from autopar.ir.program import Program
from autopar.ir.stages import Stage
from autopar.ir.trace import Traced
from autopar.planner.intra import Formulator
from autopar.planner.search import Prepared, prepare
from autopar.sharding.lookup import RuleBook


def prepare_stage(
    stage: Stage, cost: CostModel, microbatches: int, rules: RuleBook | None = None, *, strict: bool = False
) -> Prepared:
    """Lays a stage out for planning: every part once, on one microbatch, priced as often as a step runs it.

    Args:
        stage: the stage.
        cost: prices its submesh.
        microbatches: of a step.
        rules: those that other stages looked up.
        strict: as for ``prepare``.
    """
    prepared = prepare(Traced(stage.program, None, None, stage.state), cost, strict=strict, rules=rules)
    times = _times_in_step(stage, prepared.graph.program, prepared.graph.times, microbatches)
    graph = replace(prepared.graph, times=times)
    return replace(prepared, graph=graph, formulator=Formulator(graph, cost))


def _times_in_step(stage: Stage, program: Program, times: Sequence[int], microbatches: int) -> tuple[int, ...]:
    """How often a step runs each equation of a stage.

    Args:
        stage: the stage.
        program: its program as the planner laid it flat.
        times: how often one run of the stage runs each equation of it.
        microbatches: of a step.
    """
    factor, found = 1, []
    for eqn, each in zip(program.equations, times, strict=True):
        tag = stage.tags.get(eqn)
        if tag is not None:  # the equations of a region's body, which have no tag, follow one that has
            factor = microbatches if tag.part.per_microbatch else 1
        found.append(each * factor)
    return tuple(found)
