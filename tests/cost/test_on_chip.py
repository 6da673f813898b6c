"""Which temporaries live in the memory on the chip: those that fit and do not wait too long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import Mesh
from autopar.cost import AlpaCost, RooflineCost, hardware
from autopar.cost.on_chip import Chip, Stay, chip_of, placed_on_chip

MESH = Mesh.parse("x=4")
EVERY_SECOND = [float(second) for second in range(20)]

CASES = {
    "all that fits lives there": ([Stay(4, (0, 3)), Stay(6, (1, 2))], [True, True]),
    "the larger of two that do not fit together": ([Stay(5, (0, 3)), Stay(6, (1, 2))], [False, True]),
    "one after the other": ([Stay(8, (0, 3)), Stay(8, (4, 6))], [True, True]),
    "a place is taken until its last reader is done": ([Stay(8, (0, 4)), Stay(8, (4, 6))], [True, False]),
    "nothing larger than the chip": ([Stay(11, (0, 1))], [False]),
    "nothing that waits too long for a reader": ([Stay(1, (0, 5))], [False]),
    "waits count between two uses, not in all": ([Stay(1, (0, 4, 8, 12))], [True]),
    "what nobody reads needs its place once": ([Stay(10, (3,))], [True]),
    "nothing": ([], []),
}


@pytest.mark.parametrize("name", CASES)
def test_ten_bytes_where_a_temporary_may_wait_five_seconds(name):
    stays, expected = CASES[name]
    assert placed_on_chip(stays, EVERY_SECOND, Chip(10.0, 5.0)) == expected


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 19), min_size=1, max_size=4)), max_size=20),
    st.integers(1, 30),
)
def test_the_chip_never_holds_more_than_it_has(drawn, nbytes):
    stays = [Stay(size, tuple(sorted(uses))) for size, uses in drawn]
    placed = placed_on_chip(stays, EVERY_SECOND, Chip(float(nbytes), 8.0))
    for at in range(20):
        live = (s.nbytes for s, there in zip(stays, placed, strict=True) if there and s.uses[0] <= at <= s.uses[-1])
        assert sum(live) <= nbytes


def test_the_chip_of_a_v5e_holds_112_mib_for_eight_times_as_long_as_filling_it_takes():
    chip = chip_of(RooflineCost(hardware("v5e"), MESH))
    assert chip is not None and chip.nbytes == 112 * 2**20
    assert chip.wait_s == pytest.approx(8 * 112 * 2**20 / 819e9)


@pytest.mark.parametrize("cost", [RooflineCost(hardware("h100"), MESH), AlpaCost(MESH, (1.0,), (1.0,))])
def test_a_device_without_such_memory_has_no_chip(cost):
    assert chip_of(cost) is None
