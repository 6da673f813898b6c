"""Hardware profiles: shipped ones by name, measured ones by path. One JSON format for both."""

import dataclasses
import json
from importlib import resources
from pathlib import Path
from typing import Any

from autopar.cluster import Cluster, Device, Link
from autopar.errors import HardwareError

_DATA = resources.files("autopar.cost") / "data"
PROFILES = tuple(sorted(entry.name.removesuffix(".json") for entry in _DATA.iterdir() if entry.name.endswith(".json")))
"""The names that ``hardware`` knows."""


def hardware(name_or_path: str | Path) -> Cluster:
    """The cluster of a shipped profile, or of a profile file that ``autopar calibrate`` wrote.

    >>> hardware("v5e").device.memory_bytes / 2**30
    16.0

    Raises:
        HardwareError: neither a known name nor a readable profile.
    """
    if str(name_or_path) in PROFILES:
        entry = _DATA / f"{name_or_path}.json"
        return _cluster(entry.read_text(encoding="utf-8"), str(entry))
    if Path(name_or_path).is_file():
        return read_profile(name_or_path)
    raise HardwareError(
        f"unknown hardware '{name_or_path}'",
        fix=f"name one of {', '.join(PROFILES)}, or the file that `autopar calibrate -o profile.json` writes",
    )


def read_profile(path: str | Path) -> Cluster:
    """The cluster that a profile file describes; raises HardwareError when it does not parse."""
    return _cluster(Path(path).read_text(encoding="utf-8"), str(path))


def write_profile(path: str | Path, cluster: Cluster, sources: dict[str, str]) -> None:
    """Writes ``cluster`` as JSON, with a sentence on where each figure comes from, by field."""
    data = dataclasses.asdict(cluster)
    data["device"]["peak_flops"] = dict(cluster.device.peak_flops)
    for link in (data["link"], data["network"]):
        link["kinds"] = {kind: {"latency": latency, "transfer": rest} for kind, latency, rest in link["kinds"]}
    Path(path).write_text(json.dumps(data | {"sources": sources}, indent=2) + "\n", encoding="utf-8")


def _link(kinds: dict[str, dict[str, float]] | None = None, **figures: float) -> Link:
    factors = ((kind, float(f["latency"]), float(f["transfer"])) for kind, f in (kinds or {}).items())
    return Link(**figures, kinds=tuple(factors))


def _cluster(text: str, where: str) -> Cluster:
    try:
        data: dict[str, Any] = json.loads(text)
        data.pop("sources", None)
        device = data.pop("device")
        peak_flops = tuple((str(dtype), float(peak)) for dtype, peak in device.pop("peak_flops").items())
        if "float32" not in dict(peak_flops):
            raise ValueError("peak_flops needs float32")
        return Cluster(
            device=Device(peak_flops=peak_flops, **device),
            link=_link(**data.pop("link")),
            network=_link(**data.pop("network")),
            **data,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HardwareError(
            f"not a hardware profile: {error}",
            where=where,
            fix="write it with `autopar calibrate -o profile.json`",
        ) from error
