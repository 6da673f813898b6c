"""Step time on 8 CPU devices: the planned step against jax.jit with data-parallel and with fully sharded shardings.

    python -m benchmarks.speed [--models gpt bert] [--mesh data=8] [--rounds 5]

Medians over interleaved rounds in one process, each in another order; the ratio to the better of the two baselines is
what counts.
"""

import argparse
import importlib
import itertools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
from jax.sharding import NamedSharding, PartitionSpec

import autopar

Runner = tuple[Callable[..., Any], Any, Any]


def baseline(step: Callable[..., Any], state: Any, batch: Any, sharded: bool) -> Runner:
    """``jax.jit`` with the batch split over the devices, and the state replicated or split along a dimension each."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf: Any) -> NamedSharding:
        dims = [i for i, n in enumerate(leaf.shape) if n % 8 == 0] if sharded and leaf.size > 1024 else []
        return NamedSharding(mesh, PartitionSpec(*[None] * dims[0], "d") if dims else PartitionSpec())

    states = jax.tree.map(place, state)
    batches = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("d")), batch)
    run = jax.jit(step, in_shardings=(states, batches), out_shardings=(states, None))
    return run, jax.device_put(state, states), jax.device_put(batch, batches)


def planned(step: Callable[..., Any], state: Any, batch: Any, mesh: str | None) -> Runner:
    """The step under autopar's plan."""
    parallel = autopar.parallelize(step, mesh=mesh, donate=False)
    states, batches = parallel.plan(state, batch).shardings
    return parallel, jax.device_put(state, states), jax.device_put(batch, batches)


def timed_s(runner: Runner) -> float:
    """Seconds of one step."""
    run, state, batch = runner
    start = time.perf_counter()
    jax.block_until_ready(run(state, batch))
    return time.perf_counter() - start


def main() -> None:
    """Prints one line a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["gpt", "bert", "vit", "moe", "mlp"])
    parser.add_argument("--mesh", default=None)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(f"{'model':12s} {'autopar_s':>10s} {'dp_s':>10s} {'fsdp_s':>10s} {'ratio to the best':>18s}", flush=True)
    for name in options.models:
        step, state, batch = importlib.import_module(f"models.{name}").make()
        runners = {
            "autopar": planned(step, state, batch, options.mesh),
            "dp": baseline(step, state, batch, sharded=False),
            "fsdp": baseline(step, state, batch, sharded=True),
        }
        times: dict[str, list[float]] = {key: [] for key in runners}
        for order in itertools.islice(itertools.cycle(itertools.permutations(runners)), options.rounds + 2):
            for key in order:  # what ran just before leaves caches and memory behind
                times[key].append(timed_s(runners[key]))
        median = {key: statistics.median(found[2:]) for key, found in times.items()}
        ratio = median["autopar"] / min(median["dp"], median["fsdp"])
        row = " ".join(f"{median[key]:10.4f}" for key in ("autopar", "dp", "fsdp"))
        print(f"{name:12s} {row} {ratio:18.3f}", flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main()
