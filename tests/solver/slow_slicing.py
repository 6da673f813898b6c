"""Stage slicing by trying everything, and a Hypothesis strategy that draws small problems."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from autopar.solver.schedule import Pipeline, family, make_schedule
from autopar.solver.slicing import Slicing, SlicingProblem, StageCost, Submesh

MIXED = ("gpipe", "1f1b", "eager_1f1b", "zb_h1", "zb_h2")
ALIKE = ("interleaved", "wave", "chimera", "dualpipe_v", "bpipe")
N_FIELDS = len(dataclasses.fields(StageCost))


@dataclass(frozen=True)
class RandomCosts:
    """Costs without any structure: quarters from a seed; some stages are forbidden, some transfers slow."""

    seed: int
    forbidden: float
    slowest_transfer_s: float

    def cost(self, first_layer: int, last_layer: int, submesh: Submesh, microbatches: int, remat: str) -> StageCost:
        random = self._random(first_layer, last_layer, submesh.n_devices, microbatches, len(remat))
        values = [float(value) / 4 for value in random.integers(0, 12, N_FIELDS)]
        if random.random() < self.forbidden:
            values[0] = math.inf
        return StageCost(*values)

    def transfer_s(self, boundary: int, sender: Submesh, receiver: Submesh, microbatches: int) -> float:
        random = self._random(boundary, sender.n_devices, receiver.n_devices, microbatches)
        return float(random.integers(0, 5)) / 4 * self.slowest_transfer_s

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


@dataclass(frozen=True)
class Slice:
    """A complete choice: per stage (first, last, submesh, remat)."""

    schedule: str
    m: int
    v: int
    stages: tuple[tuple[int, int, Submesh, str], ...]


def slices(problem: SlicingProblem) -> Iterator[Slice]:
    """Every choice there is, whatever its cost and memory."""
    for name, m in itertools.product(problem.schedules, problem.microbatches):
        traits = family(name).traits
        for v in problem.chunks if traits.any_chunks else (traits.chunks,):
            for p in range(1, problem.n_layers // v + 1):
                if not family(name).complaint(Pipeline(p, m, v)):
                    yield from _of_length(problem, name, m, v, p * v)


def _of_length(problem: SlicingProblem, name: str, m: int, v: int, n_stages: int) -> Iterator[Slice]:
    uniform = family(name).traits.uniform
    for ends in itertools.combinations(range(1, problem.n_layers), n_stages - 1):
        bounds = [0, *ends, problem.n_layers]
        if uniform:
            meshes = [(s,) * n_stages for s in problem.submeshes if s.n_devices * n_stages // v <= problem.n_devices]
        else:
            every = itertools.product(problem.submeshes, repeat=n_stages)
            meshes = [row for row in every if sum(s.n_devices for s in row) <= problem.n_devices]
        for row in meshes:
            for remats in itertools.product(problem.remats, repeat=n_stages):
                runs = zip(bounds, bounds[1:], row, remats, strict=False)
                yield Slice(name, m, v, tuple((a, b - 1, submesh, remat) for a, b, submesh, remat in runs))


def price(problem: SlicingProblem, choice: Slice) -> tuple[float, float]:
    """The step, and the most memory of any device."""
    found, n, m, v = family(choice.schedule), len(choice.stages), choice.m, choice.v
    schedule = make_schedule(choice.schedule, n // v, m, v)
    replicas = len(schedule.placements)
    bottlenecks, fills, onces, peaks = [], [], [], []
    for k, (first, last, submesh, remat) in enumerate(choice.stages):
        cost = problem.costs.cost(first, last, submesh, m, remat)
        if math.isinf(cost.forward_s):
            return math.inf, math.inf
        f, b, w = cost.forward_s, cost.backward_s, cost.weight_s
        place = schedule.placements[0][k]
        x = 0.0
        if k + 1 < n and schedule.placements[0][k + 1] != place:
            x = problem.costs.transfer_s(last, submesh, choice.stages[k + 1][2], m)
        g = max(0.0, float(found.fill(schedule.pipeline, f, b, w)))
        once = cost.sync_s + cost.optimizer_s + (cost.replica_sync_s if replicas > 1 else 0.0)
        waits = max(0.0, found.traits.exposed * x - (w if found.traits.splits_backward else 0.0))
        work = m * v * (f + b + w) - found.traits.slowest * g + (m * v - 1) * waits
        bottlenecks += [work, (m * v - 1) * x]
        fills.append((g + 2 * x) / v)
        onces.append(v * replicas * once)
        each = max(cost.activation_bytes_per_microbatch, cost.left_bytes_per_microbatch * bool(schedule.split))
        saved = schedule.in_flight_bounds[place] * each
        peaks.append(v * replicas * cost.state_bytes + saved + cost.peak_extra_bytes)
    return max(bottlenecks) + sum(fills) + max(onces), max(peaks)


def brute_force(problem: SlicingProblem) -> tuple[dict[tuple[str, int], float], float]:
    """The least step of every schedule and number of microbatches that fits, and the least memory of any."""
    best: dict[tuple[str, int], float] = {}
    least_bytes = math.inf
    for choice in slices(problem):
        step_s, peak_bytes = price(problem, choice)
        least_bytes = min(least_bytes, peak_bytes)
        key = (choice.schedule, choice.m)
        if peak_bytes <= problem.memory_bytes and step_s < best.get(key, math.inf):
            best[key] = step_s
    return best, least_bytes


def as_slice(slicing: Slicing) -> Slice:
    """The choice of a slicing, without what it predicts."""
    stages = tuple((s.first_layer, s.last_layer, s.submesh, s.remat) for s in slicing.stages)
    return Slice(slicing.schedule, slicing.microbatches, slicing.n_chunks, stages)


@st.composite
def problems(draw, schedules: tuple[str, ...]) -> SlicingProblem:
    """Few layers and devices, any submeshes, some forbidden stages, memory that binds or does not."""
    sizes = draw(st.lists(st.sampled_from([1, 1, 2, 3, 4]), min_size=1, max_size=2, unique=True))
    microbatches = draw(st.lists(st.sampled_from([1, 2, 4, 6, 8]), min_size=1, max_size=2, unique=True))
    names = draw(st.lists(st.sampled_from(schedules), min_size=1, max_size=2, unique=True))
    return SlicingProblem(
        RandomCosts(
            draw(st.integers(0, 2**32 - 1)),
            forbidden=draw(st.sampled_from([0.0, 0.2])),
            slowest_transfer_s=draw(st.sampled_from([0.25, 2.0])),
        ),
        n_layers=draw(st.integers(1, 4)),
        n_devices=draw(st.integers(2, 8)),
        submeshes=tuple(Submesh(f"1x{size}", size) for size in sizes),
        microbatches=tuple(microbatches),
        schedules=tuple(names),
        remats=draw(st.sampled_from([("none",), ("none", "full")])),
        chunks=draw(st.sampled_from([(2,), (2, 4)])),
        memory_bytes=draw(st.sampled_from([4.0, 8.0, 12.0, math.inf, math.inf])),
    )
