"""The whole check of annotation files finds every kind of planted fault, in its entry, and nothing else."""
import copy
import json
from pathlib import Path

import numpy as np
import pytest
from check_data_cases import found, full, kinds
from coco_files import SIZE, change, coco_dict, leaf, write_images
from mmengine.config import Config
from PIL import Image

from replk_mm.data import coco_masks
from replk_mm.data.audit import audit
from replk_mm.data.demo_writer import write_demo_data
from replk_mm.data.problem_kinds import KINDS

NAMES = ('person', 'car', 'dog')
IMAGES = 10


def config(root: Path, classes: int = 3, names=NAMES, masks: int | None = None, **changes) -> Config:
    loaders = {f'{split}_dataloader': dict(dataset=leaf(root, split, masks=True, metainfo=dict(classes=names), **changes))
               for split in ('train', 'val')}
    heads = dict(bbox_head=dict(type='Shared2FCBBoxHead', num_classes=classes),
                 mask_head=dict(type='FCNMaskHead', num_classes=masks or classes))
    return Config(dict(
        default_scope='mmdet', model=dict(roi_head=heads),
        val_evaluator=dict(type='CocoMetric', ann_file=f'{root}/annotations/instances_val2017.json', metric=['bbox', 'segm']),
        **loaders), cfg_text=' ', filename='own.py')


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


def noise(path: Path, seed: int, size: tuple[int, int] = SIZE) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def train(root: Path) -> Path:
    return root / 'annotations/instances_train2017.json'


def plant(root: Path) -> set[tuple[str, str]]:
    """One fault after the other; the kind of each, and the entry or file it is to be found in."""
    folder = root / 'train2017'
    noise(folder / 'other.jpg', 5000)
    noise(folder / '003.jpg', 5001, (40, 40))
    (folder / '004.jpg').unlink()
    (folder / '005.jpg').write_bytes((folder / '005.jpg').read_bytes()[:800])
    (folder / '006.jpg').unlink()
    (folder / '006.jpg').symlink_to('gone.jpg')
    (folder / '007.jpg').write_bytes((folder / '008.jpg').read_bytes())

    def spoil(d: dict) -> None:
        a = {one['id']: one for one in d['annotations']}
        for i, changes in {
                1: dict(image_id=777), 2: dict(category_id=888), 3: dict(bbox=[4, 6, float('nan'), 12]),
                4: dict(bbox=[4, 6, 0, 12]), 5: dict(bbox=[4, 6, 16, -12]),
                6: dict(bbox=[400, 6, 16, 12]), 7: dict(bbox=[60, 6, 40, 12]),
                8: dict(area=float('inf')), 9: dict(area=0), 10: dict(segmentation=[[1, 2, 3, 4]]),
                11: dict(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), 12: dict(segmentation=[[1, 2, 3, float('nan'), 5, 6]]),
                13: dict(segmentation=dict(size=[80, 64], counts=[5120])),
                14: dict(segmentation=dict(size=[64, 80], counts=[5])),
                15: dict(segmentation=dict(size=[64, 80], counts='??')), 16: dict(segmentation='mask.png'),
                17: dict(segmentation=[[1, 2, 3, '4', 5, 6]]), 18: dict(bbox=[4, 6, 10 ** 400, 12]),
                22: dict(bbox=[-10, 6, 16, 12])}.items():
            a[i].update(changes)
        del a[19]['iscrowd'], a[20]['segmentation']
        d['annotations'].append(copy.deepcopy(a[21]))
        d['categories'] += [dict(id=5, name='car'), dict(id=99, name='dog')]
        d['images'] += [dict(id=9, file_name='other.jpg', width=80, height=64),
                        dict(id=60, file_name='000.jpg', width=80, height=64)]
        d['images'][9]['width'] = float('nan')
        del d['info']

    change(train(root), spoil)
    return {('image-unknown', 'annotation 1'), ('category-unknown', 'annotation 2'), ('bbox-invalid', 'annotation 3'),
            ('bbox-flat', 'annotation 4'), ('bbox-flat', 'annotation 5'), ('bbox-outside', 'annotation 6'),
            ('bbox-beyond', 'annotation 7'), ('bbox-beyond', 'annotation 22'),
            ('area-invalid', 'annotation 8'), ('area-not-positive', 'annotation 9'),
            ('polygon-short', 'annotation 10'), ('polygon-short', 'annotation 11'), ('polygon-number', 'annotation 12'),
            ('mask-size', 'annotation 13'), ('rle-broken', 'annotation 14'),
            ('rle-broken', 'annotation 15'), ('mask-kind', 'annotation 16'), ('polygon-number', 'annotation 17'),
            ('bbox-invalid', 'annotation 18'), ('iscrowd-missing', 'annotation 19'), ('segmentation-missing', 'annotation 20'),
            ('id-repeated', 'annotations'), ('id-repeated', 'categories'), ('id-repeated', 'images'),
            ('name-repeated', 'categories'), ('file-repeated', 'images'), ('size-invalid', 'image 10'),
            ('info-missing', str(train(root))), ('stated-size', str(folder / '003.jpg')), ('image-missing', 'image 5'),
            ('cut-off', str(folder / '005.jpg')), ('broken-link', 'image 7'), ('duplicate-image', str(folder / '008.jpg'))}


