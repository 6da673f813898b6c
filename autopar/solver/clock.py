"""What a solve may spend: seconds of wall time, or the same counted by the work done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

# A deterministic solve takes these for the time of one computed table operation, and of one entry looked at.
OPERATION_S, ENTRY_S = 2e-5, 3e-9


class Clock:
    """Seconds since the start: of wall time, or with ``counts_work`` of work, the same in every run.

    Args:
        counts_work: count work.
        time_s: where time comes from; ``time.process_time`` makes it CPU seconds of all threads.
    """

    def __init__(self, counts_work: bool = False, time_s: Callable[[], float] = time.perf_counter) -> None:
        self.counts_work, self._time_s = counts_work, time_s
        self._start, self._start_s, self._worked_s = time.perf_counter(), time_s(), 0.0

    def now(self) -> float:
        """Seconds since the start."""
        return self._worked_s if self.counts_work else self._time_s() - self._start_s

    def wall(self) -> float:
        """Seconds of wall time since the start."""
        return time.perf_counter() - self._start

    def operation(self) -> None:
        """One table operation was computed."""
        self._worked_s += OPERATION_S

    def work(self, entries: float) -> None:
        """So many entries of tables were looked at."""
        self._worked_s += ENTRY_S * entries


@dataclass(frozen=True)
class Budget:
    """What one stage may spend.

    Args:
        clock: what is counted.
        end: the time at which the stage should end.
        poll: called while waiting; it may raise.
    """

    clock: Clock
    end: float
    poll: Callable[[], None] = lambda: None

    @staticmethod
    def of(seconds: float) -> Budget:
        """So many seconds of wall time from now."""
        return Budget(Clock(), seconds)

    def remaining(self) -> float:
        """Seconds left."""
        return self.end - self.clock.now()

    def at_most(self, seconds: float) -> Budget:
        """This budget, or so many seconds where that is less."""
        return Budget(self.clock, min(self.end, self.clock.now() + seconds), self.poll)
