"""Stage costs as arrays: one entry for every run of layers, on every submesh, under every policy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np

from autopar.errors import ProblemError
from autopar.solver.slicing.data import SlicingProblem, StageCost, Submesh

FIELDS = tuple(field.name for field in fields(StageCost))


@runtime_checkable
class TabulatedCosts(Protocol):
    """A cost model that gives all runs of layers at once; saves a call for every one of them."""

    def table(self, submesh: Submesh, microbatches: int, remat: str) -> dict[str, np.ndarray]:
        """For each field of ``StageCost``, its value at ``[first_layer, last_layer]``; shape ``(layers, layers)``."""
        ...


@dataclass(frozen=True, eq=False)
class Tables:
    """Costs with a given number of microbatches, for submeshes ``c`` and policies ``r``.

    Args:
        stage: for each field of ``StageCost``, shape ``(r, c, layers, layers)``: ``[first, last]``; ``inf`` in
            ``forward_s`` where first > last.
        transfer_s: shape ``(layers - 1, c, c)``: after which layer, from and to which submesh.
        submeshes: the submeshes that fit the cluster.
        sizes: their numbers of devices.
    """

    stage: dict[str, np.ndarray]
    transfer_s: np.ndarray
    submeshes: tuple[Submesh, ...]
    sizes: tuple[int, ...]

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.transfer_s) + 1

    def only(self, c: int | None) -> Tables:
        """Those of one submesh; of all for None."""
        if c is None:
            return self
        stage = {name: values[:, c : c + 1] for name, values in self.stage.items()}
        one = slice(c, c + 1)
        return Tables(stage, self.transfer_s[:, one, one], self.submeshes[one], self.sizes[one])


def tabulate(problem: SlicingProblem, microbatches: int) -> Tables:
    """Asks the cost model for everything.

    Raises:
        ProblemError: a cost is negative or not a number.
    """
    submeshes = tuple(s for s in problem.submeshes if s.n_devices <= problem.n_devices)
    n = problem.n_layers
    stage = {name: np.zeros((len(problem.remats), len(submeshes), n, n)) for name in FIELDS}
    for r, remat in enumerate(problem.remats):
        for c, submesh in enumerate(submeshes):
            for name, values in _table(problem, submesh, microbatches, remat).items():
                stage[name][r, c] = values
    stage["forward_s"][:, :, np.tri(n, k=-1, dtype=bool)] = np.inf
    transfer_s = np.array(
        [
            [[problem.costs.transfer_s(b, one, other, microbatches) for other in submeshes] for one in submeshes]
            for b in range(n - 1)
        ]
    ).reshape(n - 1, len(submeshes), len(submeshes))
    for name, values in (*stage.items(), ("transfer_s", transfer_s)):
        if not (values >= 0).all():
            where = np.argwhere(~(values >= 0))[0].tolist()
            raise ProblemError(
                f"{name} is {values[tuple(where)]} at {where}",
                where=f"costs with {microbatches} microbatches",
                fix="return costs that are numbers of at least 0; inf in forward_s forbids a stage",
            )
    return Tables(stage, transfer_s, submeshes, tuple(submesh.n_devices for submesh in submeshes))


def _table(problem: SlicingProblem, submesh: Submesh, microbatches: int, remat: str) -> dict[str, np.ndarray]:
    if isinstance(problem.costs, TabulatedCosts):
        return problem.costs.table(submesh, microbatches, remat)
    n = problem.n_layers
    values = np.zeros((len(FIELDS), n, n))
    for first in range(n):
        for last in range(first, n):
            cost = problem.costs.cost(first, last, submesh, microbatches, remat)
            values[:, first, last] = [getattr(cost, name) for name in FIELDS]
    return dict(zip(FIELDS, values, strict=True))
