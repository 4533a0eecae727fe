"""Energy per call: counters of a made-up machine, of known steps."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from replk_mm.analysis.energy import energy_per_call

MOST = 262143328850  # microjoules, as of real CPUs


def zone(powercap: Path, folder: str, name: str, microjoules: int = 0) -> Path:
    path = powercap / folder
    path.mkdir(parents=True)
    for file, content in (('name', name), ('energy_uj', microjoules), ('max_energy_range_uj', MOST)):
        (path / file).write_text(f'{content}\n')
    return path / 'energy_uj'


def test_packages_are_added_and_their_parts_are_not(tmp_path) -> None:
    """A call costs 3 J of one package, whose counter starts again at 0, and 1 J of another."""
    first = zone(tmp_path, 'intel-rapl:0', 'package-0', MOST - 1_000_000)
    second = zone(tmp_path, 'intel-rapl:1', 'package-1', 5)
    others = [
        zone(tmp_path, 'intel-rapl:0:0', 'core'),
        zone(tmp_path, 'intel-rapl:2', 'psys'),
        zone(tmp_path, 'intel-rapl-mmio:0', 'package-0'),
    ]
    steps = {first: 3_000_000, second: 1_000_000, **dict.fromkeys(others, 7_000_000)}

    def call() -> None:
        for path, step in steps.items():
            path.write_text(str((int(path.read_text()) + step) % (MOST + 1)))

    joules, source = energy_per_call(call, seconds=0.01, powercap=tmp_path)
    assert joules == pytest.approx(4, rel=1e-9) and source == 'RAPL, 2 CPU packages'


@pytest.mark.parametrize('damage', ['missing', 'not readable', 'no number', 'stands still'])
def test_without_a_counter_nothing_is_measured(damage, tmp_path) -> None:
    calls = []
    if damage != 'missing':
        counter = zone(tmp_path, 'intel-rapl:0', 'package-0')
        if damage == 'not readable':  # a folder raises OSError for root too
            counter.unlink()
            counter.mkdir()
        if damage == 'no number':
            counter.write_text('unknown\n')
    assert energy_per_call(lambda: calls.append(1), seconds=0, powercap=tmp_path) is None
    assert bool(calls) == (damage == 'stands still')


@pytest.mark.parametrize('counts', [True, False])
def test_gpus_are_counted_by_nvml(counts, monkeypatch) -> None:
    total = [10_000]  # millijoules

    class NVMLError(Exception):
        pass

    def read(handle: str) -> int:
        assert handle == 'handle of GPU-abc'
        if not counts:
            raise NVMLError
        return total[0]

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID='handle of {}'.format,
        nvmlDeviceGetTotalEnergyConsumption=read,
    )
    monkeypatch.setitem(sys.modules, 'pynvml', nvml)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: SimpleNamespace(uuid='abc'))
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    found = energy_per_call(lambda: total.append(total.pop() + 2_500), 'cuda', seconds=0)
    assert found == ((2.5, 'NVML') if counts else None)
    monkeypatch.setitem(sys.modules, 'pynvml', None)  # not installed
    assert energy_per_call(lambda: None, 'cuda', seconds=0) is None
