"""Search by large neighbourhoods from feasible choices, on as many threads as the kernels leave free."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from autopar.solver.compiled.forests import Forest, forest_of
from autopar.solver.compiled.moves import State, state_of
from autopar.solver.compiled.neighbourhoods import Task, search
from autopar.solver.compiled.peaks import fill
from autopar.solver.compiled.sweeps import cost, excess
from autopar.solver.flat import TELL_S, Flat

THREADS = 2
FOREST_NODES = 200
# Entries that one thread looks at before it is asked for what it found: about a tenth of a second, and for small
# problems as many as so many sweeps do.
CHUNK_ENTRIES, CHUNK_SWEEPS = 20_000_000, 200
POLL_S = 0.02
# A lineage has stalled when it gained less than this share in so many chunks.
STALLED_SHARE, STALLED_CHUNKS = 1e-5, 20
# So many chunks of each lineage, then the worse half ends.
RACE_CHUNKS = 12


@dataclass
class Lineage:
    """A choice under improvement.

    Args:
        state: the choice with its rows.
        forest: scratch.
        cost: in quanta, now.
        trail: the cost after each chunk.
    """

    state: State
    forest: Forest
    cost: float
    trail: list[float]

    def stalled(self) -> bool:
        """Whether it hardly gains any more."""
        if len(self.trail) <= STALLED_CHUNKS:
            return False
        return self.trail[-1 - STALLED_CHUNKS] - self.trail[-1] <= STALLED_SHARE * abs(self.trail[-1])


def lineage_of(flat: Flat, chosen: np.ndarray, seed: int) -> Lineage:
    """Start from a feasible choice."""
    state = state_of(flat.graph, flat.memory, seed)
    state.chosen[:] = chosen
    value = float(cost(flat.graph, chosen))
    return Lineage(state, forest_of(flat.graph, FOREST_NODES), value, [value])


def improve(flat: Flat, starts: Sequence[np.ndarray], seconds: float, seed: int) -> list[np.ndarray]:
    """Improve each start until all have stalled or time is up; the choices they became.

    Which start leads far shows only after a while: of more lineages than threads the worse half ends again and again.
    """
    whole, lines = flat.part.search, [lineage_of(flat, start, seed + at) for at, start in enumerate(starts)]
    end, told = whole.now() + seconds, whole.now()
    pool, stop = ThreadPoolExecutor(THREADS), np.zeros(1, np.int64)
    try:
        while whole.now() < end and not whole.done() and not all(line.stalled() for line in lines):
            _step(flat, lines, pool, stop)
            for line in lines:
                flat.offer(line.state.chosen)
            if whole.now() - told > TELL_S:
                flat.flush()
                told = whole.now()
            if len(lines) > THREADS and len(lines[0].trail) > RACE_CHUNKS:
                lines = sorted(lines, key=lambda line: line.cost)[: max(THREADS, len(lines) // 2)]
                lines = [replace(line, trail=line.trail[-1:]) for line in lines]
    finally:
        # Chunks that wait must not begin, and those under way end at once.
        stop[0] = 1
        pool.shutdown(cancel_futures=True)
        flat.flush()
    return [line.state.chosen.copy() for line in lines]


@contextmanager
def beside(flat: Flat, seed: int) -> Iterator[None]:
    """Improve the best choice, once there is one, in a thread of its own until the body ends; ``flat.best`` shows it.

    A body that has one thread leaves a core free. Where work is counted nothing happens: how far the thread gets is
    chance.
    """
    if flat.part.search.clock.counts_work:
        yield
        return
    stop = np.zeros(1, np.int64)

    def run() -> None:
        while flat.best is None and not stop[0]:
            time.sleep(POLL_S)
        if flat.best is None:
            return
        line = lineage_of(flat, flat.best[1], seed)
        while not stop[0]:
            _chunk(flat, line, stop)
            flat.offer(line.state.chosen)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            yield
        finally:
            stop[0] = 1
            running.result()
            flat.flush()


def _step(flat: Flat, lineages: Sequence[Lineage], pool: ThreadPoolExecutor, stop: np.ndarray) -> None:
    """One chunk of each lineage."""
    work: list[Future[None]] = [pool.submit(_chunk, flat, line, stop) for line in lineages]
    for one in work:
        while not one.done():
            whole = flat.part.search
            whole.poll()
            try:
                one.result(POLL_S)
            except TimeoutError:
                continue
        one.result()
    flat.part.search.clock.work(_entries(flat) * -(-len(lineages) // THREADS))


def _entries(flat: Flat) -> int:
    return min(CHUNK_ENTRIES, CHUNK_SWEEPS * flat.sweep_entries)


def _chunk(flat: Flat, line: Lineage, stop: np.ndarray) -> None:
    fill(line.state.most, line.state.added, excess(flat.memory, line.state.chosen))
    before = np.concatenate([[0.0], np.cumsum(flat.prices)])
    hot = np.flatnonzero(np.diff(flat.graph.link_first))
    hot = hot if len(hot) else np.arange(len(line.state.chosen))
    task = Task(flat.graph, flat.memory, before, hot, flat.spare, stop)
    line.cost += search(task, line.state, line.forest, _entries(flat))
    line.trail.append(line.cost)
