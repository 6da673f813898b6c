"""The primitive by which what a stage has made goes on to the next stage.

stage_shift x, entering[, enters] -> y      x, y: (p, ...); entering: (...); enters: bool
"""

from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

SHIFT = Primitive("stage_shift")


def shift(x: Any, entering: Any, enters: Any = None, *, reverse: bool = False) -> Any:
    """Every stage's value moved to the next stage, and a new one put in.

    Args:
        x: by stage, (p, ...).
        entering: goes to the first stage, (...).
        enters: where given and false, the first stage gets what leaves the last one instead.
        reverse: from each stage to the one before; the last one is then the first.
    """
    flags = () if enters is None else (enters,)
    return SHIFT.bind(x, entering, *flags, reverse=reverse)


@SHIFT.def_abstract_eval
def _same(x: Any, *_: Any, reverse: bool) -> Any:
    return x


def _shifted(x: Any, entering: Any, *flags: Any, reverse: bool) -> Any:
    moved = jnp.roll(x, -1 if reverse else 1, axis=0)
    first = -1 if reverse else 0
    new = jnp.where(flags[0], entering, moved[first]) if flags else entering
    return moved.at[first].set(new)


SHIFT.def_impl(_shifted)
mlir.register_lowering(SHIFT, mlir.lower_fun(_shifted, multiple_results=False))
