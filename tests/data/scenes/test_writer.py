"""Writing procedural scenes: resumable, never over other people's files; the command make_demo_data."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from trees import tree

from replk_mm.commands import make_demo_data
from replk_mm.data.scenes.cue_conflict import make_cue_conflict_scene
from replk_mm.data.scenes.kinds import SCENES
from replk_mm.data.scenes.render import make_scene
from replk_mm.data.scenes.spec import DEMO_CLASSES
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.errors import UserError

SMALL = dict(train=3, val=2, size=(64, 64))


def run_command(monkeypatch, *args) -> int:
    monkeypatch.setattr(sys, 'argv', ['tools/make_demo_data.py', *map(str, args)])
    return make_demo_data.main()


def test_ade20k_layout(tmp_path, monkeypatch, capsys):
    out = tmp_path / 'd'
    assert run_command(monkeypatch, out, '--train', 3, '--val', 2, '--seed', 4, '--size', 64, 96) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f'written: {out} (3 train, 2 val scenes of 64x96 pixels')
    assert lines[-1] == f'next: python tools/train.py configs/upernet_replk-nano_demo.py --data-root {out}'
    meta = json.loads((out / 'meta.json').read_text())
    assert meta['classes'] == list(DEMO_CLASSES) and meta['scenes'] == {'train': 3, 'val': 2} and meta['seed'] == 4
    for split, folder, count in (('train', 'training', 3), ('val', 'validation', 2)):
        images, labels = sorted((out / 'images' / folder).iterdir()), sorted((out / 'annotations' / folder).iterdir())
        assert [p.stem for p in images] == [p.stem for p in labels] and len(images) == count
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            scene = make_scene(4, split, index, (64, 96))
            pixels, stored = Image.open(image), Image.open(label)
            assert image.suffix == '.jpg' and pixels.mode == 'RGB' and label.suffix == '.png' and stored.mode == 'L'
            assert (np.array(stored) == scene.label).all()
            # JPEG is lossy. A wrong channel order or a shift would give 8 grey levels on average.
            assert np.abs(np.array(pixels, int) - scene.image).mean() < 4


@pytest.mark.parametrize('choice', [('--format', 'imagenet'), ('--scenes', 'shapes')])
def test_imagenet_layout(tmp_path, monkeypatch, capsys, choice):
    out = tmp_path / 'd'
    assert run_command(monkeypatch, out, *choice, '--train', 20, '--val', 16, '--seed', 4, '--size', 64, 64) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f'next: python tools/train.py configs/replk-nano_shapes.py --data-root {out} --classes auto'
    )
    meta = json.loads((out / 'meta.json').read_text())
    for split, count in (('train', 20), ('val', 16)):
        # torchvision's and mmpretrain's folders of images number the classes in alphabetical order
        assert sorted(path.name for path in (out / split).iterdir()) == meta['classes'] == ['disc', 'square', 'star']
        images = sorted((out / split).rglob('*.jpg'), key=lambda path: path.name)
        assert len(images) == count
        for index, path in enumerate(images):
            scene = make_cue_conflict_scene(4, split, index, (64, 64))
            assert path.parent.name == scene.instances[0].spec.shape
            assert np.abs(np.array(Image.open(path), int) - scene.image).mean() < 4


def test_larger_data_set_starts_with_the_smaller_one(tmp_path):
    write_demo_data(tmp_path / 'a', train=2, val=1, size=(64, 64))
    write_demo_data(tmp_path / 'b', train=4, val=2, size=(64, 64))
    small, large = tree(tmp_path / 'a'), tree(tmp_path / 'b')
    assert all(large[name] == content for name, content in small.items() if name != 'meta.json')


@pytest.mark.parametrize(
    ('kind', 'layout'),
    [('demo', 'ade20k'), ('demo', 'coco'), ('demo', 'cityscapes'), ('conflict', 'ade20k'), ('shapes', 'imagenet')],
)
def test_interrupted_run_resumes_to_the_same_files(tmp_path, kind, layout):
    finished, resumed = [], []

    def interrupt(*key):
        if len(finished) == 4:
            raise KeyboardInterrupt
        finished.append(key)
        return SCENES[kind].make(*key)

    out = tmp_path / 'd'
    with pytest.raises(KeyboardInterrupt):
        write_demo_data(out, layout, **SMALL, kind=replace(SCENES[kind], make=interrupt))
    assert not (out / 'meta.json').exists() and (out / 'meta.partial.json').exists()
    assert not (out / 'conflict.json').exists()
    with pytest.raises(UserError, match='an interrupted run with other settings'):
        write_demo_data(out, layout, **SMALL, seed=1, kind=SCENES[kind])
    recorded = replace(SCENES[kind], make=lambda *key: resumed.append(key) or SCENES[kind].make(*key))
    write_demo_data(out, layout, **SMALL, kind=recorded)
    write_demo_data(tmp_path / 'whole', layout, **SMALL, kind=SCENES[kind])
    assert tree(out) == tree(tmp_path / 'whole')
    assert layout == 'coco' or not set(finished) & set(resumed), 'finished scenes are not drawn again'


@pytest.mark.parametrize(
    ('kind', 'layout'), [('demo', 'ade20k'), ('demo', 'cityscapes'), ('conflict', 'ade20k'), ('shapes', 'imagenet')]
)
def test_overwrite_removes_only_the_files_of_earlier_runs(tmp_path, kind, layout):
    out = tmp_path / 'd'
    write_demo_data(out, layout, **SMALL, kind=SCENES[kind])
    (out / 'notes.txt').write_text('mine')
    before = tree(out)
    other = dict(layout='coco', train=1, val=1, seed=1, size=(64, 64))
    with pytest.raises(UserError, match='--overwrite'):
        write_demo_data(out, **other)
    assert tree(out) == before
    write_demo_data(out, **other, overwrite=True)
    write_demo_data(tmp_path / 'new', **other)
    assert tree(out) == {**tree(tmp_path / 'new'), 'notes.txt': b'mine'}


def test_folder_of_other_files_is_rejected_even_with_overwrite(tmp_path):
    (tmp_path / 'precious.txt').write_text('mine')
    before = tree(tmp_path)
    with pytest.raises(UserError, match='not written by this command'):
        write_demo_data(tmp_path, train=1, val=1, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ('args', 'argument'),
    [
        (('--train', '0'), 'train'),
        (('--val', '-3'), 'val'),
        (('--seed', '-1'), 'seed'),
        (('--size', '8', '8'), 'size'),
        (('--size', '64', '512'), 'size'),
        (('--size', '9999', '9999'), 'size'),
        (('--scenes', 'context', '--format', 'coco'), 'layout'),
        (('--scenes', 'demo', '--format', 'imagenet'), 'layout'),
    ],
)
def test_invalid_settings_write_nothing(tmp_path, monkeypatch, capsys, args, argument):
    assert run_command(monkeypatch, tmp_path / 'd', *args) == 2
    assert capsys.readouterr().err.startswith(f'error: {argument}: ')
    assert not (tmp_path / 'd').exists()


def test_unwritable_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / 'file').write_text('')
    assert run_command(monkeypatch, tmp_path / 'file' / 'd') == 2
    assert capsys.readouterr().err.startswith(f'error: {tmp_path / "file"}')
    with pytest.raises(UserError, match='is a file'):
        write_demo_data(tmp_path / 'file')
    with pytest.raises(UserError, match="layout: 'voc'"):
        write_demo_data(tmp_path / 'd', layout='voc')
