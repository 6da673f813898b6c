"""TPU topologies without a TPU: libtpu compiles for them on any machine (``pip install autopar[tpu]``)."""

import importlib.util
import os

import jax
from jax.experimental import topologies

from autopar.cluster import Mesh
from autopar.errors import HardwareError, MeshError

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
}
"""What libtpu and JAX must find in the environment before JAX is imported, on a machine without a TPU.

The first three keep libtpu from asking a metadata server; the type may be any (it need not be that of the
topology). The fourth lets several programs compile at the same time: without it, libtpu locks itself for one
process, as if there were a TPU to own. The last keeps JAX from starting a TPU that is not there.
"""


def tpu_mesh(topology: str, mesh: Mesh) -> jax.sharding.Mesh:
    """A JAX mesh over the devices of a TPU topology, for ``jit(...).lower(...).compile()`` only.

    Args:
        topology: as libtpu names it: "v5e:4x4", "v5p:2x2x2", "v6e:8x8".
        mesh: its logical grid; as many devices as the topology has.

    Raises:
        HardwareError: libtpu is not installed, the environment is not set, or no such topology.
        MeshError: the mesh has another number of devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise HardwareError("libtpu is not installed", fix="pip install 'autopar[tpu]'")
    missing = [name for name in TPU_ENVIRONMENT if name not in os.environ]
    if missing:
        setting = " ".join(f"{name}={TPU_ENVIRONMENT[name]}" for name in missing)
        raise HardwareError(
            f"libtpu needs {', '.join(missing)} in the environment",
            where=f"topology {topology}",
            fix=f"start the program with {setting}",
        )
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise HardwareError(
            f"no TPU topology '{topology}': {error}", fix="name one as v5e:4x4, v5p:2x2x2 or v6e:8x8"
        ) from error
    if len(described.devices) != mesh.n_devices:
        raise MeshError(
            f"mesh {mesh} has {mesh.n_devices} devices, the topology {len(described.devices)}",
            where=f"topology {topology}",
            fix=f"give a mesh of {len(described.devices)} devices",
        )
    return topologies.make_mesh(described, mesh.shape, mesh.names)
