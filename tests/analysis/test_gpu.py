"""Precisions and the state of a GPU."""

import os

import pytest
import torch

from replk_mm.analysis import gpu

# Of one line of `nvidia-smi --query-gpu=... --format=csv,noheader,nounits`.
LINE = '580.95.05, 1980, 1980, 3201, 3201, 612.45, 700.00, [N/A]'


def tf32() -> tuple[bool, bool]:
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_tf32_is_on_for_its_calls_alone() -> None:
    before = tf32()
    assert before == (False, True), "torch's default has changed"

    with pytest.raises(ZeroDivisionError), gpu.matmul_precision('float32'):
        assert tf32() == (False, False)
        assert gpu.matmul_precision('tf32')(tf32)() == (True, True)
        assert tf32() == (False, False)
        raise ZeroDivisionError
    assert tf32() == before


def nvidia_smi(folder, script: str) -> None:
    (folder / 'nvidia-smi').write_text(f'#!/bin/sh\n{script}\n')
    (folder / 'nvidia-smi').chmod(0o755)


def test_clocks_and_power_are_those_of_nvidia_smi(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv('PATH', f'{tmp_path}{os.pathsep}{os.environ["PATH"]}')
    nvidia_smi(tmp_path, f'echo "$@" > {tmp_path}/asked; echo "{LINE}"')
    found = gpu.query_nvidia_smi('GPU-1234')
    assert found['driver'] == '580.95.05' and found['temperature'] == '[N/A]'
    assert (found['sm_clock'], found['memory_clock_max'], found['power_limit']) == ('1980', '3201', '700.00')
    asked = (tmp_path / 'asked').read_text()
    assert '--id=GPU-1234' in asked and 'clocks.max.mem,power.draw,power.limit' in asked


@pytest.mark.parametrize('script', [None, 'echo failed; exit 9'])
def test_without_nvidia_smi_nothing_is_stated(script, tmp_path, monkeypatch) -> None:
    if script:
        nvidia_smi(tmp_path, script)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert gpu.query_nvidia_smi('GPU-1234') == {}


@pytest.mark.gpu
def test_this_gpu() -> None:
    found = gpu.describe_gpu()
    assert found['memory_gib'] > 0 and '.' in found['capability']


@pytest.mark.gpu
def test_tf32_rounds_products() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip('this GPU has no TF32')
    a = torch.randn(512, 512, device='cuda')
    exact, errors = a.double() @ a.double(), {}
    for precision in ('float32', 'tf32'):
        with gpu.matmul_precision(precision):
            errors[precision] = ((a @ a).double() - exact).abs().max() / exact.abs().max()
    assert errors['float32'] < 1e-5 < errors['tf32'] < 1e-2
