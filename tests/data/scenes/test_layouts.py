"""Demo data in the layouts of COCO and Cityscapes: the libraries read the objects of the label maps."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from replk_mm.data.scenes.layouts import CITYSCAPES_IDS
from replk_mm.data.scenes.render import make_scene
from replk_mm.data.scenes.spec import DEMO_CLASSES, THING_CLASSES
from replk_mm.data.scenes.writer import write_demo_data

SIZE = (96, 128)
FIRST_THING = DEMO_CLASSES.index('disc') + 1


@pytest.fixture(scope='module')
def layouts(tmp_path_factory) -> Path:
    """The same scenes in every layout."""
    root = tmp_path_factory.mktemp('layouts')
    for layout in ('ade20k', 'coco', 'cityscapes'):
        write_demo_data(root / layout, layout, train=6, val=4, seed=3, size=SIZE)
    return root


def regions(label: np.ndarray) -> list[tuple[int, frozenset[tuple[int, int]]]]:
    """Connected regions (by edges or corners) of each class of objects, found pixel by pixel."""
    found, seen = [], np.zeros(label.shape, bool)
    for start in zip(*np.nonzero(label >= FIRST_THING), strict=True):
        if seen[start]:
            continue
        seen[start] = True
        pixels, queue = set(), [start]
        while queue:
            y, x = queue.pop()
            pixels.add((int(y), int(x)))
            for v in range(max(y - 1, 0), min(y + 2, label.shape[0])):
                for u in range(max(x - 1, 0), min(x + 2, label.shape[1])):
                    if not seen[v, u] and label[v, u] == label[start]:
                        seen[v, u] = True
                        queue.append((v, u))
        found.append((int(label[start]), frozenset(pixels)))
    return found


@pytest.mark.parametrize(
    'split, folder, ade, count', [('train', 'train2017', 'training', 6), ('val', 'val2017', 'validation', 4)]
)
def test_coco_objects_are_the_regions_of_the_label_maps(layouts, capsys, split, folder, ade, count):
    api = COCO(layouts / 'coco' / 'annotations' / f'instances_{folder}.json')
    assert [api.cats[i]['name'] for i in sorted(api.cats)] == ['disc', 'square', 'star', 'triangle_h', 'triangle_v']
    assert len(api.imgs) == count
    for image in api.imgs.values():
        stem = Path(image['file_name']).stem
        label = np.asarray(Image.open(layouts / 'ade20k' / 'annotations' / ade / f'{stem}.png'))
        drawn = (layouts / 'coco' / folder / image['file_name']).read_bytes()
        assert drawn == (layouts / 'ade20k' / 'images' / ade / f'{stem}.jpg').read_bytes()
        assert (image['height'], image['width']) == label.shape == SIZE
        found = []
        for thing in api.imgToAnns[image['id']]:
            mask = api.annToMask(thing).astype(bool)
            rows, columns = np.nonzero(mask)
            x, y, width, height = thing['bbox']
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)
            assert thing['area'] == mask.sum() and thing['iscrowd'] == 0 and thing['id'] > 0
            name = api.cats[thing['category_id']]['name']
            found.append((DEMO_CLASSES.index(name) + 1, frozenset(zip(rows.tolist(), columns.tolist(), strict=True))))
        # Objects are drawn apart from each other, so that each is a connected region.
        assert len(found) == len(set(found)) > 0 and set(found) == set(regions(label))


def test_ground_truth_has_an_ap_of_one(layouts, tmp_path, capsys):
    api = COCO(layouts / 'coco' / 'annotations' / 'instances_val2017.json')
    for kind in ('bbox', 'segm'):
        perfect = [
            {**{key: thing[key] for key in ('image_id', 'category_id', 'bbox', 'segmentation')}, 'score': 0.9}
            for thing in api.anns.values()
        ]
        for thing in perfect if kind == 'segm' else ():
            del thing['bbox']
        evaluation = COCOeval(api, api.loadRes(perfect), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


def test_cityscapes_tree_and_train_ids(layouts):
    names = {
        'sky': 'sky',
        'ground': 'terrain',
        'water': 'road',
        'disc': 'car',
        'square': 'person',
        'star': 'bicycle',
        'triangle_h': 'bus',
        'triangle_v': 'truck',
    }
    from mmseg.datasets import CityscapesDataset

    classes = CityscapesDataset.METAINFO['classes']
    table = np.array([255, *(classes.index(names[name]) for name in DEMO_CLASSES)], np.uint8)
    meta = json.loads((layouts / 'cityscapes' / 'meta.json').read_text())
    assert meta['train_ids'] == {name: table[i] for i, name in enumerate(DEMO_CLASSES, 1)}
    assert len(set(CITYSCAPES_IDS)) == 8
    assert meta['reduce_zero_label'] is False
    for split, ade in (('train', 'training'), ('val', 'validation')):
        data = CityscapesDataset(
            data_root=str(layouts / 'cityscapes'),
            pipeline=[],
            data_prefix=dict(img_path=f'leftImg8bit/{split}', seg_map_path=f'gtFine/{split}'),
        )
        assert len(data) == {'train': 6, 'val': 4}[split]
        for i in range(len(data)):
            sample = data.get_data_info(i)
            stem = Path(sample['img_path']).name.removesuffix('_leftImg8bit.png')
            label = np.asarray(Image.open(layouts / 'ade20k' / 'annotations' / ade / f'{stem}.png'))
            assert (np.asarray(Image.open(sample['seg_map_path'])) == table[label]).all()
            index = int(stem.rpartition('_')[2])
            assert (np.asarray(Image.open(sample['img_path'])) == make_scene(3, split, index, SIZE).image).all()


def test_the_demo_config_reads_every_object(root, layouts):
    cfg = Config.fromfile(root / 'configs' / 'cascade-mask-rcnn_replk-nano_demo.py')
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == THING_CLASSES
    heads = [*cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head]
    assert {head.num_classes for head in heads} == {len(THING_CLASSES)}
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    dataset = dict(cfg.train_dataloader.dataset, data_root=str(layouts / 'coco'))
    data = DATASETS.build(dataset)
    assert len(data) == 6
    for i in range(6):
        packed = data[i]
        height, width = cfg.crop_size
        truth = packed['data_samples'].gt_instances
        scene = make_scene(3, 'train', i, SIZE)
        assert tuple(packed['inputs'].shape) == (3, height, width)
        assert sorted(truth.labels.tolist()) == sorted(item.label - FIRST_THING for item in scene.instances)
        scale = height * width / (SIZE[0] * SIZE[1])
        areas = sorted(truth.masks.masks.reshape(len(truth), -1).sum(1).tolist())
        assert areas == pytest.approx(sorted(scale * item.mask.sum() for item in scene.instances), rel=0.15)
