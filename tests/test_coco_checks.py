"""Everything wrong with an annotation file is found before a run, counted and named; what is right passes."""
import contextlib
import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_files import SIZE, change, coco_dict, leaf, write_coco_root, write_images
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from replk_mm.data import coco, coco_checks
from replk_mm.data.checks import check_data, check_dataset
from replk_mm.data.coco_checks import Use
from replk_mm.engine.prepare import check_while_loading
from replk_mm.errors import UserError
from replk_mm.registry import TRANSFORMS

NAMES = ('person', 'car', 'dog')
SCORE = Use(train=False, scored=True, masks=True)
SPLITS = ('train', 'val', 'test')
TRAIN = Use(train=True, scored=False, masks=True, keep_empty=False)


@pytest.fixture
def file(tmp_path) -> Path:
    """An annotation file to spoil; its images are beside it."""
    write_images(tmp_path / 'images')
    (tmp_path / 'x.json').write_text(json.dumps(coco_dict(NAMES)))
    return tmp_path / 'x.json'


def check(file: Path, use: Use = SCORE) -> str:
    return coco_checks.check(file, file.parent / 'images', use)


def refused(file: Path, *named, use: Use = SCORE) -> str:
    with pytest.raises(UserError) as info:
        check(file, use)
    message = str(info.value)
    assert message.startswith(f'{file}: ')
    for text in named:
        assert str(text) in message
    return message


def paste(message: str) -> None:
    """Give a shell the command that a message advises."""
    command = next(line.strip() for line in message.splitlines() if line.strip().startswith('python -c'))
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    subprocess.run(['bash', '-c', command], check=True, env={**os.environ, 'PATH': path})


@pytest.mark.parametrize('use', [SCORE, TRAIN])
def test_good_file_passes_and_is_counted(file, use):
    assert check(file, use) == f'data {file}: 4 images, 12 objects of 3 categories, 4 images opened'


# -- the file ---------------------------------------------------------------------------------------------------------
def test_cut_off_file_is_named_with_the_place(file):
    text = file.read_text()
    file.write_text(text[:700])
    message = refused(file, 'cut off', 'line 1, column')
    with pytest.raises(json.JSONDecodeError) as info:
        json.loads(text[:700])
    assert f'character {info.value.pos:,} of 700' in message


@pytest.mark.parametrize(('content', 'said'), [
    (b'', 'the file is empty'), (b'{"images": [],, }', "line 1, column 15"), (b'\x89PNG\r\n\xff\xfe', 'not a text file'),
    (b'version https://git-lfs.github.com/spec/v1', 'version https'), (b'[]', 'holds a list'), (b'3', 'holds a int')])
def test_what_is_no_annotation_file(file, content, said):
    file.write_bytes(content)
    refused(file, said)


@pytest.mark.parametrize('section', ['images', 'categories'])
def test_section_missing_or_no_list(file, section):
    change(file, lambda d: d.pop(section))
    refused(file, f'{section!r} is missing')
    change(file, lambda d: d.update({section: {}}))
    refused(file, f'{section!r} is a dict')


def test_test_images_need_no_annotations_until_they_are_scored(file):
    change(file, lambda d: d.pop('annotations'))
    assert '0 objects' in check(file, Use(train=False, scored=False))
    refused(file, "there is no 'annotations'")
    refused(file, "there is no 'annotations'", use=TRAIN)


@pytest.mark.parametrize(('section', 'key'), [(s, k) for s, keys in coco.KEYS.items() for k in keys])
def test_missing_keys_are_counted_and_named(file, section, key):
    change(file, lambda d: [entry.pop(key) for entry in d[section][1:3]])
    count = len(json.loads(file.read_text())[section])
    message = refused(file, f'2 of {count} {section} have no {key!r}')
    assert (f'{section}[1], {section}[2]' if key == 'id' else 'id ') in message


def test_entries_that_are_no_objects(file):
    change(file, lambda d: d['annotations'].insert(1, 'x'))
    refused(file, '1 of 13 annotations are no objects: annotations[1]')


