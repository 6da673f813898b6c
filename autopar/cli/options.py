"""Options of the commands, one frozen dataclass a command; a field is an argument or an option."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from autopar.targets import SHAPE


def command(kind: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Decorates ``run(options)`` so that Typer sees the fields of ``kind`` as its parameters."""
    hints = get_type_hints(kind, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
    ]

    def decorate(run: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def called(**values: Any) -> None:
            run(kind(**values))

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


TargetText = Annotated[str, typer.Argument(metavar="TARGET", help=SHAPE)]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting of the target.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Meshes = Annotated[
    list[str] | None,
    typer.Option(
        "--mesh",
        help="Mesh, as data=2,tensor=4; without it, every shape is tried. Of a pipeline: of all submeshes, or again "
        "for each.",
    ),
]
Microbatches = Annotated[
    str | None, typer.Option(metavar="M", help="Parts of the batch in turn, exactly; or auto. Pipelines take 4.")
]
Stages = Annotated[
    str | None, typer.Option(metavar="N", help="A pipeline of so many stages on submeshes; or auto, to search for one.")
]
Schedules = Annotated[
    list[str] | None, typer.Option("--schedule", help="The order of a pipeline's tasks, as 1f1b; auto tries several.")
]
Chunks = Annotated[int | None, typer.Option(min=1, help="Stages on each submesh, where a schedule lets one choose.")]
Remat = Annotated[
    str | None,
    typer.Option(
        metavar="STAGES",
        help="Stages that run their forward part again, to keep less: all, none, or as 0,2; a search tries.",
    ),
]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, as autopar plan -o writes it.")]


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """A step, and what a plan of it is asked to look like."""

    target: TargetText
    set: Sets = None
    mesh: Meshes = None
    microbatches: Microbatches = None
    stages: Stages = None
    schedule: Schedules = None
    chunks: Chunks = None
    remat: Remat = None


@dataclass(frozen=True, kw_only=True)
class Searching(Shaping):
    """What to plan, for what, and under which restrictions."""

    devices: Annotated[int | None, typer.Option(min=1, help="Devices to plan for.")] = None
    hardware: Annotated[str | None, typer.Option(help="Profile name or file; detected by default.")] = None
    memory_gb: Annotated[float | None, typer.Option(min=0, help="Memory of a device in 1e9 bytes.")] = None
    pin: Annotated[list[str] | None, typer.Option(metavar="PATTERN=SPEC", help="As 'params/.*kernel=,tensor'.")] = None
    seconds: Annotated[float, typer.Option(min=0, help="Time for the solver, per mesh.")] = 60.0
    rounds: Annotated[int, typer.Option(min=1, help="On a mesh with an axis pipe: rounds of a microbatch.")] = 1
    chunk: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN[DIM]=N", help="Never make that value whole, but in N parts; or vocab=N, seq=N."),
    ] = None
    allow: Annotated[
        list[str] | None, typer.Option(help="For microbatches: recompute, or ghost_batch_norm, where they need it.")
    ] = None
    strict: Annotated[bool, typer.Option(help="Refuse primitives without a sharding rule.")] = False
    costs: Annotated[str, typer.Option(help="Prices of computation: roofline or measured.")] = "roofline"
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Planning(Searching):
    """A search under one preset, whose plan can be kept."""

    preset: Annotated[str, typer.Option(help="A strategy of the literature, as zero3 or megatron.")] = ""
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan as JSON.")] = None


@dataclass(frozen=True, kw_only=True)
class PlanningAndRunning(Planning):
    """Planning, then training."""

    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10
    check: Annotated[bool, typer.Option(help="Compare the losses with one device.")] = True


@dataclass(frozen=True, kw_only=True)
class Running(Shaping):
    """Training under a plan, made now where none is given."""

    plan: Annotated[Path | None, typer.Option(help="A plan file; without it, one is made first.")] = None
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 10
    check: Annotated[bool, typer.Option(help="Compare the losses with one device.")] = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Auditing:
    """A plan against what the compiler makes of it."""

    target: TargetText
    plan: Annotated[Path, typer.Option(help="A plan file.")]
    set: Sets = None
    topology: Annotated[
        str | None, typer.Option(help="TPU topology to compile for, as v5e:4x4; needs autopar[tpu].")
    ] = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Explaining:
    """A table of a plan, or why one value is laid out as it is."""

    plan: PlanPath
    value: Annotated[str | None, typer.Argument(metavar="[VALUE]", help="Name of a value.")] = None
    target: Annotated[str | None, typer.Option(help="Instead of the TARGET that the plan records.")] = None
    set: Sets = None
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """Two plans of one step."""

    before: PlanPath
    after: PlanPath
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Solving:
    """An instance of the IOPDDL contest."""

    problem: Annotated[Path, typer.Argument(metavar="PROBLEM", help="An instance, .json or .json.gz.")]
    seconds: Annotated[float, typer.Option(min=0, help="Time for the solver.")] = 60.0
    seed: Annotated[int, typer.Option(min=0, help="Of the solver's random choices.")] = 0
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Count work, not time: every run returns the same choice.")
    ] = False
    json: Json = False


@dataclass(frozen=True, kw_only=True)
class Calibrating:
    """A profile of the devices at hand."""

    output: Annotated[Path, typer.Option("-o", "--output", help="The profile to write.")] = Path("profile.json")
    devices: Annotated[int | None, typer.Option(min=1, help="CPU devices to force.")] = None
    quick: Annotated[bool, typer.Option(help="Few small sizes: seconds instead of minutes.")] = False
