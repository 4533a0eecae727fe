"""Detectors go through the same commands as segmentors: trained, tested, merged, tested again, looked at."""

import contextlib
import copy
import gzip
import io
import json
import shutil
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tiny import run_tool
from tiny_detector import CLASSES, detector, trained_detector, write_coco  # noqa: F401

from replk_mm.data.datasets import crop_of
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.inference import reparameterize_checkpoint
from replk_mm.engine.predict import instances_to_json, load_for_prediction, predict, select_instances
from replk_mm.errors import UserError
from replk_mm.evaluation.coco_metric import CocoMetric

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]


def direct_ap(annotations, results, kind: str) -> list[float]:
    """pycocotools on the files, nothing of ours in between."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        found = json.loads(results.read_text())
        evaluation = COCOeval(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(v) for v in evaluation.stats[:6]]


@pytest.fixture(scope='module')
def tested(detector, trained_detector, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp('tested')
    found = evaluate(
        detector.cfg(), str(trained_detector), detector.options(out / 'work'), predictions=out / 'predictions'
    )
    return found, out / 'predictions'


METAINFO = CocoDataset.METAINFO
NAMES = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l']


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_ap_is_that_of_the_exported_file(detector, tested, kind):  # noqa: F811
    found, folder = tested
    truth = detector.data / 'annotations' / 'instances_val2017.json'
    direct = direct_ap(truth, folder / f'instances.{kind}.json', kind)
    check(direct, [found.metrics[f'coco/{kind}_{name}'] for name in NAMES])


def check(direct: list[float], ours: list[float]) -> None:
    for a, b in zip(ours, direct, strict=True):
        assert (np.isnan(a) and b == -1) or a == pytest.approx(b, abs=1e-6)


@pytest.mark.parametrize('classes', [CLASSES, ('person', 'bicycle', 'car'), ('dog', 'unheard-of', 'person')])
def test_ap_of_detections_that_are_nearly_right(tmp_path, classes):
    root = write_coco(tmp_path / 'data', val=12, classes=classes)
    annotations = root / 'annotations' / 'instances_val2017.json'
    truth = COCO(str(annotations))
    names = METAINFO['classes']
    metric = METRICS.build(
        dict(
            type='replk_mm.CocoMetric',
            ann_file=str(annotations),
            metric=['bbox', 'segm'],
            outfile_prefix=str(tmp_path / 'out' / 'instances'),
        )
    )
    metric.dataset_meta = METAINFO
    rng = np.random.default_rng(0)
    for image in truth.dataset['images']:
        boxes, labels = [], []
        for a in truth.imgToAnns[image['id']]:
            name = truth.cats[a['category_id']]['name']
            left, top, width, height = a['bbox'] + rng.normal(0, 3, 4)
            boxes += [[left, top, left + width, top + height]] * 2
            # every second one of a class drawn by lot, which the annotation file need not have
            labels += [names.index(name) if name in names else 7, int(rng.integers(80))]
        masks = np.zeros((len(boxes), 96, 96), bool)
        for mask, (left, top, right, bottom) in zip(masks, np.clip(boxes, 0, 96).astype(int), strict=True):
            mask[top:bottom, left:right] = True
        metric.process(
            {},
            [
                dict(
                    img_id=image['id'],
                    ori_shape=(96, 96),
                    pred_instances=dict(
                        bboxes=torch.tensor(boxes),
                        scores=torch.tensor(rng.random(len(boxes))),
                        labels=torch.tensor(labels),
                        masks=torch.tensor(masks),
                    ),
                )
            ],
        )
    found = metric.evaluate(12)
    for kind in ('bbox', 'segm'):
        direct = direct_ap(annotations, tmp_path / 'out' / f'instances.{kind}.json', kind)
        if 'unheard-of' not in classes:  # for pycocotools the third class is there and never found
            assert 0.1 < direct[0] < 0.9
            check(direct, [found[f'coco/{kind}_{name}'] for name in NAMES])
        mean = np.mean([figures[f'{kind}_mAP'] for figures in metric.per_class.values()])
        assert found[f'coco/{kind}_mAP'] == pytest.approx(mean, abs=1e-9)
        assert set(metric.per_class) == {c for c in classes if c in names}


@pytest.mark.parametrize('order', [('a', 'b'), ('b', 'a'), ('b', 'unheard-of', 'a')])
@pytest.mark.parametrize('settings', [{}, dict(classwise=True)])
def test_scores_belong_to_the_class_in_any_order(tmp_path, order, settings):
    root = write_coco(tmp_path / 'data', val=6, classes=('a', 'b'))
    annotations = root / 'annotations' / 'instances_val2017.json'
    truth = COCO(str(annotations))
    metric = METRICS.build(dict(type='replk_mm.CocoMetric', ann_file=str(annotations), metric='bbox', **settings))
    metric.dataset_meta = dict(classes=order)
    for image in truth.dataset['images']:  # every b is found exactly, no a
        boxes = [
            [a['bbox'][0], a['bbox'][1], a['bbox'][0] + a['bbox'][2], a['bbox'][1] + a['bbox'][3]]
            for a in truth.imgToAnns[image['id']]
            if truth.cats[a['category_id']]['name'] == 'b'
        ]
        metric.process(
            {},
            [
                dict(
                    img_id=image['id'],
                    ori_shape=(96, 96),
                    pred_instances=dict(
                        bboxes=torch.tensor(boxes).reshape(-1, 4).float(),
                        scores=torch.ones(len(boxes)),
                        labels=torch.full((len(boxes),), order.index('b')),
                    ),
                )
            ],
        )
    found = metric.evaluate(6)
    assert found['coco/bbox_mAP'] == pytest.approx(0.5)
    assert [metric.per_class[name]['bbox_mAP'] for name in 'ab'] == pytest.approx([0, 1])
    if settings:
        assert found['coco/b_precision'] == pytest.approx(1) and found['coco/a_precision'] == 0


def test_the_metric_rejects_what_it_does_not_compute():
    with pytest.raises(UserError, match="metric='proposal'.*\n.*type='CocoMetric'"):
        CocoMetric(metric='proposal')
    with pytest.raises(TypeError, match='iou_thrs'):
        CocoMetric(iou_thrs=[0.5, 0.75])


def test_log_shows_ap_in_percent(detector, trained_detector, tmp_path, monkeypatch):  # noqa: F811
    figures = {'bbox_mAP': 0.52234, 'segm_mAP_l': float('nan'), 'traffic light_precision': 0.0001629, 'other': 0.5}
    monkeypatch.setattr(CocoMetric, 'compute_metrics', lambda self, results: figures)
    evaluate(detector.cfg(), str(trained_detector), detector.options(tmp_path))
    text = next(tmp_path.rglob('*.log')).read_text()
    shown = 'coco/bbox_mAP: 52.23  coco/segm_mAP_l: nan  coco/traffic light_precision: 0.02  coco/other: 0.5000'
    assert shown in text


def test_classes_come_with_the_checkpoint(detector, tmp_path):  # noqa: F811
    trained = detector.train(tmp_path / 'train', 2, seed=0, classes='dog,car')
    # Nobody has to say them again: neither for merging nor for testing nor for predicting.
    reparameterize_checkpoint(detector.cfg(), str(trained), tmp_path / 'merged.pth')
    found = evaluate(detector.cfg(), str(tmp_path / 'merged.pth'), detector.options(tmp_path / 'test'))
    assert set(found.per_class) <= {'dog', 'car'} and any('dog, car' in note for note in found.notes)
    assert load_for_prediction(detector.cfg(), str(trained), 'cpu').dataset_meta['classes'] == ['dog', 'car']


def test_two_metrics_and_a_joined_data_set(detector, trained_detector, tmp_path):  # noqa: F811
    cfg = detector.cfg()
    cfg.test_evaluator = [ConfigDict(cfg.test_evaluator, metric=kind) for kind in ('bbox', 'segm')]
    cfg.test_dataloader.dataset = ConfigDict(type='RepeatDataset', times=1, dataset=cfg.test_dataloader.dataset)
    found = evaluate(cfg, str(trained_detector), detector.options(tmp_path), predictions=tmp_path / 'p')
    assert all({'bbox_mAP', 'segm_mAP'} <= set(figures) for figures in found.per_class.values()) and found.per_class
    assert {p.name for p in (tmp_path / 'p').iterdir()} == {
        'instances.bbox.json',
        'instances.segm.json',
        'instances_2.bbox.json',
        'instances_2.segm.json',
    }


def test_labels_follow_names_in_any_order_of_the_file(detector, tmp_path):  # noqa: F811
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope

    init_default_scope('mmdet')
    for i, order in enumerate((CLASSES, ('person', 'car', 'dog'), ('dog', 'bicycle'))):
        root = write_coco(tmp_path / str(i), classes=order)
        cfg = copy.deepcopy(detector.cfg().train_dataloader.dataset)
        data = DATASETS.build(dict(cfg, type='replk_mm.CocoDataset', data_root=str(root)))
        truth = json.loads((root / 'annotations' / 'instances_train2017.json').read_text())
        names = {c['id']: c['name'] for c in truth['categories']}
        assert len(data) == len(truth['images'])
        for sample in data:
            labels = sample['data_samples'].gt_instances.labels.tolist()
            path = sample['data_samples'].img_path
            image = next(im for im in truth['images'] if path.endswith(im['file_name']))
            expected = [names[a['category_id']] for a in truth['annotations'] if a['image_id'] == image['id']]
            assert [data.metainfo['classes'][label] for label in labels] == expected


def test_variants_of_annotation_tools_train_and_score_as_the_plain_file(detector, trained_detector, tested, tmp_path):  # noqa: F811
    shutil.copytree(detector.data, tmp_path / 'data')
    for path in (tmp_path / 'data' / 'annotations').iterdir():
        data = json.loads(path.read_text())
        for image in data['images']:
            image.update(file_name=f'C:\\images\\{image["file_name"]}', id=str(image['id']))
        for annotation in data['annotations']:
            annotation.update(id=annotation['id'] - 1, category_id=float(annotation['category_id']))
            annotation.pop('iscrowd')
        path.with_name(f'{path.name}.gz').write_bytes(gzip.compress(json.dumps(data).encode('utf-8-sig')))
        path.unlink()
    root = str(tmp_path / 'data')
    weights = [
        torch.load(detector.train(tmp_path / str(i), seed=0, **where), weights_only=True)['state_dict']
        for i, where in enumerate(({}, dict(data_root=root)))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    found = evaluate(detector.cfg(), str(trained_detector), detector.options(tmp_path / 'test', data_root=root))
    assert found.metrics == pytest.approx(tested[0].metrics, nan_ok=True) and found.per_class == tested[0].per_class
    assert any('gzip' in note and 'images' in note for note in found.notes)


def test_a_model_that_finds_nothing_has_no_ap_but_a_result(detector, trained_detector, tmp_path):  # noqa: F811
    cfg = detector.cfg({'model.test_cfg.rcnn.score_thr': 1.1})
    found = evaluate(cfg, str(trained_detector), detector.options(tmp_path), predictions=tmp_path / 'p')
    assert json.loads((tmp_path / 'p' / 'instances.bbox.json').read_text()) == []
    assert found.metrics['coco/bbox_mAP'] == found.metrics['coco/segm_mAP'] == 0


def test_merged_network_has_the_same_ap(detector, trained_detector, tested, tmp_path):  # noqa: F811
    changes, differences = reparameterize_checkpoint(detector.cfg(), str(trained_detector), tmp_path / 'merged.pth')
    assert changes.merged and all(d.ok and not d.not_compared for d in differences)
    found = evaluate(detector.cfg(), str(tmp_path / 'merged.pth'), detector.options(tmp_path / 'work'))
    for name in ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50'):
        assert found.metrics[name] == pytest.approx(tested[0].metrics[name], abs=1e-3)
    at_once = evaluate(detector.cfg(), str(trained_detector), detector.options(tmp_path / 'w'), reparam=True)
    assert at_once.metrics['coco/bbox_mAP'] == pytest.approx(tested[0].metrics['coco/bbox_mAP'], abs=1e-3)


def test_predicted_objects_are_those_of_the_test(detector, trained_detector, tested):  # noqa: F811
    model = load_for_prediction(detector.cfg(), str(trained_detector), 'cpu')
    exported = json.loads((tested[1] / 'instances.segm.json').read_text())
    image = sorted((detector.data / 'val2017').glob('*.png'))[0]
    [(path, picture, prediction)] = predict(model, [str(image)])
    objects = instances_to_json(select_instances(prediction, 0), model.dataset_meta['classes'])
    assert path == image and picture.shape == (96, 96, 3)
    scores = [thing['score'] for thing in objects]
    assert scores == sorted(scores, reverse=True)
    truth = json.loads((detector.data / 'annotations' / 'instances_val2017.json').read_text())
    names = {c['id']: c['name'] for c in truth['categories']}
    of_image = sorted((d for d in exported if d['image_id'] == truth['images'][0]['id']), key=lambda d: -d['score'])
    known = [thing for thing in objects if thing['class'] in CLASSES]  # others are not exported: the file lacks them
    assert len(known) == len(of_image) > 0
    boxes = json.loads((tested[1] / 'instances.bbox.json').read_text())
    box_of = [d['bbox'] for d in sorted(boxes, key=lambda d: -d['score']) if d['image_id'] == of_image[0]['image_id']]
    for thing, expected, expected_box in zip(known, of_image, box_of, strict=True):
        assert thing['class'] == names[expected['category_id']]
        assert thing['score'] == pytest.approx(expected['score'], abs=1e-5)
        left, top, right, bottom = thing['box']
        assert expected_box == pytest.approx([left, top, right - left, bottom - top], abs=1e-2)
        a, b = rle.decode(thing['segmentation']), rle.decode(expected['segmentation'])
        assert (a != b).mean() < 1e-3
    assert len(select_instances(prediction, scores[0])) == scores.count(scores[0])


def test_memory_layout_of_the_features_changes_no_detection(detector, trained_detector):  # noqa: F811
    model = load_for_prediction(detector.cfg(), str(trained_detector), 'cpu')
    image = str(sorted((detector.data / 'val2017').glob('*.png'))[0])
    found = []
    for model.backbone.channels_last in (True, False):
        [(_, _, prediction)] = predict(model, [image])
        found.append(select_instances(prediction, 0))
    assert len(found[0]) == len(found[1]) > 0
    for a, b in zip(*found, strict=True):
        assert a['label'] == b['label'] and a['score'] == pytest.approx(b['score'], abs=1e-5)
        assert a['box'] == pytest.approx(b['box'], abs=1e-3)


@pytest.mark.parametrize(
    'pipeline, expected',
    [
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], (800, 1333)),
        ([dict(type='RandomChoiceResize', scales=[(480, 1333), (800, 1333)])], (800, 1333)),
        (
            [
                dict(
                    type='RandomChoice',
                    transforms=[
                        [dict(type='RandomChoiceResize', scales=[(480, 1333), (640, 1333)])],
                        [
                            dict(type='RandomChoiceResize', scales=[(400, 4200)]),
                            dict(type='RandomCrop', crop_size=(384, 600), crop_type='absolute_range'),
                            dict(type='RandomChoiceResize', scales=[(480, 1333), (800, 1333)]),
                        ],
                    ],
                )
            ],
            (800, 1333),
        ),
        (
            [
                dict(type='RandomResize', scale=(1024, 1024), ratio_range=(0.1, 2.0)),
                dict(type='RandomCrop', crop_size=(640, 512)),
            ],
            (512, 640),
        ),
        ([dict(type='RandomResize', scale=(100, 200), ratio_range=(0.1, 2.0)), dict(type='RandomFlip')], (200, 400)),
        ([dict(type='RandomFlip')], None),
    ],
)
def test_image_size_is_that_of_the_last_transform(pipeline, expected):
    cfg = Config(dict(model=dict(), train_dataloader=dict(dataset=dict(type='CocoDataset', pipeline=pipeline))))
    assert crop_of(cfg) == expected


def test_predict_draws_and_describes_objects(detector, trained_detector, tmp_path):  # noqa: F811
    args = (detector.config, trained_detector, detector.data / 'val2017' / '000.png', '--out', tmp_path)
    done = run_tool('predict', *args, '--score', 0)
    assert done.returncode == 0, done.stderr
    objects = json.loads((tmp_path / '000_objects.json').read_text())
    first = Counter(thing['class'] for thing in objects).most_common(1)[0]
    assert f'000_overlay.png: objects: {first[1]} {first[0]}' in done.stdout and len(objects) > 1
    done = run_tool('predict', *args, '--score', 1)
    assert f'the highest score is {max(thing["score"] for thing in objects):.4g}' in done.stdout
    assert json.loads((tmp_path / '000_objects.json').read_text()) == []
    assert cv2.imread(str(tmp_path / '000_overlay.png')).shape == (96, 96, 3)
    assert isinstance(json.loads((tmp_path / '000_objects.json').read_text()), list)
