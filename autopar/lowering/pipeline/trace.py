"""When each piece of a pipeline really ran, as a timeline next to the simulated one, and as a trace for Perfetto."""

import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from autopar.ir.stages import Part
from autopar.lowering.pipeline.build import Compiled
from autopar.lowering.pipeline.cut import PipelineError
from autopar.lowering.pipeline.order import PARTS
from autopar.lowering.pipeline.step import ONCE, Call
from autopar.lowering.processes import is_here
from autopar.solver.schedule import Task, Timeline
from autopar.solver.schedule.simulate import Event

KINDS = {part: kind for kind, part in PARTS.items()}


@dataclass(frozen=True)
class Span:
    """One piece on one device of a pipeline.

    Attributes:
        name: as ``F1:3``: forward of stage 1, microbatch 3.
        device: the device of the schedule.
        start_s, end_s: seconds since the step began.
        call: what ran; None where only the name is known.
    """

    name: str
    device: int
    start_s: float
    end_s: float
    call: Call | None = None


@dataclass(frozen=True)
class Measured:
    """One step as it ran.

    Attributes:
        result: of the step.
        spans: every piece that runs on devices of this process, by end.
    """

    result: Any
    spans: tuple[Span, ...]

    def timeline(self, compiled: Compiled) -> Timeline:
        """The tasks of the schedule, as ``simulate`` gives them; to draw, and to compare with it."""
        events = []
        for span in self.spans:
            if span.call is not None and span.call.microbatch != ONCE:
                call = span.call
                task = Task(call.stage, call.microbatch, KINDS[call.tag.part])
                events.append(Event(task, span.device, span.start_s, span.end_s))
        return Timeline(compiled.schedule, tuple(events), (), tuple(compiled.peaks), ())


@dataclass
class _Watch:
    """Waits for the pieces of each device in the order of their dispatch, in one thread a device."""

    began_s: float = field(default_factory=time.perf_counter)
    queues: dict[int, "queue.SimpleQueue[tuple[Call, list[jax.Array], float] | None]"] = field(default_factory=dict)
    threads: list[threading.Thread] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def dispatched(self, device: int, call: Call, results: list[jax.Array]) -> None:
        """Notes a piece that was dispatched to a device."""
        if device not in self.queues:
            self.queues[device] = queue.SimpleQueue()
            self.threads.append(threading.Thread(target=self._wait, args=(device,), daemon=True))
            self.threads[-1].start()
        self.queues[device].put((call, results, time.perf_counter() - self.began_s))

    def _wait(self, device: int) -> None:
        free_s = 0.0
        while (item := self.queues[device].get()) is not None:
            call, results, dispatched_s = item
            jax.block_until_ready(results)
            end_s = time.perf_counter() - self.began_s
            self.spans.append(Span(str(call), device, max(free_s, dispatched_s), end_s, call))
            free_s = end_s

    def finish(self) -> tuple[Span, ...]:
        """All pieces, when the last is done."""
        for waiting in self.queues.values():
            waiting.put(None)
        for thread in self.threads:
            thread.join()
        return tuple(sorted(self.spans, key=lambda span: span.end_s))


def measure(compiled: Compiled, *args: Any) -> Measured:
    """Runs one step and notes when each piece ended. A piece begins when it is dispatched and its device is free.

    (It may still wait for a transfer then: what it waits counts as its own.)

    Raises:
        PipelineError: the pipeline reuses buffers, so that results may be gone before they can be waited for.
    """
    if compiled.donate:
        raise PipelineError(
            "a pipeline that donates buffers cannot be measured",
            where=f"schedule {compiled.schedule.name}",
            fix='compile it with settings={"donate": False}',
        )
    watch = _Watch()
    mine = [runner for runner in compiled.runners if is_here(NamedSharding(runner.mesh, PartitionSpec()))]
    devices = {(runner.stage, runner.replica): runner.device for runner in mine}

    def note(call: Call, results: list[jax.Array]) -> None:
        if (call.stage, call.replica) in devices:
            watch.dispatched(devices[call.stage, call.replica], call, results)

    try:
        results = compiled.run(jax.tree.leaves(args), note)
    finally:
        spans = watch.finish()
    return Measured(jax.tree.unflatten(compiled.traced.out_tree, results), spans)


def spans_of(timeline: Timeline) -> tuple[Span, ...]:
    """A simulated timeline as spans."""
    names = {kind: PARTS[kind] for kind in PARTS}
    return tuple(
        Span(f"{names[e.task.kind].letter}{e.task.stage}:{e.task.microbatch}", e.device, e.start_s, e.end_s)
        for e in timeline.tasks
        if e.task.kind in names
    )


def chrome_trace(rows: Mapping[str, Sequence[Span]]) -> str:
    """The JSON that Perfetto and chrome://tracing open: one process for each named row, one thread a device.

    >>> json.loads(chrome_trace({"measured": [Span("F0:0", 0, 0.0, 2e-6)]}))["traceEvents"][-1]["dur"]
    2.0
    """
    events: list[dict[str, Any]] = []
    for pid, (name, spans) in enumerate(rows.items()):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}})
        for device in sorted({span.device for span in spans}):
            label = {"name": f"device {device}"}
            events.append({"ph": "M", "pid": pid, "tid": device, "name": "thread_name", "args": label})
        for span in spans:
            start_us, duration_us = span.start_s * 1e6, (span.end_s - span.start_s) * 1e6
            kind = {part.letter: part.name.lower() for part in Part}[span.name[0]]
            place = {"pid": pid, "tid": span.device, "ts": start_us, "dur": duration_us}
            events.append({"ph": "X", "name": span.name, "cat": kind, **place})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
