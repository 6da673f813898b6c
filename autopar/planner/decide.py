"""From the solver's choice to a plan: the spec of every value and the strategy of every equation, by name."""

from collections.abc import Mapping, Sequence

from autopar.ir.program import Constant, Value
from autopar.plan import View
from autopar.planner.graph import Graph, Group, Unit
from autopar.planner.intra import Formulation
from autopar.planner.space import Space
from autopar.sharding.factors import letters
from autopar.spec import Spec


class Decisions:
    """The choice of every unit, read back as specs and splits.

    Args:
        graph: the units.
        formulation: what the solver's nodes mean.
        strategies: the chosen label of every node.
    """

    def __init__(self, graph: Graph, formulation: Formulation, strategies: Sequence[int]) -> None:
        self.graph, self.space = graph, formulation.space
        self.label: Mapping[Unit, int] = dict(zip(formulation.units, strategies, strict=True))

    def spec(self, value: Value) -> Spec | None:
        """The layout in which a value is made; None for a free value."""
        unit = self.graph.unit(value)
        return None if unit is None else self.space.output(unit, value)[self.label[unit]]

    def values(self) -> dict[str, Spec]:
        """Layouts by name."""
        made = (value for eqn in self.graph.program.equations for value in eqn.outputs)
        specs = ((value, self.spec(value)) for value in (*self.graph.program.inputs, *made))
        return {value.name: spec for value, spec in specs if spec is not None}

    def equations(self) -> dict[str, tuple[tuple[str, str | int], ...]]:
        """What each axis splits, by equation; axes that do nothing are left out."""
        found = {}
        for position, eqn in enumerate(self.graph.program.equations):
            unit = self.graph.unit_of[position]
            if unit is not None:
                found[eqn.name] = self._splits(unit, self.space)
        return found

    def _splits(self, unit: Unit, space: Space) -> tuple[tuple[str, str | int], ...]:
        if unit.kind == "equation":
            chosen = space.strategies(self.graph.rules[unit.position])[self.label[unit]]
            return tuple((axis, split) for axis, split in chosen.splits if split is not None)
        spec = space.specs(unit.shape)[self.label[unit]]
        factors = letters(unit.shape)
        return tuple((axis, dim[0]) for dim, axes in zip(factors, spec.dims, strict=True) for axis in axes)

    def outputs(self) -> tuple[Spec, ...]:
        """The layout of every result of the program."""
        specs = []
        for atom, unit in zip(self.graph.program.outputs, self.graph.outputs, strict=True):
            if unit is not None:
                specs.append(self.space.specs(unit.shape)[self.label[unit]])
            elif isinstance(atom, Constant):
                specs.append(Spec.replicated(len(atom.aval.shape)))
            else:
                specs.append(Spec.replicated(len(atom.shape)))
        return tuple(specs)

    def views(self) -> dict[str, tuple[View, ...]]:
        """Copies that several equations share: one for each group whose layout is not the producer's."""
        found: dict[str, tuple[View, ...]] = {}
        for value, groups in self.graph.groups.items():
            made = self.spec(value)
            views = tuple(view for group in groups if (view := self._view(value, group, made)) is not None)
            if views:
                found[value.name] = views
        return found

    def _view(self, value: Value, group: Group, made: Spec | None) -> View | None:
        equations = self.graph.program.equations
        readers = [use for use in group.uses if use.position < len(equations)]
        if made is None or not readers:
            return None
        if group.anchor is not None:
            spec = self.space.specs(value.shape)[self.label[group.anchor]]
        else:
            units = {unit for use in readers if (unit := self.graph.reader(use)) is not None}
            if len({use.position for use in readers}) < 2 or len(units) > 1:
                return None  # one equation may read its operands in two layouts
            (unit,) = units
            spec = self.space.input(unit, readers[0])[self.label[unit]]
        names = tuple(dict.fromkeys(equations[use.position].name for use in readers))
        return None if spec == made else View(spec, names)
