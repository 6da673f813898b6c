"""A timeline as text and as SVG: one row per device, time to the right."""

from __future__ import annotations

from autopar.solver.schedule.data import Kind
from autopar.solver.schedule.simulate import Event, Timeline

MOST_COLUMNS = 200
# Fill of the boxes; the later of a device's stages are drawn lighter.
COLOURS = {Kind.FORWARD: "#4c78a8", Kind.BACKWARD: "#f58518", Kind.WEIGHT: "#54a24b"}
ROW_PX, LABEL_PX = 24, 70


def label(timeline: Timeline, event: Event) -> str:
    """``F3``, or ``F3.5`` (microbatch 3, stage 5) where a device holds several stages."""
    several = len(timeline.schedule.stages_of(event.device)) > 1
    stage = f".{event.task.stage}" if several else ""
    return f"{event.task.kind}{event.task.microbatch}{stage}"


def draw_text(timeline: Timeline, column_s: float | None = None) -> str:
    """One line per device; ``~`` goes on with a task, ``.`` is idle time.

    Args:
        timeline: what to draw.
        column_s: seconds per column; the shortest task unless given, more where that makes too many columns.

    >>> from autopar.solver.schedule import TaskCosts, make_schedule, simulate
    >>> print(draw_text(simulate(make_schedule("1f1b", 2, 2), TaskCosts.uniform(2, 1.0, 1.0, 0.0))))
    device 0 |F0 F1 .  B0 .  B1
    device 1 |.  F0 B0 F1 B1 .
    """
    lengths = [e.end_s - e.start_s for e in timeline.tasks if e.end_s > e.start_s]
    column_s = column_s or max(min(lengths, default=1.0), timeline.makespan_s / MOST_COLUMNS)
    n_columns = max(1, round(timeline.makespan_s / column_s))
    width = max(len(label(timeline, event)) for event in timeline.tasks) + 1
    digits = len(str(timeline.schedule.n_devices - 1))
    rows = []
    for device, events in enumerate(timeline.by_device):
        cells = ["."] * n_columns
        for event in events:
            first, last = round(event.start_s / column_s), round(event.end_s / column_s)
            for column in range(first, min(last, n_columns)):
                cells[column] = label(timeline, event) if column == first else "~"
        rows.append(f"device {device:{digits}d} |" + "".join(cell.ljust(width) for cell in cells).rstrip())
    return "\n".join(rows)


def draw_svg(timeline: Timeline, width_px: int = 1200) -> str:
    """The same as a self-contained SVG element; hovering a box names its task and times."""
    scale = (width_px - LABEL_PX) / timeline.makespan_s if timeline.makespan_s else 1.0
    height_px = ROW_PX * timeline.schedule.n_devices
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width_px} {height_px}" '
        'font-family="sans-serif" font-size="10">'
    ]
    for device, events in enumerate(timeline.by_device):
        middle = ROW_PX * device + ROW_PX * 0.65
        parts.append(f'<text x="2" y="{middle:g}">device {device}</text>')
        parts += [_box(timeline, event, scale, middle) for event in events if event.end_s > event.start_s]
    return "\n".join([*parts, "</svg>"])


def _box(timeline: Timeline, event: Event, scale: float, middle: float) -> str:
    left, wide = LABEL_PX + event.start_s * scale, (event.end_s - event.start_s) * scale
    stages = timeline.schedule.stages_of(event.device)
    opacity = 1.0 - 0.6 * stages.index(event.task.stage) / len(stages)
    title = f"{event.task}: {event.start_s:.6g} s to {event.end_s:.6g} s"
    text = label(timeline, event)
    shown = f'<text x="{left + 2:.2f}" y="{middle:g}" fill="white">{text}</text>' if wide > 6 * len(text) else ""
    return (
        f'<g><title>{title}</title><rect x="{left:.2f}" y="{ROW_PX * event.device + 2}" width="{wide:.2f}" '
        f'height="{ROW_PX - 4}" fill="{COLOURS[event.task.kind]}" fill-opacity="{opacity:.2f}"/>{shown}</g>'
    )
