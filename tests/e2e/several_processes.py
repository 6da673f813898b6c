"""Trains a tiny GPT in several processes, as a pipeline with a stage in each and under one plan over all devices.

On each host, with the address of the first, their number and this one's:

    python tests/e2e/several_processes.py 10.0.0.1:1234 2 0

The last line of the output is JSON: {"way to train": [loss after each step]}, the same in every process.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import autopar
from models import data, gpt

SETTINGS = {"layers": 1, "width": 16, "heads": 2, "vocab": 32, "seq": 8, "batch": 8, "optimizer": "sgd", "dropout": 0.0}
STEPS = 3


def connect(address: str, n_processes: int, process: int) -> None:
    """Makes JAX see the devices of all processes; comes before anything that touches a device."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # processes on CPUs speak through it
    jax.distributed.initialize(address, n_processes, process)


def losses(train: Callable[..., Any], state: Any, batch: Any) -> list[float]:
    """The loss of each step: numbers are readable in every process."""
    found = []
    for _ in range(STEPS):
        state, metrics = train(state, batch)
        found.append(float(metrics["loss"]))
    return found


def own_rows(batch: data.Batch, shardings: Any) -> data.Batch:
    """The global batch, of which each process reads only its own rows."""

    def placed(name: str) -> jax.Array:
        rows = np.split(np.asarray(batch[name]), jax.process_count())[jax.process_index()]
        return jax.make_array_from_process_local_data(shardings[name], rows)

    return {name: placed(name) for name in batch}


def main(arguments: Sequence[str]) -> None:
    """Trains in each of the ways and writes the losses."""
    address, n_processes, process = arguments
    connect(address, int(n_processes), int(process))
    config = gpt.Config(**SETTINGS)
    state_key, batch_key = jax.random.split(jax.random.key(config.seed))
    init = functools.partial(gpt.init, config)
    shapes = jax.eval_shape(init, state_key)  # no process makes the whole state
    batch = data.next_token_batch(batch_key, batch=config.batch, seq=config.seq, vocab=config.vocab)
    found = {}

    mesh = f"data={jax.local_device_count()}"
    for schedule in ("gpipe", "1f1b"):
        staged = autopar.pipeline(
            gpt.train_step, submeshes=jax.process_count(), schedule=schedule, microbatches=2, mesh=mesh
        )
        found[schedule] = losses(staged, staged.init(init, state_key, batch=batch), batch)

    train = autopar.parallelize(gpt.train_step, mesh=f"data={jax.device_count()}", preset="zero3")
    rows = own_rows(batch, train.plan(shapes, batch).shardings[1])
    found["parallelize"] = losses(train, train.init(init, state_key, batch=batch), rows)
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
