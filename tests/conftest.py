"""Eight CPU devices for every test, forced before JAX is imported; golden files; meshes."""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: text equals tests/golden/NAME.txt, up to spaces at the ends of lines."""

    def check(name: str, text: str) -> None:
        assert re.fullmatch(r"[\w.-]+", name), f"not a file name: {name!r}"
        path, actual = (
            GOLDEN / f"{name}.txt",
            "\n".join(map(str.rstrip, text.strip("\n").splitlines())) + "\n",
        )
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(actual, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        if actual != expected:
            pytest.fail(_golden_difference(path, expected, actual), pytrace=False)

    return check


def _golden_difference(path: Path, expected: str, actual: str) -> str:
    name = f"tests/golden/{path.name}"
    diff = difflib.unified_diff(expected.splitlines(), actual.splitlines(), name, "this run", lineterm="")
    return "\n".join([*diff, "", "If the new text is right: pytest --update-golden, and commit the file."])


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The profile of devices so slow that splitting a tiny stage pays."""
    from autopar.cost import write_profile  # here for the same reason as below
    from benchmarks.cases import slow_cluster

    path = tmp_path_factory.mktemp("hardware") / "slow.json"
    write_profile(path, slow_cluster(), {})
    return str(path)


@pytest.fixture
def jax_mesh() -> Callable[..., Any]:
    """``jax_mesh(data=2, tensor=4)``: a ``jax.sharding.Mesh`` over as many of the eight CPU devices."""
    import jax  # here, so that tests of the parts without JAX start without it
    import numpy as np

    def make(**axes: int) -> Any:
        n_devices = int(np.prod(tuple(axes.values())))
        devices = np.array(jax.devices("cpu")[:n_devices]).reshape(tuple(axes.values()))
        return jax.sharding.Mesh(devices, tuple(axes))

    return make
