"""The checks of annotation files find every planted fault and nothing else, and agree with mmdet and pycocotools."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from check_data_cases import codes, found, full
from coco_files import SIZE, change, coco_dict, leaf, write_coco_root, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.datasets import CocoDataset
from mmengine.config import Config, ConfigDict
from PIL import Image
from pycocotools import mask as rle

from replk_mm.data import coco
from replk_mm.data.checks.audit import check_data
from replk_mm.data.datasets import is_coco_style
from replk_mm.data.findings import InvalidDataError
from replk_mm.data.scenes.writer import write_demo_data
from replk_mm.errors import UserError

NAMES = ('person', 'car', 'dog')
IMAGES = 10
H, W = SIZE[::-1]


def config(
    root: Path,
    classes: int = 3,
    names=NAMES,
    splits=('train', 'val'),
    metric: tuple = ('bbox', 'segm'),
    masks: bool = True,
    **changes,
) -> Config:
    metainfo = dict(metainfo=dict(classes=names)) if names else {}
    loaders = {
        f'{split}_dataloader': dict(dataset=leaf(root, split, masks=masks, **metainfo, **changes)) for split in splits
    }
    heads = dict(
        bbox_head=dict(type='Shared2FCBBoxHead', num_classes=classes),
        mask_head=dict(type='FCNMaskHead', num_classes=classes),
    )
    return Config(
        dict(
            default_scope='mmdet',
            model=dict(roi_head=heads),
            val_evaluator=dict(
                type='CocoMetric', ann_file=f'{root}/annotations/instances_val2017.json', metric=list(metric)
            ),
            **loaders,
        ),
        cfg_text=' ',
        filename='own.py',
    )


@pytest.fixture
def root(tmp_path) -> Path:
    """A data set to spoil; no two of its images are the same."""
    (tmp_path / 'annotations').mkdir()
    for split, count in (('train', IMAGES), ('val', 4)):
        (tmp_path / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(coco_dict(NAMES, count)))
        write_images(tmp_path / f'{split}2017', count)
    for i in range(4):
        noise(tmp_path / 'val2017' / f'{i:03}.jpg', 1000 + i)
    return tmp_path


def noise(path: Path, seed: int, size: tuple[int, int] = SIZE, **options) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def file(root: Path, split: str = 'train') -> Path:
    return root / f'annotations/instances_{split}2017.json'


def annotation(i: int, **changes):
    return lambda d: d['annotations'][i - 1].update(changes)


def every(**changes):
    return lambda d: [a.update(changes) for a in d['annotations']]


def mask_of(size: tuple[int, int]) -> dict:
    encoded = rle.encode(np.ones(size, np.uint8, order='F'))
    return dict(size=list(size), counts=encoded['counts'].decode())


#: A change of the training file, the code of its finding, and the entry.
FAULTS = [
    (annotation(1, image_id=77), 'image-unknown', 'annotation 1'),
    (annotation(2, category_id=77), 'category-unknown', 'annotation 2'),
    (annotation(3, bbox=[4, 6, 0, 12]), 'bbox-flat', 'annotation 3'),
    (annotation(4, area=0), 'bbox-flat', 'annotation 4'),
    (annotation(5, bbox=[90, 6, 16, 12]), 'bbox-outside', 'annotation 5'),
    (annotation(6, bbox=[-10, 6, 16, 12]), 'bbox-beyond', 'annotation 6'),
    (annotation(7, segmentation=[[1, 2, 3, 4]]), 'mask-undecodable', 'annotation 7'),
    (annotation(8, segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 'mask-undecodable', 'annotation 8'),
    (annotation(9, segmentation=[[1, 2, 3, 'x', 5, 6]]), 'mask-undecodable', 'annotation 9'),
    (annotation(10, segmentation=[[1, 2, 3, 9e8, 5, 6]]), 'mask-undecodable', 'annotation 10'),
    (annotation(11, segmentation=mask_of((10, 10))), 'mask-undecodable', 'annotation 11'),
    (annotation(12, segmentation=dict(size=[H, W], counts=[5000, 5000])), 'mask-undecodable', 'annotation 12'),
    (
        annotation(13, segmentation=dict(size=[H, W], counts=mask_of((100, 100))['counts'])),
        'mask-undecodable',
        'annotation 13',
    ),
    (annotation(14, segmentation='x'), 'mask-undecodable', 'annotation 14'),
    (annotation(15, segmentation=[]), 'segmentation-missing', 'annotation 15'),
    (lambda d: d['annotations'].append(copy.deepcopy(d['annotations'][15])), 'id-repeated', 'annotations'),
    (lambda d: d['categories'].append(dict(id=5, name='car')), 'id-repeated', 'categories'),
    (lambda d: d['categories'].append(dict(id=99, name='dog')), 'name-repeated', 'categories'),
    (lambda d: d['images'].append(dict(id=9, file_name='other.jpg', width=W, height=H)), 'id-repeated', 'images'),
    (lambda d: d['images'].append(dict(id=60, file_name='000.jpg', width=W, height=H)), 'file-repeated', 'images'),
    (lambda d: d['images'].append(dict(id=61, file_name='gone.jpg', width=W, height=H)), 'image-missing', 'image 61'),
]


def test_audit_finds_every_fault_and_nothing_else(root):
    noise(root / 'train2017/other.jpg', 5000)
    noise(root / 'train2017/003.jpg', 5001, (40, 40))
    (root / 'train2017/005.jpg').write_bytes((root / 'train2017/005.jpg').read_bytes()[:800])
    for spoil, *_ in FAULTS:
        change(file(root), spoil)
    expected = {(kind, entry) for _, kind, entry in FAULTS} | {
        ('stated-size', str(root / 'train2017/003.jpg')),
        ('unreadable', str(root / 'train2017/005.jpg')),
    }
    assert found(full(config(root))) == expected
    with pytest.raises(UserError, match='gone.jpg'):
        check_data(config(root), ('train', 'val'))


def test_clean_file_has_no_problem(root):
    result = full(config(root))
    assert not found(result) and [one.inspected for one in result.datasets] == [IMAGES, 4]
    assert result.datasets[0].class_counts() == dict(person=10, car=10, dog=10)
    line = check_data(config(root), ('train', 'val'))[0]
    assert line.startswith(f'train: {root} (CocoDataset): 10 images, 10 inspected')


@pytest.mark.parametrize(
    ('content', 'code', 'text'),
    [
        (b'', 'json-invalid', 'the file is empty'),
        (b'{"images": [', 'json-invalid', 'the file is cut off'),
        (b'{"images": [],, }', 'json-invalid', 'line 1 column 15'),
        (b'\x89PNG\xff', 'json-invalid', 'not valid JSON'),
        (b'version https://git-lfs', 'json-invalid', 'not valid JSON'),
        (b'[' * 100_000, 'json-invalid', 'recursion'),
        (b'[{"image_id": 1}]', 'coco-structure', 'should be an object'),
        (b'{}', 'coco-structure', 'images: this section is missing'),
        (b'{"images": {}, "categories": []}', 'coco-structure', 'valid array'),
    ],
)
def test_invalid_annotation_file(root, content, code, text):
    file(root).write_bytes(content)
    findings = [finding for _, finding in full(config(root)).findings() if finding.path == str(file(root))]
    assert {finding.code for finding in findings} == {code} and any(text in finding.message for finding in findings)
    with pytest.raises(InvalidDataError, match=str(file(root))):
        coco.read_annotations(file(root))


KEYS = dict(
    images=('id', 'file_name', 'height', 'width'),
    categories=('id', 'name'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
)


@pytest.mark.parametrize(('section', 'key'), [(section, key) for section, keys in KEYS.items() for key in keys])
def test_missing_keys_and_wrong_types(root, section, key):
    change(file(root), lambda d: [entry.pop(key) for entry in d[section][1:3]])
    with pytest.raises(InvalidDataError, match=rf"2 entries: {section}\[1\]: no '{key}', {section}\[2\]: no '{key}'"):
        coco.read_annotations(file(root))
    change(file(root), lambda d: [entry.update({key: None}) for entry in d[section][1:3]])
    with pytest.raises(InvalidDataError, match=rf'2 entries: {section}\[1\]: {key} None: Input should be a valid'):
        coco.read_annotations(file(root))


def test_required_keys_are_those_of_mmdet_and_pycocotools(root):
    """The libraries themselves: without any of these keys they fail, or leave the objects out."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def works(section: str, key: str) -> bool:
        data = coco_dict(NAMES)
        for entry in data[section]:
            entry.pop(key)
        path = root / 'y.json'
        path.write_text(json.dumps(data))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                dataset = CocoDataset(ann_file=str(path), data_prefix=dict(img=''), pipeline=[])
                truth = COCO(str(path))
                found = truth.loadRes([dict(image_id=1, category_id=5, bbox=[4, 6, 16, 12], score=0.9)])
                COCOeval(truth, found, 'bbox').evaluate()
        except KeyError:
            return False
        return sum(len(dataset.get_data_info(i)['instances']) for i in range(4)) == 12

    for section, keys in KEYS.items():
        assert not [key for key in keys if works(section, key)]
    assert not works('annotations', 'iscrowd')
    assert works('annotations', 'segmentation')


