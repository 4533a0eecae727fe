"""Label maps of Cityscapes are converted by the published table."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replk_mm.commands import convert_cityscapes
from replk_mm.data import cityscapes
from replk_mm.errors import UserError

#: The trainId of every id of Cityscapes, by the published table; 255 is ignored.
TRAIN_IDS = [
    *[255] * 7,  # unlabeled, ego vehicle, rectification border, out of roi, static, dynamic, ground
    *[0, 1, 255, 255],  # road, sidewalk, parking, rail track
    *[2, 3, 4, 255, 255, 255],  # building, wall, fence, guard rail, bridge, tunnel
    *[5, 255, 6, 7],  # pole, polegroup, traffic light, traffic sign
    *[8, 9, 10],  # vegetation, terrain, sky
    *[11, 12],  # person, rider
    *[13, 14, 15, 255, 255, 16, 17, 18],  # car, truck, bus, caravan, trailer, train, motorcycle, bicycle
]
#: Names of trainIds 0..18, by the same table.
CLASSES = [
    *('road', 'sidewalk', 'building', 'wall', 'fence', 'pole', 'traffic light', 'traffic sign', 'vegetation'),
    *('terrain', 'sky', 'person', 'rider', 'car', 'truck', 'bus', 'train', 'motorcycle', 'bicycle'),
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
    return cityscapes.convert_labels(root, **options)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_train_ids_are_those_of_the_published_table_and_of_mmseg():
    from mmseg.datasets import CityscapesDataset

    found = cityscapes.to_train_ids(np.arange(34, dtype=np.uint8))
    assert found.tolist() == TRAIN_IDS and found.dtype == np.uint8
    assert list(CityscapesDataset.METAINFO['classes']) == CLASSES


def test_converted_labels(root):
    ids = np.random.default_rng(0).integers(0, 34, (32, 64), np.uint8)
    Image.fromarray(ids).save(label(root, 1))
    assert convert(root, jobs=2) == cityscapes.Conversion(3, 0)
    brute = [[TRAIN_IDS[i] for i in row] for row in ids.tolist()]
    assert pixels(label(root, 1, '_labelTrainIds.png')).tolist() == brute


def test_palette_of_the_source_is_ignored(root):
    picture = Image.fromarray(np.resize(np.arange(34, dtype=np.uint8), (32, 64)), 'L').convert('P')
    picture.putpalette([200] * 768)
    picture.putdata(np.resize(np.arange(34, dtype=np.uint8), 32 * 64).tolist())
    picture.save(label(root, 0))
    convert(root)
    assert pixels(label(root, 0, '_labelTrainIds.png')).ravel()[:34].tolist() == TRAIN_IDS


def test_second_run_keeps_existing_maps(root):
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
    assert (found.written, found.kept) == (0, 2) and len(found.errors) == 1
    assert found.errors[0].startswith(f'{target}: exists, and differs') and (pixels(target) == 3).all()
    assert convert(root, force=True) == cityscapes.Conversion(3, 0)
    assert pixels(target).max() == 255


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda p: write_labels(p, [0, 34, 255]), 'ids 34, 255 '),
        (lambda p: p.write_bytes(p.read_bytes()[:50]), 'truncated'),
        (lambda p: p.write_text('x'), 'cannot identify image file'),
        (lambda p: Image.new('RGB', (64, 32)).save(p), 'uint8 pixels of shape (32, 64, 3)'),
        (lambda p: Image.fromarray(np.ones((32, 64), np.uint16)).save(p), 'pixels of shape (32, 64); a label map'),
    ],
)
def test_invalid_source_is_reported_and_the_others_are_converted(root, spoil, message):
    spoil(label(root, 1))
    found = convert(root)
    assert found.written == 2 and len(found.errors) == 1
    assert found.errors[0].startswith(f'{label(root, 1)}: ') and message in found.errors[0]
    assert not label(root, 1, '_labelTrainIds.png').exists()


def test_nothing_to_convert(root, tmp_path):
    with pytest.raises(UserError, match='no such folder'):
        convert(tmp_path / 'gone')
    with pytest.raises(UserError, match='no file ends with _labelIds.png'):
        convert(root / 'leftImg8bit/train')


def test_command(root, monkeypatch, capsys):
    def run_command() -> int:
        monkeypatch.setattr(sys, 'argv', ['tools/convert_cityscapes.py', str(root), '--jobs', '2'])
        return convert_cityscapes.main()

    write_labels(label(root, 1), [99])
    assert run_command() == 2
    shown = capsys.readouterr()
    assert '2 label maps written, 0 existed already' in shown.out and str(label(root, 1)) in shown.err
    write_labels(label(root, 1), [7])
    assert run_command() == 0
    shown = capsys.readouterr()
    assert '1 label maps written, 2 existed already' in shown.out and shown.out.splitlines()[-1].startswith('next: ')
