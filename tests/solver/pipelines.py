"""Schedules and costs to try, for Hypothesis."""

from hypothesis import assume
from hypothesis import strategies as st

from autopar.solver.schedule import SCHEDULES, Schedule, TaskCosts, family, make_schedule


def chunks(name: str) -> tuple[int, ...]:
    """The chunks that a schedule is tried with."""
    traits = family(name).traits
    return (2, 4) if traits.any_chunks else (traits.chunks,)


@st.composite
def pipelines(draw: st.DrawFn) -> Schedule:
    """Any schedule with sizes that it takes."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    p, m = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    v = draw(st.sampled_from(chunks(name)))
    if name in ("interleaved", "wave", "chimera"):
        m = p * draw(st.integers(1, 3))
    if name == "dualpipe_v":
        m += 2 * p
    assume(not family(name).complaint(family(name).pipeline(p, m, v)))
    return make_schedule(name, p, m, v)


@st.composite
def priced_pipelines(draw: st.DrawFn) -> tuple[Schedule, TaskCosts]:
    """The same, with costs that are multiples of a quarter."""
    schedule = draw(pipelines())
    n = schedule.n_stages
    numbers = st.integers(0, 8).map(lambda k: k / 4)
    rows = st.lists(numbers, min_size=n, max_size=n).map(tuple)
    times = (draw(st.lists(numbers.map(lambda x: x + 0.25), min_size=n, max_size=n).map(tuple)) for _ in range(3))
    moves = {"transfer_s": draw(rows)[1:], "move_s": draw(rows)}
    return schedule, TaskCosts(*times, **moves, activation_bytes=draw(rows), kept_bytes=draw(rows))
