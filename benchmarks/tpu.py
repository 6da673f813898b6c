"""Compiles plans for a TPU topology with libtpu, on a machine without a TPU, and compares prediction and compiler.

    python benchmarks/tpu.py --model gpt --memory-gb 0.6

Prints one line of JSON: predicted and compiled FLOPs, peak and temporary bytes, estimated cycles, collectives.
"""

import argparse
import importlib
import json
import os
import time

from autopar.lowering.topology import TPU_ENVIRONMENT

SIZES = {
    "gpt": {"layers": 2, "width": 1024, "heads": 8, "seq": 512, "batch": 32, "vocab": 8192, "dropout": 0.0},
    "bert": {"layers": 2, "width": 1024, "heads": 8, "seq": 512, "batch": 32, "vocab": 8192, "dropout": 0.0},
}


def main() -> None:
    """Plans, lowers, compiles and audits one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gpt", choices=sorted(SIZES))
    parser.add_argument("--mesh", default="data=4,tensor=4")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--memory-gb", type=float, default=None)
    parser.add_argument("--preset", default="")
    parser.add_argument("--dump", default="", help="write the scheduled HLO here")
    options = parser.parse_args()
    print(json.dumps(measure(options), indent=1))


def measure(options: argparse.Namespace) -> dict[str, object]:
    """The figures of one plan."""
    import jax

    from autopar.api import Options, plan_traced, traced_in_time
    from autopar.ir.arguments import adapt
    from autopar.lowering.audit import audit, compare
    from autopar.lowering.local_program import build_local_program
    from autopar.lowering.spmd import lower
    from autopar.lowering.topology import tpu_mesh

    step, state, batch = importlib.import_module(f"models.{options.model}").make(abstract=True, **SIZES[options.model])
    traced, trace_s = traced_in_time(adapt(step, (state, batch)))
    chosen = Options(mesh=options.mesh, hardware="v5e", memory_gb=options.memory_gb, preset=options.preset)
    plan = plan_traced(traced, trace_s, chosen)
    local = build_local_program(traced.program, plan, chosen.cost_model(plan.mesh))
    program = lower(local, tpu_mesh(options.topology, plan.mesh), tuple(i for i, _ in traced.state))
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in traced.program.inputs]
    start = time.perf_counter()
    compiled = program.lower(*shapes).compile()
    compile_s = time.perf_counter() - start
    if options.dump:
        with open(options.dump, "w") as file:
            file.write(compiled.as_text())
    found = audit(compiled, plan.mesh)
    differences = compare(plan.prediction.collectives, found, plan.mesh)
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
        "state_gb": plan.prediction.state_bytes / 1e9,
        "collectives": [f"{c.kind} {'+'.join(c.axes)} {c.count}x {c.nbytes / 1e6:.1f} MB" for c in found.collectives],
        "predicted": [
            f"{c.kind} {'+'.join(c.axes)} {c.count}x {c.nbytes / 1e6:.1f} MB" for c in plan.prediction.collectives
        ],
        "differences": [str(d) for d in differences],
    }


if __name__ == "__main__":
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    main()
