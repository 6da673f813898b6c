"""Stages that are alike: one of them is planned, and the plans of the others are the same under their own names.

A deep model has stages of equally many equal layers: without this each of them would be laid out, solved and priced.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

from autopar.api.staging.kinds import Part, structure
from autopar.ir.fingerprint import fingerprint
from autopar.ir.program import Program, Value
from autopar.plan import Plan


def likeness(part: Part, shown: dict[int, str]) -> Hashable | None:
    """Equal for stages that have the same plan but for names; None for one with loops inside, which is like no other.

    Args:
        part: the stage and the cut that it is from.
        shown: what parameters and avals look like, by identity, as far as that was asked before.
    """
    stage, program = part.stage, part.stage.program
    if any(eqn.bodies for eqn in program.equations):
        return None
    text, number = structure(program.equations, shown)
    varying, maker = part.stages.varying, part.stages.maker
    inputs = tuple((number.get(v), v in varying, maker.get(v, -1) < part.index) for v in program.inputs)
    outputs = tuple(number.get(v) if isinstance(v, Value) else repr(v) for v in program.outputs)
    tags = tuple(map(stage.tags.get, program.equations))
    summed = frozenset((number[value], monoid) for value, monoid in stage.summed.items())
    sent = frozenset(number[value] for value in stage.sent)
    return text, inputs, outputs, tags, stage.state, summed, sent, stage.scatters, stage.rematerialised


@dataclass(frozen=True, eq=False)
class Names:
    """What a program calls the values and the equations of another that is like it.

    Attributes:
        values: name here, by name there.
        equations: the same for equations.
    """

    values: Mapping[str, str]
    equations: Mapping[str, str]

    @staticmethod
    def of(there: Program, here: Program) -> "Names":
        """By their places in the two programs."""
        values = dict(zip(_names(there), _names(here), strict=True))
        pairs = zip(there.equations, here.equations, strict=True)
        return Names(values, {one.name: other.name for one, other in pairs})

    def plan(self, plan: Plan, here: Program) -> Plan:
        """The plan of the one as a plan of the other."""
        return replace(
            plan,
            fingerprint=fingerprint(here),
            arguments=tuple(replace(arg, name=self.values[arg.name]) for arg in plan.arguments),
            values={self.values[name]: spec for name, spec in plan.values.items()},
            equations={self.equations[name]: splits for name, splits in plan.equations.items()},
            views={
                self.values[name]: tuple(
                    replace(view, readers=tuple(map(self.equations.__getitem__, view.readers))) for view in views
                )
                for name, views in plan.views.items()
            },
            runtime=None,
        )


def _names(program: Program) -> list[str]:
    made = (value for eqn in program.equations for value in eqn.outputs)
    return [value.name for value in (*program.inputs, *made)]
