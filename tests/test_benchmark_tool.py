"""The benchmark's command: what it refuses, prints and writes."""
import importlib.util
import json
import sys

import pytest
import torch
from benchmark_cases import allocators, convnext  # noqa: F401 (a fixture)
from tiny import ROOT, run_tool

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.fixture(scope='module')
def tool():
    """tools/benchmark.py as a module."""
    spec = importlib.util.spec_from_file_location('tool_benchmark', ROOT / 'tools' / 'benchmark.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.keep_freed_memory = lambda: False  # this process runs other tests too
    return module


@pytest.mark.parametrize('args, said', [
    (['model', 'nope.py'], 'nope.py: no such config'),
    (['backbone', 'CONVNEXT'], '--shape H W'),
    (['backbone', 'CONVNEXT', '--shape', '32', '32', '--checkpoint', 'no.pth'], 'no.pth'),
    (['model', 'CONVNEXT', '--shape', '32', '32'], 'model'),
    (['op', '--kernels', '2'], '--kernels 2')])
def test_refusals_of_the_command(tool, args, said, convnext, monkeypatch, capsys, tmp_path) -> None:
    args = [convnext if arg == 'CONVNEXT' else arg for arg in args]
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *args, '--out', str(tmp_path / 'out')])
    assert tool.main() == 2
    assert said in capsys.readouterr().err


def test_json_is_all_that_is_printed(tool, convnext, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', 'backbone', convnext, '--shape', '64', '32', '--repeats', '3',
                                      '--batch', '1', '2', '--seconds', '0.01', '--no-memory', '--json', '--out',
                                      str(tmp_path / 'out')])
    threads = torch.get_num_threads()
    assert tool.main() == 0
    assert torch.get_num_threads() == threads
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record == json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert [(p['mode'], p['batch'], p['height'], p['width']) for p in record['points']] == [
        (mode, batch, 64, 32) for mode in ('inference', 'train') for batch in (1, 2)]
    assert {f.name for f in (tmp_path / 'out').iterdir()} == {'table.txt', 'benchmark.json', 'batch.png'}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(convnext, tmp_path) -> None:
    ran = run_tool('benchmark', 'backbone', convnext, '--shape', '256', '256', '--mode', 'inference', '--repeats', 3,
                   '--seconds', 0.01, '--json', '--out', tmp_path / 'out')
    assert ran.returncode == 0, ran.stderr
    record = json.loads(ran.stdout, parse_constant=pytest.fail)
    for row in record['points'][0]['rows']:
        # At least the outputs of stem and norm, 8 x 64 x 64 floats each; None where the system does not tell.
        assert row['memory_bytes'] is None or row['memory_bytes'] > 2 * 4 * 8 * 64 * 64
