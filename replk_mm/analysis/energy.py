"""Energy of a call, where the system tells: RAPL of CPU packages (Linux powercap), NVML of a GPU.

Both count the whole device, idle power and other processes included. As a rule, only root may read RAPL.
"""

import time
from pathlib import Path

import torch

from replk_mm.analysis.timing import Call

#: Where Linux lists the counters of the CPUs.
POWERCAP = Path('/sys/class/powercap')


def energy_per_call(
    call: Call, device: str = 'cpu', seconds: float = 2.0, powercap: Path = POWERCAP
) -> tuple[float, str] | None:
    """Joules of a call, repeated for ``seconds``, and what measured them; None if nothing does.

    Args:
        call: Already warmed up.
        device: ``'cpu'``, or the CUDA device that it runs on; NVML averages its power over a second.
        seconds: At least one call is made.
        powercap: Folder of RAPL's zones.
    """

    def counts() -> list[int]:
        return [int((zone / 'energy_uj').read_text()) for zone in zones]

    try:
        if device != 'cpu':
            torch.cuda.power_draw(device)
        # Zones of two colons are parts of a package; intel-rapl-mmio repeats one.
        zones = [zone for zone in sorted(powercap.glob('intel-rapl:*')) if zone.name.count(':') == 1]
        zones = [zone for zone in zones if (zone / 'name').read_text().startswith('package')]
        ranges, before = [int((zone / 'max_energy_range_uj').read_text()) for zone in zones], counts()
    except (OSError, ValueError, ImportError, RuntimeError):  # without nvidia-ml-py, torch has no NVML
        return None
    if device == 'cpu' and not zones:
        return None
    start, calls, spent = time.perf_counter(), 0, 0.0
    while calls == 0 or spent < seconds:
        call()
        calls, spent = calls + 1, time.perf_counter() - start
    if device != 'cpu':
        torch.cuda.synchronize(device)
        watts = torch.cuda.power_draw(device) / 1e3
        return watts * (time.perf_counter() - start) / calls, 'NVML'
    # A counter starts again at 0 after its range.
    joules = sum((b - a) % (size + 1) for a, b, size in zip(before, counts(), ranges, strict=True)) / 1e6
    return (joules / calls, f'RAPL, {len(zones)} CPU package{"s" * (len(zones) > 1)}') if joules else None
