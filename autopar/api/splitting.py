"""How many microbatches a plan takes: as many as are asked for, or those under which the best plan fits."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from autopar.errors import InfeasibleError, MicrobatchError
from autopar.ir.trace import Traced
from autopar.lowering.time.microbatch import batch_arguments, split_step
from autopar.plan import Plan, Splitting

log = logging.getLogger(__name__)

AUTO = "auto"

PATIENCE = 2
"""How many numbers of microbatches in a row may be worse than the best before the search ends."""

Chunks = Mapping[str, int] | tuple[tuple[str, int], ...]
"""Parts by ``name pattern[dimension]`` of a value, or by the name of a dimension, "vocab" or "seq"."""


def splitting_of(microbatches: int | str, chunk: Chunks, batch: str, allow: str | tuple[str, ...]) -> Splitting:
    """The splitting that the user's words stand for.

    Raises:
        MicrobatchError: a number below one.
    """
    pairs = chunk.items() if isinstance(chunk, Mapping) else chunk
    allowed = (allow,) if isinstance(allow, str) and allow else tuple(allow)
    unknown = set(allowed) - {"recompute", "ghost_batch_norm"}
    if unknown or not isinstance(microbatches, int) or microbatches < 1:
        raise MicrobatchError(
            f"microbatches={microbatches}, allow={allowed} cannot be",
            fix="give a number from 1 on, or 'auto'; and 'recompute' or 'ghost_batch_norm'",
        )
    return Splitting(microbatches, tuple(_chunk(name, count) for name, count in pairs), batch, allowed)


def _chunk(name: str, count: int) -> tuple[str, int | None, int]:
    if count < 1:
        raise MicrobatchError(f"chunk '{name}' in {count} parts cannot be", fix="give a number from 1 on")
    found = re.fullmatch(r"(.+)\[(-?\d+)\]", name)
    return (found[1], int(found[2]), count) if found else (name, None, count)


def plan_over_time(
    traced: Traced, microbatches: int | str, splitting: Splitting, plan_one: Callable[[Traced], Plan]
) -> Plan:
    """The best plan of a step split over time.

    Args:
        traced: the whole step.
        microbatches: a number, or "auto": 1, 2, 4, ... times the stages, until memory does not bind or
            more are no better.
        splitting: what else is asked for.
        plan_one: plans a split step.

    Raises:
        InfeasibleError: no plan fits, whatever the number.
        MicrobatchError: the step cannot be split so.
    """
    if microbatches != AUTO and not (microbatches == 1 and splitting.stages > 1):
        return replace(plan_one(split_step(traced, splitting)), splitting=splitting)
    best, refused, worse = None, None, 0
    for each in _numbers(traced, splitting):
        try:
            found = replace(plan_one(split_step(traced, each)), splitting=each)
        except InfeasibleError as error:
            refused = error if refused is None or error.least_bytes < refused.least_bytes else refused
            continue
        except MicrobatchError as error:
            if best is None and refused is None:
                raise
            log.warning("microbatches are not tried: %s", error.what)
            break
        if best is None or found.prediction.bundled_s < best.prediction.bundled_s:
            best, worse = found, 0
        else:
            worse += 1
        if worse >= PATIENCE or not (memory_binds(found) or each.stages > 1):
            break
    if best is None:
        assert refused is not None
        raise refused
    return best


def _numbers(traced: Traced, splitting: Splitting) -> Iterator[Splitting]:
    size = min(value.shape[0] for value in batch_arguments(traced, splitting.batch))
    count = splitting.stages if size % splitting.stages == 0 else 1
    yield replace(splitting, microbatches=count)
    count *= 2
    while size % count == 0:
        yield replace(splitting, microbatches=count)
        count *= 2


def memory_binds(plan: Plan) -> bool:
    """Whether a cheaper plan was passed over because it needs more memory; for a plan that was just made."""
    _, formulation, _ = plan.runtime
    return formulation.problem.limit is not None