@pytest.mark.parametrize(('section', 'key', 'value'), [
    ('images', 'width', '80'), ('images', 'file_name', 3), ('categories', 'id', '5'), ('annotations', 'category_id', 'car'),
    ('annotations', 'image_id', None), ('annotations', 'id', [1])])
def test_wrong_types_are_named(file, section, key, value):
    change(file, lambda d: d[section][0].update({key: value}))
    refused(file, f'{section} have a {key!r}', repr(value))


@pytest.mark.parametrize('key', ['area', 'iscrowd'])
def test_command_that_adds_a_missing_key_does(file, key):
    change(file, lambda d: [a.pop(key) for a in d['annotations']])
    message = refused(file, f"12 of 12 annotations have no '{key}'")
    paste(message)
    assert check(file)
    if key == 'area':
        assert {a['area'] for a in json.loads(file.read_text())['annotations']} == {16 * 12}


@pytest.mark.parametrize(('folder', 'name'), [("o'neil's data", 'x.json'), ('a "b" $HOME `c`', 'x.json'), ('a b', 'y!z.json')])
def test_command_that_mends_a_file_pastes_whatever_its_name(file, folder, name):
    place = file.parent / folder
    place.mkdir()
    (file.parent / 'images').rename(place / 'images')
    file = file.rename(place / name)
    change(file, lambda d: [a.pop('iscrowd') for a in d['annotations']])
    paste(refused(file, "no 'iscrowd'"))
    assert check(file)


@pytest.mark.parametrize('name', ["driver's cab", 'the "cab"', 'a\\b', '$5', 'plain'])
def test_command_that_renames_a_category_pastes_whatever_its_name(file, name):
    names = {'car': name}
    paste(coco.mend(file, f"[c.update(name={names!r}.get(c['name'], c['name'])) for c in d['categories']]", 'Rename'))
    assert [c['name'] for c in json.loads(file.read_text())['categories']] == ['person', name, 'dog']


def test_crowd_key_is_for_scoring_only(file):
    change(file, lambda d: [a.pop('iscrowd') for a in d['annotations']])
    assert check(file, TRAIN)
    assert check(file, Use(train=False, own_file=False))


