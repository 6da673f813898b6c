"""Stage costs that add up over layers: what ``slice_stages`` asks, from the costs of one layer of each kind."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np

from autopar.api.staging.costs import LayerCost
from autopar.api.staging.kinds import Tied
from autopar.api.staging.links import link_between, transfer_s
from autopar.cluster import Cluster
from autopar.solver.slicing import StageCost, Submesh

FIELDS = tuple(field.name for field in fields(StageCost))
LARGEST = "peak_extra_bytes"
"""The field that is the largest of its layers', not their sum."""

KEEP, AGAIN = "none", "full"
"""Policies of stages: to keep activations, or to run the forward part again and keep what they were sent."""

Runs = Mapping[tuple[int, ...], LayerCost]
"""What one layer of each kind costs, by ``(kind,)``, and two that follow each other, by ``(kind, kind)``."""


@dataclass(frozen=True)
class LayerFacts:
    """What is known of layers on any submesh.

    Attributes:
        kinds: the kind of each layer.
        gradient_bytes: of each layer, on all its devices together.
        boundary_bytes: what one microbatch sends between layers.
        tied: arguments that several layers read.
    """

    kinds: tuple[int, ...]
    gradient_bytes: tuple[int, ...]
    boundary_bytes: tuple[int, ...]
    tied: tuple[Tied, ...]

    def shared_bytes(self) -> np.ndarray:
        """``[first, last]``: gradients that a stage shares with others."""
        n = len(self.kinds)
        first, last = np.ogrid[:n, :n]
        total = np.zeros((n, n))
        for tied in self.tied:
            inside = sum(((first <= layer) & (layer <= last)).astype(int) for layer in tied.layers)
            total += np.where((inside > 0) & (inside < len(tied.layers)), tied.nbytes, 0.0)
        return total


@dataclass(frozen=True, eq=False)
class LayerTables:
    """Costs of stages as sums over their layers, with what two neighbours of a kind cost more or less than apart.

    Attributes:
        layers: by number of microbatches: smaller ones may be cut in other places.
        runs: by name of submesh and number of microbatches.
        cluster: the links between submeshes.
    """

    layers: Mapping[int, "LayerFacts"]
    runs: Mapping[tuple[str, int], Runs]
    cluster: Cluster

    def cost(self, first_layer: int, last_layer: int, submesh: Submesh, microbatches: int, remat: str) -> StageCost:
        """What one stage costs; see ``table``."""
        table = self.table(submesh, microbatches, remat)
        return StageCost(**{name: float(values[first_layer, last_layer]) for name, values in table.items()})

    def table(self, submesh: Submesh, microbatches: int, remat: str) -> dict[str, np.ndarray]:
        """For each field of ``StageCost`` its value at ``[first_layer, last_layer]``, under ``KEEP`` or ``AGAIN``."""
        runs, layers = self.runs[submesh.name, microbatches], self.layers[microbatches]
        found = {name: _table(name, layers.kinds, runs) for name in FIELDS}
        link_Bps = submesh.n_devices * link_between(self.cluster, 2 * submesh.n_devices).bandwidth_Bps
        found["sync_s"] = found["sync_s"] + 2.0 * layers.shared_bytes() / link_Bps
        found["sent_bytes"] = np.tile([*layers.boundary_bytes, 0.0], (len(layers.kinds), 1))
        found["replica_sync_s"] = 2.0 * _sums(layers.gradient_bytes) / link_Bps
        return found | _again(found, [runs[kind,] for kind in layers.kinds]) if remat == AGAIN else found

    def transfer_s(self, boundary: int, sender: Submesh, receiver: Submesh, microbatches: int) -> float:
        """Every device of the smaller submesh sends or receives its part of what crosses a boundary."""
        nbytes = self.layers[microbatches].boundary_bytes[boundary]
        return transfer_s(self.cluster, nbytes, sender.n_devices, receiver.n_devices)


def _table(name: str, kinds: Sequence[int], runs: Runs) -> np.ndarray:
    """``[first, last]``: one field of the costs of the layers between."""
    alone = [getattr(runs[kind,], name) for kind in kinds]
    pairs = [(kind, kind) if kind == other else () for kind, other in pairwise(kinds)]
    if name == LARGEST:
        return np.maximum(_largest(alone), _between(_largest, [getattr(runs[p], name) if p else 0.0 for p in pairs]))
    more = [getattr(runs[p], name) - 2 * alone[i] if p else 0.0 for i, p in enumerate(pairs)]
    return np.maximum(_sums(alone) + _between(_sums, more), 0.0)


def _again(kept: Mapping[str, np.ndarray], alone: Sequence[LayerCost]) -> dict[str, np.ndarray]:
    """What differs where stages run their forward part again, in the backward part and on the same plan.

    The last layer does so as far as its own backward pass needs it, the others as far as the next layer. What used to
    be kept for a microbatch is there while its backward pass runs; all the time, what the first layer was sent.

    Args:
        kept: ``[first, last]``: the costs of stages that keep activations.
        alone: of each layer.
    """
    forward_s, activation_bytes = kept["forward_s"], kept["activation_bytes_per_microbatch"]
    last_s = np.array([layer.again_s for layer in alone])
    received_bytes = np.triu(np.array([[layer.received_bytes] for layer in alone]) + np.zeros_like(activation_bytes))
    return {
        "backward_s": kept["backward_s"] + np.triu(np.maximum(forward_s - np.diag(forward_s), 0.0) + last_s),
        "activation_bytes_per_microbatch": received_bytes,
        LARGEST: kept[LARGEST] + np.maximum(activation_bytes - received_bytes, 0.0),
    }


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
