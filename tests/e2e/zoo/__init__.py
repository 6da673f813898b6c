"""Small train steps with what published JAX code is made of and ``models/`` does not have.

``STEPS[name]()`` makes ``(step, state, *batch)`` with ``step(state, *batch) -> (state, metrics)``; shapes are tiny.
"""

from collections.abc import Callable
from typing import Any

from tests.e2e.zoo import generative, science, sequences, training, vision

STEPS: dict[str, Callable[[], tuple[Any, ...]]] = {
    **generative.STEPS,
    **science.STEPS,
    **sequences.STEPS,
    **training.STEPS,
    **vision.STEPS,
}
