"""Where the batch goes: which factors of which equations descend from the batch, the sequence and the experts.

Presets speak of batch, sequence, parameters and experts; a program has only equations. Labels start at the arguments
that are not state (dimension 0 is the batch, dimension 1 the sequence) and follow the factors of the rules.
"""

from collections import Counter
from dataclasses import dataclass

from autopar.ir.program import Value
from autopar.planner.graph import Graph, Unit
from autopar.planner.space import Space
from autopar.sharding.factors import letters
from autopar.sharding.strategies import Split


@dataclass(frozen=True)
class Flow:
    """Labels of a program.

    Attributes:
        factors: for each equation, the label of each labelled factor: "batch" or "seq".
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
        """For every choice of a unit, what each axis does: "batch", "seq", "other", a linear group, or None."""
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


def _kind(split: Split, labels: dict[str, str]) -> Split:
    return labels.get(split, "other") if isinstance(split, str) else split


def flow_of(graph: Graph) -> Flow:
    """Follows batch and sequence from the arguments through the program."""
    program = graph.program
    state = {program.inputs[i] for i, _ in graph.state}
    data = [value for value in program.arguments if value not in state and value.shape]
    batch = Counter(value.shape[0] for value in data).most_common(1)
    dims: dict[Value, tuple[str, ...]] = {
        value: ("batch", *("seq" if i == 0 and value.shape[1] > 1 else "" for i in range(len(value.shape) - 1)))
        for value in data
        if batch and value.shape[0] == batch[0][0]
    }
    factors: list[dict[str, str]] = []
    for eqn, rule in zip(program.equations, graph.rules, strict=True):
        labels: dict[str, str] = {}
        for atom, layout in zip(eqn.inputs, rule.operands, strict=True):
            for dim, label in zip(layout, dims.get(atom, ()), strict=False):  # type: ignore[arg-type]
                if label and dim and labels.get(dim[0]) != "batch":
                    labels[dim[0]] = label
        factors.append(labels)
        for value, layout in zip(eqn.outputs, rule.results, strict=True):
            row = tuple(labels.get(dim[0], "") if dim else "" for dim in layout)
            if any(row):
                dims[value] = row
    parameters = _parameters(graph, tuple(factors), state)
    return Flow(tuple(factors), dims, parameters, _experts(graph, parameters))


def _parameters(graph: Graph, factors: tuple[dict[str, str], ...], state: set[Value]) -> frozenset[Value]:
    """State from which a value flows into an equation of the batch, walking the program backwards."""
    meets: set[Value] = set()
    for eqn, labels in zip(reversed(graph.program.equations), reversed(factors), strict=True):
        if "batch" in labels.values() or any(value in meets for value in eqn.outputs):
            meets.update(eqn.operands)
    return frozenset(value for value in state if value in meets and value.shape)


def _experts(graph: Graph, parameters: frozenset[Value]) -> frozenset[Value]:
    """Parameters that a contraction, possibly after a change of dtype, takes one matrix at a time."""
    source = {value: value for value in parameters if len(value.shape) >= 3}
    found = set()
    for eqn, rule in zip(graph.program.equations, graph.rules, strict=True):
        for atom, layout in zip(eqn.inputs, rule.operands, strict=True):
            parameter = source.get(atom)  # type: ignore[arg-type]
            if parameter is None or not layout or not layout[0]:
                continue
            if eqn.primitive.name == "dot_general" and all(layout[0][0] in sum(v, ()) for v in rule.operands):
                found.add(parameter)
            elif eqn.primitive.name in ("convert_element_type", "optimization_barrier"):
                source[eqn.outputs[0]] = parameter
    return frozenset(found)
