"""Why no strategies are left out where mesh axes are of equal size and speed: exchanging them is no symmetry."""

import pytest

from autopar.cluster import Mesh
from autopar.cost import RooflineCost, hardware
from autopar.planner.space import complete_specs
from autopar.sharding.reshard import reshard_matrix
from autopar.spec import Spec

MESH = Mesh.parse("a=2,b=2")
COST = RooflineCost(hardware("v5p"), MESH)


def _seconds(source: Spec, target: Spec) -> float:
    return float(reshard_matrix((source,), (target,), (1 << 12, 1 << 12), 4, COST)[0, 0])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Spec((("a",), ())), Spec(((), ()))),
        (Spec((("a",), ())), Spec(((), ("a",)))),
        (Spec(((), ()), frozenset("a")), Spec((("a",), ()))),
    ],
)
def test_equal_axes_that_are_alone_cost_the_same(source, target):
    assert _seconds(source, target) == pytest.approx(_seconds(_exchanged(source), _exchanged(target)), rel=1e-12)


def test_a_dimension_of_two_axes_gives_up_the_minor_one_for_less_than_the_major_one():
    both = Spec((("a", "b"), ()))
    assert both in complete_specs((8, 8), MESH)
    assert _exchanged(both) not in complete_specs((8, 8), MESH)
    assert _seconds(both, Spec((("a",), ()))) < _seconds(both, Spec((("b",), ())))


def _exchanged(spec: Spec) -> Spec:
    other = {"a": "b", "b": "a"}
    return Spec(
        tuple(tuple(other[axis] for axis in dim) for dim in spec.dims), frozenset(other[axis] for axis in spec.partial)
    )
