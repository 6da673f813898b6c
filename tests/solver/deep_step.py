"""Problems like deep train steps: forward, backward, state, activations; layers share their tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.solver import Problem, Usage

BLOCK = 12  # nodes of one layer in one direction
SKIP = 3
SAVED = tuple(range(2, BLOCK + 1, 2))  # nodes with a parameter, whose activation the backward pass reads


@dataclass(frozen=True)
class Layer:
    """The tables of one layer, shared by all layers."""

    costs: dict[str, np.ndarray]
    matrices: dict[tuple[str, str], np.ndarray]
    bytes: dict[str, np.ndarray]


def make_layer(strategies: int, seed: int) -> Layer:
    random = np.random.default_rng(seed)
    stream = max(2, strategies)
    sizes = {f"{kind}0": stream for kind in "fb"}
    for i in range(1, BLOCK + 1):
        sizes[f"f{i}"] = sizes[f"b{i}"] = int(random.integers(max(2, strategies // 3), strategies + 1))
        sizes[f"p{i}"] = sizes[f"g{i}"] = int(random.integers(2, max(3, strategies // 2)))
    matrices: dict[tuple[str, str], np.ndarray] = {}

    def matrix(a: str, b: str) -> None:
        values = random.uniform(0.0, 5.0, (sizes[a], sizes[b]))
        matrices[a, b] = np.where(random.random(values.shape) < 0.3, 0.0, values)

    for kind in "fb":
        for i in range(1, BLOCK + 1):
            matrix(f"{kind}{i - 1}", f"{kind}{i}")
            if i % SKIP == 0 and i > SKIP:
                matrix(f"{kind}{i - SKIP}", f"{kind}{i}")
        matrix(f"{kind}{BLOCK}", f"{kind}0")
        matrix(f"{kind}0", f"{kind}0")
    for i in SAVED:
        for pair in ((f"p{i}", f"f{i}"), (f"f{i}", f"b{i}"), (f"b{i}", f"g{i}"), (f"p{i}", f"g{i}")):
            matrix(*pair)
    costs = {name: random.uniform(0.0, 10.0, size) for name, size in sizes.items()}
    # A strategy that keeps less is dearer: sharded state has to be gathered.
    small = {name: np.sort(random.uniform(1.0, 100.0, size)) for name, size in sizes.items()}
    for i in SAVED:
        costs[f"p{i}"] = 10.0 - np.sort(costs[f"p{i}"])
    return Layer(costs, matrices, small)


def deep_train_step(layers: int, strategies: int, *, seed: int = 0) -> Problem:
    """The problem without a limit; parameters are live throughout, activations from forward to backward."""
    draft = _Draft(make_layer(strategies, seed), [], [], [])
    stream, forward = draft.node("f0"), []
    end = 4 * layers * (BLOCK + 1)
    for _ in range(layers):
        state = {i: draft.node(f"p{i}") for i in SAVED}
        here, stream = draft.walk("f", stream)
        for i in SAVED:
            draft.edge(state[i], here[i], f"p{i}", f"f{i}")
            draft.usages.append(Usage(state[i], 0, end, draft.layer.bytes[f"p{i}"]))
        forward.append((state, here))
    stream = draft.node("b0")
    for state, here in reversed(forward):
        back, stream = draft.walk("b", stream)
        for i in SAVED:
            gradient = draft.node(f"g{i}")
            draft.edge(here[i], back[i], f"f{i}", f"b{i}")
            draft.edge(back[i], gradient, f"b{i}", f"g{i}")
            draft.edge(state[i], gradient, f"p{i}", f"g{i}")
            draft.usages.append(Usage(here[i], here[i], back[i] + 1, draft.layer.bytes[f"f{i}"]))
    return Problem(tuple(draft.nodes), tuple(draft.edges), tuple(draft.usages))


@dataclass(frozen=True)
class _Draft:
    layer: Layer
    nodes: list[np.ndarray]
    edges: list[tuple[int, int, np.ndarray]]
    usages: list[Usage]

    def node(self, name: str) -> int:
        self.nodes.append(self.layer.costs[name])
        return len(self.nodes) - 1

    def edge(self, u: int, v: int, a: str, b: str) -> None:
        self.edges.append((u, v, self.layer.matrices[a, b]))

    def walk(self, kind: str, before: int) -> tuple[list[int], int]:
        """One layer in one direction: its nodes, and the stream after it."""
        here = [before]
        for i in range(1, BLOCK + 1):
            here.append(self.node(f"{kind}{i}"))
            self.edge(here[i - 1], here[i], f"{kind}{i - 1}", f"{kind}{i}")
            if i % SKIP == 0 and i > SKIP:
                self.edge(here[i - SKIP], here[i], f"{kind}{i - SKIP}", f"{kind}{i}")
        after = self.node(f"{kind}0")
        self.edge(here[BLOCK], after, f"{kind}{BLOCK}", f"{kind}0")
        self.edge(before, after, f"{kind}0", f"{kind}0")
        return here, after
