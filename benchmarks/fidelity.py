"""Every model x mesh x preset on 8 CPU devices: losses and collectives, against one device and the plan.

    python -m benchmarks.fidelity [--models gpt moe] [--meshes data=8] [--presets dp none] [--steps 10] [--size wide]

One line per case: largest relative difference of the loss, FLOPs of XLA over predicted ones (all but random bits;
matrix products and convolutions), collectives that agree; then a line per difference. Random bits weigh in a tiny
step, and XLA on CPU counts the loop that makes them once. ``--size wide --steps 0`` compiles steps in which products
outweigh everything else, and runs none. The second ratio counts a convolution as if it had no padding.
"""

import argparse
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax

from benchmarks.cases import MESHES, PRESETS, SIZES, TINY, Built, Case, cases, reference_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TINY), choices=list(TINY))
    parser.add_argument("--meshes", nargs="+", default=list(MESHES))
    parser.add_argument("--presets", nargs="+", default=["none", *PRESETS])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    arguments = parser.parse_args()
    print(
        f"{'case':44} {'loss error':>10} {'flops':>8} {'products':>8} {'collectives':>24} {'seconds':>8}",
        flush=True,
    )
    for case in cases():
        wanted = case.mesh in arguments.meshes and (case.preset or "none") in arguments.presets
        if case.model in arguments.models and wanted:
            report(case, arguments.size, arguments.steps)
            jax.clear_caches()


def report(case: Case, size: str, steps: int) -> None:
    start = time.perf_counter()
    built = Built(case, size=size)
    pairs = zip(built.losses(steps), reference_losses(case.model, steps, size), strict=True)
    error = max((abs(found - expected) / abs(expected) for found, expected in pairs), default=0.0)
    predicted, differences = built.plan.prediction, built.differences()
    unexplained = sum(not difference.explanation for difference in differences)
    n_kinds = len(predicted.collectives)
    verdict = f"{n_kinds - len(differences)}/{n_kinds} equal, {unexplained} unexpl."
    seconds = time.perf_counter() - start
    ratios = " ".join(f"{ratio:8.3f}" for ratio in built.flops_ratios())
    print(f"{case!s:44} {error:10.1e} {ratios} {verdict:>24} {seconds:8.1f}", flush=True)
    for d in differences:
        print(
            f"    {d.kind} {'+'.join(d.axes)}: predicted {d.predicted_count} of {d.predicted_bytes:.0f} B,"
            f" compiled {d.compiled_count} of {d.compiled_bytes:.0f} B; {d.explanation or 'UNEXPLAINED'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
