"""Segmentation metrics against figures counted pixel by pixel."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from replk_mm.engine.hooks import ProgressHook
from replk_mm.engine.nonfinite import StopAtNonFinite
from replk_mm.errors import UserError
from replk_mm.evaluation.gather import absent_classes, require_ground_truth
from replk_mm.evaluation.iou_metric import IoUMetric
from replk_mm.text import class_table

CLASSES = tuple('abcdef')


def by_hand(labels, predictions):
    """``{class: (intersection, union, labelled)}``, pixel by pixel in Python."""
    intersection, union, labelled, predicted = ([0] * len(CLASSES) for _ in range(4))
    for label, prediction in zip(labels, predictions, strict=True):
        for a, b in zip(label.ravel().tolist(), prediction.ravel().tolist(), strict=True):
            if a == 255:
                continue
            labelled[a] += 1
            predicted[b] += 1
            intersection[a] += a == b
    union = [p + q - i for p, q, i in zip(labelled, predicted, intersection, strict=True)]
    return intersection, union, labelled


def evaluate(labels, predictions, **options):
    metric = IoUMetric(iou_metrics=['mIoU'], **options)
    metric.dataset_meta = dict(classes=CLASSES)
    for label, prediction in zip(labels, predictions, strict=True):
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=torch.as_tensor(label)[None])
        sample.pred_sem_seg = PixelData(data=torch.as_tensor(prediction)[None])
        metric.process({}, [sample.to_dict()])
    return metric, metric.evaluate(len(labels))


@pytest.fixture(params=[0, 1, 2])
def maps(request):
    """Labels with ignored pixels and without class d; predictions that never name class e, and name d."""
    rng = np.random.default_rng(request.param)
    labels = [rng.choice([0, 1, 2, 4, 255], size=(13, 17 + i)) for i in range(3)]
    predictions = [
        np.where(
            rng.random(a.shape) < 0.5, np.where(np.isin(a, [4, 255]), 0, a), rng.choice([0, 1, 2, 3], size=a.shape)
        )
        for a in labels
    ]
    return labels, predictions


def test_figures_equal_a_count_by_hand(maps):
    metric, found = evaluate(*maps)
    intersection, union, labelled = by_hand(*maps)
    iou = {c: 100 * intersection[c] / union[c] for c in range(6) if union[c]}
    accuracy = {c: 100 * intersection[c] / labelled[c] for c in range(6) if labelled[c]}
    assert set(iou) == {0, 1, 2, 3, 4}, 'class f is nowhere, class d in predictions only'
    assert found['mIoU'] == pytest.approx(np.mean(list(iou.values())), abs=0.006)
    assert found['mAcc'] == pytest.approx(np.mean(list(accuracy.values())), abs=0.006)
    assert found['aAcc'] == pytest.approx(100 * sum(intersection) / sum(labelled), abs=0.006)
    assert found['mIoU_present'] == pytest.approx(np.mean([iou[c] for c in (0, 1, 2, 4)]), abs=0.006)
    assert found['mIoU_present'] > found['mIoU'] + 1
    assert set(metric.per_class) == {'a', 'b', 'c', 'e'}
    for c in (0, 1, 2, 4):
        figures = metric.per_class[CLASSES[c]]
        assert figures['IoU'] == pytest.approx(iou[c], rel=1e-5)
        assert figures['Acc'] == pytest.approx(accuracy[c], rel=1e-5)
        assert figures['pixels'] == labelled[c]
    assert metric.per_class['e']['IoU'] == 0


def test_counts_beyond_the_precision_of_float32_are_exact():
    """float32 has no 2^24 + 1; mmseg counts the pixels of each image in it."""
    metric = IoUMetric()
    metric.dataset_meta = dict(classes=('a', 'b'))
    images = [2**24, 1, 1, 1]
    found = metric.compute_metrics([((torch.tensor([float(n), 0.0]),) * 4, str(n)) for n in images])
    assert metric.per_class['a'] == dict(IoU=100, Acc=100, pixels=2**24 + 3)
    assert found['aAcc'] == 100


def test_ignored_pixels_do_not_count(maps):
    labels, predictions = maps
    changed = [np.where(a == 255, 5, b) for a, b in zip(labels, predictions, strict=True)]
    assert evaluate(labels, changed)[1] == evaluate(labels, predictions)[1]


def test_a_perfect_prediction_is_a_hundred_and_a_wrong_one_nothing():
    label = np.repeat([[0, 1, 2, 255]], 4, axis=0)
    assert evaluate([label], [np.where(label == 255, 0, label)])[1]['mIoU'] == 100
    assert evaluate([label], [np.where(label == 255, 0, (label + 1) % 3)])[1]['mIoU_present'] == 0


@pytest.mark.filterwarnings('ignore:Mean of empty slice:RuntimeWarning')
def test_nothing_labelled_is_no_figure():
    metric, found = evaluate([np.full((3, 3), 255)], [np.zeros((3, 3), int)])
    assert metric.per_class == {} and absent_classes([metric]) == []
    assert 'mIoU_present' not in found
    with pytest.raises(UserError, match='val_dataloader.dataset: the ground truth has nothing'):
        StopAtNonFinite().after_val_epoch(None, found)


@pytest.mark.parametrize(
    ('scores', 'is_scored'),
    [
        (dict(bbox_mAP=-1.0, bbox_mAP_50=-1.0), False),  # mmdet's
        (dict(bbox_mAP=float('nan'), time=1.0), False),
        (dict(mIoU=np.float32('nan')), False),  # mmseg's
        (dict(bbox_mAP=0.0, bbox_mAP_s=float('nan')), True),
        ({}, True),  # mmdet's, without detections
    ],
)
def test_scores_without_ground_truth(scores, is_scored):
    with contextlib.nullcontext() if is_scored else pytest.raises(UserError, match='test_dataloader.dataset'):
        require_ground_truth(scores, 'test')


def test_classes_without_ground_truth_stand_beside_the_scores(capsys):
    metric, found = evaluate([np.zeros((3, 3), int)], [np.zeros((3, 3), int)])
    assert found['mIoU'] == 100
    evaluator = SimpleNamespace(metrics=[metric])
    ProgressHook().after_val_epoch(SimpleNamespace(val_loop=SimpleNamespace(evaluator=evaluator), iter=3), found)
    assert '(5 classes have no ground truth: b, c, d, e, f)' in capsys.readouterr().out
    table = class_table(metric.per_class, absent_classes([metric])).splitlines()
    assert table[2].split()[:2] == ['a', '100.00'] and [line.split() for line in table[3:]] == [
        [name, '-', '-', 'no', 'pixels'] for name in 'bcdef'
    ]


def test_formatting_only_gives_no_figures(tmp_path):
    metric = IoUMetric(format_only=True, output_dir=str(tmp_path))
    metric.dataset_meta = dict(classes=CLASSES)
    assert metric.compute_metrics([]) == {}


def test_predictions_lie_in_the_folders_of_their_images(tmp_path):
    """Images of one name, as frames of several videos have, do not overwrite each other."""
    metric = IoUMetric(output_dir=str(tmp_path / 'out'), images_root=str(tmp_path / 'images'))
    metric.dataset_meta = dict(classes=['a', 'b'])
    for i, folder in enumerate(('x', 'y', '')):
        (tmp_path / 'images' / folder).mkdir(parents=True, exist_ok=True)
        labels = torch.full((1, 4, 4), i % 2)
        metric.process(
            {},
            [
                dict(
                    img_path=str(tmp_path / 'images' / folder / '1.jpg'),
                    pred_sem_seg=dict(data=labels),
                    gt_sem_seg=dict(data=labels),
                )
            ],
        )
    found = {
        str(p.relative_to(tmp_path / 'out')): int(np.asarray(Image.open(p)).max())
        for p in (tmp_path / 'out').rglob('*.png')
    }
    assert found == {'x/1.png': 0, 'y/1.png': 1, '1.png': 0}
    sample = dict(img_path='2.jpg', pred_sem_seg=dict(data=torch.ones_like(labels)), gt_sem_seg=dict(data=labels))
    metric.process({}, [sample | dict(reduce_zero_label=True)])
    assert np.unique(Image.open(tmp_path / 'out' / '2.png')).tolist() == [2], 'ids are those of the label files'


def test_counts_of_each_image_are_kept(maps):
    labels, predictions = maps
    metric, scores = evaluate(labels, predictions)
    counts = metric.statistics['mIoU']
    assert counts.score() == pytest.approx(scores['mIoU']) and counts.classes == CLASSES
    for i, pair in enumerate(zip(labels, predictions, strict=True)):
        intersection, union, labelled = by_hand(*([part] for part in pair))
        assert counts.intersection[i].tolist() == intersection and counts.label[i].tolist() == labelled
        assert (counts.label[i] + counts.predicted[i] - counts.intersection[i]).tolist() == union
    assert not evaluate(labels, predictions, nan_to_num=0)[0].statistics  # another mean
    assert list(evaluate(labels, predictions, prefix='x')[0].statistics) == ['x/mIoU']
