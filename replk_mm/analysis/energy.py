"""Energy of a call, where the system tells: RAPL of CPUs (Linux powercap), NVML of NVIDIA GPUs.

Both count the whole device: idle power and other processes are included, the memory of CPUs and the rest of the machine
are not. Linux lets only root read RAPL unless the administrator allows more.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from replk_mm.analysis.timing import Call

#: Where Linux lists the counters of the CPUs.
POWERCAP = Path('/sys/class/powercap')


def energy_per_call(
    call: Call, device: str = 'cpu', seconds: float = 2.0, powercap: Path = POWERCAP
) -> tuple[float, str] | None:
    """Measure a repeated call.

    Args:
        call: Already warmed up.
        device: ``'cpu'``, or the CUDA device that it runs on.
        seconds: Duration of the measurement, at least one call. Counters are updated every 1 to 100 ms.
        powercap: Folder of RAPL's zones.

    Returns:
        Joules per call, and what counted them; None if nothing does.
    """
    found = _rapl_counter(powercap) if device == 'cpu' else _nvml_counter(device)
    if found is None:
        return None
    joules_since_start, source = found
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < seconds:
        call()
        calls += 1
    if device != 'cpu':
        torch.cuda.synchronize(device)
    joules = joules_since_start()
    return (joules / calls, source) if joules > 0 else None


def _rapl_counter(powercap: Path) -> tuple[Callable[[], float], str] | None:
    """Joules of all CPU packages since this call; intel-rapl-mmio and subzones repeat a part of them."""

    def read() -> list[int]:
        return [int((zone / 'energy_uj').read_text()) for zone in zones]

    try:
        zones = [
            zone
            for zone in sorted(powercap.glob('intel-rapl:*'))
            if (zone / 'name').read_text().startswith('package') and zone.name.count(':') == 1
        ]
        ranges, before = [int((zone / 'max_energy_range_uj').read_text()) for zone in zones], read()
    except (OSError, ValueError):  # readable by root only, as a rule
        return None

    def joules() -> float:  # a counter starts again at 0 after its range
        return sum((b - a) % (size + 1) for a, b, size in zip(before, read(), ranges, strict=True)) / 1e6

    return (joules, f'RAPL, {len(zones)} CPU package{"s" * (len(zones) > 1)}') if zones else None


def _nvml_counter(device: str) -> tuple[Callable[[], float], str] | None:
    """Joules of a GPU since this call, with the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f'GPU-{torch.cuda.get_device_properties(device).uuid}')
        torch.cuda.synchronize(device)
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # millijoules
    except pynvml.NVMLError:  # GPUs before Volta do not count
        return None
    return lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3, 'NVML'
