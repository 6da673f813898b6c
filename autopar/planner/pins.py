"""Restrictions of the search: user pins by name, and presets. Both become masks over the choices of units."""

import re
from collections.abc import Callable, Sequence

import numpy as np

from autopar.cluster import Mesh
from autopar.errors import PinError, PresetError
from autopar.ir.program import Value
from autopar.planner.graph import Graph, Unit
from autopar.planner.intra import Formulator
from autopar.planner.piping import staged
from autopar.planner.presets import PRESETS
from autopar.planner.space import Space
from autopar.spec import Spec, canonical

Masks = dict[Unit, np.ndarray]


def restrict(graph: Graph, formulator: Formulator, preset: str, pins: Sequence[tuple[str, str]]) -> Masks:
    """The masks of a preset and of pins together.

    Args:
        graph: the units.
        formulator: their choices on a mesh.
        preset: a name of ``PRESETS``; empty for none.
        pins: (pattern, spec) pairs: ``("params/.*kernel", ",tensor")`` puts the second dimension of every value
            whose name matches (``re.search``) on ``tensor`` and leaves the first whole.

    Raises:
        PresetError: an unknown preset.
        PinError: a pin that matches nothing, that a shape cannot carry, or that contradicts another restriction.
    """
    masks: Masks = {}
    if preset:
        if preset not in PRESETS:
            raise PresetError(f"unknown preset '{preset}'", fix=f"choose one of {', '.join(sorted(PRESETS))}")
        masks = dict(PRESETS[preset](graph, formulator.space))
    for unit, mask in staged(graph, formulator.space).items():
        both = mask & masks.get(unit, mask)
        masks[unit] = both if both.any() else mask
    for pattern, text in pins:
        _pin(masks, graph, formulator.space, pattern, text)
    return masks


def parse_pin(text: str) -> tuple[str, str]:
    """Reads ``PATTERN=SPEC`` of the command line, as ``params/.*kernel=,tensor``."""
    pattern, sign, spec = text.rpartition("=")
    if not sign or not pattern:
        raise PinError(f"pin '{text}' is not PATTERN=SPEC", fix="write it as 'params/.*kernel=,tensor'")
    return pattern, spec


def parse_spec(text: str, mesh: Mesh) -> Spec:
    """Reads a spec: the axes of each dimension between commas, joined by ``+``: ``data+tensor,,`` for three."""
    dims = [tuple(axis for axis in part.strip().split("+") if axis and axis != "-") for part in text.split(",")]
    used = [axis for dim in dims for axis in dim]
    unknown = [axis for axis in used if axis not in mesh.names]
    if unknown or len(set(used)) < len(used):
        what = f"spec '{text}' names axis '{unknown[0]}'" if unknown else f"spec '{text}' names an axis twice"
        raise PinError(what, where=f"mesh {mesh}", fix=f"use each of {', '.join(mesh.names)} at most once")
    return canonical(dims, mesh.names)


def _pin(masks: Masks, graph: Graph, space: Space, pattern: str, text: str) -> None:
    spec = parse_spec(text, space.mesh)
    matches = [value for value in _values(graph) if re.search(pattern, value.name)]
    fitting = [value for value in matches if len(value.shape) == len(spec.dims)]
    if not fitting:
        ranks = sorted({len(value.shape) for value in matches})
        raise PinError(
            f"pin '{pattern}={text}' matches no value of {len(spec.dims)} dimensions",
            where=f"{len(matches)} values match by name, with {ranks} dimensions" if matches else "no name matches",
            fix="autopar explain lists the names",
        )
    for value in fitting:
        _pin_value(masks, graph, space, value, spec)


def _pin_value(masks: Masks, graph: Graph, space: Space, value: Value, spec: Spec) -> None:
    if not spec.fits(value.shape, space.sizes):
        raise PinError(
            f"{value.name} of shape {tuple(value.shape)} cannot be laid out as {spec}",
            where=f"mesh {space.mesh}",
            fix="pin dimensions that the axes divide",
        )
    unit = graph.unit(value)
    assert unit is not None
    mask = np.array([choice == spec for choice in space.output(unit, value)])
    narrow(masks, unit, mask)
    if not masks[unit].any():
        raise PinError(
            f"{value.name} cannot be {spec}: another pin, the preset or its equation's rule forbids it",
            where=f"mesh {space.mesh}",
            fix="drop one of the pins that contradict each other",
        )


def _values(graph: Graph) -> list[Value]:
    made = [value for eqn in graph.program.equations for value in eqn.outputs]
    return [value for value in (*graph.program.inputs, *made) if graph.unit(value) is not None]


def narrow(masks: Masks, unit: Unit, mask: np.ndarray) -> None:
    """Keeps only the choices of a unit that ``mask`` allows too."""
    masks[unit] = masks[unit] & mask if unit in masks else mask


Preset = Callable[[Graph, Space], Masks]
