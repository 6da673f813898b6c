"""A cost model that times heavy equations on the devices at hand and remembers the timings on disk."""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from autopar.cluster import Mesh
from autopar.cost import timing
from autopar.cost.model import CostModel, LocalCall, Work

HEAVY = frozenset(("dot_general", "conv_general_dilated"))
"""Primitives worth timing: they dominate a step, and fusion hardly changes them."""


def local_call(
    primitive: Any, params: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]
) -> LocalCall:
    """The equation ``primitive(*operands, **params)`` at the given (local) operand shapes.

    Args:
        primitive: the JAX primitive itself.
        params: its parameters, as one device runs it.
        shapes: of the operands on one device.
        dtypes: names of the operands' dtypes.
    """
    operands = tuple(zip(map(tuple, shapes), dtypes, strict=True))
    described = ", ".join(f"{dtype}{list(shape)}" for shape, dtype in operands)
    settings = ", ".join(f"{name}={params[name]}" for name in sorted(params))
    return LocalCall(
        f"{primitive.name}({described}; {settings})",
        operands,
        lambda *values: primitive.bind(*values, **params),
    )


@dataclass(frozen=True)
class MeasuredCost:
    """Another cost model, with the computation of every ``Work`` that carries a call replaced by a timing.

    Each distinct call is timed once per kind of device and JAX version, on all devices at hand at the same
    time, and kept in ``timings.sqlite`` in ``directory``.

    Attributes:
        inner: prices collectives, memory and all that is not timed.
        directory: where the database lies; made when missing.
    """

    inner: CostModel
    directory: Path

    @property
    def mesh(self) -> Mesh:
        """The mesh of ``inner``."""
        return self.inner.mesh

    @property
    def memory_bytes(self) -> float:
        """The memory of one device, in bytes."""
        return self.inner.memory_bytes

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        """That of ``inner``."""
        return self.inner.collective_s(kind, nbytes, axes)

    def memory_s(self, nbytes: float) -> float:
        """That of ``inner``."""
        return self.inner.memory_s(nbytes)

    def compute_s(self, work: Work) -> float:
        """The timing of ``work.call``, taken now if there is none yet; without a call, that of ``inner``."""
        if work.call is None:
            return self.inner.compute_s(work)
        if work.call.signature not in self._known_s:
            self._known_s[work.call.signature] = self._measure_s(work.call)
        return self._known_s[work.call.signature]

    def _measure_s(self, call: LocalCall) -> float:
        mesh = timing.device_mesh()
        operands = [timing.random_operand(shape, dtype, mesh) for shape, dtype in call.operands]
        seconds = timing.seconds_per_call(timing.on_every_device(call.run, mesh), operands)
        with closing(self._connect()) as database, database:
            database.execute(
                "INSERT OR REPLACE INTO timings VALUES (?, ?, ?, ?)", (*_setting(), call.signature, seconds)
            )
        return seconds

    @cached_property
    def _known_s(self) -> dict[str, float]:
        with closing(self._connect()) as database:
            rows = database.execute(
                "SELECT signature, seconds FROM timings WHERE device_kind = ? AND jax_version = ?", _setting()
            )
            return dict(rows.fetchall())

    def _connect(self) -> sqlite3.Connection:
        self.directory.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.directory / "timings.sqlite")
        database.execute(
            "CREATE TABLE IF NOT EXISTS timings (device_kind TEXT, jax_version TEXT, signature TEXT, "
            "seconds REAL, PRIMARY KEY (device_kind, jax_version, signature))"
        )
        return database


def _setting() -> tuple[str, str]:
    """What a timing holds for: the kind and number of devices, and the JAX version."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}", jax.__version__
