"""A plan in a terminal: Rich tables."""

import io

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.plan.data import Plan
from autopar.plan.figures import Row, argument_rows, headline, memory_by_cause, nbytes, sent

WIDTH = 110
"""Columns of a plan that is printed where nobody knows the terminal."""


def table(title: str, columns: str, right: str = "") -> Table:
    """A plain table; ``columns`` and, of them, those aligned ``right`` are separated by ``|``."""
    found = Table(
        title=f"\n{title}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for name in columns.split("|"):
        aligned = name in right.split("|")
        found.add_column(name, justify="right" if aligned else "left", overflow="fold")
    return found


def as_text(what: RenderableType, width: int = WIDTH) -> str:
    """A renderable as plain text without spaces at the ends of lines."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False).print(what)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def plan_page(plan: Plan) -> RenderableType:
    """Everything about a plan that fits a page."""
    parts: list[RenderableType] = [headline_table(plan), arguments_table(plan), memory_table(plan)]
    parts.append(collectives_table(plan) if plan.prediction.collectives else Text("nothing is sent"))
    if plan.solution.replicated_primitives:
        parts.append(replicated_table(plan))
    return Group(*parts)


def headline_table(plan: Plan) -> Table:
    """Mesh, time, memory, work and certificate."""
    found = Table.grid(padding=(0, 2))
    for name, value in headline(plan):
        found.add_row(Text(name, style="bold"), value)
    return found


def arguments_table(plan: Plan) -> Table:
    """The layout of every argument; those that differ only in a layer's number share a row."""
    shown, alike = argument_rows(plan)
    found = table("arguments", "name|count|shape|spec|per device", "count|per device")
    for row in shown:
        found.add_row(*_cells(row))
    if alike:
        count, total = sum(row.count for row in alike), sum(row.nbytes for row in alike)
        found.add_row("optimizer state, as its parameters", str(count), "", "", nbytes(total))
    return found


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    shape = ", ".join(map(str, row.argument.shape))
    spec = Text(str(row.argument.spec)).plain
    return row.name, str(row.count), f"{row.argument.dtype}({shape})", escape(spec), nbytes(row.nbytes)


def escape(text: str) -> str:
    """Square brackets are not markup here."""
    return text.replace("[", r"\[")


def memory_table(plan: Plan) -> Table:
    """Memory of one device by cause."""
    found = table("memory of a device at the peak", "cause|bytes", "bytes")
    for cause, total in memory_by_cause(plan).items():
        found.add_row(cause, nbytes(total))
    if plan.prediction.on_chip_bytes:
        found.add_row("besides, on the chip", nbytes(plan.prediction.on_chip_bytes))
    return found


def collectives_table(plan: Plan) -> Table:
    """What one device sends in a step."""
    found = table("collectives of a step", "kind|axes|count|per device", "count|per device")
    for row in sent(plan):
        found.add_row(row.kind, row.axes, str(row.count), nbytes(row.nbytes))
    return found


def replicated_table(plan: Plan) -> Table:
    """Primitives that no rule splits."""
    found = table("run whole on every device", "primitive without a rule|first use")
    for name, line in plan.solution.replicated_primitives:
        found.add_row(name, escape(line))
    return found