def scored(data: dict, kind: str = 'bbox') -> float:
    """AP of detections that are the annotations themselves."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    truth = COCO()
    truth.dataset = data
    found = [dict(image_id=a['image_id'], category_id=a['category_id'], score=.9, **(
        dict(bbox=a['bbox']) if kind == 'bbox' else dict(segmentation=a['segmentation']))) for a in copy.deepcopy(
            data['annotations'])]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if kind == 'segm':
            for detection, a in zip(found, data['annotations'], strict=True):
                detection['segmentation'] = truth.annToRLE(a)
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize('number', [lambda i: i, lambda i: f'a{i}'])
def test_annotations_are_numbered_as_pycocotools_can_score_them(file, number):
    """Detections that are the annotations themselves have AP 1, and less or none at all with such ids."""
    change(file, lambda d: [a.update(id=number(i)) for i, a in enumerate(d['annotations'])])
    spoilt = json.loads(file.read_text())
    try:
        assert scored(spoilt) < 0.99
    except ValueError:
        assert number(0) == 'a0'
    message = refused(file, "of 12 annotations have an 'id' that pycocotools cannot score", repr(number(0)))
    for harmless in (TRAIN, Use(train=False, scored=False), Use(train=False, own_file=False)):
        assert check(file, harmless)
    paste(message)
    assert check(file) and scored(json.loads(file.read_text())) == 1


@pytest.mark.parametrize('first', [1, -50, 10**12])
def test_other_numbers_of_annotations_are_fine(file, first):
    change(file, lambda d: [a.update(id=first + i) for i, a in enumerate(d['annotations'])])
    assert check(file) and scored(json.loads(file.read_text())) == 1


@pytest.mark.parametrize('needed', [True, False])
def test_info_is_asked_for_if_pycocotools_needs_it(file, needed, monkeypatch):
    from pycocotools.coco import COCO
    original = COCO.loadRes

    def old(self, results):
        if needed:
            self.dataset['info']  # as some releases copy it
        return original(self, results)

    monkeypatch.setattr(COCO, 'loadRes', old)
    change(file, lambda d: d.pop('info'))
    if needed:
        refused(file, "there is no 'info'")
    else:
        assert check(file)


def test_what_mmdet_and_pycocotools_fail_on_is_what_is_refused(file):
    """The libraries themselves say which keys they need: without any of these they fail, without others they do not."""
    from mmdet.datasets import CocoDataset
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def works(section, key) -> bool:
        data = coco_dict(NAMES)
        for entry in data[section] if section else [data]:
            entry.pop(key)
        path = file.with_name('y.json')
        path.write_text(json.dumps(data))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                dataset = CocoDataset(ann_file=str(path), data_prefix=dict(img=''), pipeline=[])
                truth = COCO(str(path))
                found = truth.loadRes([dict(image_id=1, category_id=5, bbox=[4, 6, 16, 12], score=0.9)])
                evaluation = COCOeval(truth, found, 'bbox')
                evaluation.evaluate()
        except KeyError:
            return False
        return sum(len(dataset.get_data_info(i)['instances']) for i in range(4)) == 12

    for section, key in [(s, k) for s, keys in coco.KEYS.items() for k in keys] + [('annotations', 'iscrowd')]:
        assert not works(section, key), (section, key)
    for section, key in (('annotations', 'segmentation'), (None, 'info')):
        assert works(section, key) or (key == 'info' and coco_checks.info_needed()), (section, key)


# -- what belongs together ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('key', 'section'), [('image_id', 'images'), ('category_id', 'categories')])
def test_annotations_of_absent_images_and_categories(file, key, section):
    change(file, lambda d: [d['annotations'][i].update({key: 77}) for i in (3, 8)])
    refused(file, f'2 of 12 annotations have a {key} that {section} do not have: 77 (annotations 4, 9)')


@pytest.mark.parametrize('section', ['images', 'annotations', 'categories'])
def test_ids_that_occur_twice(file, section):
    change(file, lambda d: d[section].append(copy.deepcopy(d[section][0])))
    refused(file, f'1 of the {section} have a id that others have too')


def test_category_names_that_occur_twice(file):
    change(file, lambda d: d['categories'].append(dict(id=99, name='car')))
    refused(file, '1 of the categories have a name that others have too: car')


def test_images_absent_from_disk_are_counted(file):
    for name in ('001.jpg', '003.jpg'):
        (file.parent / 'images' / name).unlink()
    message = refused(file, '2 of 4 images are not in', file.parent / 'images', '001.jpg, 003.jpg')
    assert '000.jpg' not in message


def test_images_in_folders_of_their_own(file):
    (file.parent / 'images' / 'a').mkdir()
    (file.parent / 'images' / '002.jpg').rename(file.parent / 'images' / 'a' / '002.jpg')
    refused(file, '1 of 4 images are not in', '002.jpg')
    change(file, lambda d: d['images'][2].update(file_name='a/002.jpg'))
    assert check(file)


def test_damaged_and_wrongly_sized_images(file):
    folder = file.parent / 'images'
    (folder / '000.jpg').write_bytes((folder / '000.jpg').read_bytes()[:500])
    Image.new('RGB', (20, 30)).save(folder / '002.jpg')
    refused(file, f'{folder / "000.jpg"}: the file is cut off', f'{folder / "002.jpg"}: 20x30 pixels, and 80x64 in the file')


def test_image_turned_by_its_camera_has_the_size_that_readers_give_it(file):
    import mmcv
    exif = Image.Exif()
    exif[0x0112] = 6
    path = file.parent / 'images' / '000.jpg'
    Image.new('RGB', SIZE[::-1]).save(path, exif=exif)
    assert mmcv.imread(path).shape[:2] == SIZE[::-1]
    assert check(file)


# -- boxes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('box', 'said'), [
    ([4, 6, 0, 12], 'less than a pixel'), ([4, 6, 16, -3], 'less than a pixel'), ([90, 6, 16, 12], 'outside their image'),
    ([4, -20, 16, 12], 'outside their image'), ([4, 6, float('nan'), 12], 'not four numbers'),
    ([4, 6, float('inf'), 12], 'not four numbers'),
    ([4, 6, 16], 'not four numbers'), ('x', 'not four numbers'), ([4, 6, '16', 12], 'not four numbers')])
def test_boxes_that_cannot_be(file, box, said):
    change(file, lambda d: [d['annotations'][i].update(bbox=box) for i in (5, 7)])
    refused(file, '2 of 12', said, 'ids 6')


def test_boxes_that_mmdet_leaves_out_are_those_named(file):
    """mmdet's own data set counts what is left."""
    from mmdet.datasets import CocoDataset
    boxes = [[4, 6, .5, 12], [4, 6, 16, .9], [80, 6, 5, 5], [4, 64, 5, 5], [-5, 6, 5, 5], [-5, 6, 6, 5], [79, 63, 9, 9]]
    change(file, lambda d: [a.update(bbox=b) for a, b in zip(d['annotations'], boxes, strict=False)])
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[])
    left_out = 12 - sum(len(dataset.get_data_info(i)['instances']) for i in range(4))
    message = refused(file, '2 of 12 boxes are less than a pixel', '3 of 12 boxes lie outside')
    assert left_out == 5 and 'ids 1 [4, 6, 0.5, 12], 2 [4, 6, 16, 0.9]' in message


