"""Steps that run as pipelines: stages on submeshes, each planned by itself, in the order of a schedule."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autopar.api.agreeing import agreed_plan
from autopar.api.planning import Options, traced_in_time
from autopar.api.staging.assemble import Planned, plan_pipeline
from autopar.api.staging.finalists import plan_searched
from autopar.api.staging.presets import PIPELINES, devices_each
from autopar.api.staging.search import Search, search_traced
from autopar.api.staging.stored import planned_before, schedule_of
from autopar.cluster import Mesh
from autopar.compat import shape_struct
from autopar.errors import MeshError
from autopar.ir.arguments import Adapted, adapt
from autopar.lowering.pipeline.build import Compiled, compile_pipeline, submeshes
from autopar.lowering.pipeline.cut import Layout
from autopar.lowering.pipeline.trace import Measured, measure
from autopar.plan import PipelinePlan
from autopar.solver.schedule import Schedule, make_schedule


@dataclass(frozen=True)
class Pipeline:
    """How a step becomes a pipeline.

    Attributes:
        submeshes: how many submeshes, one after the other; each runs the stages that the schedule gives it.
        schedule: a name of ``autopar.solver.schedule.SCHEDULES``.
        microbatches: parts of the batch, in flight one after the other.
        chunks: stages on each submesh; None for what is usual under the schedule.
        stage_of_layer: the stage of each layer; empty for one layer a stage, of equal work.
        remat: whether stages run their forward part again where the backward part needs it, or which of them; they
            keep only what they were sent.
        plan: a plan to run instead of planning; it has all of the above.
        devices: of all submeshes, in order, or how many of those that JAX sees; None means all of these.
        static_argnums: arguments that are hashable Python values.
        donate: whether the state's buffers may be reused.
        compiler_options: for XLA.
    """

    submeshes: int = 2
    schedule: str = "1f1b"
    microbatches: int = 4
    chunks: int | None = None
    stage_of_layer: tuple[int, ...] = ()
    remat: bool | Collection[int] = False
    plan: PipelinePlan | None = None
    devices: Sequence[Any] | int | None = None
    static_argnums: tuple[int, ...] = ()
    donate: bool = True
    compiler_options: Mapping[str, Any] | None = None

    def tasks(self) -> Schedule:
        """The schedule of these numbers; ScheduleError where it cannot take them."""
        return make_schedule(self.schedule, self.submeshes, self.microbatches, self.chunks)

    def layout(self, meshes: Sequence[Mesh], options: Options) -> Layout:
        """Where what runs: on one mesh at all places, or on one for each.

        Raises:
            ScheduleError: no such schedule, or it cannot take these numbers.
            MeshError: another number of meshes.
        """
        schedule = self.tasks()
        if len(meshes) not in (1, schedule.n_devices):
            raise MeshError(
                f"{len(meshes)} meshes for {schedule.n_devices} submeshes",
                where=f"schedule {schedule.name}",
                fix="give one mesh for all submeshes, or one for each",
            )
        each = tuple(meshes) * schedule.n_devices if len(meshes) == 1 else tuple(meshes)
        again = frozenset(range(schedule.n_stages) if self.remat is True else self.remat or ())
        return Layout(schedule, each, tuple(self.stage_of_layer), options.splitting(), again)


class PipelineStep:
    """A train step that is cut into stages at its first call and then runs on their submeshes. Made by ``pipeline``."""

    def __init__(
        self, step: Callable[..., Any], options: Options, meshes: Callable[[], Sequence[Mesh]], how: Pipeline
    ) -> None:
        self.step, self.options, self.meshes, self.how = step, options, meshes, how
        self._planned: dict[Any, tuple[Any, Planned]] = {}
        self._programs: dict[Any, Compiled] = {}
        functools.update_wrapper(self, step)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Runs the step; the state that it returns stays with its stages."""
        adapted = self._adapted(args, keywords)
        return adapted.restore(self._compiled(adapted)(*adapted.arguments))

    def plan(self, *args: Any, **keywords: Any) -> PipelinePlan:
        """The plan for these arguments, without running; shapes suffice, and no device is touched."""
        return self._plan(self._adapted(args, keywords))[1].plan

    def init(self, init_fn: Callable[..., Any], *args: Any, batch: Any = None) -> Any:
        """Runs ``init_fn(*args)`` so that every array of the state is born on its stage, whole on no host.

        Args:
            init_fn: makes the state, the first argument of the step.
            *args: its arguments, such as a key.
            batch: the step's other arguments (shapes suffice), as a tuple or a single one.
        """
        rest = batch if isinstance(batch, tuple) else (batch,)
        return self.compiled(jax.eval_shape(init_fn, *args), *rest).init(init_fn, *args)

    def compiled(self, *args: Any, **keywords: Any) -> Compiled:
        """The pipeline for arguments of these shapes."""
        return self._compiled(self._adapted(args, keywords))

    def measure(self, *args: Any, **keywords: Any) -> Measured:
        """Runs one step, waits for every task and says when each ran; ``chrome_trace`` writes that down."""
        adapted = self._adapted(args, keywords)
        return measure(self._compiled(adapted), *adapted.arguments)

    def _adapted(self, args: Sequence[Any], keywords: dict[str, Any]) -> Adapted:
        return adapt(self.step, args, self.how.static_argnums, keywords)

    def _plan(self, adapted: Adapted) -> tuple[Any, Planned]:
        """The traced step and its stages, planned once for arguments of these shapes."""
        key = _key(adapted)
        if key not in self._planned:
            traced, trace_s = traced_in_time(adapted)
            if self.how.plan is not None:
                planned = planned_before(traced, self.how.plan)
            else:
                layout = self.how.layout(self.meshes(), self.options)
                planned = plan_pipeline(traced, layout, self.options, trace_s=trace_s)
            self._planned[key] = traced, planned
        return self._planned[key]

    def _compiled(self, adapted: Adapted) -> Compiled:
        key = _key(adapted)
        if key not in self._programs:
            traced, planned = self._plan(adapted)
            settings = {"donate": self.how.donate, "compiler_options": self.how.compiler_options}
            devices = None if isinstance(self.how.devices, int) else self.how.devices
            plan = agreed_plan(planned.plan, devices)
            if plan is not planned.plan:
                planned = planned_before(traced, plan)
            places, schedule = submeshes(plan.meshes, devices), schedule_of(plan)
            self._programs[key] = compile_pipeline(traced, planned.stages, planned.programs, places, schedule, settings)
        return self._programs[key]


