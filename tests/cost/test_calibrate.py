"""Fitting recovers the figures behind synthetic timings; measuring runs for real on 8 CPU devices."""

import sqlite3
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from autopar.cluster import Cluster, Device, Link, Mesh
from autopar.cost import COLLECTIVES, RooflineCost, Work, hardware
from autopar.cost.calibrate import Sample, Sizes, calibrate, fit, write_calibration
from autopar.cost.measured import MeasuredCost, local_call

SMALL = Sizes(widths=(16, 32), dtypes=("float32",), nbytes=(2**10, 2**14))
FAKE = types.SimpleNamespace(device_kind="fake", memory_stats=lambda: {"bytes_limit": 16e9})


def synthetic(link: Link, n_devices: int, overhead_s: float = 1e-5) -> list[Sample]:
    """Timings of a device of 1e12 flop/s and 1e11 B/s behind ``link``."""
    device = Device("fake", (("float32", 1e12),), 1.0, 16e9, 1e11, 1.0)
    cluster = Cluster("fake", device, "switch", n_devices, n_devices, link, link)
    cost = RooflineCost(cluster, Mesh((("x", n_devices),)))
    products = [Sample("matmul", "float32", f, overhead_s + f / 1e12) for f in (1e8, 1e9, 1e10)]
    copies = [Sample("copy", "float32", b, overhead_s + b / 1e11) for b in (1e6, 1e7, 1e8)]
    sent = [
        Sample(kind, "float32", b, cost.collective_s(kind, b, ("x",))) for kind in COLLECTIVES for b in (1e4, 1e6, 1e8)
    ]
    return [*products, *copies, *(sent if n_devices > 1 else [])]


@pytest.mark.parametrize("n_devices", [2, 8, 12])
@pytest.mark.parametrize(
    "link", [Link(1e9, 1e-5), Link(5e10, 1e-6, (("all_to_all", 1.0, 4.0), ("all_reduce", 0.5, 1.3))), Link(1e9, 0.0)]
)
def test_the_fit_recovers_alpha_beta_and_rates(link, n_devices):
    found = fit(synthetic(link, n_devices), FAKE, n_devices, 4)
    for kind in COLLECTIVES:
        assert found.link.of(kind).bandwidth_Bps == pytest.approx(link.of(kind).bandwidth_Bps, rel=1e-6)
        assert found.link.of(kind).alpha_s == pytest.approx(link.of(kind).alpha_s, abs=1e-12)
    device = found.device
    assert device.peak("float32") * device.flops_efficiency == pytest.approx(1e12, rel=1e-3)
    assert device.memory_Bps * device.memory_efficiency == pytest.approx(1e11, rel=1e-2)
    assert device.memory_bytes == 16e9 and found.domain_devices == n_devices and found.devices_per_host == 4


def test_noise_never_fits_a_negative_latency_or_bandwidth():
    samples = synthetic(Link(1e9, 0.0), 8)
    noisy = [Sample(s.kind, s.dtype, s.amount, s.seconds * (0.5 if s.amount < 1e5 else 1.5)) for s in samples]
    found = fit(noisy, FAKE, 8, 8)
    assert found.link.alpha_s >= 0 and found.link.bandwidth_Bps > 0
    assert 0 < found.device.flops_efficiency <= 1 and 0 < found.device.memory_efficiency <= 1


def test_one_device_is_its_own_link():
    found = fit(synthetic(Link(1.0, 1.0), 1), FAKE, 1, 1)
    assert found.link == Link(found.device.memory_Bps, 0.0)


def test_calibration_measures_every_collective_reports_progress_and_writes_a_profile(tmp_path):
    told = []
    cluster, samples = calibrate(sizes=SMALL, progress=lambda *event: told.append(event))
    assert {s.kind for s in samples} == {"matmul", "copy", *COLLECTIVES}
    assert [number for _, number, _ in told] == list(range(len(samples))) and told[0][2] == len(samples)
    assert all(s.seconds > 0 for s in samples)
    write_calibration(tmp_path / "profile.json", cluster, samples)
    assert hardware(tmp_path / "profile.json") == cluster
    assert cluster.domain_devices == len(jax.devices()) == 8


def test_calibration_of_one_device_has_no_collectives():
    cluster, samples = calibrate(jax.devices()[:1], SMALL)
    assert {s.kind for s in samples} == {"matmul", "copy"} and cluster.devices_per_host == 1


def product(width: int):
    eqn = jax.make_jaxpr(lambda x: lax.dot(x, x))(jnp.ones((width, width))).eqns[0]
    return local_call(eqn.primitive, eqn.params, [(width, width)] * 2, ["float32"] * 2)


def measured(tmp_path) -> MeasuredCost:
    return MeasuredCost(RooflineCost(hardware("v5e"), Mesh.parse("x=8")), tmp_path / "timings")


def test_a_heavy_equation_is_timed_once_and_remembered_on_disk(tmp_path):
    work = Work("dot_general", 2.0 * 64**3, 0.0, "float32", product(64))
    first_s = measured(tmp_path).compute_s(work)
    assert 0 < first_s < 1
    assert measured(tmp_path).compute_s(work) == first_s
    database = sqlite3.connect(tmp_path / "timings" / "timings.sqlite")
    rows = database.execute("SELECT * FROM timings").fetchall()
    database.close()
    assert len(rows) == 1 and rows[0][:2] == ("cpu x 8", jax.__version__)
    assert rows[0][2].startswith("dot_general(float32[64, 64], float32[64, 64];")


def test_other_shapes_are_timed_apart_and_larger_ones_take_longer(tmp_path):
    cost = measured(tmp_path)
    small_s, large_s = (cost.compute_s(Work("dot_general", 1.0, 0.0, "float32", product(n))) for n in (8, 512))
    assert small_s < large_s


def test_everything_else_is_priced_by_the_inner_model(tmp_path):
    cost = measured(tmp_path)
    work = Work("add", 1.0, 1e6, "float32")
    assert cost.compute_s(work) == cost.inner.compute_s(work)
    assert cost.memory_s(1e6) == cost.inner.memory_s(1e6)
    assert cost.collective_s("all_gather", 1e6, ("x",)) == cost.inner.collective_s("all_gather", 1e6, ("x",))
    assert (cost.mesh, cost.memory_bytes) == (cost.inner.mesh, cost.inner.memory_bytes)
    assert hash(cost) == hash(measured(tmp_path))
