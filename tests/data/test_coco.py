"""Variants of annotation files that tools write: read as the plain file is, everywhere, or rejected with the cause."""

import contextlib
import copy
import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from check_data_cases import codes, full
from coco_files import SIZE, coco_dict, leaf, write_images
from mmengine.config import Config
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from replk_mm.data import coco
from replk_mm.data.classes import use_classes
from replk_mm.data.coco_dataset import CocoDataset
from replk_mm.data.findings import InvalidDataError
from replk_mm.evaluation.coco_metric import CocoMetric

NAMES = ('helmet', 'vest')
IMAGES = 4


def every(section: str, **changes):
    """A change of every entry of a section: new values, computed from the entry."""

    def change(data: dict) -> bytes:
        for entry in data[section]:
            entry.update({key: how(entry) for key, how in changes.items()})
        return json.dumps(data).encode()

    return change


def encoded(name: str, then=lambda content: content):
    return lambda data: then(json.dumps({**data, 'info': dict(by='é')}, ensure_ascii=False).encode(name))


#: A change of the content, and a fragment of its description.
VARIANTS = {
    'byte order mark': (encoded('utf-8-sig'), 'utf-8-sig'),
    'UTF-16': (encoded('utf-16'), 'utf-16'),
    'gzip': (encoded('utf-8', gzip.compress), 'gzip'),
    'gzip and byte order mark': (encoded('utf-8-sig', gzip.compress), 'gzip'),
    'text image_id': (every('annotations', image_id=lambda a: str(a['image_id'])), "image_id '1' for image 1"),
    'text image id': (every('images', id=lambda i: str(i['id'])), "image_id 1 for image '1'"),
    'text category_id': (every('annotations', category_id=lambda a: str(a['category_id'])), "category_id '5'"),
    'float image_id': (every('annotations', image_id=lambda a: float(a['image_id'])), 'image_id 1.0'),
    'text size': (every('images', width=lambda i: str(i['width'])), "width '80'"),
    'iscrowd of JSON': (every('annotations', iscrowd=lambda a: False), 'iscrowd False'),
    'backslashes': (every('images', file_name=lambda i: f'images\\{i["file_name"]}'), r'images\000.jpg is 000.jpg'),
    'folder': (every('images', file_name=lambda i: f'train2017/{i["file_name"]}'), 'train2017/000.jpg is 000.jpg'),
    'Windows path': (every('images', file_name=lambda i: rf'C:\data\{i["file_name"]}'), '000.jpg is 000.jpg'),
    'absolute path': (every('images', file_name=lambda i: f'/home/me/{i["file_name"]}'), '000.jpg is 000.jpg'),
}
#: Changes that need no description: only pycocotools' own reading of the file cannot score it.
INDEX_ONLY = {
    'ids from 0': every('annotations', id=lambda a: a['id'] - 1),
    'text ids': every('annotations', id=lambda a: f'a{a["id"]}'),
    'no iscrowd': lambda data: json.dumps(data).replace('"iscrowd": 0, ', '').encode(),
}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / 'annotations').mkdir()
    for split in ('train', 'val'):
        write_images(tmp_path / f'{split}2017', IMAGES)
        (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(coco_dict(NAMES)))
    for path in (tmp_path / 'val2017').iterdir():  # no training images
        Image.fromarray(np.random.default_rng(int(path.stem) + 99).integers(0, 255, (64, 80, 3), np.uint8)).save(path)
    return tmp_path


def rewrite(root: Path, change) -> Path:
    """Apply a change to the annotations of both splits; return the file of the training split."""
    for split in ('val', 'train'):
        path = root / f'annotations/instances_{split}2017.json'
        path.write_bytes(change(coco_dict(NAMES)))
    return path


def data_config(root: Path, scope: str = 'replk_mm.') -> Config:
    metainfo = dict(classes=NAMES)
    loaders = {
        f'{split}_dataloader': dict(dataset=leaf(root, split, type=f'{scope}CocoDataset', metainfo=metainfo))
        for split in ('train', 'val')
    }
    evaluator = dict(type=f'{scope}CocoMetric', ann_file=f'{root}/annotations/instances_val2017.json')
    heads = dict(bbox_head=dict(num_classes=2))
    return Config(
        dict(default_scope='mmdet', model=dict(roi_head=heads), val_evaluator=evaluator, **loaders),
        cfg_text=' ',
        filename='own.py',
    )


def read_as_dataset(root: Path) -> list[dict]:
    config = leaf(root, metainfo=dict(classes=NAMES), pipeline=[])
    config.pop('type')
    dataset = CocoDataset(**config)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    assert all(type(info['height']) is int for info in infos)  # as mmdet itself reads it
    return [{**info, 'img_id': int(info['img_id'])} for info in infos]


