"""COCO's metric on detections of known IoU: every score in closed form."""

import json

import numpy as np
import pytest
import torch

from replk_mm.evaluation import coco_metric
from replk_mm.evaluation.coco_metric import CocoMetric

SIDE = 200
#: Category, IoU of its detections with its objects, side of its objects: large, medium and small by COCO's areas.
KNOWN = {'cup': (0.77, 100), 'fork': (0.72, 50), 'pea': (0.52, 20)}
#: IoU thresholds of COCO, of which AP is the mean; the AP of one detection of one object is 1 up to its IoU.
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]
AP = {name: float(np.mean([iou > t for t in THRESHOLDS])) for name, (iou, _) in KNOWN.items()}
ORDER = ('pea', 'unheard-of', 'fork', 'cup', 'extra')


def item(name: str, x: float, y: float, width: float, height: float) -> dict:
    return dict(name=name, bbox=[x, y, width, height])


def evaluate(tmp_path, images: list[tuple[list[dict], list[dict]]], classwise: bool = False, tested: int | None = None):
    """Score detections; masks are exact, so that their AP is 1. Returns the metric and its scores.

    Args:
        images: Objects and detections of each image.
        tested: Number of images that are tested; all by default.
    """
    ids = {name: 9 - 2 * i for i, name in enumerate(('cup', 'fork', 'pea', 'extra'))}
    data: dict = dict(images=[], annotations=[], categories=[dict(id=i, name=name) for name, i in ids.items()])
    for number, (objects, _) in enumerate(images):
        data['images'].append(dict(id=number, file_name=f'{number}.jpg', width=SIDE, height=SIDE))
        for one in objects:
            x, y, w, h = one['bbox']
            outline = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            common = dict(image_id=number, category_id=ids[one['name']], id=len(data['annotations']) + 1, area=w * h)
            more = dict(bbox=one['bbox'], iscrowd=one.get('iscrowd', 0), segmentation=outline)
            data['annotations'].append(common | more)
    path = tmp_path / 'truth.json'
    path.write_text(json.dumps(data))
    metric = CocoMetric(ann_file=str(path), metric=['bbox', 'segm'], classwise=classwise)
    metric.dataset_meta = dict(classes=ORDER)
    for number, (objects, found) in enumerate(images[:tested]):
        masks = np.zeros((len(found), SIDE, SIDE), bool)
        for mask, one in zip(masks, objects, strict=False):
            x, y, w, h = map(int, one['bbox'])
            mask[y : y + h, x : x + w] = True
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one['bbox'] for one in found)]
        predicted = dict(
            bboxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
            scores=torch.tensor([one.get('score', 0.9) for one in found]),
            labels=torch.tensor([ORDER.index(one['name']) for one in found], dtype=torch.long),
            masks=torch.from_numpy(masks),
        )
        metric.process({}, [dict(img_id=number, ori_shape=(SIDE, SIDE), pred_instances=predicted)])
    return metric, metric.evaluate(len(images[:tested]))


