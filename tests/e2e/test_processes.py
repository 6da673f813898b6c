"""Two processes with four devices each, joined by ``jax.distributed``: the losses of one device in both of them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from models import gpt
from tests.e2e.several_processes import SETTINGS, losses

ROOT = Path(__file__).parents[2]
N_PROCESSES, N_DEVICES = 2, 4
TIMEOUT_S = 300.0
FLAGS = f"--xla_force_host_platform_device_count={N_DEVICES} --xla_backend_optimization_level=0"


def run(program: str, folder: Path) -> list[Any]:
    """What the last line of each process of a program of this folder says, in JSON; all are ended when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": str(ROOT)}
    path, outputs = Path(__file__).with_name(program), [folder / f"{i}.txt" for i in range(N_PROCESSES)]
    processes = []
    try:
        for i, output in enumerate(outputs):
            command = [sys.executable, str(path), address, str(N_PROCESSES), str(i)]
            with output.open("w") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=ROOT)
            processes.append(process)
        wait(processes)
    finally:
        for process in processes:
            process.kill()  # JAX catches the signal of terminate()
            process.wait()
    texts = [output.read_text() for output in outputs]
    said = "\n".join(f"--- process {i}:\n{_without_gloo(text)[-3000:]}" for i, text in enumerate(texts))
    assert not any(process.returncode for process in processes), f"{program} failed:\n{said}"
    return [json.loads(text.splitlines()[-1]) for text in texts]


def _without_gloo(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if "peer ranks" not in line)


def wait(processes: Sequence[subprocess.Popen]) -> None:
    """Until all have ended, one has failed, or the time is over."""
    end_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end_s:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            return
        time.sleep(0.2)


def test_a_program_in_two_processes_trains_as_one_device_does(tmp_path: Path) -> None:
    first, second = run("several_processes.py", tmp_path)
    step, state, batch = gpt.make(**SETTINGS)
    expected = losses(jax.jit(step, compiler_options={"xla_backend_optimization_level": 0}), state, batch)
    assert first == second and sorted(first) == ["1f1b", "gpipe", "parallelize"]
    for found in first.values():
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_arrays_and_pipelines_over_devices_of_two_processes_are_what_they_are_in_one(tmp_path: Path) -> None:
    first, second = run("in_each_process.py", tmp_path)
    assert first["own programs"] == second["own programs"]  # what both compile is the same text
    assert first["checked"] == second["checked"] and len(first["checked"]) == 8