def test_few_bad_boxes_among_many_are_noted_only(tmp_path):
    write_images(tmp_path / 'images', 1)
    data = coco_dict(NAMES, images=1, per_image=1)
    data['annotations'] = [dict(data['annotations'][0], id=i + 1) for i in range(300)]
    data['annotations'][7]['bbox'] = [1, 1, 5, 0]
    (tmp_path / 'x.json').write_text(json.dumps(data))
    assert 'boxes that are less than a pixel wide or high: 1, hardly to be found, ids 8 [1, 1, 5, 0]' in check(
        tmp_path / 'x.json')
    change(tmp_path / 'x.json', lambda d: [a.update(bbox=[1, 1, 5, 0]) for a in d['annotations'][:4]])
    refused(tmp_path / 'x.json', '5 of 300 boxes are less than a pixel')


@pytest.mark.parametrize(('box', 'said'), [([4, 6, .5, 12], 'are less than a pixel wide or high'),
                                           ([90, 6, 9, 9], 'lie outside their image')])
def test_one_bad_box_of_a_small_file_is_noted_unless_it_is_all_there_is(file, box, said):
    change(file, lambda d: d['annotations'][5].update(bbox=box))
    assert f'boxes that {said}: 1, left out, ids 6 {box}' in check(file, TRAIN)
    change(file, lambda d: d.update(annotations=d['annotations'][5:6]))
    refused(file, f'1 of 1 boxes {said}', use=TRAIN)


def test_one_box_beyond_its_image_does_not_make_all_of_them_corners(file):
    change(file, lambda d: d.update(annotations=d['annotations'][:2]))
    change(file, lambda d: d['annotations'][0].update(bbox=[40, 30, 60, 50]))
    assert check(file)


def test_corners_and_shares_of_the_image_are_recognised(file):
    def corners(d):
        for a in d['annotations']:
            x, y, w, h = 40, 30, 20, 20
            a['bbox'] = [x, y, x + w, y + h]

    change(file, corners)
    refused(file, 'reach beyond', '[x1, y1, x2, y2]')
    change(file, lambda d: [a.update(bbox=[.1, .1, .5, .5]) for a in d['annotations']])
    refused(file, 'less than a pixel', "shares of the image's size")


def test_masks_are_asked_for_where_they_are_used(file):
    change(file, lambda d: [a.pop('segmentation') for a in d['annotations'][2:4]])
    refused(file, "2 of 12 annotations have no 'segmentation', and the config scores masks: ids 3, 4")
    refused(file, 'the config trains masks', use=TRAIN)
    assert check(file, Use(train=True, masks=False, scored=False))


