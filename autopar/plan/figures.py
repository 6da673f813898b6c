"""What there is to show of a plan: figures with units, memory by cause, arguments grouped by module."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.plan.data import Argument, Plan


def seconds(value_s: float) -> str:
    """A duration in a unit that suits it.

    >>> seconds(0.00834), seconds(2.5), seconds(3e-6), seconds(0)
    ('8.34 ms', '2.5 s', '3 µs', '0 s')
    """
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9)):
        if abs(value_s) * scale >= 1:
            return f"{_three_digits(value_s * scale)} {unit}"
    return "0 s"


def nbytes(value: float) -> str:
    """Bytes in a unit that suits them (1 MB is 1e6 bytes).

    >>> nbytes(1_341_240), nbytes(12), nbytes(2.5e10)
    ('1.34 MB', '12 B', '25 GB')
    """
    return _scaled(value, "B")


def flops(value: float) -> str:
    """Floating-point operations in a unit that suits them.

    >>> flops(18_486_211)
    '18.5 MFLOP'
    """
    return _scaled(value, "FLOP")


def _scaled(value: float, unit: str) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{_three_digits(value / scale)} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def _three_digits(value: float) -> str:
    return (
        f"{value:.{max(0, 2 - math.floor(math.log10(abs(value) or 1)))}f}".rstrip("0").rstrip(".")
        if abs(value) < 100
        else f"{value:.0f}"
    )


ITEM_BYTES = {"bool": 1, "float8": 1, "bfloat16": 2, "key<fry>": 8}


def item_bytes(dtype: str) -> float:
    """Bytes of one element of a dtype by its name; keys count as the two words of a Threefry key."""
    if dtype in ITEM_BYTES:
        return ITEM_BYTES[dtype]
    bits = re.search(r"(\d+)", dtype)
    return int(bits.group(1)) / 8 if bits and not dtype.startswith("key") else 8


def local_bytes(argument: Argument, sizes: Mapping[str, int]) -> float:
    """Bytes of an argument on one device."""
    return math.prod(argument.shape) * item_bytes(argument.dtype) / argument.spec.shards(sizes)


def certificate(plan: Plan) -> str:
    """How good the plan is known to be, in words."""
    if plan.solution.proven_optimal:
        return "proven optimal"
    return f"within {plan.solution.gap:.2%} of the optimum"


def memory_by_cause(plan: Plan) -> dict[str, float]:
    """Bytes of one device at the peak: each kind of state, the batch, and what the step itself needs."""
    sizes, causes = plan.mesh.sizes, {}
    for argument in plan.arguments:
        top = argument.name.split("/")[0] if "/" in argument.name else "state"
        cause = top if argument.state else "batch and constants"
        causes[cause] = causes.get(cause, 0.0) + local_bytes(argument, sizes)
    rest = plan.prediction.peak_bytes - sum(causes.values())
    return causes | {"activations and temporaries": max(rest, 0.0)}


@dataclass(frozen=True)
class Row:
    """Arguments that differ only in numbers in their names.

    Attributes:
        name: with ``*`` for the numbers that differ.
        count: how many they are.
        argument: the first of them.
        nbytes: on one device, of all of them.
    """

    name: str
    count: int
    argument: Argument
    nbytes: float


def argument_rows(plan: Plan) -> tuple[list[Row], list[Row]]:
    """The arguments grouped by name, and apart the moments that lie as their parameter does.

    A moment is a state argument whose name ends as that of an earlier one of the same shape does:
    ``opt_state/1/0/mu/embed/embedding`` of ``params/embed/embedding``.
    """
    known: dict[tuple[str, tuple[int, ...]], Argument] = {}
    shown, alike = list[tuple[str, Argument]](), list[tuple[str, Argument]]()
    for argument in plan.arguments:
        parameter = _parameter_of(argument, known) if argument.state else None
        of = argument.name if parameter is None else parameter.name
        if parameter is not None and parameter.spec == argument.spec:
            alike.append((of, argument))
            continue
        shown.append((of, argument))
        if argument.state and parameter is None and "/" in argument.name:
            known[argument.name.split("/", 1)[1], argument.shape] = argument
    return _grouped(shown, plan.mesh.sizes), _grouped(alike, plan.mesh.sizes)


def _parameter_of(argument: Argument, known: Mapping[tuple[str, tuple[int, ...]], Argument]) -> Argument | None:
    parts = argument.name.split("/")
    tails = ("/".join(parts[i:]) for i in range(2, len(parts)))
    return next((known[tail, argument.shape] for tail in tails if (tail, argument.shape) in known), None)


def _grouped(arguments: list[tuple[str, Argument]], sizes: Mapping[str, int]) -> list[Row]:
    """Rows of arguments that lie alike and belong to the same parameter, or to ones that differ in numbers."""
    groups: dict[tuple[object, ...], list[Argument]] = {}
    for of, argument in arguments:
        depth, moment = argument.name.count("/"), of != argument.name
        key = (re.sub(r"\d+", "*", of), depth, moment, argument.shape, argument.dtype, argument.spec)
        groups.setdefault(key, []).append(argument)
    return [
        Row(
            _common([m.name for m in members]),
            len(members),
            members[0],
            sum(local_bytes(m, sizes) for m in members),
        )
        for members in groups.values()
    ]


def _common(names: list[str]) -> str:
    """One name for several of the same depth: the numbers, or else the parts, in which they differ become a star.

    >>> _common(["h_0/mlp/w", "h_1/mlp/w"]), _common(["opt/1/w"]), _common(["opt/mu/h_0", "opt/nu/h_1"])
    ('h_*/mlp/w', 'opt/1/w', 'opt/*/h_*')
    """
    return "/".join(map(_common_part, zip(*(name.split("/") for name in names), strict=True)))


def _common_part(parts: tuple[str, ...]) -> str:
    pieces = [re.split(r"(\d+)", part) for part in parts]
    if len({tuple(piece[::2]) for piece in pieces}) > 1:
        return "*"
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*pieces, strict=True))


@dataclass(frozen=True)
class Sent:
    """Collectives of one kind over the same axes, ready to be shown."""

    kind: str
    axes: str
    count: int
    nbytes: float


def sent(plan: Plan) -> list[Sent]:
    """The collectives of a step, most bytes first."""
    found = [Sent(c.kind, "·".join(c.axes), c.count, c.nbytes) for c in plan.prediction.collectives]
    return sorted(found, key=lambda row: -row.nbytes)


def restrictions(plan: Plan) -> list[str]:
    """What the plan was asked to be: preset, pins, microbatches and chunks."""
    found = [f"preset {plan.preset}"] if plan.preset else []
    found += [f"pin {pattern}={spec}" for pattern, spec in plan.pins]
    found += [f"{plan.microbatches} microbatches"] if plan.microbatches > 1 else []
    if plan.splitting.stages > 1:
        rounds = f", {plan.splitting.rounds} rounds" if plan.splitting.rounds > 1 else ""
        found.append(f"pipeline of {plan.splitting.stages} stages{rounds}")
    found += [
        f"{name if dim is None else f'{name}[{dim}]'} in {count} parts" for name, dim, count in plan.splitting.chunk
    ]
    return found + [f"allow {name}" for name in plan.splitting.allow]


def headline(plan: Plan) -> list[tuple[str, str]]:
    """Name and value of the figures that come first."""
    p = plan.prediction
    time = f"{seconds(p.compute_s)} compute + {seconds(p.communication_s)} communication"
    if p.serial_s > p.step_s * (1 + 1e-9):
        time += f" - {seconds(p.serial_s - p.step_s)} at the same time"
    rows = [
        ("mesh", f"{plan.mesh} ({plan.mesh.n_devices} devices, {plan.hardware or 'given costs'})"),
        ("step", f"{seconds(p.step_s)} = {time}"),
        ("memory", f"{nbytes(p.peak_bytes)} a device at the peak"),
        ("work", f"{flops(p.flops)} a device"),
        ("cost", f"{seconds(plan.solution.objective_s)}, {certificate(plan)}"),
    ]
    asked = restrictions(plan)
    return rows + ([("under", ", ".join(asked))] if asked else [])
