"""A piece of work in a process of its own, stopped when it takes more time or memory than it may."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

POLL_S = 0.1

Tell = Callable[[str, float], None]
"""``tell(phase, seconds)``: the work enters a phase, which may take so many seconds of wall time."""


@dataclass(frozen=True)
class Outcome:
    """What became of the work.

    Args:
        value: what it returned; None where it was stopped.
        stopped: in words, why it returned nothing; empty otherwise.
        seconds: of wall time.
        peak_bytes: the most memory that it was seen to hold.
    """

    value: Any
    stopped: str
    seconds: float
    peak_bytes: float


def run_apart(work: Callable[[Any, Tell], Any], argument: Any, seconds: float, memory_bytes: float) -> Outcome:
    """``work(argument, tell)`` in a spawned process.

    Args:
        work: a function of a module.
        argument: anything that can be pickled, as must be what the work returns.
        seconds: of wall time until it first tells of a phase, or returns.
        memory_bytes: it is stopped when it is seen to hold more.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, argument, there))
    start = time.perf_counter()
    process.start()
    there.close()
    try:
        value, stopped, peak = _watch(here, process.pid or 0, seconds, memory_bytes)
    finally:
        process.kill()
        process.join()
        here.close()
    return Outcome(value, stopped, time.perf_counter() - start, peak)


def _child(work: Callable[[Any, Tell], Any], argument: Any, there: Connection) -> None:
    value = work(argument, lambda phase, seconds: there.send((phase, seconds)))
    there.send((None, value))


def _watch(here: Connection, pid: int, seconds: float, memory_bytes: float) -> tuple[Any, str, float]:
    """``(value, why it was stopped, most bytes seen)``."""
    phase, start, peak = "starting", time.perf_counter(), 0.0
    while True:
        held = _held_bytes(pid)
        peak = max(peak, held)
        if held > memory_bytes:
            return None, f"more than {memory_bytes / 1e9:.4g} GB while {phase}", peak
        if time.perf_counter() - start > seconds:
            return None, f"more than {seconds:.0f} s while {phase}", peak
        if not here.poll(POLL_S):
            continue
        try:
            word, value = here.recv()
        except EOFError:
            return None, f"died while {phase}", peak
        if word is None:
            return value, "", peak
        phase, seconds, start = word, value, time.perf_counter()


def _held_bytes(pid: int) -> float:
    """The memory that a process holds; 0 once it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE")