@pytest.mark.parametrize('mask', [[[1, 2]], [[1, 2, 3, 4]], [[]], [[1, 2], [4, 6, 20, 6, 20, 18]]])
def test_polygons_that_pycocotools_fails_on(file, mask):
    change(file, lambda d: d['annotations'][5].update(segmentation=mask))
    with pytest.raises(Exception, match='.'):  # pycocotools raises Exception itself
        scored(json.loads(file.read_text()), 'segm')
    refused(file, '1 of 12 annotations have polygons that are not pairs of numbers, three or more: ids 6 ')
    assert '1 annotations have polygons' in check(file, TRAIN), 'mmdet leaves it out'
    assert check(file, Use(train=False, masks=False))
    change(file, lambda d: d['annotations'][7].update(segmentation=mask))
    refused(file, '2 of 12 annotations have polygons', use=TRAIN)


@pytest.mark.parametrize('mask', [[[4, 6, 20, 6, 20, 18, 7]], [[4, 6, 20, 6, 20, 18], [1, 2]]])
def test_one_odd_polygon_that_can_be_read_is_noted(file, mask):
    change(file, lambda d: d['annotations'][5].update(segmentation=mask))
    assert scored(json.loads(file.read_text()), 'segm') == 1
    assert '1 annotations have polygons that are not pairs' in check(file)
    change(file, lambda d: d['annotations'][7].update(segmentation=mask))
    refused(file, '2 of 12 annotations have polygons')


@pytest.mark.parametrize('mask', [[4, 6, 20, 6, 20, 18], 'mask.png', {'size': [64, 80]}, {'counts': [5120]},
                                  {'size': [64, 80], 'counts': 5}, 3])
@pytest.mark.parametrize('use', [SCORE, TRAIN])
def test_masks_that_are_neither_polygons_nor_rle(file, mask, use):
    change(file, lambda d: d['annotations'][5].update(segmentation=mask))
    refused(file, "1 of 12 annotations have a 'segmentation' that is neither polygons nor RLE: ids 6", use=use)


@pytest.mark.parametrize('use', [SCORE, TRAIN])
@pytest.mark.parametrize('compressed', [False, True])
def test_rle_is_of_its_images_size(file, use, compressed):
    from pycocotools import mask as api
    box = np.zeros(SIZE[::-1], np.uint8, order='F')
    box[6:18, 24:40] = 1
    rle = api.encode(box)
    rle['counts'] = rle['counts'].decode()
    if not compressed:
        ends = np.flatnonzero(np.diff(box.ravel(order='F'), prepend=0, append=0)).tolist()
        rle['counts'] = np.diff([0, *ends, box.size]).tolist()
    change(file, lambda d: d['annotations'][1].update(segmentation=rle, iscrowd=1))
    assert check(file, use) and np.array_equal(api.decode(api.frPyObjects(rle, *rle['size']) if not compressed else rle), box)
    change(file, lambda d: d['annotations'][1]['segmentation'].update(size=list(SIZE)))
    refused(file, "1 of 12 annotations have a mask (RLE) whose size is not its image's: ids 2 ([80, 64], image [64, 80])",
            use=use)


# -- images without objects -------------------------------------------------------------------------------------------
def test_images_left_out_of_training_are_counted_as_mmdet_does(file):
    from mmdet.datasets import CocoDataset
    change(file, lambda d: d.update(annotations=[a for a in d['annotations'] if a['image_id'] in (1, 3)]))
    with contextlib.redirect_stdout(io.StringIO()):
        left = len(CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[],
                               filter_cfg=dict(filter_empty_gt=True)))
    assert left == 2 and '2 images without objects are left out' in check(file, TRAIN)


@pytest.mark.parametrize('use', [Use(train=True, scored=False, keep_empty=False, classes=('cat',)),
                                 Use(train=True, scored=False, keep_empty=False, min_size=65)])
def test_nothing_left_to_train_with(file, use):
    refused(file, 'none of the 4 images has an object of a class', use=use)


def test_all_kinds_come_in_one_message(file):
    def spoil(d):
        d['annotations'][0]['image_id'] = 50
        d['annotations'][1]['bbox'] = d['annotations'][2]['bbox'] = [0, 0, 0, 0]
        d['images'].append(dict(d['images'][0]))

    change(file, spoil)
    (file.parent / 'images' / '003.jpg').unlink()
    message = refused(file, 'annotations have a image_id', 'less than a pixel', 'of the images have a id', 'are not in')
    assert message.count('\n  and ') == 3


