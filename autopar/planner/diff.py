"""What two plans of one step decide differently. Plans alone are enough: no step, no JAX."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autopar.plan import Collective, Plan
from autopar.plan.terminal import as_text
from autopar.spec import Spec


@dataclass(frozen=True)
class Change:
    """A value that the two plans lay out differently.

    Attributes:
        name: of the value.
        before, after: its layouts; None where a plan has no such value.
    """

    name: str
    before: Spec | None
    after: Spec | None


@dataclass(frozen=True)
class Module:
    """Changed values of one module.

    Attributes:
        name: the path that its values share, as ``params/h_0/attn``.
        changes: arguments first, then activations in program order.
        n_values: how many values the module has.
    """

    name: str
    changes: tuple[Change, ...]
    n_values: int


@dataclass(frozen=True)
class Figure:
    """A predicted figure of both plans; ``name`` carries its unit."""

    name: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class PlanDiff:
    """The difference of two plans.

    Attributes:
        same_program: whether both are for one program.
        mesh: the two meshes, as text.
        figures: predictions side by side.
        modules: where layouts differ, most changed first.
        collectives: bytes of each kind and axes, where they differ.
    """

    same_program: bool
    mesh: tuple[str, str]
    figures: tuple[Figure, ...]
    modules: tuple[Module, ...]
    collectives: tuple[Figure, ...]

    @property
    def empty(self) -> bool:
        """Whether the plans decide the same."""
        return self.mesh[0] == self.mesh[1] and not self.modules and not self.collectives

    def __rich__(self) -> Any:
        from autopar.planner import pages

        return pages.diff_page(self)

    def __str__(self) -> str:
        return as_text(self.__rich__())


def diff(before: Plan, after: Plan) -> PlanDiff:
    """Compares two plans by module."""
    return PlanDiff(
        same_program=before.fingerprint == after.fingerprint,
        mesh=(str(before.mesh), str(after.mesh)),
        figures=_figures(before, after),
        modules=_modules(before.values, after.values),
        collectives=_collectives(before.prediction.collectives, after.prediction.collectives),
    )


_FIGURES = ("step_s", "compute_s", "communication_s", "peak_bytes", "state_bytes", "flops")


def _figures(before: Plan, after: Plan) -> tuple[Figure, ...]:
    return tuple(Figure(n, getattr(before.prediction, n), getattr(after.prediction, n)) for n in _FIGURES)


def module_of(name: str) -> str:
    """The module of a value: its name without the last part; empty if it has one part.

    >>> module_of("params/h_0/attn/key/kernel"), module_of("step")
    ('params/h_0/attn/key', '')
    """
    return name.rpartition("/")[0]


def _modules(before: Mapping[str, Spec], after: Mapping[str, Spec]) -> tuple[Module, ...]:
    changes: dict[str, list[Change]] = {}
    sizes: dict[str, int] = {}
    for name in dict.fromkeys((*before, *after)):
        module = module_of(name)
        sizes[module] = sizes.get(module, 0) + 1
        old, new = before.get(name), after.get(name)
        if old != new:
            changes.setdefault(module, []).append(Change(name, old, new))
    found = (Module(name, tuple(rows), sizes[name]) for name, rows in changes.items())
    return tuple(sorted(found, key=lambda module: -len(module.changes)))


def _collectives(before: tuple[Collective, ...], after: tuple[Collective, ...]) -> tuple[Figure, ...]:
    old, new = ({f"{c.kind} {'·'.join(c.axes)}": c.nbytes for c in side} for side in (before, after))
    pairs = (Figure(key, old.get(key, 0.0), new.get(key, 0.0)) for key in dict.fromkeys((*old, *new)))
    return tuple(figure for figure in pairs if figure.change)