@pytest.mark.parametrize(
    ('spoil', 'split', 'code', 'severity'),
    [
        (lambda d: [a.pop('iscrowd') for a in d['annotations']], 'val', 'iscrowd-missing', 'error'),
        (lambda d: [a.pop('iscrowd') for a in d['annotations']], 'train', None, ''),
        (lambda d: [a.update(id=a['id'] - 1) for a in d['annotations']], 'val', 'id-unscorable', 'error'),
        (lambda d: [a.update(id=f'a{a["id"]}') for a in d['annotations']], 'val', 'id-unscorable', 'error'),
        (lambda d: [a.update(id=f'a{a["id"]}') for a in d['annotations']], 'train', None, ''),
        (lambda d: [a.pop('segmentation') for a in d['annotations']], 'val', 'segmentation-missing', 'error'),
        (lambda d: d.pop('annotations'), 'train', 'coco-no-annotations', 'error'),
        (lambda d: d.update(images=[], annotations=[]), 'train', 'coco-no-annotations', 'error'),
        (every(bbox=[0.1, 0.1, 0.5, 0.5]), 'train', 'bbox-flat', 'error'),
        (every(bbox=[500, 6, 5, 5]), 'train', 'bbox-outside', 'error'),
        (every(bbox=[60, 40, 76, 60]), 'train', 'bbox-corners', 'error'),
        (annotation(1, bbox=[4, 6, 0, 12]), 'train', 'bbox-flat', 'warning'),
        (annotation(1, bbox=[70, 6, 16, 12]), 'train', 'bbox-beyond', 'note'),
        (annotation(1, bbox=[4, 60, 16, 12]), 'train', 'bbox-beyond', 'note'),
        (lambda d: d.update(annotations=[d['annotations'][0] | dict(area=0)]), 'train', 'bbox-flat', 'error'),
        (every(category_id=15), 'train', 'class-absent', 'warning'),
        (every(category_id=15), 'val', 'class-absent', 'note'),
        (every(iscrowd=1), 'train', 'crowds', 'error'),
        (every(iscrowd=1), 'val', 'crowds', 'error'),
        (every(ignore=1), 'train', 'crowds', 'error'),
        (every(ignore=1), 'val', None, ''),
        (annotation(1, iscrowd=1), 'train', None, ''),
        (lambda d: [a.update(iscrowd=1) for a in d['annotations'][::2]], 'val', 'crowds', 'warning'),
        (lambda d: [a.update(iscrowd=1) for a in d['annotations'][::3]], 'train', 'class-absent', 'warning'),
    ],
)
def test_faults_of_a_whole_file(root, spoil, split, code, severity):
    change(file(root, split), spoil)
    result = full(config(root))
    assert codes(result) - {'class-absent'} <= ({code, 'crowds'} if code else set())
    assert not code or code in codes(result, severity)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_objects_of_categories_that_are_no_classes_do_not_count(root, split):
    """They are ignored on purpose, but something must remain to learn and to score."""
    change(file(root, split), every(category_id=15))
    result = full(config(root, 1, names=NAMES[:1]))
    assert codes(result, 'error') == {'nothing-labelled'}