# -- through the config -----------------------------------------------------------------------------------------------
def test_config_says_whether_masks_are_used(tmp_path):
    root = write_coco_root(tmp_path / 'data', NAMES)
    change(root / 'annotations/instances_train2017.json', lambda d: [a.pop('segmentation') for a in d['annotations']])
    assert check_dataset(leaf(root), 'mmdet', None)
    with pytest.raises(UserError, match='trains masks'):
        check_dataset(leaf(root, masks=True), 'mmdet', None)
    assert check_dataset(leaf(root), 'mmdet', None, [dict(type='CocoMetric', metric='bbox')])
    with pytest.raises(UserError, match='scores masks'):
        check_dataset(leaf(root), 'mmdet', None, [dict(type='CocoMetric', metric=['bbox', 'segm'])])


def test_a_file_that_is_trained_with_and_scored_must_do_for_both(tmp_path):
    """As who tries whether a model can learn a few images by heart."""
    root = write_coco_root(tmp_path / 'data', NAMES)
    file = root / 'annotations/instances_train2017.json'
    cfg = Config(dict(default_scope='mmdet', **{f'{split}_dataloader': dict(dataset=leaf(root)) for split in SPLITS},
                      val_evaluator=dict(type='CocoMetric', ann_file=str(file)),
                      test_evaluator=dict(type='CocoMetric', ann_file=str(file), metric=['bbox', 'segm'])))
    assert len(check_data(cfg, SPLITS, None)) == 1
    change(file, lambda d: [a.pop('segmentation') for a in d['annotations']])
    check_data(cfg, ('train', 'val'), None)
    with pytest.raises(UserError, match='scores masks'):
        check_data(cfg, SPLITS, None)
    change(file, lambda d: [a.pop('iscrowd') for a in d['annotations']])
    check_data(cfg, ('train',), None)
    with pytest.raises(UserError, match="no 'iscrowd'"):
        check_data(cfg, ('train', 'val'), None)


def test_classes_may_stand_in_a_file(tmp_path):
    root = write_coco_root(tmp_path / 'data', NAMES)
    names = tmp_path / 'names.txt'
    names.write_text('dog\ncar\n')
    dataset = leaf(root, metainfo=dict(classes=str(names)))
    assert '12 objects' in check_dataset(dataset, 'mmdet', None)
    names.write_text('cat\n')
    with pytest.raises(UserError, match='none of the 4 images has an object of a class'):
        check_dataset(dataset, 'mmdet', None)


def test_photographs_with_boxes_pass(reference):
    root = reference / 'data/camvid/coco'
    metric = dict(type='CocoMetric', ann_file=f'{root}/annotations/instances_val2017.json', metric=['bbox', 'segm'])
    cfg = Config(dict(default_scope='mmdet', train_dataloader=dict(dataset=leaf(root, masks=True)), val_evaluator=metric,
                      val_dataloader=dict(dataset=leaf(root, 'val'))))
    lines = check_data(cfg, ('train', 'val'), None)
    assert len(lines) == 2 and all('32 images opened' in line or '16 images opened' in line for line in lines)


def test_panoptic_annotations_are_left_to_their_own_reader(tmp_path):
    root = write_coco_root(tmp_path / 'data', NAMES)
    change(root / 'annotations/instances_val2017.json', lambda d: d.update(annotations=[dict(image_id=1, segments_info=[])]))
    assert 'annotation file and image folder are there' in check_dataset(
        leaf(root, 'val', type='CocoPanopticDataset'), 'mmdet', None)


# -- read once --------------------------------------------------------------------------------------------------------
def test_a_file_is_read_once_and_given_once(file, monkeypatch):
    calls = []
    original = coco._parse
    monkeypatch.setattr(coco, '_parse', lambda path: calls.append(path) or original(path))
    coco.forget()
    first = coco.read(file)
    assert coco.read(file) is first and len(calls) == 1
    assert coco.take(str(file)) is first and coco.take(file) is None
    coco.read(file)
    change(file, lambda d: d['images'].pop())
    assert coco.take(file) is None, 'an outdated content was given'


# -- while loading ----------------------------------------------------------------------------------------------------
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
