"""Pipelines of one model in the order that the simulator says, and in the order of their measured steps.

    python -m benchmarks.order [--rounds 5] [--layers 4] [--width 384] [--devices 4]

Two processes with a core each, which the CPU devices of a process share: stages in one process would lend each other
their core while they wait, and a bubble would cost nothing. One line a plan: predicted and measured milliseconds of a
step (medians of interleaved rounds), and at the end Spearman's rank correlation.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import NamedSharding, PartitionSpec

import autopar
from autopar.cluster import Cluster, Link, Mesh
from autopar.cost import RooflineCost
from autopar.cost.calibrate import Sizes, calibrate
from autopar.lowering.pipeline.send import send
from models import gpt

ONE_THREAD = {"JAX_PLATFORMS": "cpu", "NPROC": "1"}
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**35)}
"""glibc keeps what is freed, as allocators of accelerators do; else the kernel zeroes new pages for large buffers."""


@dataclass(frozen=True)
class Row:
    """A pipeline on two submeshes; ``stage_of_layer`` is empty for stages of equal work."""

    schedule: str
    microbatches: int
    stage_of_layer: tuple[int, ...] = ()

    def __str__(self) -> str:
        cut = "".join(map(str, self.stage_of_layer)) or "even"
        return f"{self.schedule} m={self.microbatches} {cut}"


def rows(n_layers: int) -> list[Row]:
    """Plans that differ in bubbles and balance."""
    even = [Row("1f1b", m) for m in (1, 2, 4, 8)] + [Row("gpipe", m) for m in (2, 4, 8)]
    even += [Row("zb_h1", m) for m in (2, 4, 8)] + [Row("interleaved", m) for m in (2, 4)]
    cuts = [(0,) * k + (1,) * (n_layers - k) for k in sorted({1, n_layers // 2 - 1, n_layers // 2 + 1, n_layers - 1})]
    return even + [Row("1f1b", m, cut) for m in (2, 8) for cut in cuts if len(set(cut)) == 2]


def ranks(values: list[float]) -> np.ndarray:
    """The place of each value in order; equal ones share the mean of theirs."""
    found = np.array(values)
    below = (found[None, :] < found[:, None]).sum(axis=1)
    equal = (found[None, :] == found[:, None]).sum(axis=1)
    return below + (equal - 1) / 2


def planned(row: Row, step: Any, arguments: tuple[Any, ...], cluster: Cluster) -> tuple[Any, float]:
    """The pipeline, and the seconds that its plan predicts."""
    mesh = Mesh.parse(f"data={cluster.domain_devices}")
    run = autopar.pipeline(
        step,
        submeshes=2,
        schedule=row.schedule,
        microbatches=row.microbatches,
        stage_of_layer=row.stage_of_layer,
        mesh=mesh,
        cost=RooflineCost(cluster, mesh),
        donate=False,
    )
    return run, run.plan(*arguments).step_s


def link_between_processes() -> Link:
    """What it takes to send arrays to the other process and back, as the runtime does it."""
    each = [next(d for d in jax.devices() if d.process_index == process) for process in range(2)]
    here, there = (NamedSharding(jax.make_mesh((1,), ("d",), devices=[d]), PartitionSpec()) for d in each)
    sizes, found = (2**12, 2**17, 2**20), []
    for nbytes in sizes:
        array, times = send(np.zeros(nbytes // 4, np.float32), here), []
        for _ in range(9):
            start = time.perf_counter()
            array = jax.block_until_ready(send(send(array, there), here))
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times[1:]) / 2)
    per_byte_s, alpha_s = np.polyfit(sizes, found, 1)
    return Link(1 / float(per_byte_s), max(float(alpha_s), 0.0))


def timed(run: Any, state: Any, batch: Any) -> tuple[Any, float]:
    """The new state, and the seconds until all processes have it."""
    sync_global_devices("start")
    start = time.perf_counter()
    found = jax.block_until_ready(run(state, batch))
    sync_global_devices("end")
    return found[0], time.perf_counter() - start


def measure(wanted: argparse.Namespace) -> None:
    """What each of the processes does; the first one prints."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(wanted.address, 2, wanted.process)
    sizes = Sizes((256, 512, 1024), ("float32",), (2**14, 2**18, 2**21))
    cluster, _ = calibrate(jax.local_devices(), sizes)
    cluster = replace(cluster, network=link_between_processes(), domain_devices=wanted.devices)
    step, state, batch = gpt.make(
        layers=wanted.layers, width=wanted.width, batch=wanted.batch, seq=wanted.seq, vocab=512, optimizer="sgd"
    )
    plans = {row: planned(row, step, (state, batch), cluster) for row in rows(wanted.layers)}
    times: dict[Row, list[float]] = {row: [] for row in plans}
    random = np.random.default_rng(0)  # the same in both processes
    for _ in range(1 + wanted.rounds):  # once to compile
        for k in random.permutation(len(plans)):  # what ran just before leaves caches and memory behind
            row = list(plans)[k]
            placed, _ = timed(plans[row][0], state, batch)  # kept for all plans, states would fill the memory
            times[row].append(timed(plans[row][0], placed, batch)[1])
    if wanted.process:
        return
    measured = {row: statistics.median(found[1:]) for row, found in times.items()}
    print(f"{'plan':28} {'predicted ms':>13} {'measured ms':>12}")
    for row, (_, step_s) in sorted(plans.items(), key=lambda item: item[1][1]):
        print(f"{row!s:28} {step_s * 1e3:13.1f} {measured[row] * 1e3:12.1f}")
    predicted_ranks, measured_ranks = ranks([step_s for _, step_s in plans.values()]), ranks(list(measured.values()))
    print(f"Spearman over {len(plans)} plans: {np.corrcoef(predicted_ranks, measured_ranks)[0, 1]:.3f}")


def start(devices: int) -> None:
    """Runs this program in two processes, each on a core of its own that all its devices share."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        sys.exit("order: two processes need two cores")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    again = [sys.executable, "-m", "benchmarks.order", *sys.argv[1:], "--address", address]
    forced = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    settings, processes = os.environ | ONE_THREAD | KEEP_MEMORY | forced, []
    for process, core in enumerate(cores):
        os.sched_setaffinity(0, {core})  # a child inherits it
        processes.append(subprocess.Popen([*again, "--process", str(process)], env=settings))
    sys.exit(max(process.wait() for process in processes))


def main() -> None:
    """Starts two processes, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--devices", type=int, default=4, help="of each process")
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    start(wanted.devices) if wanted.address is None else measure(wanted)


if __name__ == "__main__":
    main()
