"""Boxes and masks that cannot be meant so: refused where they would do harm, noted where they are few."""
import contextlib
import io
import json

import numpy as np
import pytest
from coco_cases import NAMES, SCORE, TRAIN, check, file, refused, scored  # noqa: F401 (a fixture)
from coco_files import SIZE, change, coco_dict, write_images

from replk_mm.data.coco_checks import Use

# ruff: noqa: F811 (fixtures that come from another file)


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
