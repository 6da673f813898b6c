"""The communication-only prices of Alpa, with which its own test cases have known objectives."""

from dataclasses import dataclass

from autopar.cluster import Mesh
from autopar.cost.model import Work


@dataclass(frozen=True)
class AlpaCost:
    """Alpa's cost model: alpha + beta * bytes moved + a constant per collective; computation is free.

    The prices are in a unit of its own (alpha = beta = 1 in Alpa's tests), not in seconds. An axis of size 1
    is free, which Alpa gets by not listing such strategies; several axes are priced one after another,
    innermost first, each level leaving 1/size of the bytes to the next. Source: Alpa 0.2.3,
    ``alpa/device_mesh.py`` (``LogicalDeviceMesh.all_gather_cost`` and its neighbours).

    Attributes:
        mesh: the mesh.
        alpha: one per mesh axis.
        beta: one per mesh axis, per byte.
        memory_bytes: the memory of one device; unlimited unless given.
    """

    mesh: Mesh
    alpha: tuple[float, ...]
    beta: tuple[float, ...]
    memory_bytes: float = float("inf")

    def collective_s(self, kind: str, nbytes: float, axes: tuple[str, ...]) -> float:
        """The price of one collective.

        >>> AlpaCost(Mesh.parse("x=4"), (1.0,), (1.0,)).collective_s("all_reduce", 32 * 256 * 4, ("x",))
        49153.01
        """
        total = 0.0
        for (name, size), alpha, beta in zip(self.mesh.axes[::-1], self.alpha[::-1], self.beta[::-1], strict=True):
            if name not in axes or size == 1:
                continue
            total += alpha + beta * _moved(kind, size) * nbytes + _EXTRA[kind]
            if kind in ("all_reduce", "all_gather", "reduce_scatter"):
                nbytes /= size
        return total

    def compute_s(self, work: Work) -> float:
        """Free."""
        return 0.0

    def memory_s(self, nbytes: float) -> float:
        """Free."""
        return 0.0


_EXTRA = {
    "all_reduce": 0.01,
    "all_gather": 0.1,
    "reduce_scatter": 0.001,
    "all_to_all": 0.001,
    "collective_permute": 0.0,
}


def _moved(kind: str, size: int) -> float:
    """The bytes that Alpa charges, per byte of the buffer."""
    ring = (size - 1) / size
    penalty = size / 2  # Alpa's own factor against all-to-alls
    factors = {"all_reduce": 2 * ring, "all_to_all": ring / size * penalty, "collective_permute": 1.0}
    return factors.get(kind, ring)
