"""CPU seconds of stage slicing on synthetic costs: ``python -m benchmarks.slicing [--rows gpt-39b gpt-3-175b]``.

The models are those of Alpa's paper (GPT-39B on 64 V100) and of GPT-3 (on 1024 A100); layers cost their FLOPs, larger
submeshes reach less of their devices' speed. The last figures are the predicted step without synchronisation and
update, what the event simulator finds for it, and the slicing. Alpa's own figure for GPT-39B is 1.65 s, with one
number of microbatches and one schedule. Tabulating the costs is timed apart: a real cost model takes longer.
"""

import argparse
import time
from dataclasses import dataclass

from autopar.solver.slicing import Layer, LayerCosts, Slicing, SlicingProblem, Submesh, slice_stages, timeline
from autopar.solver.slicing.tables import tabulate

BYTES_PER_PARAMETER = 18.0  # fp16 weights and gradients, fp32 master weights and Adam moments
ALL = ("gpipe", "1f1b", "eager_1f1b", "zb_h1", "interleaved")


@dataclass(frozen=True)
class Model:
    """A GPT on a cluster of hosts with 8 devices each."""

    layers: int
    width: int
    seq: int
    batch: int
    n_devices: int
    device_flops: float
    bandwidth_Bps: float
    memory_bytes: float
    vocab: int = 51200


MODELS = {
    "gpt-39b": Model(48, 8192, 1024, 1024, 64, 60e12, 3e9, 16e9),
    "gpt-3-175b": Model(96, 12288, 2048, 1536, 1024, 150e12, 25e9, 80e9),
}


def costs(model: Model, submeshes: tuple[Submesh, ...]) -> LayerCosts:
    tokens = model.batch * model.seq
    parameters, embedding = 12 * model.width**2, model.vocab * model.width
    flops = 2 * tokens * parameters + 4 * tokens * model.seq * model.width
    activation_bytes = tokens * model.width * 34.0

    def layer(extra_parameters: float, extra_flops: float) -> Layer:
        n = parameters + extra_parameters
        return Layer(
            forward_s=(flops + extra_flops) / model.device_flops,
            state_bytes=n * BYTES_PER_PARAMETER,
            gradient_bytes=2.0 * n,
            activation_bytes=activation_bytes,
            boundary_bytes=2.0 * tokens * model.width,
        )

    middle = [layer(0, 0)] * (model.layers - 2)
    layers = (layer(embedding, 0), *middle, layer(embedding, 2 * tokens * embedding))
    efficiency = {s.name: 0.97 ** (s.n_devices.bit_length() - 1) for s in submeshes}
    tied = (((0, model.layers - 1), 2.0 * embedding),)
    return LayerCosts(layers, efficiency, model.bandwidth_Bps, tied, update_s_per_byte=1e-12)


def problem(model: Model, schedules: tuple[str, ...], microbatches: tuple[int, ...]) -> SlicingProblem:
    sizes = [1, 2, 4, *(8 * 2**k for k in range((model.n_devices // 8).bit_length()))]
    submeshes = tuple(Submesh(f"{max(1, n // 8)}x{min(n, 8)}", n) for n in sizes)
    return SlicingProblem(
        costs(model, submeshes),
        model.layers,
        model.n_devices,
        submeshes,
        microbatches,
        schedules,
        remats=("none", "full"),
        chunks=(2, 4),
        memory_bytes=model.memory_bytes,
    )


def described(asked: SlicingProblem, slicing: Slicing) -> str:
    stages = ", ".join(f"{s.last_layer - s.first_layer + 1}@{s.submesh.name}" for s in slicing.stages[:6])
    more = ", ..." if len(slicing.stages) > 6 else ""
    head = f"{slicing.schedule} m={slicing.microbatches} p={slicing.n_pipeline_devices}"
    predicted_s, simulated_s = slicing.total_s - slicing.once_s, timeline(asked, slicing).makespan_s
    return f"{predicted_s:9.3f} {simulated_s:9.3f}  {head}: {stages}{more}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=sorted(MODELS), default=sorted(MODELS))
    arguments = parser.parse_args()
    searches = {"1f1b, one m": (("1f1b",), (64,)), "1f1b, 4 m": (("1f1b",), (32, 64, 128, 256))}
    searches["5 schedules, 4 m"] = (ALL, (32, 64, 128, 256))
    print(f"{'model':12} {'search':18} {'tables s':>8} {'search s':>8} {'predicted':>9} {'simulated':>9}")
    for row in arguments.rows:
        for name, (schedules, microbatches) in searches.items():
            asked = problem(MODELS[row], schedules, microbatches)
            start_s = time.process_time()
            for m in microbatches:
                tabulate(asked, m)
            tables_s = time.process_time() - start_s
            found = slice_stages(asked)
            search_s = time.process_time() - start_s - 2 * tables_s
            print(f"{row:12} {name:18} {tables_s:8.2f} {search_s:8.2f} {described(asked, found)}", flush=True)


if __name__ == "__main__":
    main()
