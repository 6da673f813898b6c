from __future__ import annotations

import time
from autopar.solver.eliminate import decode, eliminate, elimination_order
from autopar.solver.problem import Choice, NoChoiceError, Problem, Progress
from autopar.solver.tables import Tables, largest_finite, quantize, quantum_of

import numpy as np


def solve(problem, *, seconds=60.0, relative_gap=0.0, hint=None, on_progress=None, should_stop=None) -> Choice:
    start = time.perf_counter()
    tables = Tables()
    total = sum(largest_finite(a) for a in problem.nodes) + sum(largest_finite(m) for *_, m in problem.edges)
    q = quantum_of(total)
    seen = {}

    def get(a):
        if id(a) not in seen:
            seen[id(a)] = tables.intern(quantize(a, q))
        return seen[id(a)]

    nodes = [get(a) for a in problem.nodes]
    pairs = {}
    for u, v, m in problem.edges:
        t = get(m)
        if u > v:
            u, v, t = v, u, tables.transpose(t)
        pairs[u, v] = tables.add(pairs[u, v], t) if (u, v) in pairs else t
    order = elimination_order([len(a) for a in problem.nodes], list(pairs))
    if order.left:
        raise NotImplementedError
    total, steps = eliminate(tables, nodes, [(u, v, t) for (u, v), t in pairs.items()], order)
    if total == np.inf:
        raise NoChoiceError("every choice is forbidden", np.inf, ())
    x = tuple(decode(steps, len(nodes)))
    if problem.limit is not None and problem.peak(x) > problem.limit:
        raise NotImplementedError
    objective = problem.cost(x)
    return Choice(x, objective, min(objective, total * q), True, time.perf_counter() - start, {"misses": tables.misses, "widest": order.widest_entries})
