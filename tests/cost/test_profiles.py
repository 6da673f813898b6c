"""Shipped and written hardware profiles; candidate meshes; what importing costs needs."""

import json
import subprocess
import sys
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopar.cluster import Mesh, mesh_candidates
from autopar.cost import PROFILES, RooflineCost, Work, hardware, read_profile, write_profile
from autopar.errors import HardwareError

NUMBERS = {
    *("peak_flops", "flops_efficiency", "memory_bytes", "memory_Bps", "memory_efficiency"),
    *("domain_devices", "devices_per_host"),
    *("link.bandwidth_Bps", "link.alpha_s"),
    *("network.bandwidth_Bps", "network.alpha_s"),
}


def test_the_shipped_profiles_are_these():
    assert set(PROFILES) == {"cpu", "v4", "v5e", "v5p", "v6e", "v100", "a100", "h100", "h200", "b200"}


@pytest.mark.parametrize("name", PROFILES)
def test_every_number_of_a_profile_has_a_source(name):
    data = json.loads((resources.files("autopar.cost") / "data" / f"{name}.json").read_text())
    on_chip = {"on_chip_bytes", "overlaps"} & set(data["device"])
    kinds = {f"{link}.kinds" for link in ("link", "network") if "kinds" in data[link]}
    assert set(data["sources"]) == NUMBERS | on_chip | kinds
    assert all(len(source) > 10 for source in data["sources"].values())


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_plausible(name):
    cluster = hardware(name)
    device = cluster.device
    assert cluster.name == name and cluster.topology in ("torus", "switch")
    assert 1e9 < device.peak("float32") <= max(p for _, p in device.peak_flops) < 1e16
    assert 1e9 <= device.memory_bytes < 1e12 and 1e9 <= device.memory_Bps < 1e14
    assert 0 < device.flops_efficiency <= 1 and 0 < device.memory_efficiency <= 1
    assert cluster.network.bandwidth_Bps <= cluster.link.bandwidth_Bps <= device.memory_Bps * 1.5
    assert 1e-7 < cluster.link.alpha_s <= cluster.network.alpha_s < 1e-3
    assert cluster.devices_per_host <= cluster.domain_devices


def test_a_matrix_product_on_v5e_takes_the_time_of_its_data_sheet():
    cost = RooflineCost(hardware("v5e"), Mesh.parse("x=16"))
    assert cost.compute_s(Work("dot_general", 197e12, 0.0, "bfloat16")) == pytest.approx(1 / 0.9)


def test_narrow_floats_fall_back_to_the_16_bit_rate():
    device = hardware("a100").device
    assert device.peak("float8_e4m3fn") == device.peak("bfloat16") == device.peak("float16") == 312e12
    assert device.peak("int64") == device.peak("float32")


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_survives_writing_and_reading(name, tmp_path):
    path = tmp_path / "profile.json"
    write_profile(path, hardware(name), {"memory_bytes": "a test"})
    assert hardware(path) == hardware(str(path)) == read_profile(path) == hardware(name)


def test_unknown_hardware_lists_the_known_names():
    with pytest.raises(HardwareError, match=r"unknown hardware 'tpu9'\n.*a100, b200, cpu.*v6e"):
        hardware("tpu9")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: "not json", "Expecting value"),
        (lambda data: json.dumps(data | {"device": {}}), "peak_flops"),
        (lambda data: json.dumps({k: v for k, v in data.items() if k != "link"}), "link"),
        (lambda data: json.dumps(data | {"colour": "red"}), "colour"),
        (lambda data: json.dumps([1]), "pop"),
    ],
)
def test_a_broken_profile_says_what_is_wrong_and_where(change, reason, tmp_path):
    path = tmp_path / "broken.json"
    write_profile(path, hardware("cpu"), {})
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(HardwareError, match=f"not a hardware profile: .*{reason}") as caught:
        hardware(path)
    assert str(path) in str(caught.value) and "autopar calibrate" in str(caught.value)


def test_costs_are_importable_without_jax():
    code = "import sys, autopar.cost, autopar.cluster; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.integers(1, 64), st.integers(1, 3))
def test_mesh_candidates_are_all_the_ordered_factorisations(n_devices, rank):
    names = ("a", "b", "c")[:rank]
    meshes = mesh_candidates(n_devices, names)
    assert len(set(meshes)) == len(meshes)
    assert all(mesh.n_devices == n_devices and mesh.names == names for mesh in meshes)
    divisors = [n for n in range(1, n_devices + 1) if n_devices % n == 0]
    count = {1: 1, 2: len(divisors), 3: sum(d % e == 0 for d in divisors for e in divisors)}
    assert len(meshes) == count[rank]
