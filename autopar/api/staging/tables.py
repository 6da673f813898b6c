"""Stage costs that add up over layers: what ``slice_stages`` asks, from the costs of one layer of each kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from autopar.api.staging.kinds import Tied
from autopar.cluster import Cluster, Link
from autopar.solver.slicing import StageCost, Submesh

FIELDS = tuple(field.name for field in fields(StageCost))
LARGEST = "peak_extra_bytes"
"""The field that is the largest of its layers', not their sum."""

Runs = Mapping[tuple[int, ...], StageCost]
"""What one layer of each kind costs, by ``(kind,)``, and two that follow each other, by ``(kind, kind)``."""


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Costs of stages as sums over their layers, with what two neighbours of a kind cost more or less than apart.

    Attributes:
        kinds: the kind of each layer.
        runs: by name of submesh and number of microbatches.
        gradient_bytes: of each layer, on all its devices together.
        boundary_bytes: what one microbatch sends between layers, by number of microbatches.
        tied: arguments that several layers read.
        cluster: the links between submeshes.
    """

    kinds: tuple[int, ...]
    runs: Mapping[tuple[str, int], Runs]
    gradient_bytes: tuple[int, ...]
    boundary_bytes: Mapping[int, tuple[int, ...]]
    tied: tuple[Tied, ...]
    cluster: Cluster

    def cost(self, first_layer: int, last_layer: int, submesh: Submesh, microbatches: int, remat: str) -> StageCost:
        """What one stage costs; see ``table``."""
        table = self.table(submesh, microbatches, remat)
        return StageCost(**{name: float(values[first_layer, last_layer]) for name, values in table.items()})

    def table(self, submesh: Submesh, microbatches: int, remat: str) -> dict[str, np.ndarray]:
        """For each field of ``StageCost`` its value at ``[first_layer, last_layer]``; there is one policy, "none"."""
        runs = self.runs[submesh.name, microbatches]
        found = {name: self._table(name, runs) for name in FIELDS}
        link_Bps = submesh.n_devices * self._link(2 * submesh.n_devices).bandwidth_Bps
        found["sync_s"] = found["sync_s"] + 2.0 * self._shared_bytes() / link_Bps
        found["sent_bytes"] = np.tile([*self.boundary_bytes[microbatches], 0.0], (len(self.kinds), 1))
        found["replica_sync_s"] = 2.0 * _sums(self.gradient_bytes) / link_Bps
        return found

    def transfer_s(self, boundary: int, sender: Submesh, receiver: Submesh, microbatches: int) -> float:
        """Every device of the smaller submesh sends or receives its part of what crosses a boundary."""
        link = self._link(sender.n_devices + receiver.n_devices)
        narrow = min(sender.n_devices, receiver.n_devices)
        return link.alpha_s + self.boundary_bytes[microbatches][boundary] / (narrow * link.bandwidth_Bps)

    def _link(self, n_devices: int) -> Link:
        """The link between neighbours that have so many devices together."""
        return self.cluster.link if n_devices <= self.cluster.domain_devices else self.cluster.network

    def _table(self, name: str, runs: Runs) -> np.ndarray:
        alone = [getattr(runs[kind,], name) for kind in self.kinds]
        pairs = [(kind, kind) if kind == other else () for kind, other in zip(self.kinds, self.kinds[1:], strict=False)]
        if name == LARGEST:
            return np.maximum(
                _largest(alone), _between(_largest, [getattr(runs[p], name) if p else 0.0 for p in pairs])
            )
        more = [getattr(runs[p], name) - 2 * alone[i] if p else 0.0 for i, p in enumerate(pairs)]
        return np.maximum(_sums(alone) + _between(_sums, more), 0.0)

    def _shared_bytes(self) -> np.ndarray:
        """Gradients that a stage shares with others."""
        n = len(self.kinds)
        first, last = np.ogrid[:n, :n]
        total = np.zeros((n, n))
        for tied in self.tied:
            inside = sum(((first <= layer) & (layer <= last)).astype(int) for layer in tied.layers)
            total += np.where((inside > 0) & (inside < len(tied.layers)), tied.nbytes, 0.0)
        return total


def _sums(values: Sequence[float]) -> np.ndarray:
    """``[first, last]``: the sum of the values between; 0 where there are none."""
    ends = np.concatenate([[0.0], np.cumsum(values)])
    return np.triu(ends[None, 1:] - ends[:-1, None])


def _largest(values: Sequence[float]) -> np.ndarray:
    """``[first, last]``: the largest of the values between; 0 where there are none."""
    rows = [np.concatenate([np.zeros(i), np.maximum.accumulate(values[i:])]) for i in range(len(values))]
    return np.array(rows).reshape(len(values), len(values))


def _between(join: Callable[[Sequence[float]], np.ndarray], values: Sequence[float]) -> np.ndarray:
    """The joined values of the boundaries inside each stage."""
    n = len(values) + 1
    total = np.zeros((n, n))
    if n > 1:
        total[:-1, 1:] = join(values)
    return total
