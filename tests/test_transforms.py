"""Images and annotations are checked while they load too, and named where they are bad."""
from pathlib import Path

import pytest
from coco_cases import file  # noqa: F401 (a fixture)
from coco_files import SIZE
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from replk_mm.engine.prepare import check_while_loading
from replk_mm.errors import UserError
from replk_mm.registry import TRANSFORMS

# ruff: noqa: F811 (fixtures that come from another file)


def load(results: dict, **options) -> dict:
    init_default_scope('mmdet')
    for step in (dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True, **options)):
        results = TRANSFORMS.build(dict(type='replk_mm.CheckedLoad', load=step))(results)
    return results


def entry(path: Path, **changes) -> dict:
    box = dict(bbox=[4, 6, 20, 18], bbox_label=1, ignore_flag=0, mask=[[4, 6, 20, 6, 20, 18]])
    return dict(img_path=str(path), img_id=1, seg_map_path=None, height=64, width=80, instances=[box | changes])


def test_good_annotations_load(file):
    out = load(entry(file.parent / 'images' / '000.jpg'))
    assert out['gt_bboxes'].tensor.tolist() == [[4, 6, 20, 18]] and out['gt_masks'].masks.shape == (1, 64, 80)


def test_bad_annotations_are_named_with_their_image(file):
    path = file.parent / 'images' / '000.jpg'
    bad = entry(path)
    del bad['instances'][0]['mask']
    with pytest.raises(UserError, match="its annotations cannot be read .KeyError: 'mask'.") as info:
        load(bad)
    assert str(info.value).startswith(f'{path}: ')


def test_bad_image_is_named_of_a_data_set_with_boxes_too(file):
    path = file.parent / 'images' / '000.jpg'
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match='the file is cut off') as info:
        load(entry(path))
    assert str(info.value).startswith(f'{path}: ')


def test_damaged_map_of_a_data_set_with_boxes_is_named(file):
    label = file.parent / 'map.png'
    Image.new('L', SIZE).save(label)
    good = entry(file.parent / 'images' / '000.jpg') | dict(seg_map_path=str(label))
    assert load(dict(good), with_seg=True)['gt_seg_map'].shape == SIZE[::-1]
    label.write_bytes(label.read_bytes()[:30])
    with pytest.raises(UserError, match='the file is cut off') as info:
        load(dict(good), with_seg=True)
    assert str(info.value).startswith(f'{label}: ')


def test_loading_steps_are_wrapped_wherever_they_stand():
    steps = [dict(type='mmdet.LoadAnnotations', with_bbox=True), dict(type='Resize', scale=(8, 8)),
             dict(type='RandomChoice', transforms=[[dict(type='LoadImageFromFile')], [dict(type='LoadPanopticAnnotations')]])]
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=steps))))
    check_while_loading(cfg, None)
    first, resize, choice = cfg.train_dataloader.dataset.pipeline
    assert (first.type, first.load) == ('replk_mm.CheckedLoad', steps[0]) and resize == steps[1]
    assert [part[0].load.type for part in choice.transforms] == ['LoadImageFromFile', 'LoadPanopticAnnotations']
