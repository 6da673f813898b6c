"""Pipelines of one model in the order that the simulator says, and in the order of their measured steps.

    python -m benchmarks.order [--rounds 9] [--layers 6] [--width 256]

Two CPU devices of one thread each, so that two stages run beside each other on two cores and a bubble is idle time. One
line a plan: predicted and measured milliseconds of a step (medians of interleaved rounds in one process), and at the
end Spearman's rank correlation.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import numpy as np

import autopar
from autopar.cluster import Cluster, Mesh
from autopar.cost import RooflineCost
from autopar.cost.calibrate import Sizes, calibrate
from models import gpt


@dataclass(frozen=True)
class Row:
    """A pipeline on two devices; ``stage_of_layer`` is empty for stages of equal work."""

    schedule: str
    microbatches: int
    stage_of_layer: tuple[int, ...] = ()

    def __str__(self) -> str:
        cut = "".join(map(str, self.stage_of_layer)) or "even"
        return f"{self.schedule} m={self.microbatches} {cut}"


def rows(n_layers: int) -> list[Row]:
    """Plans that differ in bubbles and balance."""
    even = [Row(schedule, m) for schedule in ("gpipe", "1f1b") for m in (1, 2, 4, 8)]
    even += [Row("zb_h1", 2), Row("zb_h1", 4), Row("interleaved", 4), Row("interleaved", 8)]
    uneven = [
        Row("1f1b", m, (0,) * k + (1,) * (n_layers - k)) for m in (2, 8) for k in (1, 2, n_layers - 2, n_layers - 1)
    ]
    return even + uneven


def ranks(values: list[float]) -> np.ndarray:
    """The place of each value in order."""
    return np.argsort(np.argsort(values)).astype(float)


def main() -> None:
    """Prints one line a plan and the correlation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    wanted = parser.parse_args()
    cluster, _ = calibrate(sizes=Sizes((256, 512), ("float32",), (2**14, 2**18, 2**21)))
    step, state, batch = gpt.make(layers=wanted.layers, width=wanted.width, batch=16, seq=128, vocab=512)
    plans = {row: planned(row, step, state, batch, cluster) for row in rows(wanted.layers)}
    times: dict[Row, list[float]] = {row: [] for row in plans}
    for _ in range(wanted.rounds + 1):
        for row, (run, _) in plans.items():
            start = time.perf_counter()
            jax.block_until_ready(run(state, batch))
            times[row].append(time.perf_counter() - start)
    measured = {row: statistics.median(found[1:]) for row, found in times.items()}
    print(f"{'plan':28} {'predicted ms':>13} {'measured ms':>12}")
    for row, (_, step_s) in sorted(plans.items(), key=lambda item: item[1][1]):
        print(f"{row!s:28} {step_s * 1e3:13.1f} {measured[row] * 1e3:12.1f}")
    predicted_ranks, measured_ranks = ranks([step_s for _, step_s in plans.values()]), ranks(list(measured.values()))
    print(f"Spearman over {len(plans)} plans: {np.corrcoef(predicted_ranks, measured_ranks)[0, 1]:.3f}")


def planned(row: Row, step: Any, state: Any, batch: Any, cluster: Cluster) -> tuple[Any, float]:
    """The pipeline, and the seconds that its plan predicts."""
    run = autopar.pipeline(
        step,
        submeshes=2,
        schedule=row.schedule,
        microbatches=row.microbatches,
        stage_of_layer=row.stage_of_layer,
        cost=RooflineCost(cluster, Mesh.parse("data=1")),
        donate=False,
    )
    return run, run.plan(state, batch).step_s


if __name__ == "__main__":
    main()
