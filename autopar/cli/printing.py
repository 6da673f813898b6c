"""Plans as the JSON that commands print."""

from typing import Any

from autopar.plan import Plan


def plan_json(plan: Plan) -> dict[str, Any]:
    """What ``autopar plan --json`` prints."""
    solution, prediction = plan.solution, plan.prediction
    return {
        "objective_s": solution.objective_s,
        "lower_bound_s": solution.lower_bound_s,
        "gap": solution.gap,
        "proven_optimal": solution.proven_optimal,
        "step_s": prediction.step_s,
        "peak_bytes": prediction.peak_bytes,
        "flops_per_device": prediction.flops,
        "microbatches": plan.microbatches,
        "collectives": [collective_json(c) for c in prediction.collectives],
        "trace_s": solution.trace_s,
        "build_s": solution.build_s,
        "solve_s": solution.solve_s,
        "n_equations": solution.n_equations,
        "n_nodes": solution.n_nodes,
        "replicated_primitives": [name for name, _ in solution.replicated_primitives],
        "params": {name: [list(axes) for axes in dims] for name, dims in plan.params.items()},
        "mesh": plan.mesh.sizes,
    }


def collective_json(one: Any) -> dict[str, Any]:
    """Collectives of a plan or of a compiled program as JSON."""
    return {"kind": one.kind, "axes": list(one.axes), "bytes": one.nbytes, "count": one.count}
