"""What the dimensions of a program mean: which are the batch, the sequence, the residual stream, the experts.

Presets speak of these; a program has only equations. Two dimensions that carry one factor of an equation are
one *dimension of the program* (union-find over the factors of all rules), as names are inferred in einsum
notation. So the width of a residual network is one dimension through all its layers, and so is the batch, from
the arguments to the dropout masks that are made without them.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from autopar.ir.program import Equation, Value
from autopar.planner.graph import HEAVY, Graph, Unit
from autopar.planner.space import Space
from autopar.sharding.factors import ShardingRule, letters
from autopar.sharding.strategies import Split

PASSES_ON = ("convert_element_type", "optimization_barrier", "copy")
"""Equations whose result is still the parameter that they read."""


@dataclass(frozen=True)
class Flow:
    """Labels of a program: "batch", "seq", "stream" (the width of the residual stream), "expert", or none.

    Attributes:
        factors: for each equation, the label of each labelled factor.
        dims: for each value, the labels of its dimensions ("" where there is none).
        parameters: state that meets the batch in some equation; other state belongs to the optimizer.
        experts: parameters whose dimension 0 is a batch factor of a contraction (one matrix for each expert).
    """

    factors: tuple[dict[str, str], ...]
    dims: dict[Value, tuple[str, ...]]
    parameters: frozenset[Value]
    experts: frozenset[Value]

    def touches(self, graph: Graph, unit: Unit) -> bool:
        """Whether a unit handles values that have a batch dimension, or reduces over one."""
        if unit.kind in ("equation", "cluster"):
            return any("batch" in self.factors[i].values() for i in unit.equations)
        assert unit.value is not None
        return "batch" in self.dims.get(unit.value, ())

    def kinds(self, graph: Graph, space: Space, unit: Unit) -> list[dict[str, Split]]:
        """For every choice of a unit, what each axis does: a label, "other", a linear group, or None."""
        if unit.kind == "equation":
            labels = self.factors[unit.position]
            chosen = space.strategies(graph.rules[unit.position])
            return [{axis: _kind(split, labels) for axis, split in s.splits} for s in chosen]
        if unit.kind == "cluster":
            names = [dim[0] if dim else "" for dim in letters(unit.shape)]
            labels = self.factors[unit.position]
            kinds = [labels.get(name, "other") for name in names]
        else:
            assert unit.value is not None
            kinds = [label or "other" for label in self.dims.get(unit.value, ("",) * len(unit.shape))]
        found = []
        for spec in space.specs(unit.shape):
            row: dict[str, Split] = dict.fromkeys(space.mesh.names)
            row.update({axis: kind for dim, kind in zip(spec.dims, kinds, strict=True) for axis in dim})
            found.append(row)
        return found

    def one_per_expert(self, graph: Graph, unit: Unit) -> bool:
        """Whether a unit is a contraction of every expert's own operands."""
        if unit.kind != "equation" or graph.program.equations[unit.position].primitive.name not in HEAVY:
            return False
        expert = {name for name, label in self.factors[unit.position].items() if label == "expert"}
        rule = graph.rules[unit.position]
        return all(any(expert & set(dim) for dim in layout) for layout in (*rule.operands, *rule.results))


def _kind(split: Split, labels: dict[str, str]) -> Split:
    return labels.get(split, "other") if isinstance(split, str) else split


def flow_of(graph: Graph) -> Flow:
    """Names the dimensions of a program."""
    dimensions = _Dimensions(graph)
    labels: dict[int, str] = {}
    for name, places in (("batch", _batch(graph)), ("seq", _sequence(graph))):
        for value, dim in places:
            labels.setdefault(dimensions.of(value, dim), name)
    flow = _labelled(graph, dimensions, labels)
    for value in flow.experts:
        labels.setdefault(dimensions.of(value, 0), "expert")
    for value in _residual_sums(graph, flow):
        for dim in range(len(value.shape)):
            labels.setdefault(dimensions.of(value, dim), "stream")
    return _labelled(graph, dimensions, labels)


def stages_of(graph: Graph) -> tuple[frozenset[str], ...]:
    """For every equation, the factors that are the stages of a pipeline: the dimension that a shift moves along."""
    dimensions = _Dimensions(graph)
    shifts = [eqn for eqn in graph.program.equations if eqn.primitive.name == "stage_shift"]
    roots = {dimensions.of(eqn.outputs[0], 0) for eqn in shifts}
    return tuple(
        frozenset(name for name, root in dimensions.factors(position).items() if root in roots)
        for position in range(len(graph.program.equations))
    )


