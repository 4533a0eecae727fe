"""Everything wrong with an annotation file is found before a run, counted and named; what is right passes."""
import contextlib
import copy
import io
import json

import pytest
from coco_cases import NAMES, SCORE, TRAIN, check, file, paste, refused, scored  # noqa: F401 (a fixture)
from coco_files import SIZE, change, coco_dict, leaf, write_coco_root
from mmengine.config import Config
from PIL import Image

from replk_mm.data import coco, coco_checks
from replk_mm.data.checks import check_data, check_dataset
from replk_mm.data.coco_checks import Use
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)
SPLITS = ('train', 'val', 'test')


@pytest.mark.parametrize('use', [SCORE, TRAIN])
def test_good_file_passes_and_is_counted(file, use):
    assert check(file, use) == f'data {file}: 4 images, 12 objects of 3 categories, 4 images opened'


def test_test_images_need_no_annotations_until_they_are_scored(file):
    change(file, lambda d: d.pop('annotations'))
    assert '0 objects' in check(file, Use(train=False, scored=False))
    refused(file, "there is no 'annotations'")
    refused(file, "there is no 'annotations'", use=TRAIN)


def test_crowd_key_is_for_scoring_only(file):
    change(file, lambda d: [a.pop('iscrowd') for a in d['annotations']])
    assert check(file, TRAIN)
    assert check(file, Use(train=False, own_file=False))


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


# -- images without objects -------------------------------------------------------------------------------------------
def test_images_left_out_of_training_are_counted_as_mmdet_does(file):
    from mmdet.datasets import CocoDataset
    change(file, lambda d: d.update(annotations=[a for a in d['annotations'] if a['image_id'] in (1, 3)]))
    with contextlib.redirect_stdout(io.StringIO()):
        left = len(CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[],
                               filter_cfg=dict(filter_empty_gt=True)))
    assert left == 2 and '2 images without objects are left out' in check(file, TRAIN)


@pytest.mark.parametrize(('keep_empty', 'said'), [
    (False, ['1 images without objects are left out', '2 images with a side of less than 50 pixels are left out']),
    (True, ['3 images with a side of less than 50 pixels are left out'])])
def test_why_images_are_left_out_of_training(file, keep_empty, said):
    from mmdet.datasets import CocoDataset

    def shrink(d):
        d['annotations'] = [a for a in d['annotations'] if a['image_id'] != 2]
        for i in (0, 1, 2):
            Image.new('RGB', (80, 49)).save(file.parent / 'images' / d['images'][i]['file_name'])
            d['images'][i]['height'] = 49

    change(file, shrink)
    with contextlib.redirect_stdout(io.StringIO()):
        left = CocoDataset(ann_file=str(file), data_prefix=dict(img=''), pipeline=[],
                           filter_cfg=dict(filter_empty_gt=not keep_empty, min_size=50))
    assert len(left) == 1
    line = check(file, Use(train=True, scored=False, keep_empty=keep_empty, min_size=50))
    assert [text for text in line.split('; ') if 'left out' in text] == [f'{text} of training' for text in said]


@pytest.mark.parametrize('use', [Use(train=True, scored=False, keep_empty=False, classes=('cat',)),
                                 Use(train=True, scored=False, keep_empty=False, min_size=65),
                                 Use(train=True, scored=False, keep_empty=True, min_size=65)])
def test_nothing_left_to_train_with(file, use):
    refused(file, 'none of the 4 images has', *(() if use.keep_empty else ['an object of a class']),
            *(['sides of at least 65 pixels'] if use.min_size else []), use=use)


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
    assert [line for line in check_data(cfg, SPLITS, None) if line.startswith('data')] == [
        f'data {file}: 4 images, 12 objects of 3 categories, 4 images opened']
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
    assert len(lines) == 4 and all(f'{number} images opened' in line for number, line in zip((32, 16), lines, strict=False))
    assert [line.split(';')[0].rpartition(': ')[2] for line in lines[2:]] == ['32 images of the train data set',
                                                                              '16 images of the val data set']


def test_panoptic_annotations_are_left_to_their_own_reader(tmp_path):
    root = write_coco_root(tmp_path / 'data', NAMES)
    change(root / 'annotations/instances_val2017.json', lambda d: d.update(annotations=[dict(image_id=1, segments_info=[])]))
    assert 'annotation file and image folder are there' in check_dataset(
        leaf(root, 'val', type='CocoPanopticDataset'), 'mmdet', None)
