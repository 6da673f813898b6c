"""calibrate: measures the devices at hand."""

from autopar.cli.console import note, progress, show
from autopar.cli.options import Calibrating
from autopar.cli.planning import force_devices
from autopar.cost.calibrate import Sizes, write_calibration
from autopar.cost.calibrate import calibrate as measure
from autopar.errors import HardwareError
from autopar.plan.terminal import table

QUICK = Sizes(widths=(64, 256), dtypes=("float32",), nbytes=(2**12, 2**16))


def calibrate(request: Calibrating) -> None:
    """Writes a profile that ``--hardware`` can name."""
    if request.output.is_dir() or not request.output.resolve().parent.is_dir():
        raise HardwareError(f"profile {request.output} cannot be written", fix="name a file in a folder that exists")
    force_devices(request.devices or 0)
    with progress("measuring") as update:
        told = lambda what, number, total: update(f"measuring {what} ({number + 1} of {total})")  # noqa: E731
        cluster, samples = measure(sizes=QUICK if request.quick else None, progress=told)
    write_calibration(request.output, cluster, samples)
    shown = table(f"{len(samples)} measurements", "|")
    for dtype, peak in cluster.device.peak_flops:
        shown.add_row(f"{dtype} products", f"{peak * cluster.device.flops_efficiency / 1e9:.3g} GFLOP/s a device")
    shown.add_row("memory", f"{cluster.device.memory_Bps * cluster.device.memory_efficiency / 1e9:.3g} GB/s a device")
    shown.add_row("link", f"{cluster.link.bandwidth_Bps / 1e9:.3g} GB/s, {cluster.link.alpha_s * 1e6:.3g} µs a step")
    show(shown)
    note(f"profile written to {request.output}: use it with --hardware {request.output}")