def _key(adapted: Adapted) -> Any:
    leaves, tree = jax.tree.flatten(adapted.arguments)
    return tree, adapted.key, tuple(map(shape_struct, leaves))


_HOW = tuple(Pipeline.__dataclass_fields__)

Meshes = Mesh | str | Sequence[Mesh | str]
"""One mesh for all submeshes, or one for each."""


def pipeline(step: Callable[..., Any] | None = None, *, mesh: Meshes | None = None, **options: Any) -> Any:
    """Decorates a single-device train step so that it runs as a pipeline.

    The memory limit holds for a device with all the microbatches that the schedule has in flight there.

    Args:
        step: the step; omitted when options are given: ``@pipeline(submeshes=2, schedule="1f1b", microbatches=8)``.
        mesh: the mesh of each submesh, such as ``"data=2,tensor=2"``; a list of them where submeshes differ. Without
            it, one device each; under a preset of ``PIPELINES``, as that divides all devices.
        **options: those of ``Pipeline`` and of ``Options``; ``preset`` may also be gpipe, 1f1b, interleaved or 3d.

    Raises:
        ScheduleError: no such schedule, or it cannot take these numbers.
        MeshError, LayerError, PipelineError, MicrobatchError, PlanError: at the first call; see their texts.
    """
    if step is None:
        return functools.partial(pipeline, mesh=mesh, **options)
    given: dict[str, Any] = {name: options.pop(name) for name in _HOW if name in options}
    usual = PIPELINES.get(options.get("preset", ""))
    if usual is not None:
        given, options = {"schedule": usual.schedule} | given, options | {"preset": usual.inner}
    how = Pipeline(**given)
    if how.plan is None:
        how.tasks()
    named = [mesh] if isinstance(mesh, Mesh | str) else mesh or []
    meshes = [Mesh.parse(each) if isinstance(each, str) else each for each in named]

    def divided() -> Sequence[Mesh]:
        if meshes or usual is None:
            return meshes or [Mesh((("data", 1),))]
        n_devices = how.devices if isinstance(how.devices, int) else len(how.devices or jax.devices())
        return [usual.submesh(devices_each(n_devices, how.submeshes))]

    return PipelineStep(step, Options(mesh=meshes[0] if meshes else None, **options), divided, how)


def plan_stages(step: Callable[..., Any], *args: Any, **options: Any) -> PipelinePlan:
    """The best pipeline for ``step(*args)``; shapes suffice, nothing runs and no device is touched.

    Layers of a kind are planned once for each submesh, and stages searched with the sums of their costs; the stages of
    the best slicing are then planned whole. Run it with ``autopar.pipeline(step, plan=plan)``.

    Args:
        step: a train step: a pure function of pytrees, or one that updates Flax NNX objects.
        *args: its arguments, or ``jax.ShapeDtypeStruct`` in their place.
        **options: see ``Search``.

    Raises:
        LayerError, MicrobatchError, ScheduleError: the step cannot be cut so.
        InfeasibleError: nothing fits the memory; names the least that would.
    """
    search = Search(**options)
    traced, trace_s = traced_in_time(adapt(step, args, search.static_argnums))
    return plan_searched(traced, search_traced(traced, trace_s, search)).plan
