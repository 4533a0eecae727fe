"""Commands replace only files that they wrote, and never their inputs."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import report_records
from tiny import tiny, trained  # noqa: F401
from tool_cases import read, tool_main

# ruff: noqa: F811 (fixtures that come from another file)

#: Arguments, and the files of ``out`` that belong to somebody else. Configs and checkpoints need not exist: outputs
#: are checked before the work.
CASES = {
    'report': (['{records}', '--out', '{out}'], ['index.html', 'report.md']),
    'compare': (['a', 'b', '--out', '{out}'], ['compare.json', 'compare.md', 'changed_1.png']),
    'erf': (['no.py', '--images', '{images}', '--out', '{out}'], ['erf.json', 'erf.npz', 'erf.png']),
    'erf --compare': (['--compare', 'erf.json', '--out', '{out}', '--name', 'x'], ['x.png', 'x.md']),
    'benchmark': (['op', '--out', '{out}'], ['table.txt', 'benchmark.json']),
    'shape_bias': (['no.py', 'no.pth', '--data-root', 'no', '--out', '{out}'], ['shape_bias.json', 'shape_bias.png']),
    'robustness': (['no.py', 'no.pth', '--out', '{out}'], ['robustness.json', 'robustness.png']),
    'test': (
        ['no.py', 'no.pth', '--out', '{out}'],
        ['metrics.json', 'predictions/a.png', 'predictions/b/instances.bbox.json'],
    ),
    'demo': (['--out', '{out}'], ['demo.json', 'report.html', 'predictions.png', 'reparameterized.pth']),
    'check_data': (['no.py', '--json', '{out}/data.json'], ['data.json']),
    'check_data --picture': (['no.py', '--picture', '{out}/data.png'], ['data.png']),
    'list_configs': (['--configs', '{configs}', '--write', '{out}/thesis.md'], ['thesis.md']),
    'convert_checkpoint': (['no.pth', '{out}/thesis.txt'], ['thesis.txt']),
    'reparameterize': (['{config}', 'no.pth', '{out}/thesis.txt'], ['thesis.txt']),
    'predict': (
        ['{config}', '{checkpoint}', '{images}/a.png', '--out', '{out}', '--device', 'cpu'],
        ['a_overlay.png', 'a_labels.png'],
    ),
}


@pytest.fixture
def known(tiny, trained, tmp_path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ('records', 'out', 'images', 'configs')}
    for folder in found.values():
        folder.mkdir()
    report_records.write(found['records'], [report_records.metric('a', 0, 50.0)])
    cv2.imwrite(str(found['images'] / 'a.png'), np.full((40, 64, 3), 50, np.uint8))
    (found['configs'] / 'tiny_demo.py').write_text(tiny.config.read_text())
    return {**found, 'config': tiny.config, 'checkpoint': trained}


@pytest.mark.parametrize(('name', 'file'), [(name, file) for name, (_, files) in CASES.items() for file in files])
@pytest.mark.parametrize('link', [False, True])
def test_files_of_others_stay(name, file, link, known, tmp_path, monkeypatch, capfd):
    path, mine = known['out'] / file, tmp_path / 'mine'
    path.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('my work of three years')
    path.symlink_to(mine) if link else mine.rename(path)
    args = [arg.format(**known) for arg in CASES[name][0]]
    assert tool_main(name.split()[0], *args, monkeypatch=monkeypatch) == 2
    error = capfd.readouterr().err
    assert f'{path}: ' in error and '--overwrite' in error
    assert path.read_text() == 'my work of three years' and path.is_symlink() == link


@pytest.mark.parametrize(
    'name',
    [
        'report',
        'list_configs',
        'convert_checkpoint',
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('predict', 'reparameterize')),
    ],
)
def test_own_files_are_replaced_and_others_on_request(name, known, monkeypatch):
    args, files = CASES[name]
    args = [arg.format(**known).replace('no.pth', str(known['checkpoint'])) for arg in args]
    monkeypatch.setattr('replk_mm.commands.list_configs.read_configs', lambda folder: [])
    for _ in range(2):
        assert tool_main(name, *args, monkeypatch=monkeypatch) == 0
    target, mine = known['out'] / files[0], known['out'] / 'mine'
    mine.write_text('my work')
    target.unlink()
    target.symlink_to(mine)
    assert tool_main(name, *args, '--overwrite', monkeypatch=monkeypatch) == 0
    assert mine.read_text() == 'my work' and not target.is_symlink()


@pytest.mark.parametrize('options', [[], ['--overwrite']], ids=['', 'overwrite'])
def test_predictions_do_not_replace_an_input(options, known, monkeypatch, capfd):
    folder = known['images']
    args = [known['config'], known['checkpoint'], folder / 'a.png', folder / 'a_overlay.png', '--device', 'cpu']
    (folder / 'a_overlay.png').write_bytes((folder / 'a.png').read_bytes())
    before = (folder / 'a_overlay.png').read_bytes()
    assert tool_main('predict', *args, '--out', folder, *options, monkeypatch=monkeypatch) == 2
    assert 'a_overlay.png: is an input' in capfd.readouterr().err
    assert (folder / 'a_overlay.png').read_bytes() == before and len(list(folder.iterdir())) == 2


def test_trained_checkpoints_are_not_replaced_by_converted_ones(known, tmp_path, monkeypatch):
    other = tmp_path / 'iter_7.pth'
    other.write_bytes(known['checkpoint'].read_bytes())
    assert tool_main('convert_checkpoint', known['checkpoint'], other, monkeypatch=monkeypatch) == 2
    assert read(other)['optimizer']


def test_own_safetensors(known, tmp_path, monkeypatch):
    for _ in range(2):
        arguments = known['checkpoint'], tmp_path / 'a.safetensors'
        assert tool_main('convert_checkpoint', *arguments, monkeypatch=monkeypatch) == 0


def test_json_names_its_generator(known, monkeypatch):
    """Without it, the next run of the same command could not replace the file."""
    from replk_mm.analysis.benchmark import report
    from replk_mm.commands import check_data
    from replk_mm.data.checks.audit import Audit

    texts = [report.record_to_json({'what': 'op'}), check_data.to_json(Audit('config', False))]
    assert [json.loads(text)['generator'] for text in texts] == ['replk_mm'] * 2
