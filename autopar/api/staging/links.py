"""What passes between the stages of a pipeline, and what it costs on the links of a cluster."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.api.planning import Options
from autopar.cluster import Cluster, Link, Mesh
from autopar.cost import CostModel, RooflineCost
from autopar.cost.measured import MeasuredCost
from autopar.ir.program import Value
from autopar.ir.stages import Stages

ONE_DEVICE = Mesh((("data", 1), ("tensor", 1)))
"""What prices of memory are measured against."""


def prices_on(options: Options, mesh: Mesh) -> CostModel:
    """The prices on one of several meshes: of the options' cost model, if they have one, with another mesh."""
    return options.cost_model(mesh) if options.cost is None else _moved(options.cost, mesh)


def _moved(cost: CostModel, mesh: Mesh) -> CostModel:
    if isinstance(cost, MeasuredCost):
        return replace(cost, inner=_moved(cost.inner, mesh))
    return replace(cost, mesh=mesh) if isinstance(cost, RooflineCost) else cost


def cluster_of(cost: CostModel) -> Cluster | None:
    """The cluster behind a cost model, if it has one."""
    if isinstance(cost, MeasuredCost):
        return cluster_of(cost.inner)
    return cost.cluster if isinstance(cost, RooflineCost) else None


def link_between(cluster: Cluster, n_devices: int) -> Link:
    """The link between neighbours that have so many devices together."""
    return cluster.link if n_devices <= cluster.domain_devices else cluster.network


def apart(meshes: Sequence[Mesh], devices_per_host: int) -> frozenset[tuple[int, int]]:
    """The pairs of submeshes that are not driven by one process: the runtime lets transfers between them hold both.

    Args:
        meshes: of the submeshes, whose devices follow each other.
        devices_per_host: how many devices a process drives; 0 if one drives all.
    """
    if not devices_per_host:
        return frozenset()
    stops = list(itertools.accumulate(mesh.n_devices for mesh in meshes))
    hosts = [
        {(stop - mesh.n_devices) // devices_per_host, (stop - 1) // devices_per_host}
        for mesh, stop in zip(meshes, stops, strict=True)
    ]
    pairs = itertools.permutations(range(len(meshes)), 2)
    return frozenset((one, other) for one, other in pairs if len(hosts[one] | hosts[other]) > 1)


def transfer_s(cluster: Cluster, nbytes: float, sender: int, receiver: int) -> float:
    """Seconds from one submesh to the next: each device of the smaller one sends or receives its part."""
    link = link_between(cluster, sender + receiver)
    return link.alpha_s + nbytes / (min(sender, receiver) * link.bandwidth_Bps)


@dataclass(frozen=True)
class Traffic:
    """What the stages of a step send each other.

    Attributes:
        crossing_bytes: for each boundary between stages, of one microbatch, the larger of both ways.
        shared_bytes: for each stage, once a step: shares of gradients, and parameters that other stages keep.
        summed_bytes: for each stage, the gradients that it adds up.
    """

    crossing_bytes: tuple[float, ...]
    shared_bytes: tuple[float, ...]
    summed_bytes: tuple[float, ...]

    @staticmethod
    def of(stages: Stages) -> "Traffic":
        """Reads them off a cut."""
        n_stages = len(stages.stages)
        readers: dict[Value, set[int]] = {}
        for index, stage in enumerate(stages.stages):
            for value in stage.program.inputs:
                readers.setdefault(value, set()).add(index)
        up, down = [0.0] * (n_stages - 1), [0.0] * (n_stages - 1)
        for value in readers.keys() & stages.varying & stages.maker.keys():
            made, ends = stages.maker[value], readers[value]
            for boundary in range(made, max(ends)):
                up[boundary] += value.nbytes
            for boundary in range(min(ends), made):
                down[boundary] += value.nbytes
        shared = [0.0] * n_stages
        for value in readers.keys() - stages.varying:
            home = stages.home.get(value, stages.maker.get(value))
            if home is not None:
                abroad = readers[value] - {home}
                shared[home] += len(abroad) * value.nbytes
                for index in abroad:
                    shared[index] += value.nbytes
        summed = (sum(v.nbytes for v in stage.summed) for stage in stages.stages)
        return Traffic(tuple(map(max, up, down)), tuple(shared), tuple(map(float, summed)))

    def transfers_s(self, cluster: Cluster | None, meshes: Sequence[Mesh]) -> tuple[float, ...]:
        """Seconds of one microbatch over each boundary; none where links have no prices."""
        if cluster is None:
            return (0.0,) * len(self.crossing_bytes)
        sizes = [mesh.n_devices for mesh in meshes]
        pairs = zip(self.crossing_bytes, sizes, sizes[1:], strict=False)
        return tuple(transfer_s(cluster, nbytes, sender, receiver) for nbytes, sender, receiver in pairs)

    def once_s(self, cluster: Cluster | None, meshes: Sequence[Mesh], replicas: int) -> tuple[float, ...]:
        """Seconds of each stage, once a step: shared gradients, and the sums of other replicas of the stage."""
        if cluster is None:
            return (0.0,) * len(meshes)
        copied = [2.0 * nbytes if replicas > 1 else 0.0 for nbytes in self.summed_bytes]
        return tuple(
            (shared + copy) / (mesh.n_devices * link_between(cluster, 2 * mesh.n_devices).bandwidth_Bps)
            for shared, copy, mesh in zip(self.shared_bytes, copied, meshes, strict=True)
        )