@pytest.mark.parametrize('name', [*VARIANTS, *INDEX_ONLY])
def test_variants_are_read_as_the_plain_file_everywhere(root, name):
    plain, before = read_as_dataset(root), score(root)
    change, fragment = VARIANTS.get(name) or (INDEX_ONLY[name], None)
    path = rewrite(root, change)
    assert read_as_dataset(root) == plain and len(plain) == IMAGES
    assert sum(len(info['instances']) for info in plain) == 3 * IMAGES
    assert score(root) == before and 0 < before['coco/bbox_mAP'] < 1
    described = coco.read_annotations(path, root / 'train2017')['variants']
    assert fragment in '; '.join(described) if fragment else not described
    result = full(data_config(root))
    assert not codes(result, 'error', 'warning') and codes(result, 'note') == ({'coco-variant'} if fragment else set())
    # mmdet and pycocotools themselves would fail, leave objects out, or score them as missed.
    strict = codes(full(data_config(root, '')), 'error')
    assert strict == ({'coco-variant'} if fragment else {'id-unscorable' if 'ids' in name else 'iscrowd-missing'})


def score(root: Path) -> dict[str, float]:
    """AP of detections: the objects of images with even ids exactly, those of odd ids shifted."""
    metric = CocoMetric(ann_file=f'{root}/annotations/instances_val2017.json', metric='bbox')
    metric.dataset_meta = dict(classes=NAMES)
    for key in metric._coco_api.imgs:
        boxes = [np.add(a['bbox'], [0, 0, *a['bbox'][:2]]) for a in metric._coco_api.imgToAnns[key]]
        labels = [NAMES.index(metric._coco_api.cats[a['category_id']]['name']) for a in metric._coco_api.imgToAnns[key]]
        odd = int(key) % 2
        scores = torch.full((len(boxes),), 0.5 + 0.1 * odd)
        found = dict(bboxes=torch.tensor(np.array(boxes)) + 3 * odd, labels=torch.tensor(labels), scores=scores)
        metric.process({}, [dict(img_id=key, ori_shape=SIZE[::-1], pred_instances=found)])
    return {name: value for name, value in metric.evaluate(IMAGES).items() if not np.isnan(value)}


@pytest.mark.parametrize('named', [False, True])
def test_a_compressed_file_replaces_a_missing_one(root, named):
    plain = read_as_dataset(root)
    for path in (root / 'annotations').iterdir():
        path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    cfg = data_config(root)
    if named:
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.dataset.ann_file += '.gz'
    assert codes(full(cfg)) == {'coco-variant'} and read_as_dataset(root) == plain
    assert 'coco-variant' in codes(full(data_config(root, '')), 'error')


ROOT_CLASS = dict(id=0, name='things', supercategory='none')


@pytest.mark.parametrize(
    ('extra', 'supercategory', 'classes'),
    [
        (ROOT_CLASS, 'things', NAMES),
        (dict(id=0, name='_background_', supercategory=None), None, NAMES),
        ({**ROOT_CLASS, 'name': 'background'}, 'none', NAMES),
        (ROOT_CLASS, 'none', ('things', *NAMES)),  # a class without objects
        ({**ROOT_CLASS, 'supercategory': 'things'}, 'things', ('things', *NAMES)),  # as COCO's person
    ],
)
def test_an_exporters_root_is_no_class(root, extra, supercategory, classes):
    def change(data: dict) -> bytes:
        others = [{**category, 'supercategory': supercategory} for category in data['categories']]
        return json.dumps({**data, 'categories': [extra, *others]}).encode()

    rewrite(root, change)
    cfg = data_config(root)
    use_classes(cfg, 'auto', ('train', 'val'))
    assert cfg.train_dataloader.dataset.metainfo.classes == classes
    assert cfg.model.roi_head.bbox_head.num_classes == len(classes)
    assert codes(full(cfg)) == ({'class-absent'} if len(classes) > 2 else set())


def test_a_root_with_objects_is_a_class(root):
    data = coco_dict(('things', *NAMES))
    for category in data['categories'][1:]:
        category['supercategory'] = 'things'
    assert list(coco.category_counts(data)) == ['things', *NAMES]
    data['annotations'] = [a for a in data['annotations'] if a['category_id'] != data['categories'][0]['id']]
    assert list(coco.category_counts(data)) == list(NAMES)
    data['categories'][1]['supercategory'] = 'others'  # then things are not the root of all
    assert list(coco.category_counts(data)) == ['things', *NAMES]


