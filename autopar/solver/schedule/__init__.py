"""Pipeline schedules: task lists per device, one validator, one event simulator, one drawing. No JAX."""

from autopar.solver.schedule import chunked, one_way  # noqa: F401  (fills the table)
from autopar.solver.schedule.data import Kind, Pipeline, Schedule, ScheduleError, Task
from autopar.solver.schedule.draw import draw_svg, draw_text
from autopar.solver.schedule.line import Dispatch, dispatch_order
from autopar.solver.schedule.registry import SCHEDULES, Family, Traits, family, make_schedule, schedule
from autopar.solver.schedule.simulate import TaskCosts, Timeline, simulate
from autopar.solver.schedule.validate import validate

__all__ = [
    "SCHEDULES",
    "Dispatch",
    "Family",
    "Kind",
    "Pipeline",
    "Schedule",
    "ScheduleError",
    "Task",
    "TaskCosts",
    "Timeline",
    "Traits",
    "dispatch_order",
    "draw_svg",
    "draw_text",
    "family",
    "make_schedule",
    "schedule",
    "simulate",
    "validate",
]
