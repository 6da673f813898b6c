"""Stage costs that add up over layers, with tied weights: for tests, benchmarks and quick estimates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.solver.slicing.data import StageCost, Submesh


@dataclass(frozen=True)
class Layer:
    """One layer, of the whole batch, on one device.

    Args:
        forward_s: its forward pass; the input and the weight part of backward last as long each.
        state_bytes: parameters, optimizer state and gradients.
        gradient_bytes: what is synchronised.
        activation_bytes: saved for backward without rematerialisation.
        boundary_bytes: what it passes to the next layer.
    """

    forward_s: float
    state_bytes: float
    gradient_bytes: float
    activation_bytes: float
    boundary_bytes: float


@dataclass(frozen=True)
class LayerCosts:
    """Costs that add up over layers, split evenly over a submesh.

    Args:
        layers: the model.
        efficiency: for each submesh name, the share of its devices' speed that it reaches.
        bandwidth_Bps: of each device, between stages and within a submesh.
        tied: groups of layers that share their weights, with the bytes of their gradient: a stage that holds some
            but not all of a group synchronises them with the others, and keeps its own copy.
        update_s_per_byte: of the optimizer, per byte of state on a device.
    """

    layers: tuple[Layer, ...]
    efficiency: dict[str, float]
    bandwidth_Bps: float
    tied: tuple[tuple[tuple[int, ...], float], ...] = ()
    update_s_per_byte: float = 0.0

    def cost(self, first_layer: int, last_layer: int, submesh: Submesh, microbatches: int, remat: str) -> StageCost:
        """Looks up the table."""
        table = self.table(submesh, microbatches, remat)
        return StageCost(**{name: float(values[first_layer, last_layer]) for name, values in table.items()})

    def transfer_s(self, boundary: int, sender: Submesh, receiver: Submesh, microbatches: int) -> float:
        """The narrower side of the two bounds the speed."""
        narrow = min(sender.n_devices, receiver.n_devices)
        return self.layers[boundary].boundary_bytes / microbatches / (narrow * self.bandwidth_Bps)

    def table(self, submesh: Submesh, microbatches: int, remat: str) -> dict[str, np.ndarray]:
        """All runs of layers; ``remat`` is ``none``, or ``full``: only the inputs of layers are saved."""
        n = submesh.n_devices
        forward_s = self._sums("forward_s") / (microbatches * n * self.efficiency[submesh.name])
        sizes = {"none": "activation_bytes", "full": "boundary_bytes"}
        state_bytes = self._sums("state_bytes") / n
        shared_bytes = self._shared_bytes()
        ring_s = 2.0 * (n - 1) / n / self.bandwidth_Bps
        boundary_bytes = np.array([layer.boundary_bytes for layer in self.layers]) / microbatches
        return {
            "forward_s": forward_s,
            "backward_s": forward_s * (2.0 if remat == "full" else 1.0),
            "weight_s": forward_s,
            "sync_s": self._sums("gradient_bytes") * ring_s + 2.0 * shared_bytes / (n * self.bandwidth_Bps),
            "optimizer_s": state_bytes * self.update_s_per_byte,
            "state_bytes": state_bytes,
            "activation_bytes_per_microbatch": self._sums(sizes[remat]) / (microbatches * n),
            "peak_extra_bytes": self._largest("activation_bytes") / (microbatches * n) * (remat == "full"),
            "sent_bytes": np.tile(boundary_bytes, (len(self.layers), 1)),
            "replica_sync_s": 2.0 * self._sums("gradient_bytes") / (n * self.bandwidth_Bps),
            "left_bytes_per_microbatch": self._sums("activation_bytes") / (microbatches * n),
        }

    def _sums(self, field: str) -> np.ndarray:
        """``[first, last]``: the sum over the layers between; 0 where there are none."""
        ends = np.concatenate([[0.0], np.cumsum([getattr(layer, field) for layer in self.layers])])
        return np.maximum(ends[None, 1:] - ends[:-1, None], 0.0)

    def _largest(self, field: str) -> np.ndarray:
        values = np.array([getattr(layer, field) for layer in self.layers])
        rows = [np.concatenate([np.zeros(i), np.maximum.accumulate(values[i:])]) for i in range(len(values))]
        return np.array(rows)

    def _shared_bytes(self) -> np.ndarray:
        """``[first, last]``: gradients of tied weights that the stage shares with others."""
        n = len(self.layers)
        first, last = np.ogrid[:n, :n]
        result = np.zeros((n, n))
        for group, size in self.tied:
            inside = sum(((first <= layer) & (layer <= last)).astype(int) for layer in group)
            result += np.where((inside > 0) & (inside < len(group)), size, 0.0)
        return result
