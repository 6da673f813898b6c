"""CPU seconds of planning pipelines of large models, on shapes alone: ``python -m benchmarks.stages [--rows gpt-39b]``.

GPT-39B on 64 V100 is the model and the cluster of Alpa's paper (Zheng et al. 2022, table 5: 2,393 s of planning with
profiled stage costs, batch 1,024 in 64 microbatches); GPT-3 175B on 1,024 A100 has the batch of Narayanan et al. 2021.
"""

import argparse
import time
from dataclasses import dataclass

from autopar.api.planning import traced_in_time
from autopar.api.staging.finalists import plan_searched
from autopar.api.staging.search import Search, StagesPlan, search_traced
from autopar.ir.arguments import adapt
from autopar.ir.trace import Traced
from models import gpt


@dataclass(frozen=True)
class Row:
    """A GPT on a cluster; one layer more than blocks, so that the head is a layer of its own."""

    blocks: int
    width: int
    seq: int
    batch: int
    devices: int
    hardware: str
    microbatches: tuple[int, ...]
    stage_devices: tuple[int, ...] = ()
    schedules: tuple[str, ...] = ("1f1b",)
    vocab: int = 51200
    head_width: int = 128

    def traced(self) -> tuple[Traced, float]:
        """The step, and the CPU seconds of tracing it."""
        step, *arguments = gpt.make(
            layers=self.blocks,
            width=self.width,
            heads=self.width // self.head_width,
            seq=self.seq,
            batch=self.batch,
            vocab=self.vocab,
            precision="bf16",
            dropout=0.0,
            remat=True,
            abstract=True,
        )
        return traced_in_time(adapt(step, arguments))

    def search(self) -> Search:
        """What to choose from."""
        return Search(
            devices=self.devices,
            hardware=self.hardware,
            microbatches=self.microbatches,
            schedules=self.schedules,
            stage_devices=self.stage_devices,
            layers=self.blocks + 1,
        )


def searched(found: StagesPlan) -> str:
    """The chosen slicing in some lines."""
    best = found.slicing
    stages = "; ".join(f"{s.first_layer}-{s.last_layer} on {s.submesh.name}" for s in best.stages)
    parts = ", ".join(f"{name} {spent_s:.1f}" for name, spent_s in found.seconds.by_part.items())
    return (
        f"{best.total_s:.3f} s a step, {best.schedule}, {best.microbatches} microbatches: {stages}\n"
        f"{found.n_problems} layer plans; {found.seconds.total:.1f} CPU s: {parts}"
    )


ROWS = {
    "gpt-1.3b": Row(24, 2048, 1024, 512, 16, "v100", (32,)),
    "gpt-39b": Row(48, 8192, 1024, 1024, 64, "v100", (64,), (4, 8, 16, 32, 64)),
    "gpt-3-175b": Row(96, 12288, 2048, 1536, 1024, "a100", (96,), (8, 16, 32, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=sorted(ROWS))
    parser.add_argument("--whole", action="store_true", help="plan the stages of the best slicing, too")
    arguments = parser.parse_args()
    for name in arguments.rows:
        start_s = time.process_time()
        row = ROWS[name]
        traced, trace_s = row.traced()
        found = search_traced(traced, trace_s, row.search())
        print(f"{name}: {time.process_time() - start_s:.1f} CPU s, model and all\n{searched(found)}", flush=True)
        if arguments.whole:
            print(plan_searched(traced, found).plan, flush=True)
            print(f"{name}: {time.process_time() - start_s:.1f} CPU s with the plan of every stage", flush=True)


if __name__ == "__main__":
    main()
