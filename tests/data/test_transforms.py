"""The pipeline names images, label maps and annotations that it cannot load."""

from pathlib import Path

import numpy as np
import pytest
from check_data_cases import data, image, label, seg_config  # noqa: F401 (a fixture)
from coco_files import SIZE, write_images
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch.utils.data import DataLoader

from replk_mm.data.transforms import CheckedLoad, ShrinkLabels, check_loading
from replk_mm.errors import UserError, user_message
from replk_mm.registry import TRANSFORMS

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.fixture
def photo(tmp_path) -> Path:
    write_images(tmp_path, 1)
    return tmp_path / '000.jpg'


def load_objects(results: dict, **options) -> dict:
    init_default_scope('mmdet')
    annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True, **options)
    for step in (dict(type='LoadImageFromFile'), annotations):
        results = TRANSFORMS.build(dict(type='replk_mm.CheckedLoad', load=step))(results)
    return results


def entry(path: Path, **changes) -> dict:
    box = dict(bbox=[4, 6, 20, 18], bbox_label=1, ignore_flag=0, mask=[[4, 6, 20, 6, 20, 18]])
    return dict(img_path=str(path), img_id=1, seg_map_path=None, height=64, width=80, instances=[box | changes])


def load_labels(pair: tuple[Path, Path], classes: int | None = 8, reduce: bool = True) -> dict:
    results = dict(
        img_path=str(pair[0]), seg_map_path=str(pair[1]), seg_fields=[], label_map=None, reduce_zero_label=reduce
    )
    init_default_scope('mmseg')
    for kind in ('LoadImageFromFile', 'LoadAnnotations'):
        results = CheckedLoad(dict(type=kind), classes)(results)
    return results


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_good_files_load(photo, data):
    out = load_objects(entry(photo))
    assert out['gt_bboxes'].tensor.tolist() == [[4, 6, 20, 18]] and out['gt_masks'].masks.shape == (1, 64, 80)
    out = load_labels((image(data, 0), label(data, 0)))
    pixels = np.asarray(Image.open(label(data, 0))).astype(int)
    assert np.array_equal(out['gt_seg_map'], np.where(pixels == 0, 255, pixels - 1))


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        (dict(mask=[[0, 0, 9e8, 0, 9e8, 9e8]]), 'mask of box'),
        (dict(mask=dict(size=[64, 80], counts=[9000])), 'mask of box'),
        (dict(bbox=None), 'cannot be read'),
    ],
)
def test_invalid_annotations_name_their_image(photo, changes, text):
    with pytest.raises(UserError, match=text) as info:
        load_objects(entry(photo, **changes))
    assert str(info.value).startswith(f'annotations of {photo}: ')


def test_damaged_files_with_boxes(photo):
    semantic = photo.with_name('map.png')
    Image.new('L', SIZE).save(semantic)
    good = entry(photo) | dict(seg_map_path=str(semantic))
    assert load_objects(dict(good), with_seg=True)['gt_seg_map'].shape == SIZE[::-1]
    for path in (semantic, photo):
        cut(path)
        with pytest.raises(UserError) as info:
            load_objects(dict(good), with_seg=True)
        assert str(info.value).startswith(f'{path}: cannot be read')


@pytest.mark.parametrize('which', [0, 1])
@pytest.mark.parametrize('spoil', [cut, lambda p: p.write_bytes(b''), lambda p: p.write_text('text'), Path.unlink])
def test_damaged_files(data, which, spoil):
    pair = image(data, 0), label(data, 0)
    spoil(pair[which])
    with pytest.raises(UserError) as info:
        load_labels(pair)
    assert str(info.value).startswith(f'{pair[which]}: cannot be read')


@pytest.mark.parametrize(
    ('pixels', 'reduce', 'text'),
    [
        (np.zeros((64, 64, 3), np.uint8), True, '3 channels'),
        (np.full((64, 64), 9, np.uint8), True, 'label ids 9 are out of'),
        (np.full((64, 64), 8, np.uint8), False, 'label ids 8 are out of'),
        (np.full((64, 64), 255, np.uint8), False, None),
    ],
)
def test_unknown_ids_are_those_of_the_file(data, pixels, reduce, text):
    path = label(data, 0)
    Image.fromarray(pixels).save(path)
    if text is None:
        load_labels((image(data, 0), path), reduce=reduce)
        return
    with pytest.raises(UserError, match=text) as info:
        load_labels((image(data, 0), path), reduce=reduce)
    assert str(info.value).startswith(f'{path}: ')


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_file_in_a_data_worker(data, workers):
    cut(label(data, 2))
    init_default_scope('mmseg')
    dataset = seg_config(data).train_dataloader.dataset
    built = DATASETS.build(dict(type='RepeatDataset', times=1, dataset=dataset))
    check_loading(built, 8)
    loader = DataLoader(built, batch_size=1, num_workers=workers, collate_fn=lambda batch: batch)
    with pytest.raises(UserError) as info:
        list(loader)
    message = user_message(info.value).splitlines()
    assert message[0].startswith(f'{label(data, 2)}: cannot be read') and len(message) == 2


def test_shrunk_labels_are_the_block_centres():
    labels = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)
    out = ShrinkLabels(4).transform({'gt_seg_map': labels, 'img': np.zeros((8, 12, 3), np.uint8)})
    assert out['gt_seg_map'].tolist() == [[2 * 12 + 2, 2 * 12 + 6, 2 * 12 + 10], [6 * 12 + 2, 6 * 12 + 6, 6 * 12 + 10]]
    assert out['img'].shape == (8, 12, 3)


def test_shrinking_needs_multiples_of_the_factor():
    with pytest.raises(UserError, match=r'^a\.png: ShrinkLabels\(factor=4\) got a map of 9x8'):
        ShrinkLabels(4).transform({'gt_seg_map': np.zeros((9, 8), np.uint8), 'seg_map_path': 'a.png'})
