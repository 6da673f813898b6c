"""CPU seconds that planning takes, on shapes alone: trace, build, solve, for models of several depths on an 8x8 mesh.

python -m benchmarks.planning [--mesh data=8,tensor=8] [--memory-gb G] [--rows gpt-2 gpt-12 gpt-48 llama-32]
"""

import argparse
import importlib
import time
from typing import Any

WIDE = {"width": 8192, "heads": 64, "seq": 2048, "batch": 64, "vocab": 51200}
LLAMA_8B = {"width": 4096, "heads": 32, "kv_heads": 8, "seq": 8192, "batch": 64, "vocab": 128256}

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-2": ("gpt", {"layers": 2, **WIDE}),
    "gpt-12": ("gpt", {"layers": 12, **WIDE}),
    "gpt-48": ("gpt", {"layers": 48, **WIDE}),
    "llama-32-short": ("llama", {"layers": 32, **LLAMA_8B, "seq": 2048, "batch": 16}),
    "llama-8": ("llama", {"layers": 8, **LLAMA_8B}),
    "llama-32": ("llama", {"layers": 32, **LLAMA_8B}),
}


def measure(model: str, settings: dict[str, Any], mesh: str, memory_gb: float | None) -> str:
    """One row of the table."""
    from autopar.api import Options, plan_traced, traced_in_time
    from autopar.ir.arguments import adapt

    start = time.process_time()
    step, state, batch = importlib.import_module(f"models.{model}").make(abstract=True, **settings)
    made_s = time.process_time() - start
    traced, trace_s = traced_in_time(adapt(step, (state, batch)))
    # Without a limit the memory of a real device would bind: the row without one shows the exact solver alone.
    plan = plan_traced(traced, trace_s, Options(mesh=mesh, hardware="v5p", memory_gb=memory_gb or 1e6))
    total_s = time.process_time() - start - made_s
    found = plan.solution
    return (
        f"{found.n_equations:7d} {found.n_nodes:6d} {trace_s:8.1f} {found.build_s:8.1f} {found.solve_s:8.1f} "
        f"{total_s:8.1f}  {'proven' if found.proven_optimal else f'gap {found.gap:.2e}':12s} "
        f"{plan.prediction.step_s:9.3f} {plan.prediction.peak_bytes / 1e9:8.1f}"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", default="data=8,tensor=8")
    parser.add_argument("--memory-gb", type=float, default=None)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    options = parser.parse_args()
    header = "equations  nodes  trace_s  build_s  solve_s  total_s  certificate     step_s  peak_GB"
    print(f"{'model':10s}{header}", flush=True)
    for name in options.rows:
        model, settings = ROWS[name]
        print(f"{name:10s}{measure(model, settings, options.mesh, options.memory_gb)}", flush=True)


if __name__ == "__main__":
    main()
