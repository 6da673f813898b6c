"""A step whose layers are written out one by one becomes one with a loop over its layers."""

from dataclasses import replace

from autopar.ir.program import Program
from autopar.ir.trace import Traced
from autopar.lowering.rolling.complete import completed
from autopar.lowering.rolling.early import with_early_slices
from autopar.lowering.rolling.trunk import common_layers, find_links
from autopar.lowering.rolling.write import write_rolled


def roll(traced: Traced, n_layers: int | None = None) -> Traced:
    """The step with its trunk of alike layers as loops: a scan forward, a reverse scan backward.

    Arguments, results and state stay what they are: each layer keeps parameters of its own, which are stacked before
    the loop. Random numbers keep their bits.

    Args:
        traced: the step, as ``autopar.ir.trace.trace`` makes it.
        n_layers: how many units to roll, from the first alike ones on; None for all that are alike. Where only every
            second layer is alike, a unit is two layers.

    Raises:
        RollError: no layers of the step are alike and chained, or fewer than ``n_layers``.
    """
    return replace(traced, program=rolled(traced.program, n_layers))


def rolled(program: Program, n_layers: int | None = None) -> Program:
    """The program with its trunk of alike layers as loops; see ``roll``."""
    program = with_early_slices(program)
    links = find_links(program)
    while (longer := next(filter(None, (completed(program, link.run) for link in links)), None)) is not None:
        program, links = longer, find_links(longer)
    return write_rolled(program, common_layers(program, links, n_layers))
