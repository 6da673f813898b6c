"""Steps that run as pipelines: stages on submeshes, each planned by itself, in the order of a schedule."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from autopar.api.planning import Options, plan_prepared, traced_in_time
from autopar.api.staging.prepare import prepare_stage
from autopar.cluster import Mesh
from autopar.compat import shape_struct
from autopar.ir.arguments import Adapted, adapt
from autopar.ir.stages import Stage
from autopar.lowering.local_program import LocalProgram, build_local_program
from autopar.lowering.pipeline.build import Compiled, Layout, build_pipeline
from autopar.lowering.pipeline.trace import Measured, measure
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
        devices: of all submeshes, in order; None means those that JAX sees.
        static_argnums: arguments that are hashable Python values.
        donate: whether the state's buffers may be reused.
    """

    submeshes: int = 2
    schedule: str = "1f1b"
    microbatches: int = 4
    chunks: int | None = None
    stage_of_layer: tuple[int, ...] = ()
    devices: Sequence[Any] | None = None
    static_argnums: tuple[int, ...] = ()
    donate: bool = True

    def tasks(self) -> Schedule:
        """The schedule of these numbers; ScheduleError where it cannot take them."""
        return make_schedule(self.schedule, self.submeshes, self.microbatches, self.chunks)


class PipelineStep:
    """A train step that is cut into stages at its first call and then runs on their submeshes. Made by ``pipeline``."""

    def __init__(self, step: Callable[..., Any], options: Options, layout: Pipeline) -> None:
        self.step, self.options, self.layout = step, options, layout
        self._programs: dict[Any, Compiled] = {}
        functools.update_wrapper(self, step)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Runs the step; the state that it returns stays with its stages."""
        adapted = self._adapted(args, keywords)
        compiled = self._compiled(adapted)
        return adapted.restore(compiled(*adapted.arguments))

    def compiled(self, *args: Any, **keywords: Any) -> Compiled:
        """The pipeline for arguments of these shapes."""
        return self._compiled(self._adapted(args, keywords))

    def measure(self, *args: Any, **keywords: Any) -> Measured:
        """Runs one step, waits for every task and says when each ran; ``chrome_trace`` writes that down."""
        adapted = self._adapted(args, keywords)
        return measure(self._compiled(adapted), *adapted.arguments)

    def _adapted(self, args: Sequence[Any], keywords: dict[str, Any]) -> Adapted:
        return adapt(self.step, args, self.layout.static_argnums, keywords)

    def _compiled(self, adapted: Adapted) -> Compiled:
        leaves, tree = jax.tree.flatten(adapted.arguments)
        key = (tree, adapted.key, tuple(map(shape_struct, leaves)))
        if key not in self._programs:
            traced, _ = traced_in_time(adapted)
            plan_stage = functools.partial(_plan_stage, options=self.options)
            schedule, meshes = self.layout.tasks(), self.options.meshes()
            layout = Layout(
                schedule, meshes[:1] * schedule.n_devices, self.layout.stage_of_layer, self.options.splitting()
            )
            settings = {"donate": self.layout.donate}
            self._programs[key] = build_pipeline(traced, layout, plan_stage, self.layout.devices, settings)
        return self._programs[key]


def _plan_stage(stage: Stage, mesh: Mesh, microbatches: int, *, options: Options) -> LocalProgram:
    """The best local program of a stage on its submesh; what runs per microbatch is priced so often."""
    own = replace(options, mesh=mesh)
    cost = own.cost_model(mesh)
    prepared = prepare_stage(stage, cost, microbatches, strict=options.strict)
    return build_local_program(stage.program, plan_prepared(prepared, cost, own), cost, prepared.rules)


_LAYOUT = tuple(Pipeline.__dataclass_fields__)


def pipeline(step: Callable[..., Any] | None = None, *, mesh: Mesh | str = "data=1", **options: Any) -> Any:
    """Decorates a single-device train step so that it runs as a pipeline.

    The memory limit holds for a stage with one microbatch in flight.

    Args:
        step: the step; omitted when options are given: ``@pipeline(submeshes=2, schedule="1f1b", microbatches=8)``.
        mesh: the mesh of each submesh, such as ``"data=2,tensor=2"``.
        **options: those of ``Pipeline`` and of ``Options``.

    Raises:
        ScheduleError: no such schedule, or it cannot take these numbers.
        MeshError, LayerError, PipelineError, MicrobatchError: at the first call; see their texts.
    """
    if step is None:
        return functools.partial(pipeline, mesh=mesh, **options)
    layout = Pipeline(**{name: options.pop(name) for name in _LAYOUT if name in options})
    layout.tasks()
    return PipelineStep(step, Options(mesh=mesh, **options), layout)
