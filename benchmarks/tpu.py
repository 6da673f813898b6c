"""Compiles plans for a TPU topology with libtpu, on a machine without a TPU, and compares prediction and compiler.

    python benchmarks/tpu.py --model gpt --memory-gb 0.15
    python benchmarks/tpu.py --model gpt --preset zero3 --set remat=true     # does what is done twice stay twice?

Prints one JSON object: predicted and compiled FLOPs, peak and temporary bytes, estimated cycles, collectives; and what
the plan does twice to save memory (gathers of a parameter, products of a rematerialised block) beside what the compiler
left of it.
"""

import argparse
import importlib
import json
import os
import time
from typing import Any

from autopar.lowering.topology import TPU_ENVIRONMENT

TEXT = {"layers": 2, "width": 1024, "heads": 8, "seq": 512, "batch": 32, "vocab": 8192, "dropout": 0.0}
SIZES: dict[str, dict[str, Any]] = {
    "gpt": TEXT,
    "bert": TEXT,
    "vit": {"layers": 2, "width": 1024, "heads": 8, "image": 64, "patch": 4, "batch": 256},
    "mlp": {"layers": 6, "width": 8192, "batch": 16384},
}


def main() -> None:
    """Plans, lowers, compiles and audits one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt", choices=sorted(SIZES))
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change the model's size")
    parser.add_argument("--mesh", default="data=4,tensor=4")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--memory-gb", type=float, default=None)
    parser.add_argument("--preset", default="")
    parser.add_argument("--dump", default="", help="write the scheduled HLO here")
    options = parser.parse_args()
    print(json.dumps(measure(options), indent=1))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The figures of one plan."""
    from autopar.api import Options, plan_traced, traced_in_time
    from autopar.ir.arguments import adapt
    from autopar.lowering.audit import audit
    from autopar.lowering.local_program import build_local_program
    from autopar.targets import parse_settings

    settings = SIZES[options.model] | parse_settings(options.set)
    step, state, batch = importlib.import_module(f"models.{options.model}").make(abstract=True, **settings)
    traced, trace_s = traced_in_time(adapt(step, (state, batch)))
    chosen = Options(
        mesh=options.mesh,
        hardware=options.topology.split(":")[0],
        memory_gb=options.memory_gb,
        preset=options.preset,
    )
    plan = plan_traced(traced, trace_s, chosen)
    local = build_local_program(traced.program, plan, chosen.cost_model(plan.mesh))
    compiled, compile_s = _compiled(local, plan.mesh, tuple(i for i, _ in traced.state), options)
    found = audit(compiled, plan.mesh)
    return {
        "model": options.model,
        "preset": options.preset,
        "step_s": plan.prediction.step_s,
        "gap": plan.solution.gap,
        "plan_cpu_s": plan.solution.trace_s + plan.solution.build_s + plan.solution.solve_s,
        "compile_s": round(compile_s, 1),
        "tflop_per_device": {"predicted": plan.prediction.flops / 1e12, "compiled": found.flops / 1e12},
        "mcycles": (found.estimated_cycles or 0) / 1e6,
        "temp_gb": found.temp_bytes / 1e9,
        "peak_gb": {"predicted": plan.prediction.peak_bytes / 1e9, "compiled": found.peak_bytes / 1e9},
        "on_chip_gb": plan.prediction.on_chip_bytes / 1e9,
        "state_gb": plan.prediction.state_bytes / 1e9,
        "done_twice": _done_twice(local, plan, found),
        "collectives": [f"{c.kind} {'+'.join(c.axes)} {c.count}x {c.nbytes / 1e6:.1f} MB" for c in found.collectives],
        "predicted": [
            f"{c.kind} {'+'.join(c.axes)} {c.count}x {c.nbytes / 1e6:.1f} MB" for c in plan.prediction.collectives
        ],
        "differences": _differences(plan, found),
    }


def _compiled(local: Any, mesh: Any, donated: tuple[int, ...], options: argparse.Namespace) -> tuple[Any, float]:
    """The step compiled for the topology, and the seconds that it took."""
    import jax

    from autopar.lowering.spmd import lower
    from autopar.lowering.topology import tpu_mesh

    program = lower(local, tpu_mesh(options.topology, mesh), donated)
    shapes = [jax.ShapeDtypeStruct(slot.value.shape, slot.value.dtype) for slot in local.inputs]
    start = time.perf_counter()
    compiled = program.lower(*shapes).compile()
    compile_s = time.perf_counter() - start
    if options.dump:
        with open(options.dump, "w") as file:
            file.write(compiled.as_text())
    return compiled, compile_s


def _done_twice(local: Any, plan: Any, found: Any) -> dict[str, object]:
    """What the plan repeats, and what the compiler merged of it: no collective, no product where all is well."""
    from autopar.lowering import predict
    from autopar.lowering.audit import merged
    from autopar.lowering.instructions import Move

    again = [i for i, _ in predict.walk(local) if isinstance(i, Move) and i.repeat]
    return {
        "repeated_reshardings": len(again),
        "merged_collectives": merged(plan.prediction.collectives, found, plan.mesh),
        "product_tflop": {
            "predicted": predict.flops(local, ("dot_general", "conv_general_dilated")) / 1e12,
            "compiled": found.product_flops / 1e12,
        },
    }


def _differences(plan: Any, found: Any) -> list[str]:
    from autopar.lowering.audit import compare

    return [str(difference) for difference in compare(plan.prediction.collectives, found, plan.mesh)]


if __name__ == "__main__":
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    main()