def test_one_of_two_annotation_files_may_lack_the_classes(root):
    cfg = config(root, 1, names=NAMES[:1], splits=('train',))
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset',
        datasets=[leaf(root, split, metainfo=dict(classes=NAMES[:1])) for split in ('train', 'val')],
    )
    change(file(root, 'val'), every(category_id=15))
    assert codes(full(config(root, 1, names=NAMES[:1], splits=('val',))), 'error') == {'nothing-labelled'}
    assert not codes(full(cfg), 'error')


@pytest.mark.parametrize(('size', 'expected'), [(64, set()), (65, {'no-images'})])
def test_images_that_the_filter_removes(root, size, expected):
    cfg = config(root)
    cfg.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=True, min_size=size)
    assert codes(full(cfg), 'error') == expected


def test_checks_depend_on_the_metric(root):
    change(file(root, 'val'), lambda d: [a.pop('segmentation') for a in d['annotations']])
    assert not codes(full(config(root, metric=('bbox',), masks=False)))
    cfg = config(root)
    cfg.val_evaluator.ann_file = str(file(root))
    assert ('metric-file', 'val_dataloader.dataset') in found(full(cfg))


def test_reported_boxes_are_those_that_mmdet_ignores(root):
    boxes = [
        [4, 6, 0.5, 12],
        [4, 6, 16, 0.9],
        [80, 6, 5, 5],
        [4, 64, 5, 5],
        [-5, 6, 5, 5],
        [-5, 6, 6, 5],
        [79, 63, 9, 9],
    ]
    change(file(root), lambda d: [a.update(bbox=b) for a, b in zip(d['annotations'], boxes, strict=False)])
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDataset(
            ann_file=str(file(root)), data_prefix=dict(img=''), pipeline=[], metainfo=dict(classes=NAMES)
        )
    left_out = 3 * IMAGES - sum(len(dataset.get_data_info(i)['instances']) for i in range(IMAGES))
    named = {entry for code, entry in found(full(config(root))) if code in ('bbox-flat', 'bbox-outside')}
    assert named == {f'annotation {i}' for i in range(1, 6)} and left_out == 5


