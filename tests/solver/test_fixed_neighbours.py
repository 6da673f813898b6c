"""A node with more fixed neighbours than a table may have dimensions."""

import numpy as np

from autopar.solver import Problem, solve


def test_a_node_with_a_hundred_fixed_neighbours_is_solved() -> None:
    n_fixed = 100
    costs = (np.array([0.0, 1.0]), *(np.array([1.0]) for _ in range(n_fixed)))
    edges = tuple((0, 1 + i, np.array([[2.0], [0.0]])) for i in range(n_fixed))
    choice = solve(Problem(costs, edges))
    assert choice.strategies[0] == 1
    assert choice.objective == 1 + n_fixed
    assert choice.proven
