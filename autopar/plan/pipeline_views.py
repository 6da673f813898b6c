"""The plan of a pipeline in a terminal and in a notebook: one row a stage, then what was not chosen."""

from collections.abc import Iterator
from html import escape as html_escape

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.plan.figures import certificate, nbytes, seconds
from autopar.plan.html import STYLE, table_of
from autopar.plan.pipeline import PipelinePlan
from autopar.plan.terminal import table

STAGE_COLUMNS = "stage|layers|place|mesh|forward|backward|once|bubble|memory|held|sent"
NUMBERS = "stage|place|forward|backward|once|bubble|memory|held|sent"
TITLE = "stages: forward and backward of one microbatch, the rest of a step; most activations held; bytes to the next"


def headline(plan: PipelinePlan) -> list[tuple[str, str]]:
    """Name and value of the figures that come first."""
    chunks = f", {plan.chunks} stages on each submesh" if plan.chunks > 1 else ""
    rows = [
        ("pipeline", f"{len(plan.stages)} stages on {plan.n_devices} devices ({plan.hardware or 'given costs'})"),
        ("order", f"{plan.schedule}, {plan.microbatches} microbatches{chunks}"),
        ("step", f"{seconds(plan.step_s)}, {bubble_share(plan):.0%} of the devices' time in bubbles"),
        ("memory", f"{nbytes(plan.peak_bytes)} a device at the peak"),
        ("stages", "; ".join(dict.fromkeys(certificate(stage.plan) for stage in plan.stages))),
    ]
    if plan.remat:
        rows.append(("remat", f"forward again before backward in stages {', '.join(map(str, sorted(plan.remat)))}"))
    asked = [f"preset {plan.preset}"] if plan.preset else []
    asked += [f"pin {pattern}={spec}" for pattern, spec in plan.pins]
    if asked:
        rows.append(("under", ", ".join(asked)))
    if plan.seconds:
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in plan.seconds.items())
        rows.append(("planned in", f"{sum(plan.seconds.values()):.1f} CPU seconds: {parts}"))
    return rows


def bubble_share(plan: PipelinePlan) -> float:
    """The share of a step in which devices wait, over all of them."""
    idle_s = sum(s.prediction.bubble_s * s.plan.mesh.n_devices for s in plan.stages)
    return idle_s / (plan.step_s * plan.n_devices) if plan.step_s else 0.0


def stage_rows(plan: PipelinePlan) -> Iterator[tuple[str, ...]]:
    """The cells of each stage."""
    for index, (stage, (first, last)) in enumerate(zip(plan.stages, plan.layers, strict=True)):
        p = stage.prediction
        yield (
            str(index),
            str(first) if first == last else f"{first}-{last}",
            str(stage.device),
            str(stage.plan.mesh),
            seconds(p.forward_s),
            seconds(p.backward_s + p.weight_s),
            seconds(p.once_s),
            seconds(p.bubble_s),
            nbytes(p.peak_bytes),
            str(p.in_flight),
            nbytes(p.sent_bytes),
        )


def runner_up_rows(plan: PipelinePlan) -> Iterator[tuple[str, str, str]]:
    """Price, by how much it is higher, and what differs."""
    for other in plan.runner_ups:
        yield seconds(other.step_s), f"{other.slower:+.1%}", "; ".join(other.differences)


def pipeline_page(plan: PipelinePlan) -> RenderableType:
    """Everything about a pipeline that fits a page."""
    head = Table.grid(padding=(0, 2))
    for name, value in headline(plan):
        head.add_row(Text(name, style="bold"), value)
    stages = table(TITLE, STAGE_COLUMNS, NUMBERS)
    for row in stage_rows(plan):
        stages.add_row(*row)
    parts: list[RenderableType] = [head, stages]
    if plan.runner_ups:
        others = table("runner-ups, as the search prices them", "step|slower|differences", "step|slower")
        for row in runner_up_rows(plan):
            others.add_row(*row)
        parts.append(others)
    return Group(*parts)


def html_page(plan: PipelinePlan) -> str:
    """The same in a notebook, the plan of each stage folded."""
    rows = "".join(f"<tr><th>{name}</th><td>{html_escape(value)}</td></tr>" for name, value in headline(plan))
    columns = [f"#{name}" if name in NUMBERS.split("|") else name for name in STAGE_COLUMNS.split("|")]
    cells = (tuple(map(html_escape, row)) for row in stage_rows(plan))
    parts = [f"<table>{rows}</table>", table_of(TITLE, columns, cells)]
    if plan.runner_ups:
        others = (tuple(map(html_escape, row)) for row in runner_up_rows(plan))
        parts.append(table_of("runner-ups, as the search prices them", ("#step", "#slower", "differences"), others))
    for index, stage in enumerate(plan.stages):
        parts.append(f"<details><summary>stage {index}</summary>{stage.plan._repr_html_()}</details>")
    return f'<div class="autopar"><style>{STYLE}</style>{"".join(parts)}</div>'