def test_images_in_subfolders(root):
    (root / 'train2017/a').mkdir()
    (root / 'train2017/002.jpg').rename(root / 'train2017/a/002.jpg')
    assert found(full(config(root))) == {('image-missing', 'image 3')}
    change(file(root), lambda d: d['images'][2].update(file_name='a/002.jpg'))
    assert not found(full(config(root)))


def test_generated_scenes_are_clean(tmp_path):
    write_demo_data(tmp_path, 'coco', train=6, val=3, size=(64, 64))
    names = tuple(c['name'] for c in json.loads(file(tmp_path).read_text())['categories'])
    assert not codes(full(config(tmp_path, names=names, classes=5)), 'error', 'warning')


def test_photographs_with_the_classes_of_the_file_or_of_the_config(reference):
    result = full(config(reference / 'data/camvid/coco', 80, None))
    assert codes(result, 'error') == {'classes-mismatch'}, 'heads of 80 classes for 3 categories'
    result = full(config(reference / 'data/camvid/coco', 3, ('person', 'bicycle', 'car')))
    assert not codes(result)
    result = full(config(reference / 'data/camvid/coco', 80, CocoDataset.METAINFO['classes']))
    assert codes(result) == {'class-absent'} and not codes(result, 'error')
    assert len(result.datasets[0].class_counts()) == 80 and sum(result.datasets[0].class_counts().values()) == 136


@pytest.mark.parametrize(
    ('kind', 'style'),
    [
        ('CocoDataset', True),
        ('replk_mm.CocoDataset', True),
        ('CityscapesDataset', True),
        ('LVISV1Dataset', False),
        ('Objects365V2Dataset', False),
        ('CocoPanopticDataset', False),
        ('VOCDataset', False),
    ],
)
def test_types_in_coco_style(tmp_path, kind, style):
    assert is_coco_style(ConfigDict(type=kind, ann_file='x.json'), 'mmdet') == style
    if not style:
        root = write_coco_root(tmp_path / 'data', NAMES)
        assert not codes(full(config(root, splits=('train',), type=kind)))


NUMBERS = st.integers(-5, 6000) | st.integers() | st.floats() | st.text(max_size=3) | st.none()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(NUMBERS, max_size=10), max_size=3)
    | st.fixed_dictionaries(
        dict(
            size=st.just([H, W]) | st.lists(NUMBERS, max_size=3),
            counts=st.text() | st.binary(max_size=20) | st.lists(NUMBERS, max_size=5),
        )
    )
)
def test_any_mask_decodes_or_has_an_error(mask):
    if coco.mask_error(mask, H, W) is None:
        encoded = rle.frPyObjects(mask, H, W) if isinstance(mask, list) or isinstance(mask['counts'], list) else mask
        assert rle.decode(encoded).shape[:2] == (H, W)


@pytest.mark.parametrize('counts', ['p', '00P', '0`p', 'ÿÿ', '', '00\0'])
def test_malformed_rle(counts):
    assert coco.mask_error(dict(size=[H, W], counts=counts), H, W)


def test_masks_of_pycocotools_have_no_error():
    generator = np.random.default_rng(0)
    for _ in range(50):
        height, width = generator.integers(1, 40, 2).tolist()
        pixels = np.asfortranarray(generator.random((height, width)) < generator.random(), np.uint8)
        mask = dict(size=[height, width], counts=rle.encode(pixels)['counts'].decode())
        assert coco.mask_error(mask, height, width) is None
        assert coco.mask_error(mask, height + 1, width)
