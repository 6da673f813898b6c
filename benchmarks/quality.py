"""The unrestricted plan against every preset, planned only.

    python -m benchmarks.quality [--models gpt moe] [--meshes data=8] [--hardware v5e] [--show]

One line per model, mesh and hardware: milliseconds of a step, predicted / the solver's objective, unrestricted
and under each preset. ``!``: a preset's objective is lower, ``?``: not proven optimal,
``-``: does not apply or does not fit the memory. ``--show`` prints the collectives of every plan.
"""

import argparse
import os
import time
from dataclasses import replace
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from autopar.api import Options, plan_prepared, traced_in_time
from autopar.errors import InfeasibleError, PresetError
from autopar.ir.arguments import adapt
from autopar.ir.trace import Traced
from autopar.plan import Plan
from autopar.planner.search import prepare
from benchmarks.cases import MESHES, PRESETS, make, of_models

TEXT: dict[str, Any] = {"layers": 2, "width": 1024, "heads": 16, "vocab": 8192, "seq": 512, "batch": 32}
REALISTIC = of_models(
    TEXT,
    {"layers": 4, "width": 8192, "batch": 1024},
    {"layers": 2, "width": 1024, "heads": 16, "image": 64, "batch": 64},
    {"layers": 2, "width": 160, "image": 32, "batch": 128},
)
HARDWARE = ("v5e", "h100", "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(REALISTIC), choices=list(REALISTIC))
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--hardware", nargs="+", default=list(HARDWARE))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for the solver, per plan")
    parser.add_argument("--show", action="store_true", help="print the collectives of every plan")
    arguments = parser.parse_args()
    print(f"{'case':32} {'free':>16} " + " ".join(f"{name:>16}" for name in arguments.presets), flush=True)
    for model in arguments.models:
        step, *args = make(model, abstract=True, **REALISTIC[model])
        traced = traced_in_time(adapt(step, args))[0]
        for mesh in arguments.meshes:
            for hardware in arguments.hardware:
                options = Options(mesh=mesh, hardware=hardware, seconds=arguments.seconds)
                row(f"{model} {mesh} {hardware}", traced, options, arguments)


def row(name: str, traced: Traced, options: Options, arguments: argparse.Namespace) -> None:
    start = time.process_time()
    plans = {preset: planned(traced, options, preset) for preset in ("", *arguments.presets)}
    free = plans[""]
    cells = [cell(found, free) for found in plans.values()]
    print(f"{name:32} {' '.join(cells)} {time.process_time() - start:6.1f} s", flush=True)
    for preset, found in plans.items():
        if arguments.show and found is not None:
            print(f"    {preset or 'free'}: " + "; ".join(map(collective, found.prediction.collectives)))


def collective(found: Any) -> str:
    return f"{found.count} {found.kind}({'+'.join(found.axes)}) {found.nbytes / 1e6:.1f} MB"


def cell(found: Plan | None, free: Plan | None) -> str:
    """Milliseconds: predicted step / objective; ``!`` where it beats the unrestricted plan."""
    if found is None or free is None:
        return f"{'-':>16}"
    better = found.solution.objective_s < free.solution.objective_s * (1 - 1e-9)
    mark = "!" if better else "" if found.solution.proven_optimal else "?"
    return f"{found.prediction.step_s * 1e3:.2f}/{found.solution.objective_s * 1e3:.2f}{mark}".rjust(16)


def planned(traced: Traced, options: Options, preset: str) -> Plan | None:
    """The plan under a preset; None where the preset does not apply."""
    cost = options.cost_model(options.meshes()[0])
    try:
        return plan_prepared(prepare(traced, cost), cost, replace(options, preset=preset))
    except (PresetError, InfeasibleError):
        return None


if __name__ == "__main__":
    main()
