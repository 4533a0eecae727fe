"""Cityscapes: label maps are converted as the data set's own table says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import run_tool

from replk_mm.data import cityscapes
from replk_mm.errors import UserError

#: Cityscapes' table as published: name and trainId of every id from 0 on; 255 is ignored.
TABLE = [
    ('unlabeled', 255),
    ('ego vehicle', 255),
    ('rectification border', 255),
    ('out of roi', 255),
    ('static', 255),
    ('dynamic', 255),
    ('ground', 255),
    ('road', 0),
    ('sidewalk', 1),
    ('parking', 255),
    ('rail track', 255),
    ('building', 2),
    ('wall', 3),
    ('fence', 4),
    ('guard rail', 255),
    ('bridge', 255),
    ('tunnel', 255),
    ('pole', 5),
    ('polegroup', 255),
    ('traffic light', 6),
    ('traffic sign', 7),
    ('vegetation', 8),
    ('terrain', 9),
    ('sky', 10),
    ('person', 11),
    ('rider', 12),
    ('car', 13),
    ('truck', 14),
    ('bus', 15),
    ('caravan', 255),
    ('trailer', 255),
    ('train', 16),
    ('motorcycle', 17),
    ('bicycle', 18),
]
PREFIX = dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')
STEMS = [f'aachen_{i:06}_000019' for i in range(3)]


def write_labels(path: Path, ids) -> None:
    pixels = np.resize(np.asarray(ids, np.uint8), (32, 64))
    Image.fromarray(pixels).save(path)


def label(root: Path, i: int, suffix: str = '_labelIds.png') -> Path:
    return root / 'gtFine/train/aachen' / f'{STEMS[i]}_gtFine{suffix}'


@pytest.fixture
def root(tmp_path) -> Path:
    """A tree of raw labels, as the archives unpack."""
    folder = tmp_path / 'cityscapes'
    for part in PREFIX.values():
        (folder / part / 'aachen').mkdir(parents=True)
    for i, stem in enumerate(STEMS):
        Image.new('RGB', (64, 32), (9, 9, 9)).save(folder / 'leftImg8bit/train/aachen' / f'{stem}_leftImg8bit.png')
        write_labels(label(folder, i), range(34))
        write_labels(label(folder, i, '_instanceIds.png'), [0])
    return folder


def convert(root: Path, **options) -> cityscapes.Conversion:
    return cityscapes.convert(root, progress=False, **options)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


# -- the table --------------------------------------------------------------------------------------------------------
def test_train_ids_are_the_published_ones_and_mmsegs_classes():
    from mmseg.datasets import CityscapesDataset

    found = cityscapes.to_train_ids(np.arange(34, dtype=np.uint8))
    assert found.tolist() == [train_id for _, train_id in TABLE] and found.dtype == np.uint8
    names = CityscapesDataset.METAINFO['classes']
    assert [names[train_id] for _, train_id in TABLE if train_id != 255] == [name for name, i in TABLE if i != 255]
    assert sorted(i for _, i in TABLE if i != 255) == list(range(19))


# -- converted --------------------------------------------------------------------------------------------------------
def test_converted_labels_are_right_and_pass_the_check(root):
    ids = np.random.default_rng(0).integers(0, 34, (32, 64), np.uint8)
    Image.fromarray(ids).save(label(root, 1))
    assert convert(root, jobs=2) == cityscapes.Conversion(3, 0)
    brute = [[TABLE[i][1] for i in row] for row in ids.tolist()]
    assert pixels(label(root, 1, '_labelTrainIds.png')).tolist() == brute


def test_source_with_a_palette_is_read_by_index(root):
    picture = Image.fromarray(np.resize(np.arange(34, dtype=np.uint8), (32, 64)), 'L').convert('P')
    picture.putpalette([200] * 768)
    picture.putdata(np.resize(np.arange(34, dtype=np.uint8), 32 * 64).tolist())
    picture.save(label(root, 0))
    convert(root)
    assert pixels(label(root, 0, '_labelTrainIds.png')).ravel()[:34].tolist() == [i for _, i in TABLE]


def test_second_run_keeps_what_is_there(root):
    convert(root)
    before = [label(root, i, '_labelTrainIds.png').stat().st_mtime_ns for i in range(3)]
    label(root, 1, '_labelTrainIds.png').unlink()
    assert convert(root) == cityscapes.Conversion(1, 2)
    assert [label(root, i, '_labelTrainIds.png').stat().st_mtime_ns for i in (0, 2)] == [before[0], before[2]]


def test_map_that_differs_is_replaced_by_force_only(root):
    convert(root)
    target = label(root, 2, '_labelTrainIds.png')
    write_labels(target, [3])
    found = convert(root)
    assert (found.written, found.kept) == (0, 2) and len(found.problems) == 1
    assert found.problems[0].startswith(f'{target}: exists already, and differs') and (pixels(target) == 3).all()
    assert convert(root, force=True) == cityscapes.Conversion(3, 0)
    assert pixels(target).max() == 255


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda p: write_labels(p, [0, 34, 255]), "ids 34, 255 are none of Cityscapes' 0..33"),
        (lambda p: p.write_bytes(p.read_bytes()[:50]), 'truncated'),
        (lambda p: p.write_text('x'), 'cannot identify image file'),
        (lambda p: Image.new('RGB', (64, 32)).save(p), 'uint8 pixels of shape (32, 64, 3)'),
        (lambda p: Image.fromarray(np.ones((32, 64), np.uint16)).save(p), 'pixels of shape (32, 64); a label map'),
    ],
)
def test_bad_source_is_named_and_the_others_are_converted(root, spoil, said):
    spoil(label(root, 1))
    found = convert(root)
    assert found.written == 2 and len(found.problems) == 1
    assert found.problems[0].startswith(f'{label(root, 1)}: ') and said in found.problems[0]
    assert not label(root, 1, '_labelTrainIds.png').exists()


def test_nothing_to_convert(root, tmp_path):
    with pytest.raises(UserError, match='no such folder'):
        convert(tmp_path / 'gone')
    with pytest.raises(UserError, match='no file ends with _labelIds.png'):
        convert(root / 'leftImg8bit/train')


@pytest.mark.slow
def test_command(root):
    write_labels(label(root, 1), [99])
    done = run_tool('convert_cityscapes', root, '--jobs', 2)
    assert done.returncode == 2 and '2 label maps written, 0 were there already' in done.stdout
    assert '1 label maps not converted' in done.stderr and str(label(root, 1)) in done.stderr
    assert 'Traceback' not in done.stderr
    write_labels(label(root, 1), [7])
    done = run_tool('convert_cityscapes', root)
    assert done.returncode == 0 and '1 label maps written, 2 were there already' in done.stdout