class _Dimensions:
    """Union-find over the dimensions of all values."""

    def __init__(self, graph: Graph) -> None:
        self._first: dict[Value, int] = {}
        self._parent: list[int] = []
        self._factor: list[dict[str, int]] = []
        for eqn, rule in zip(graph.program.equations, graph.rules, strict=True):
            self._factor.append(self._unite(eqn, rule))
        for i, o in graph.state:
            result = graph.program.outputs[o]
            if isinstance(result, Value):
                for dim in range(len(result.shape)):
                    self._join(self._node(result, dim), self._node(graph.program.inputs[i], dim))

    def of(self, value: Value, dim: int) -> int:
        """The dimension of the program that a dimension of a value is."""
        return self._find(self._node(value, dim))

    def factors(self, position: int) -> dict[str, int]:
        """That of each factor of an equation."""
        return {name: self._find(node) for name, node in self._factor[position].items()}

    def _unite(self, eqn: Equation, rule: ShardingRule) -> dict[str, int]:
        found: dict[str, int] = {}
        sides = (*zip(eqn.inputs, rule.operands, strict=True), *zip(eqn.outputs, rule.results, strict=True))
        for atom, layout in sides:
            if isinstance(atom, Value):
                for dim, names in enumerate(layout):
                    if names:  # a product of factors is known by its major one
                        node = self._node(atom, dim)
                        self._join(node, found.setdefault(names[0], node))
        return found

    def _node(self, value: Value, dim: int) -> int:
        if value not in self._first:
            self._first[value] = len(self._parent)
            self._parent.extend(range(len(self._parent), len(self._parent) + len(value.shape)))
        return self._first[value] + dim

    def _find(self, node: int) -> int:
        while self._parent[node] != node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _join(self, a: int, b: int) -> None:
        a, b = self._find(a), self._find(b)
        self._parent[max(a, b)] = min(a, b)


def _data(graph: Graph) -> list[Value]:
    """The arguments that have the batch as dimension 0."""
    program = graph.program
    state = {program.inputs[i] for i, _ in graph.state}
    data = [value for value in program.arguments if value not in state and value.shape]
    common = Counter(value.shape[0] for value in data).most_common(1)
    return [value for value in data if value.shape[0] == common[0][0]]


def _batch(graph: Graph) -> list[tuple[Value, int]]:
    return [(value, 0) for value in _data(graph)]


def _sequence(graph: Graph) -> list[tuple[Value, int]]:
    return [(value, 1) for value in _data(graph) if len(value.shape) > 1 and value.shape[1] > 1]


def _labelled(graph: Graph, dimensions: _Dimensions, labels: dict[int, str]) -> Flow:
    program = graph.program
    factors = []
    for position in range(len(program.equations)):
        named = dimensions.factors(position).items()
        factors.append({name: labels[root] for name, root in named if root in labels})
    values = (*program.inputs, *(value for eqn in program.equations for value in eqn.outputs))
    dims = {}
    for value in values:
        row = tuple(labels.get(dimensions.of(value, dim), "") for dim in range(len(value.shape)))
        if any(row):
            dims[value] = row
    state = {program.inputs[i] for i, _ in graph.state}
    parameters = _parameters(graph, factors, state)
    return Flow(tuple(factors), dims, parameters, _experts(graph, parameters))


def _parameters(graph: Graph, factors: list[dict[str, str]], state: set[Value]) -> frozenset[Value]:
    """State from which a value flows into an equation of the batch, walking the program backwards."""
    meets: set[Value] = set()
    for eqn, labels in zip(reversed(graph.program.equations), reversed(factors), strict=True):
        if "batch" in labels.values() or any(value in meets for value in eqn.outputs):
            meets.update(eqn.operands)
    return frozenset(value for value in state if value in meets and value.shape)


def _experts(graph: Graph, parameters: Iterable[Value]) -> frozenset[Value]:
    """Parameters that a contraction takes one matrix at a time, which neither is summed nor spread."""
    source = {value: value for value in parameters if len(value.shape) >= 3}
    found = set()
    for eqn, rule in zip(graph.program.equations, graph.rules, strict=True):
        for atom, layout in zip(eqn.inputs, rule.operands, strict=True):
            parameter = source.get(atom) if isinstance(atom, Value) else None
            if parameter is None or not layout or not layout[0]:
                continue
            everywhere = (*rule.operands, *rule.results)
            if eqn.primitive.name == "dot_general" and all(layout[0][0] in sum(v, ()) for v in everywhere):
                found.add(parameter)
            elif eqn.primitive.name in PASSES_ON:
                source[eqn.outputs[0]] = parameter
    return frozenset(found)


def _residual_sums(graph: Graph, flow: Flow) -> list[Value]:
    """Sums ``x + f(x)`` of two values of the batch that come from different contractions (He et al. 2016)."""
    origins: dict[Value, int] = {}  # contractions as bits
    found = []
    for position, (eqn, labels) in enumerate(zip(graph.program.equations, flow.factors, strict=True)):
        if eqn.primitive.name in (*HEAVY, "gather"):
            origins.update(dict.fromkeys(eqn.outputs, 1 << position))
            continue
        each = [origins.get(value, 0) for value in eqn.operands]
        everything = 0
        for one in each:
            everything |= one
        origins.update(dict.fromkeys(eqn.outputs, everything))
        if eqn.primitive.name in ("add", "add_any") and "batch" in labels.values() and len(each) == 2:
            same = all(value.shape == eqn.outputs[0].shape for value in eqn.operands)
            if same and all(each) and not each[0] & each[1]:
                found.append(eqn.outputs[0])
    return found
