"""The command ``benchmark``: its errors and its output."""

import json
import sys
from pathlib import Path

import pytest
import torch

from replk_mm.commands import benchmark

CONVNEXT = """
model = dict(backbone=dict(type='replk_mm.ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 16]), out_indices=(0, 1),
                           gap_before_final_norm=False))
test_dataloader = dict()
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command in this process; CONVNEXT among the arguments is a config with a backbone only."""
    monkeypatch.setattr(benchmark, 'keep_freed_memory', lambda: False)  # this process runs other tests too
    monkeypatch.setattr('replk_mm.analysis.benchmark.network_benchmark.keep_freed_memory', lambda keep=True: False)
    path = tmp_path / 'convnext.py'
    path.write_text(CONVNEXT)

    def call(arguments: str) -> int:
        arguments = arguments.replace('CONVNEXT', str(path))
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *arguments.split(), '--out', str(tmp_path / 'out')])
        return benchmark.main()

    return call


@pytest.mark.parametrize(
    ('arguments', 'fragment'),
    [
        ('model nope.py', 'nope.py'),
        ('backbone CONVNEXT', '--shape'),
        ('backbone CONVNEXT --shape 32 32 --checkpoint no.pth', 'no.pth'),
        ('model CONVNEXT --shape 32 32', 'model'),
        ('op --kernels 2', '--kernels 2'),
        ('op --kernels 5x4', '--kernels 5x4'),
        ('op --implementations winograd', 'channels_last'),
        ('op --dtype float32 tf32', 'tf32'),
        ('backbone CONVNEXT --shape 32 32 --dtype float16', 'float16'),
    ],
)
def test_user_errors(run, arguments, fragment, capsys) -> None:
    assert run(arguments) == 2
    assert fragment in capsys.readouterr().err


def test_a_damaged_export_is_an_error_before_anything_is_measured(run, tmp_path: Path, capsys) -> None:
    folder = tmp_path / 'exported'
    folder.mkdir()
    (folder / 'manifest.json').write_text('{"generator": "replk_mm", "schema_version": 1, "network": "network.onnx"}')
    assert run(f'model CONVNEXT --compare {folder}') == 2
    assert 'manifest.json: cannot be read: format: Field required' in capsys.readouterr().err


@pytest.mark.parametrize('kernel', ['5x5x5', 'x5', '0x5', 'five'])
def test_kernels_that_are_none(run, kernel, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        run(f'op --kernels {kernel}')
    assert stop.value.code == 2 and '--kernels' in capsys.readouterr().err


def test_json_is_the_only_output(run, capsys, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert run('backbone CONVNEXT --shape 64 32 --repeats 3 --batch 1 2 --seconds 0.01 --no-memory --json') == 0
    assert torch.get_num_threads() == threads
    record = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert record == json.loads((tmp_path / 'out' / 'benchmark.json').read_text())
    assert [(p['mode'], p['batch'], p['height'], p['width']) for p in record['points']] == [
        (mode, batch, 64, 32) for mode in ('inference', 'train') for batch in (1, 2)
    ]
    assert {f.name for f in (tmp_path / 'out').iterdir()} == {'table.txt', 'benchmark.json'}


@pytest.mark.parametrize(
    'arguments',
    ['op --kernels 3 --maps 8 --channels 8', 'backbone CONVNEXT --mode inference --shape 32 32 --no-memory'],
)
def test_bfloat16_without_instructions_is_measured_in_float32(run, arguments, monkeypatch, capsys) -> None:
    monkeypatch.setattr(benchmark, 'has_bfloat16_instructions', lambda: False)
    assert run(f'{arguments} --dtype bfloat16 --repeats 3 --seconds 0.01 --json') == 0
    out, err = capsys.readouterr()
    assert err.count('lacks bfloat16 instructions (AVX-512') == 1
    record = json.loads(out)
    assert 'float32 instead of bfloat16' in record['notes'][0]
    assert record.get('dtype', 'float32') == 'float32'
    assert {row.get('dtype', 'float32') for point in record['points'] for row in point['rows']} == {'float32'}


@pytest.mark.slow
@pytest.mark.extras('openvino', 'onnxruntime', 'onnx', 'onnxscript')
def test_other_engines_compute_the_features_of_a_shipped_config(run, root, capsys) -> None:
    config = root / 'configs' / 'upernet_replk-nano_demo.py'
    options = '--mode inference --shape 64 64 --repeats 3 --seconds 0.01 --no-memory --json'
    assert run(f'backbone {config} --compare openvino,onnxruntime {options}') == 0
    rows = {row['name']: row for row in json.loads(capsys.readouterr().out)['points'][0]['rows']}
    for engine in ('openvino', 'onnxruntime'):
        assert rows[engine]['equal'] is True and rows[engine]['difference'] < 1e-5
