"""Instances of the contest on intra-operator parallelism (github.com/google/iopddl, ASPLOS 2025)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autopar.errors import ProblemError
from autopar.solver.problem import Problem, Usage

FORBIDDEN = 10**18


def read_iopddl(path: str | Path) -> Problem:
    """Read an instance from ``.json`` or ``.json.gz``; costs of 1e18 and more are forbidden.

    Raises:
        ProblemError: the file is not such an instance.
    """
    data = _load(path)
    shared: dict[bytes, np.ndarray] = {}
    nodes = tuple(_array(costs, (len(costs),), shared) for costs in data["nodes"]["costs"])
    edges = []
    for (u, v), flat in zip(data["edges"]["nodes"], data["edges"]["costs"], strict=True):
        edges.append((u, v, _array(flat, (len(nodes[u]), len(nodes[v])), shared)))
    usages = []
    spans = zip(data["nodes"]["intervals"], data["nodes"]["usages"], strict=True)
    for node, ((lo, hi), flat) in enumerate(spans):
        if lo < hi:
            usages.append(Usage(node, lo, hi, _array(flat, (len(flat),), shared, FORBIDDEN**2)))
    limit = data.get("usage_limit")
    return Problem(nodes, tuple(edges), tuple(usages), None if limit is None else float(limit))


def exact_score(path: str | Path, strategies: Sequence[int]) -> tuple[int, int, bool]:
    """``(cost, peak usage, feasible)`` in Python integers: sums of the int64 values exceed int64."""
    data = _load(path)
    cost = sum(costs[s] for costs, s in zip(data["nodes"]["costs"], strategies, strict=True))
    for (u, v), flat in zip(data["edges"]["nodes"], data["edges"]["costs"], strict=True):
        cost += flat[strategies[u] * len(data["nodes"]["costs"][v]) + strategies[v]]
    change: dict[int, int] = {}
    spans = zip(data["nodes"]["intervals"], data["nodes"]["usages"], strategies, strict=True)
    for (lo, hi), usages, strategy in spans:
        if lo < hi:
            change[lo] = change.get(lo, 0) + usages[strategy]
            change[hi] = change.get(hi, 0) - usages[strategy]
    live = peak = 0
    for time in sorted(change):
        live += change[time]
        peak = max(peak, live)
    limit = data.get("usage_limit")
    return cost, peak, cost < FORBIDDEN and (limit is None or peak <= limit)


def _load(path: str | Path) -> dict[str, Any]:
    raw = Path(path).read_bytes()
    if raw[:2] == b"\x1f\x8b":
        raw = gzip.decompress(raw)
    fix = "pass a .json or .json.gz file of that contest's format"
    try:
        problem = json.loads(raw)["problem"]
        nodes = [len(problem["nodes"][name]) for name in ("costs", "intervals", "usages")]
        edges = [len(problem["edges"][name]) for name in ("nodes", "costs")]
    except (ValueError, KeyError, TypeError) as error:
        raise ProblemError(f"{path} is not an IOPDDL instance ({error!r})", fix=fix) from error
    if len(set(nodes)) > 1 or len(set(edges)) > 1:
        raise ProblemError(f"{path} is not an IOPDDL instance (lists of {nodes} nodes, {edges} edges)", fix=fix)
    return problem


def _array(
    values: list[int], shape: tuple[int, ...], shared: dict[bytes, np.ndarray], forbidden: int = FORBIDDEN
) -> np.ndarray:
    array = np.array(values, np.float64)
    array[array >= forbidden] = np.inf
    array = array.reshape(shape)
    return shared.setdefault(repr(shape).encode() + array.tobytes(), array)
