"""The commands: help, mistakes, files that must not be overwritten, the whole chain."""

import argparse
import json
import shlex

import cv2
import numpy as np
import pytest
import torch
from checkpoint_cases import tiny_backbone, write
from PIL import Image
from tiny import ROOT, run_tool, tiny, trained  # noqa: F401
from tool_cases import merged, plain, read, tool_main  # noqa: F401

# ruff: noqa: F811 (fixtures that come from another file)


# ruff: noqa: F811 (fixtures that come from another file)
TOOLS = [
    'train',
    'test',
    'predict',
    'reparameterize',
    'convert_checkpoint',
    'compare',
    'erf',
    'probe',
    'shape_bias',
    'robustness',
    'choose',
    'suite',
    'report',
]


@pytest.mark.parametrize('name', TOOLS)
def test_help_shows_an_example(name, monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        tool_main(name, '--help', monkeypatch=monkeypatch)
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert f'\n  replk {name} ' in text


MISTAKES = {
    'train': [
        ['{cfg}', '--data-root', '{tmp}/gone'],
        ['{tmp}/no.py'],
        ['{cfg}', '--device', 'tpu'],
        ['{cfg}', '--data-root', '{data}', '--work-dir', '{tmp}/w', '--resume', '{tmp}/gone.pth'],
        ['{cfg}', '--data-root', '{data}', '--work-dir', '{file}/w'],
        ['{cfg}', '--amp', 'fp16', '--device', 'cpu'],
        ['{cfg}', '--data-root', '{data}', '--work-dir', '{tmp}/w', '--pretrained', '{tmp}/gone.pth'],
        ['{cfg}', '--cfg-options', 'model.backbone.with_pc=1'],
    ],
    'test': [
        ['{cfg}', '{tmp}/gone.pth'],
        ['{cfg}', '{file}'],
        ['{cfg}', '{ckpt}', '--data-root', '{tmp}/gone'],
        ['{cfg}', '{ckpt}', '--out', '{file}/out'],
    ],
    'predict': [
        ['{cfg}', '{tmp}/gone.pth', '{tmp}/x.jpg', '--out', '{tmp}/out'],
        ['{cfg}', '{ckpt}', '{tmp}/x.jpg', '--out', '{tmp}/out'],
        ['{cfg}', '{ckpt}', '{tmp}/x.jpg', '--out', '{file}/out'],
    ],
    'reparameterize': [
        ['{cfg}', '{tmp}/gone.pth', '{tmp}/out.pth'],
        ['{cfg}', '{ckpt}', '{ckpt}'],
        ['{cfg}', '{ckpt}', '{file}/out.pth'],
    ],
    'convert_checkpoint': [
        ['{tmp}/gone.pth', '{tmp}/out.pth'],
        ['{file}', '{tmp}/out.pth'],
        ['{ckpt}', '{file}/out.pth'],
    ],
}


@pytest.mark.parametrize(('name', 'args'), [(name, args) for name, cases in MISTAKES.items() for args in cases])
def test_mistakes_exit_with_2_and_one_message(name, args, tiny, trained, tmp_path, monkeypatch, capfd):
    (tmp_path / 'file').write_text('not a checkpoint')
    known = dict(cfg=tiny.config, data=tiny.data, tmp=tmp_path, file=tmp_path / 'file', ckpt=trained)
    code = tool_main(name, *(a.format(**known) for a in args), monkeypatch=monkeypatch)
    error = capfd.readouterr().err
    assert code == 2
    assert 'error: ' in error
    assert 'Traceback' not in error
    lines = [line.removeprefix('error: ') for line in error.splitlines()]
    assert len(lines) == len(set(lines)), error


@pytest.mark.parametrize(
    'args',
    [
        ['--max-iters', '0'],
        ['--max-iters', 'x'],
        ['--seed', '-1'],
        ['--seed', '99999999999'],
        ['--amp', 'int8'],
        ['--cfg-options', 'model.backbone.arch'],
    ],
)
def test_values_out_of_range_are_rejected_by_name(args, tiny, monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        tool_main('train', tiny.config, *args, monkeypatch=monkeypatch)
    assert info.value.code == 2
    assert args[0] in capsys.readouterr().err


def test_pictures_of_one_name_do_not_overwrite_each_other(tiny, trained, tmp_path, monkeypatch):
    sources = []
    for i, name in enumerate(['a/x.png', 'b/x.png', 'c/x_2.png']):
        path = tmp_path / name
        path.parent.mkdir()
        cv2.imwrite(str(path), np.full((40 + i, 64, 3), 50, np.uint8))
        sources.append(path)
    out = tmp_path / 'out'
    assert (
        tool_main('predict', tiny.config, trained, *sources, '--out', out, '--device', 'cpu', monkeypatch=monkeypatch)
        == 0
    )
    labels, overlays = sorted(out.glob('*_labels.png')), sorted(out.glob('*_overlay.png'))
    assert sorted(Image.open(f).size for f in labels) == [(64, 40), (64, 41), (64, 42)]
    assert sorted(Image.open(f).size for f in overlays) == [(64 + 210, 40), (64 + 210, 41), (64 + 210, 42)]


def test_converting_onto_the_input_is_rejected(trained, monkeypatch, capsys):
    before = trained.stat().st_mtime_ns
    assert tool_main('convert_checkpoint', trained, trained, monkeypatch=monkeypatch) == 2
    assert 'is an input' in capsys.readouterr().err and trained.stat().st_mtime_ns == before


def test_converting_to_the_authors_names_and_back(trained, tmp_path, monkeypatch, capsys):
    there, back = tmp_path / 'official.pth', tmp_path / 'back.pth'
    assert tool_main('convert_checkpoint', trained, there, '--to', 'official', monkeypatch=monkeypatch) == 0
    assert tool_main('convert_checkpoint', there, back, monkeypatch=monkeypatch) == 0
    assert 'RepLKNet' in capsys.readouterr().out
    first, last = read(trained)['state_dict'], read(back)['state_dict']
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize('choice', ['--use-ema', '--no-use-ema', '--prefix'])
def test_converting_averaged_or_raw_weights(choice, tmp_path, monkeypatch):
    """Checkpoints of the authors' main.py have both, and the command line as a Namespace."""
    log: list[str] = []
    monkeypatch.setattr('replk_mm.checkpoints.key_formats.announce', log.append)
    raw = tiny_backbone().state_dict()
    averaged = {key: value + 1 for key, value in raw.items()}
    source = write(
        tmp_path / 'a.pth', {'model': raw, 'model_ema': averaged, 'args': argparse.Namespace(lr=1.0), 'epoch': 3}
    )
    options = ['--prefix', 'model.'] if choice == '--prefix' else [choice]
    assert tool_main('convert_checkpoint', source, tmp_path / 'b.pth', *options, monkeypatch=monkeypatch) == 0
    chosen = 'model_ema.' if choice == '--use-ema' else 'model.'
    assert f"weights '{chosen}'" in log[0]
    weights, expected = read(tmp_path / 'b.pth')['state_dict'], averaged if choice == '--use-ema' else raw
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in weights)


@pytest.mark.slow
def test_commands_from_training_to_a_merged_test(tiny, tmp_path):
    work, merged = tmp_path / 'work', tmp_path / 'merged.pth'
    place = ['--data-root', tiny.data, '--work-dir', work]
    found = run_tool('train', tiny.config, *place, '--max-iters', 4, '--seed', 1)
    assert found.returncode == 0, found.stderr
    last = work / 'iter_4.pth'
    assert f'{last}\nnext: python {ROOT}/tools/test.py {tiny.config} {last} ' in found.stdout
    assert len(found.stdout.splitlines()) < 20 and not found.stderr
    found = run_tool('reparameterize', tiny.config, last, merged)
    assert found.returncode == 0, found.stderr
    assert '4 parallel kernels merged' in found.stdout
    assert 'equal' in found.stdout
    following = shlex.split(found.stdout.splitlines()[-1].removeprefix('next: '))  # with the data of the training
    assert following[1:] == [f'{ROOT}/tools/test.py', str(work / 'tiny.py'), str(merged)]
    found = run_tool('reparameterize', tiny.config, merged, tmp_path / 'again.pth')
    assert found.returncode == 0 and found.stdout.startswith('already merged')
    found = run_tool('test', *following[2:], '--work-dir', work, '--out', tmp_path / 'out')
    assert found.returncode == 0, found.stderr
    assert 'mIoU' in found.stdout and 'next: ' in found.stdout and not found.stderr
    assert json.loads((tmp_path / 'out' / 'metrics.json').read_text())['reparameterized'] == 'in the checkpoint'
    assert len(list((tmp_path / 'out' / 'predictions').iterdir())) == 2
    found = run_tool('train', tmp_path / 'no.py')
    assert found.returncode == 2
    assert 'Traceback' not in found.stderr