def test_every_planted_fault_is_found_and_nothing_else(root):
    planted = plant(root)
    result = full(config(root), jobs=2)
    assert found(result) == planted
    for kind in sorted({kind for kind, _ in planted}):
        if KINDS[kind].severity == 'error':
            pass


def test_clean_file_has_no_problem(root):
    result = full(config(root))
    assert not found(result)
    assert [one.tally.looked for one in result.sets] == [IMAGES, 4]
    assert result.sets[0].classes == dict(person=10, car=10, dog=10)


def test_generated_scenes_are_clean(tmp_path):
    write_demo_data(tmp_path / 'x', 'coco', train=6, val=3, size=(64, 64))
    names = tuple(c['name'] for c in json.loads(train(tmp_path / 'x').read_text())['categories'])
    result = full(config(tmp_path / 'x', names=names, classes=5))
    assert not kinds(result, 'error', 'warning')


def test_photographs_have_notes_only(reference):
    cfg = config(reference / 'data/camvid/coco', classes=80, names=None)
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.pop('metainfo')
    result = full(cfg)
    assert kinds(result) == {'count-differs', 'class-absent'} == kinds(result, 'note')
    assert len(result.sets[0].classes) == 80 and sum(result.sets[0].classes.values()) == 136


@pytest.mark.parametrize(('content', 'kind'), [
    (b'', 'json-empty'), (b'{"images": [', 'json-cut-off'), (b'{"images": [],, }', 'json-invalid'),
    (b'\x89PNG\xff', 'json-not-text'), (b'[' * 100_000, 'json-nesting'),
    (b'{"images": ' + b'[' * 5000 + b']' * 5000 + b'}', 'json-nesting'),
    (b'{"images": ' + b'9' * 5000 + b'}', 'json-invalid'), (b'[]', 'coco-structure'), (b'{}', 'coco-structure'),
    (b'{"images": [], "annotations": [], "categories": []}', 'coco-no-images'),
    (b'{"images": [3], "annotations": [], "categories": []}', 'coco-structure'),
    (b'{"images": [{"id": 1, "file_name": "0.jpg", "height": 9}], "annotations": [], "categories": []}', 'coco-key-missing'),
    (b'{"images": [], "annotations": [], "categories": [{"id": "1", "name": "car"}]}', 'coco-type')])
def test_file_that_is_no_annotation_file_does_not_stop_the_check(root, content, kind):
    train(root).write_bytes(content)
    result = full(config(root))
    assert (kind, str(train(root))) in {(problem.kind, problem.path) for _, problem in result.found()}
    assert [one.tally.looked for one in result.sets] == [0, 4], 'the other data set was not looked at'


def test_keys_that_are_missing_or_of_a_wrong_type_hide_nothing_else(root):
    def spoil(d: dict) -> None:
        a, images = d['annotations'], d['images']
        del a[0]['area'], a[5]['bbox'], a[8]['category_id'], images[7]['width'], images[8]['file_name']
        a[1].update(image_id=777)
        a[2]['bbox'][0] = '4'
        a[3]['area'] = None
        a[4].update(category_id='15')
        a[0].update(segmentation='mask.png')
        images[9].update(height='64')
        d['categories'].append(3)

    change(train(root), spoil)
    cut = root / 'train2017/005.jpg'
    cut.write_bytes(cut.read_bytes()[:800])
    noise(root / 'train2017/003.jpg', 5001, (40, 40))
    result = full(config(root))
    assert found(result) == {
        ('coco-key-missing', 'annotations id 1'), ('coco-key-missing', 'annotations id 6'),
        ('coco-key-missing', 'annotations id 9'), ('coco-key-missing', 'images id 8'), ('coco-key-missing', 'images id 9'),
        ('image-unknown', 'annotation 2'), ('bbox-invalid', 'annotation 3'), ('area-invalid', 'annotation 4'),
        ('coco-type', 'annotations[4]'), ('coco-type', 'images[9]'), ('coco-structure', 'categories[3]'),
        ('mask-kind', 'annotation 1'), ('cut-off', str(cut)), ('stated-size', str(root / 'train2017/003.jpg'))}
    assert [one.tally.looked for one in result.sets] == [IMAGES - 1, 4]


@pytest.mark.parametrize('key', ['area', 'bbox'])
def test_a_key_that_all_annotations_lack_is_one_finding_each(root, key):
    """As programs write that do not know it: the rest is looked at, and what follows from it is not said again."""
    change(train(root), lambda d: [a.pop(key) for a in d['annotations']] + [d['annotations'][3].update(image_id=777)])
    result = full(config(root))
    assert found(result) == {('coco-key-missing', f'annotations id {i + 1}') for i in range(3 * IMAGES)} | {
        ('image-unknown', 'annotation 4')}
    assert result.sets[0].classes == dict(person=10, car=10, dog=10) and result.sets[0].tally.looked == IMAGES


