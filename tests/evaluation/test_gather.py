"""Metrics of several processes equal those of one."""

import json

import pytest
from rank_cases import in_new_python
from tiny_detector import write_coco

PROCESSES = (1, 2, 3, 7)  # of 5 images
SCRIPT = """
import replk_mm.mmcv_ops  # before mmdet
import json, pathlib, sys
import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.logging import MMLogger
from pycocotools.coco import COCO
from replk_mm.evaluation.coco_metric import CocoMetric
from replk_mm.evaluation.iou_metric import IoUMetric
from replk_mm.errors import UserError
from rank_cases import together

folder = pathlib.Path(sys.argv[1])
file = folder / 'data' / 'annotations' / 'instances_val2017.json'
MMLogger.get_instance('quiet', log_level='CRITICAL')
CLASSES = ('car', 'person', 'dog')


def evaluated(metric, process, skip=(), **sampler):
    metric.dataset_meta = dict(classes=CLASSES)
    for i in DefaultSampler(range(5), **sampler):
        if i not in skip:
            process(metric, i)
    return [metric.evaluate(5), metric.per_class]


def segment(metric, i):
    rng = np.random.default_rng(i)
    label = rng.choice([0, 1, 2, 255], size=(13, 17))
    guess = np.where(rng.random(label.shape) < .5, label % 255, rng.integers(0, 3, label.shape))
    metric.process({}, [dict(img_path=f'images/{i}.png', gt_sem_seg=dict(data=torch.tensor(label)[None]),
                             pred_sem_seg=dict(data=torch.tensor(guess)[None]))])


truth = COCO(str(file))


def detect(metric, i):
    rng = np.random.default_rng(i)
    image = truth.dataset['images'][i]
    boxes, labels = [], []
    for a in truth.imgToAnns[image['id']] if i != 3 else ():
        left, top, width, height = a['bbox'] + rng.normal(0, 3, 4)
        boxes += [[left, top, left + width, top + height]] * 2
        labels += [CLASSES.index(truth.cats[a['category_id']]['name']), int(rng.integers(3))]
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    masks = np.zeros((len(boxes), 96, 96), bool)
    for mask, (left, top, right, bottom) in zip(masks, np.clip(boxes, 0, 96).astype(int)):
        mask[top:bottom, left:right] = True
    metric.process({}, [dict(img_id=image['id'], ori_shape=(96, 96), pred_instances=dict(
        bboxes=torch.tensor(boxes), scores=torch.tensor(np.round(rng.random(len(boxes)), 1).astype(np.float32)),  # ties
        labels=torch.tensor(labels, dtype=torch.long), masks=torch.tensor(masks)))])


def iou(rank):
    metric = IoUMetric(iou_metrics=['mIoU', 'mFscore'], prefix='seg', output_dir=str(folder / 'out'))
    first = evaluated(metric, segment, shuffle=False)
    return [first, evaluated(metric, segment, shuffle=True, seed=4)]  # as two validations of one training


def ap(rank):
    return [evaluated(CocoMetric(ann_file=str(file), metric=['bbox', 'segm']), detect, shuffle=False)]


def incomplete(rank):
    messages = []
    for given in (dict(skip=(4,)), dict(round_up=False)):
        try:
            evaluated(IoUMetric(), segment, shuffle=False, **given)
        except UserError as error:
            messages.append(str(error))
    return messages


print(json.dumps(dict(iou={p: together(p, iou, folder / f'iou{p}') for p in PROCESSES},
                      ap={p: together(p, ap, folder / f'ap{p}') for p in PROCESSES},
                      incomplete=together(2, incomplete, folder / 'incomplete'))))
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp('gather')
    write_coco(folder / 'data', val=5)
    found = in_new_python(f'PROCESSES = {PROCESSES}\n{SCRIPT}', folder)
    assert len(list((folder / 'out').iterdir())) == 5, 'predictions are not written'
    return found


@pytest.mark.parametrize('processes', PROCESSES)
@pytest.mark.parametrize(('kind', 'metric', 'scale'), [('iou', 'seg/mIoU', 100), ('ap', 'coco/bbox_mAP', 1)])
def test_figures_are_those_of_one_process_to_the_last_bit(found, kind, metric, scale, processes):
    one, ranks = found[kind]['1'][0][0], found[kind][str(processes)]
    assert 0.1 < one[0][metric] / scale < 0.9 and set(one[1]) == {'car', 'person', 'dog'}
    for rank, validations in enumerate(ranks):
        for metrics, per_class in validations:
            assert json.dumps(metrics) == json.dumps(one[0])  # where NaN is NaN
            assert rank or json.dumps(per_class) == json.dumps(one[1])


def test_images_that_no_process_took_are_an_error_in_all(found):
    messages = found['incomplete']
    assert messages[0] == messages[1] and len(messages[0]) == 2
    assert all('4 of 5 images were evaluated by 2 processes' in message for message in messages[0])
    assert "sampler=dict(type='DefaultSampler')" in messages[0][0]
