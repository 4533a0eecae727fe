"""scripts/gpu_table.py: its files at a tiny size, and what an interruption leaves."""

import json
import sys

import gpu_table
import pytest
import torch
from tiny import tiny  # noqa: F401 (a fixture)

from replk_mm.analysis.benchmark import operator_benchmark

# ruff: noqa: F811 (a fixture that comes from another file)


@pytest.fixture
def run(monkeypatch, tmp_path, tiny):
    monkeypatch.setattr(gpu_table, 'keep_freed_memory', lambda: False)  # this process runs other tests too
    monkeypatch.setattr('replk_mm.analysis.benchmark.network_benchmark.keep_freed_memory', lambda keep=True: False)
    for name in ('matmul_gflops', 'copy_gbytes'):
        monkeypatch.setattr(f'replk_mm.analysis.benchmark.operator_benchmark.{name}', lambda *args: 10.0)
    monkeypatch.setattr(gpu_table, 'STAGES', [(4, 8), (8, 4)])
    monkeypatch.setattr(gpu_table, 'NETWORK', tiny.config)
    monkeypatch.setattr(gpu_table, 'SHAPE', (64, 64))
    monkeypatch.setattr(gpu_table, 'ROUNDS', 3)
    monkeypatch.setattr('replk_mm.analysis.timing._LOAD_SECONDS', 0.0)

    def call(arguments: str) -> int:
        monkeypatch.setattr(sys, 'argv', ['gpu_table.py', *arguments.split(), '--out', str(tmp_path)])
        return gpu_table.main()

    return call


def records(folder) -> list[dict]:
    return json.loads((folder / 'table.json').read_text(), parse_constant=pytest.fail)['records']


@pytest.mark.slow
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.gpu)])
def test_files(device, run, tmp_path) -> None:
    dtypes = 'float32 bfloat16' if device == 'cpu' else 'float32 tf32 float16 bfloat16'
    assert run(f'--device {device} --kernels 3 5x1 --batch 2 --dtype {dtypes}') == 0
    operators, *networks = records(tmp_path)
    kernels = [(kernel, stage) for kernel in ([3, 3], [5, 1]) for stage in gpu_table.STAGES]
    assert [
        (p['kernel'], (p['channels'], p['size'])) for p in operators['points'][:: 4 * len(dtypes.split())]
    ] == kernels
    assert [record['points'][0]['mode'] for record in networks] == ['inference', 'train']
    text = (tmp_path / 'table.md').read_text()
    assert text.count('\n\n| kernel | map |') == 2 * len(dtypes.split())  # a table for each stage and precision
    assert text.count('\n\n|  | ms, median') == 2 and 'DIFFERENT' not in text


def test_what_there_was_no_time_for_is_noted(run, tmp_path) -> None:
    assert run('--device cpu --kernels 3 --minutes 0') == 0
    [found] = records(tmp_path)
    assert found['points'] == [] and sum('for lack of time' in note for note in found['notes']) == 3


def test_an_interruption_leaves_what_was_measured(run, tmp_path, monkeypatch) -> None:
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(operator_benchmark, '_to_layout', lambda x, name: x if x.shape[1] == 4 else interrupt())
    assert run('--device cpu --kernels 3 --batch 1') == 130
    [found] = records(tmp_path)
    assert [point['size'] for point in found['points']] == [8] * 4
    assert '| 3x3 | 8 | forward |' in (tmp_path / 'table.md').read_text()


def test_networks_that_do_not_fit_are_noted(run, tmp_path, monkeypatch) -> None:
    def fail(*args):
        raise gpu_table.UserError('backbone: CUDA out of memory.\nTry a smaller --batch.')

    monkeypatch.setattr(gpu_table, 'benchmark_networks', fail)
    assert run('--device cpu --kernels 3 --batch 1') == 0
    assert [
        note for note in records(tmp_path)[0]['notes'] if 'train: not measured: backbone: CUDA out of memory.' in note
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_without_a_gpu(run, capsys, tmp_path) -> None:
    assert run('') == 2
    assert 'finds 0 GPUs' in capsys.readouterr().err and not (tmp_path / 'table.json').exists()