@pytest.mark.parametrize('section', ['categories', 'annotations'])
def test_a_section_that_is_none_does_not_hide_the_images(root, section):
    change(train(root), lambda d: d.update({section: {}}))
    (root / 'train2017/004.jpg').unlink()
    result = full(config(root))
    assert found(result) - {('class-absent', str(train(root)))} == {
        ('coco-structure', str(train(root))), ('image-missing', 'image 5')}
    assert result.sets[0].tally.looked == IMAGES - 1


def test_classes_are_compared_in_a_file_with_other_faults(root):
    change(train(root), lambda d: (d['annotations'][0].pop('area'), d['categories'][0].update(name='Persons')))
    assert {'coco-key-missing', 'classes-mismatch'} <= kinds(full(config(root)), 'error')


def test_without_the_folder_of_the_images_their_file_is_looked_at_all_the_same(root):
    change(train(root), lambda d: (d['annotations'][0].update(image_id=777), d['annotations'][3].update(bbox=[4, 6, 0, 12])))
    (root / 'train2017').rename(root / 'elsewhere')
    assert found(full(config(root))) == {('folder-missing', str(root / 'train2017')), ('image-unknown', 'annotation 1'),
                                         ('bbox-flat', 'annotation 4')}
    train(root).write_text('[]')
    assert kinds(full(config(root))) >= {'folder-missing', 'coco-structure'}


def test_classes_and_every_head_are_compared(root):
    change(train(root), lambda d: d['categories'][0].update(name='Persons'))
    result = full(config(root, classes=4, masks=3))
    texts = [problem.found for _, problem in result.found() if problem.kind == 'classes-mismatch']
    assert any('1 of its 3 categories are none of the 3 classes' in text for text in texts)
    assert any('the heads have different numbers of classes' in text for text in texts)


def test_metric_with_the_file_of_other_images(root):
    cfg = config(root)
    cfg.val_evaluator.ann_file = str(train(root))
    assert kinds(full(cfg)) == {'metric-file'}


def test_odd_names_of_files_do_no_harm(root):
    for i, name in enumerate(['\udcff.jpg', 'a\0b.jpg', '\ud800.jpg', '', '../../x.jpg', '/', 'x' * 5000]):
        change(train(root), lambda d, i=i, name=name: d['images'][i].update(file_name=name))
    missing = {entry for kind, entry in found(full(config(root))) if kind == 'image-missing'}
    assert missing == {f'image {i + 1}' for i in range(7)}


def test_data_that_are_trained_with_and_scored(root):
    cfg = config(root)
    cfg.val_dataloader = copy.deepcopy(cfg.train_dataloader)
    cfg.val_evaluator.ann_file = str(train(root))
    result = full(cfg)
    assert kinds(result) == {'same-data'} and sum(one.tally.looked for one in result.sets) == IMAGES


def test_without_full_all_entries_and_a_sample_of_the_images(root, monkeypatch):
    monkeypatch.setattr('replk_mm.data.files.SAMPLE', 2)
    planted = plant(root)
    unseen = {(kind, where) for kind, where in planted if kind in ('rle-broken', 'polygon-number', 'stated-size', 'cut-off')}
    result = audit(config(root), jobs=1)
    assert found(result) == planted - unseen and len(unseen) == 6
    assert [one.tally.looked for one in result.sets] == [2, 2]


# -- masks ------------------------------------------------------------------------------------------------------------
def test_runs_are_those_of_pycocotools():
    from pycocotools import mask as api
    rng = np.random.default_rng(0)
    for height, width, share in [(1, 1, 1.), (7, 5, .5), (64, 80, .5), (64, 80, .01), (300, 400, .9999), (64, 80, 0.)]:
        pixels = np.asfortranarray((rng.random((height, width)) < share).astype(np.uint8))
        column = pixels.ravel(order='F')
        changes = np.flatnonzero(np.diff(column.astype(int))) + 1
        runs = np.diff([0, *([] if column[0] == 0 else [0]), *changes, column.size]).tolist()
        text = api.encode(pixels)['counts'].decode()
        assert coco_masks.decompressed(text).tolist() == runs
        assert coco_masks.rle_problem(dict(size=[height, width], counts=text)) is None
        assert 'pixels, and' in coco_masks.rle_problem(dict(size=[height + 1, width], counts=text))


@pytest.mark.parametrize(('size', 'counts'), [
    ([64], [1]), ([64, '80'], [5120]), ([0, 80], []), ([64, 80], ['a']), ([64, 80], [5121, -1]), ([64, 80], [[5120]]),
    ([64, 80], [1e30]), ([64, 80], ''), ([64, 80], 'é'), ([64, 80], 'o'), ([64, 80], 'o' * 99), ([64, 80], [10 ** 40])])
def test_runs_that_cannot_be(size, counts):
    assert coco_masks.rle_problem(dict(size=size, counts=counts))