def test_ap_of_detections_of_known_iou(tmp_path, monkeypatch):
    """Three sizes, so that each AP by size is that of one category; classes without a category or objects are left."""
    lines: list[str] = []
    monkeypatch.setattr(coco_metric, 'print_log', lambda text, logger: lines.append(text))
    images = [
        ([item(name, 20, 30, side, side)], [item(name, 20, 30, iou * side, side)])
        for name, (iou, side) in KNOWN.items()
    ]
    images[0][1].append(item('unheard-of', 20, 30, 100, 100))
    metric, scores = evaluate(tmp_path, images, classwise=True)
    mean = sum(AP.values()) / 3
    found = {name.removeprefix('coco/bbox_'): value for name, value in scores.items() if 'bbox' in name}
    expected = dict(mAP=mean, mAP_50=1, mAP_75=1 / 3, mAP_s=AP['pea'], mAP_m=AP['fork'], mAP_l=AP['cup'])
    assert found == pytest.approx(expected)
    assert all(scores[f'coco/segm_{name}'] == pytest.approx(1) for name in expected)
    assert set(metric.per_class) == set(KNOWN)
    kept = {name: float(matches.score()[0]) for name, matches in metric.statistics.items()}
    assert kept == pytest.approx({'coco/bbox_mAP': 100 * mean, 'coco/segm_mAP': 100})
    assert metric.statistics['coco/bbox_mAP'].per_class(np.eye(3))[0] == pytest.approx(
        [100 * AP['cup'] if name == 'cup' else np.nan for name in metric.statistics['coco/bbox_mAP'].classes],
        nan_ok=True,
    )
    for name, (iou, _) in KNOWN.items():
        of_class = metric.per_class[name]
        boxes = [of_class[f'bbox_{score}'] for score in ('mAP', 'mAP_50', 'mAP_75')]
        assert boxes == pytest.approx([AP[name], 1, float(iou > 0.75)]) and of_class['instances'] == 1
        assert scores[f'coco/{name}_precision'] == of_class['segm_mAP'] == pytest.approx(1)
    assert f'= {100 * mean:.1f}' in lines[0] and '= 100.0' in lines[1]


def test_detections_in_crowds_count_neither_way(tmp_path):
    """Without the crowd, the surest detection would be false, and AP the precision 1/2."""
    crowd, thing = item('cup', 100, 100, 90, 90) | dict(iscrowd=1), item('cup', 10, 10, 60, 60)
    found = [thing | dict(score=0.5), item('cup', 110, 110, 30, 30) | dict(score=0.9)]
    for objects, ap, sizes in (([thing, crowd], 1, (1, 1)), ([thing], 0.5, (0.5, 1))):
        metric, scores = evaluate(tmp_path, [(objects, found)])
        assert scores['coco/bbox_mAP'] == pytest.approx(ap)
        assert [metric.per_class['cup'][key] for key in ('bbox_mAP', 'instances')] == pytest.approx(sizes)


def test_all_objects_of_an_image_count_and_sizes_without_objects_are_nan(tmp_path):
    """Of two objects found exactly, AP is 1; with one detection an image it would be about 1/2."""
    objects = [item('cup', 10, 10, 40, 50), item('cup', 110, 110, 40, 50)]
    metric, scores = evaluate(tmp_path, [(objects, objects)])
    assert scores['coco/bbox_mAP'] == scores['coco/bbox_mAP_m'] == metric.per_class['cup']['bbox_mAP'] == 1
    assert metric.per_class['cup']['instances'] == 2
    assert np.isnan([scores['coco/bbox_mAP_s'], scores['coco/bbox_mAP_l']]).all()


def test_images_of_the_file_that_are_not_tested_are_not_missed(tmp_path):
    """As of a hold-out: the annotations of all training images, and predictions on some."""
    objects = [item('cup', 10, 10, 40, 50)]
    metric, scores = evaluate(tmp_path, [(objects, objects), (objects, [])], tested=1)
    found = [scores['coco/bbox_mAP'], scores['coco/segm_mAP'], metric.per_class['cup']['instances']]
    assert found == pytest.approx([1, 1, 1])


def test_images_that_were_not_tested_do_not_count(tmp_path):
    """A test may take a part of the images of the annotation file."""
    cup = item('cup', 0, 0, 100, 100)
    metric, _ = evaluate(tmp_path, [([cup], [cup]), ([cup], [])])
    found = dict(bboxes=torch.tensor([[0.0, 0, 100, 100]]), scores=torch.tensor([0.9]), labels=torch.tensor([3]))
    found['masks'] = torch.ones(1, SIDE, SIDE, dtype=torch.bool)
    metric.process({}, [dict(img_id=0, ori_shape=(SIDE, SIDE), pred_instances=found)])
    assert metric.evaluate(1)['coco/bbox_mAP'] == pytest.approx(1)
