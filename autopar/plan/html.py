"""A plan in a notebook: one self-contained piece of HTML, without scripts or links."""

from collections.abc import Iterable, Sequence
from html import escape

from autopar.plan.data import Plan
from autopar.plan.figures import (
    Row,
    argument_rows,
    certificate,
    flops,
    memory_by_cause,
    nbytes,
    restrictions,
    seconds,
    sent,
)
from autopar.spec import Spec

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2")
"""One for each mesh axis, in mesh order."""

STYLE = """
.autopar {font-family: system-ui, sans-serif; font-size: 13px; line-height: 1.45; max-width: 72em}
.autopar h4 {margin: 1em 0 .3em}
.autopar table {border-collapse: collapse}
.autopar th, .autopar td {padding: .12em .9em .12em 0; text-align: left; vertical-align: top}
.autopar th {border-bottom: 1px solid currentColor; font-weight: 600}
.autopar .n {text-align: right; font-variant-numeric: tabular-nums}
.autopar code {font-size: 12px; background: none}
.autopar .axis {border-radius: 3px; color: #fff; padding: 0 .35em; margin-right: .15em}
.autopar .bar {display: flex; height: 1.1em; width: 36em; max-width: 100%; margin: .2em 0}
.autopar .bar span {height: 100%}
.autopar .key {margin-right: 1em; white-space: nowrap}
.autopar .dot {display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em}
"""


def page(plan: Plan) -> str:
    """Mesh, time and memory by cause, the layout of every argument, collectives."""
    p = plan.prediction
    title = f"{seconds(p.step_s)} a step on {plan.mesh.n_devices} devices ({plan.hardware or 'given costs'})"
    time_s = {"compute": p.compute_s, "exposed communication": p.step_s - p.compute_s}
    parts = [
        f"<h4>{escape(title)}</h4>",
        _mesh(plan),
        f"<p>{escape(_summary(plan))}</p>",
        _bar(f"step: {seconds(p.step_s)}", {k: (v, seconds(v)) for k, v in time_s.items()}),
        _bar(
            f"memory of a device at the peak: {nbytes(p.peak_bytes)}{_on_chip(plan)}",
            {k: (v, nbytes(v)) for k, v in memory_by_cause(plan).items()},
        ),
        _arguments(plan),
        _collectives(plan),
    ]
    return f'<div class="autopar"><style>{STYLE}</style>{"".join(parts)}</div>'


def _on_chip(plan: Plan) -> str:
    held = plan.prediction.on_chip_bytes
    return f", besides {nbytes(held)} on the chip" if held else ""


def _summary(plan: Plan) -> str:
    texts = [f"{flops(plan.prediction.flops)} a device", certificate(plan), *restrictions(plan)]
    unruled = ", ".join(name for name, _ in plan.solution.replicated_primitives)
    return "; ".join([*texts, f"without a rule: {unruled}"] if unruled else texts)


def _mesh(plan: Plan) -> str:
    axes = (f"{_axis(plan, name)} {size}" for name, size in plan.mesh.axes)
    return f"<div>mesh: {' × '.join(axes)}</div>"


def _axis(plan: Plan, name: str) -> str:
    color = COLORS[plan.mesh.names.index(name) % len(COLORS)]
    return f'<span class="axis" style="background:{color}">{escape(name)}</span>'


def _spec(plan: Plan, spec: Spec) -> str:
    """Each dimension's axes in their colours, a dash for a whole one."""
    dims = ("".join(_axis(plan, axis) for axis in dim) or "–" for dim in spec.dims)
    partial = "".join(f" + partial {_axis(plan, axis)}" for axis in sorted(spec.partial))
    return f"[{', '.join(dims)}]{partial}"


def _bar(title: str, shares: dict[str, tuple[float, str]]) -> str:
    """A bar whose pieces are as long as their share, and a key."""
    total = sum(value for value, _ in shares.values()) or 1.0
    pieces, key = [], []
    for i, (name, (value, text)) in enumerate(shares.items()):
        color = COLORS[i % len(COLORS)]
        pieces.append(f'<span style="width:{100 * value / total:.2f}%;background:{color}"></span>')
        dot = f'<span class="dot" style="background:{color}"></span>'
        key.append(f'<span class="key">{dot}{escape(name)} {escape(text)}</span>')
    return f'<h4>{escape(title)}</h4><div class="bar">{"".join(pieces)}</div><div>{"".join(key)}</div>'


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns whose names start with ``#`` hold numbers; cells are HTML."""
    classes = [' class="n"' if name.startswith("#") else "" for name in columns]
    heads = zip(columns, classes, strict=True)
    head = "".join(f"<th{kind}>{escape(name.lstrip('#'))}</th>" for name, kind in heads)
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, classes, strict=True))}</tr>" for row in rows
    )
    return f"<h4>{escape(title)}</h4><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _arguments(plan: Plan) -> str:
    shown, alike = argument_rows(plan)
    columns = ("name", "#count", "type", "spec", "#a device")
    first = table_of("arguments", columns, (_cells(plan, row) for row in shown))
    if not alike:
        return first
    count = sum(row.count for row in alike)
    rest = table_of("", columns, (_cells(plan, row) for row in alike))
    summary = f"{count} arrays of optimizer state that lie as their parameters"
    return f"{first}<details><summary>{summary}</summary>{rest}</details>"


def _cells(plan: Plan, row: Row) -> tuple[str, ...]:
    argument = row.argument
    shape = f"{argument.dtype}({', '.join(map(str, argument.shape))})"
    return (
        f"<code>{escape(row.name)}</code>",
        str(row.count),
        f"<code>{escape(shape)}</code>",
        _spec(plan, argument.spec),
        nbytes(row.nbytes),
    )


def _collectives(plan: Plan) -> str:
    rows = sent(plan)
    if not rows:
        return "<h4>nothing is sent</h4>"
    cells = ((row.kind, escape(row.axes), str(row.count), nbytes(row.nbytes)) for row in rows)
    return table_of("collectives of a step", ("kind", "axes", "#count", "#sent by a device"), cells)
