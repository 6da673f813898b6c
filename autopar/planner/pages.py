"""Differences and explanations as Rich tables, for the terminal and for ``print``."""

from rich.console import Group, RenderableType
from rich.table import Table

from autopar.plan.figures import flops, nbytes, seconds
from autopar.plan.terminal import escape, table
from autopar.planner.diff import Figure, Module, PlanDiff
from autopar.planner.explain import Explanation
from autopar.spec import Spec

MODULES_SHOWN = 12
"""How many modules a difference lists, the most changed ones first."""


def diff_page(found: PlanDiff) -> RenderableType:
    """The figures of both plans, where layouts differ, and what else is sent."""
    if found.empty:
        return "the plans decide the same"
    parts: list[RenderableType] = ["mesh " + " -> ".join(dict.fromkeys(found.mesh))]
    parts += [_figures_table("predicted", found.figures), _modules_table(found.modules)]
    return Group(*parts, _figures_table("bytes sent by a device", found.collectives))


def _figures_table(title: str, figures: tuple[Figure, ...]) -> Table:
    shown = table(title, "|before|after|change", "before|after|change")
    for figure in figures:
        text, signed = (seconds, _signed_s) if figure.name.endswith("_s") else (nbytes, _signed_bytes)
        if figure.name == "flops":
            text, signed = flops, _signed_flops
        shown.add_row(figure.name, text(figure.before), text(figure.after), signed(figure.change))
    return shown


def _modules_table(modules: tuple[Module, ...]) -> Table:
    """Values of one primitive that change alike share a row."""
    shown = table("layouts", "module|value|before|after")
    for module in modules[:MODULES_SHOWN]:
        count = f"{module.name or 'outside modules'} ({len(module.changes)} of {module.n_values})"
        rows: dict[tuple[str, Spec | None, Spec | None], list[str]] = {}
        for change in module.changes:
            name = change.name.rpartition("/")[2]
            rows.setdefault((name.partition(":")[0], change.before, change.after), []).append(name)
        for (base, before, after), names in rows.items():
            name = names[0] if len(names) == 1 else f"{base} ({len(names)} times)"
            shown.add_row(count, name, _spec(before), _spec(after))
            count = ""
    if len(modules) > MODULES_SHOWN:
        shown.add_row(f"and {len(modules) - MODULES_SHOWN} modules more", "", "", "")
    return shown


def _spec(spec: Spec | None) -> str:
    return "absent" if spec is None else escape(str(spec))


def explanation_page(found: Explanation) -> RenderableType:
    """Where the value is read, and what each other layout would add."""
    return Group(escape(_why(found)), _readers_table(found), _alternatives_table(found))


def _why(found: Explanation) -> str:
    plan, name = found.plan, found.name
    shapes = {argument.name: argument.shape for argument in plan.arguments}
    shape = f" of shape {shapes[name]}" if name in shapes else ""
    splits = ", ".join(f"{axis} splits {split}" for axis, split in plan.equations.get(name, ()))
    return f"{name}{shape} lies as {plan.values[name]} on mesh {plan.mesh}{f'; {splits}' if splits else ''}"


def _readers_table(found: Explanation) -> Table:
    """The equations that read the value, what each mesh axis splits in them, and the copy that they read."""
    plan, name = found.plan, found.name
    shown = table(f"equations that read {name}", "equation|what each axis splits|from a copy laid out as")
    copies = {reader: view.spec for view in plan.views.get(name, ()) for reader in view.readers}
    for reader in found.readers:
        splits = ", ".join(f"{axis}: {split}" for axis, split in plan.equations.get(reader, ()))
        shown.add_row(reader, splits, escape(str(copies[reader])) if reader in copies else "")
    return shown


def _alternatives_table(found: Explanation) -> Table:
    figures = "step|compute|communication|peak memory"
    shown = table(f"layouts of {found.name}, and what each adds to the step", f"spec|{figures}|", figures)
    for one in found.alternatives:
        if one.refused:
            shown.add_row(escape(str(one.spec)), "", "", "", "", f"none: {one.refused}")
            continue
        times = (_signed_s(x) for x in (one.objective_s, one.compute_s, one.communication_s))
        shown.add_row(escape(str(one.spec)), *times, _signed_bytes(one.peak_bytes), "chosen" if one.chosen else "")
    return shown


def _signed_s(value_s: float) -> str:
    return f"+{seconds(value_s)}" if value_s >= 1e-12 else "0" if value_s > -1e-12 else f"-{seconds(-value_s)}"


def _signed_bytes(value: float) -> str:
    return "0" if not value else f"{'+' if value > 0 else '-'}{nbytes(abs(value))}"


def _signed_flops(value: float) -> str:
    return "0" if not value else f"{'+' if value > 0 else '-'}{flops(abs(value))}"