@pytest.mark.parametrize(
    ('change', 'code', 'fragment'),
    [
        (encoded('latin-1'), 'json-invalid', 'UTF-8'),
        (encoded('utf-8', lambda content: gzip.compress(content)[:-20]), 'json-invalid', 'cannot be read'),
        (encoded('utf-16', lambda content: content[:-1]), 'json-invalid', 'cannot be read'),
        (every('annotations', image_id=lambda a: f'img{a["image_id"]}'), 'image-unknown', 'known: 1, 2, 3, 4'),
        (every('annotations', category_id=lambda a: a['category_id'] + 0.5), 'coco-structure', 'category_id'),
    ],
)
def test_ambiguous_files_are_rejected_with_the_cause(root, change, code, fragment):
    rewrite(root, change)
    findings = [finding for _, finding in full(data_config(root)).findings() if finding.code == code]
    assert findings and fragment in f'{findings[0].message} {findings[0].fix}'


def test_ids_that_are_partly_text(root):
    """COCOeval turns all ids into text, and finds no ground truth."""
    data = coco_dict(NAMES)
    data['images'][1]['id'] = '2b'
    data['annotations'] = [a for a in data['annotations'] if a['image_id'] != 2]
    rewrite(root, lambda _: json.dumps(data).encode())
    (error,) = [finding for _, finding in full(data_config(root)).findings() if finding.severity == 'error'][:1]
    assert error.code == 'coco-structure' and 'partly text' in error.message


def test_equal_names_in_two_folders_are_not_one_image(root):
    names = ['a/000.jpg', 'b/000.jpg', 'b\\001.jpg', '002.jpg']
    assert coco.locate_images(names, root / 'train2017') == ['a/000.jpg', 'b/000.jpg', '001.jpg', '002.jpg']
    (root / 'train2017/b').mkdir()
    shutil.copy(root / 'train2017/000.jpg', root / 'train2017/b/000.jpg')
    located = coco.locate_images(names, root / 'train2017')
    assert located == ['000.jpg', 'b/000.jpg', '001.jpg', '002.jpg']


def test_invalid_files_are_rejected_by_training_too(root):
    rewrite(root, encoded('latin-1'))
    with pytest.raises(InvalidDataError, match='UTF-8'):
        read_as_dataset(root)


@pytest.mark.parametrize('mask_scores', [False, True])
def test_exported_masks_have_the_reported_ap_by_size(tmp_path, mask_scores):
    """pycocotools alone, on the exported file: of a thin diagonal, the box is large and the mask small."""
    side, rng = 160, np.random.default_rng(0)
    images = [dict(id=i, file_name=f'{i}.jpg', width=side, height=side) for i in range(6)]
    objects, found = [], []
    for image in images:
        boxes, masks = [], []
        for k, thick in enumerate((4, 40)):
            x, y = 60 * k, 10
            outline = [x, y, x + thick, y, x + 60 + thick, y + 80, x + 60, y + 80]
            mask = _polygon(outline, side)
            objects.append(
                dict(
                    id=len(objects) + 1,
                    image_id=image['id'],
                    category_id=1,
                    iscrowd=0,
                    area=float(mask.sum()),
                    bbox=[x, y, 60 + thick, 80],
                    segmentation=[outline],
                )
            )
            masks.append(np.roll(mask, int(rng.integers(0, 3)), 1))
            boxes.append([x, y, x + 60 + thick, y + 80])
        more = dict(mask_scores=torch.tensor(rng.random(2))) if mask_scores else {}
        found.append(
            dict(
                bboxes=torch.tensor(boxes).float(),
                labels=torch.zeros(2, dtype=torch.long),
                scores=torch.tensor(rng.random(2)),
                masks=torch.tensor(np.array(masks, bool)),
                **more,
            )
        )
    path = tmp_path / 'truth.json'
    data = dict(info={}, images=images, annotations=objects, categories=[dict(id=1, name='a')])
    path.write_text(json.dumps(data))
    metric = CocoMetric(ann_file=str(path), metric=['bbox', 'segm'], outfile_prefix=str(tmp_path / 'instances'))
    metric.dataset_meta = dict(classes=('a',))
    for image, one in zip(images, copy.deepcopy(found), strict=True):
        metric.process({}, [dict(img_id=image['id'], ori_shape=(side, side), pred_instances=one)])
    reported = metric.evaluate(len(images))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / 'instances.segm.json')), 'segm')
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
    for name, value in zip(names, evaluation.stats, strict=False):
        ours = reported[f'coco/segm_{name}']
        assert ours == pytest.approx(value) or np.isnan(ours) and value == -1
    assert 0 < reported['coco/segm_mAP_s'] < 1  # with the areas of boxes it would be another
    boxes = json.loads((tmp_path / 'instances.bbox.json').read_text())
    masks = json.loads((tmp_path / 'instances.segm.json').read_text())
    assert len(boxes) == len(masks) == 12 and all(
        'bbox' in b and 'bbox' not in m for b, m in zip(boxes, masks, strict=True)
    )


def _polygon(outline: list[int], side: int) -> np.ndarray:
    from pycocotools import mask

    return mask.decode(mask.merge(mask.frPyObjects([outline], side, side)))
