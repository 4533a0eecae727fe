"""Energy per call: counters of a made-up machine, of known steps."""

import time
from pathlib import Path

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


@pytest.mark.parametrize('error', [None, ModuleNotFoundError, RuntimeError])
def test_gpus_are_measured_by_nvml(error, monkeypatch) -> None:
    """250 W, for calls of 20 ms; without nvidia-ml-py, and on some GPUs, torch raises."""

    def power_draw(device: str) -> int:
        if error:
            raise error
        return 250_000  # milliwatts

    monkeypatch.setattr(torch.cuda, 'power_draw', power_draw)
    monkeypatch.setattr(torch.cuda, 'synchronize', lambda device: None)
    found = energy_per_call(lambda: time.sleep(0.02), 'cuda', seconds=0.05)
    assert found is None if error else found[1] == 'NVML' and 250 * 0.02 <= found[0] < 250 * 2
