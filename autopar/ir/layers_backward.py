"""The layers of the backward pass, by dataflow: each equation goes where the forward pass uses what it reads."""

from collections.abc import Mapping, Sequence

from autopar.ir.body import Body, line_of
from autopar.ir.program import Equation, Value


def follow(body: Body, of: dict[Equation, int], n_layers: int, free: frozenset[Value]) -> set[Equation]:
    """Gives the other equations their layers, in ``of``; returns those that must run on the way up all the same.

    A *cotangent* depends on the last layer. It never goes up again, and goes down to the layer in which the forward
    pass uses what it is multiplied with, but no further than the backward equations that wait for it allow. Anything
    else (a derivative kept from the forward pass, a recomputation) belongs to its reader, where its operands are.
    """
    uses = _uses(of)
    for value in body.program.inputs:  # a copy for the backward pass belongs where its original is used
        near = next((each for each in line_of(body, value) if each in uses), None)
        if near is not None:
            uses[value] = uses[near]
    others = [e for e in body.program.equations if e not in of and not free.issuperset(e.outputs)]
    cotangent = {value for eqn, layer in of.items() if layer == n_layers - 1 for value in eqn.outputs}
    kept, falling = [], []
    for eqn in others:
        if cotangent.isdisjoint(eqn.operands):
            kept.append(eqn)
            uses.update({value: common for value in eqn.outputs if (common := _common(eqn, uses))})
        else:
            falling.append(eqn)
            cotangent.update(eqn.outputs)
    layer_of: dict[Value, int] = {}
    for eqn, least in zip(falling, _least(falling, uses), strict=True):
        bound = min((layer_of[value] for value in eqn.operands if value in layer_of), default=n_layers - 1)
        of[eqn] = max(_falls_to(eqn, bound, uses), min(bound, least))
        layer_of.update(dict.fromkeys(eqn.outputs, of[eqn]))
    _pull_gradients(body, falling, of, uses)
    _with_readers(kept, falling, of, uses)
    return _early(kept, falling, of)


def _uses(of: Mapping[Equation, int]) -> dict[Value, frozenset[int]]:
    """The layers in which the forward pass makes or reads each value."""
    uses: dict[Value, set[int]] = {}
    for eqn, layer in of.items():
        for value in (*eqn.outputs, *eqn.operands):
            uses.setdefault(value, set()).add(layer)
    return {value: frozenset(layers) for value, layers in uses.items()}


def _common(eqn: Equation, uses: Mapping[Value, frozenset[int]]) -> frozenset[int]:
    """The layers where all operands of an equation are, else the first that can have them; none if all can."""
    each = [uses[value] for value in eqn.operands if value in uses]
    if not each:
        return frozenset()
    return frozenset.intersection(*each) or frozenset([max(map(min, each))])


def _least(falling: Sequence[Equation], uses: Mapping[Value, frozenset[int]]) -> list[int]:
    """For each cotangent the highest layer that it, or one that waits for it, cannot do without."""
    waiting: dict[Value, int] = {}
    found = []
    for eqn in reversed(falling):
        own = max((min(uses[value]) for value in eqn.operands if value in uses), default=0)
        least = max([own, *(waiting.get(value, 0) for value in eqn.outputs)])
        for value in eqn.operands:
            waiting[value] = max(waiting.get(value, 0), least)
        found.append(least)
    return found[::-1]


def _falls_to(eqn: Equation, bound: int, uses: Mapping[Value, frozenset[int]]) -> int:
    below = [[layer for layer in uses.get(value, ()) if layer <= bound] for value in eqn.operands]
    return min((max(layers) for layers in below if layers), default=bound)


def _pull_gradients(
    body: Body, falling: Sequence[Equation], of: dict[Equation, int], uses: Mapping[Value, frozenset[int]]
) -> None:
    """Gives gradients that read none of the forward pass (that of a bias) the layer of their parameter.

    So it is where what they are made from goes there anyway.
    """
    readers: dict[Value, list[Equation]] = {}
    producer = {value: eqn for eqn in falling for value in eqn.outputs}
    places: dict[Value, set[int]] = {}
    for eqn in falling:
        for value in eqn.operands:
            readers.setdefault(value, []).append(eqn)
    for value in uses.keys() & set(body.program.inputs):
        places.setdefault([*line_of(body, value)][-1], set()).update(uses[value])
    for gradient, owner in body.owners.items():
        line = _alone(producer.get(gradient), producer, readers)
        below = [layer for layer in places.get(owner, ()) if line and layer <= of[line[0]]]
        made = {value for eqn in line for value in eqn.outputs}
        needed = [v for eqn in line for v in eqn.operands if v not in made and (v in producer or v in uses)]
        there = (below and max(below) in uses.get(v, {of[e] for e in readers[v] if e not in line}) for v in needed)
        if below and all(there):
            of.update(dict.fromkeys(line, max(below)))


def _alone(
    eqn: Equation | None, producer: Mapping[Value, Equation], readers: Mapping[Value, Sequence[Equation]]
) -> list[Equation]:
    """An equation and those before it, as long as each is read by the next alone."""
    line: list[Equation] = []
    while eqn is not None:
        line.append(eqn)
        made = [producer[value] for value in eqn.operands if value in producer]
        only = len(made) == 1 and all(len(readers[value]) == 1 for value in made[0].outputs if value in readers)
        eqn = made[0] if only else None
    return line


def _with_readers(
    kept: Sequence[Equation],
    falling: Sequence[Equation],
    of: dict[Equation, int],
    uses: Mapping[Value, frozenset[int]],
) -> None:
    highest: dict[Value, int] = {}
    for eqn in falling:
        _note(eqn, highest, of)
    for eqn in reversed(kept):
        reader = max(highest.get(value, 0) for value in eqn.outputs)
        places = uses.get(eqn.outputs[0], frozenset([reader]))
        of[eqn] = max((layer for layer in places if layer <= reader), default=min(places))
        _note(eqn, highest, of)


def _note(eqn: Equation, highest: dict[Value, int], of: Mapping[Equation, int]) -> None:
    """Notes the highest layer that reads each value."""
    for value in eqn.operands:
        highest[value] = max(highest.get(value, 0), of[eqn])


def _early(kept: Sequence[Equation], falling: Sequence[Equation], of: Mapping[Equation, int]) -> set[Equation]:
    """Those of ``kept`` that a higher layer needs, directly or not."""
    highest: dict[Value, int] = {}
    early: set[Equation] = set()
    wanted: set[Value] = set()
    for eqn in falling:
        _note(eqn, highest, of)
    for eqn in reversed(kept):
        if any(highest.get(v, 0) > of[eqn] or v in wanted for v in eqn.outputs):
            early.add(eqn)
            wanted.update(eqn.operands)
        _note(eqn, highest, of)
    return early
