"""Metrics recomputed from predictions and labels; truth is counted one pixel at a time, or by pycocotools."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from coco_files import coco_dict
from compare_cases import mean_iou, tally
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report_records import CLASSES, facts, files_of, label_map, metric, scenes, write
from tiny_detector import detector  # noqa: F401 (fixture)

from replk_mm.bench.records import read_records
from replk_mm.bench.rescore import Rescored, rescore
from replk_mm.bench.suites import inputs, measurements
from replk_mm.commands import report as command
from replk_mm.data.datasets import datasets_of
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.record import write_statistics
from replk_mm.evaluation.per_image import SegmentationCounts
from replk_mm.files import sha256

# ruff: noqa: F811 (fixtures that come from another file)
COUNT, RUN, DATA = 4, 'runs/a/0/test', 'data/scenes'


def result(folder: Path, **changes) -> Path:
    """A work dir with four images, their predictions, and the record that a test writes of them."""
    root = scenes(folder / DATA, COUNT)
    files = files_of(folder, 'a', 3, COUNT)
    pairs = [(label_map(i) - 1, label_map(i, 3) - 1) for i in range(COUNT)]
    each = np.stack([tally([label], [prediction], 3) for label, prediction in pairs])
    whole = each.sum(0)
    counts = SegmentationCounts(
        images=tuple(f'{i:03}' for i in range(COUNT)),
        classes=tuple(CLASSES),
        intersection=np.diagonal(each, axis1=1, axis2=2),
        predicted=each.sum(1),
        label=each.sum(2),
    )
    counts.save(folder / RUN / 'statistics.npz')
    right, label = np.diag(whole), whole.sum(1)
    metrics = dict(mIoU=mean_iou(whole), mAcc=100 * (right / label).mean(), aAcc=100 * right.sum() / whole.sum())
    iou = 100 * right / (label + whole.sum(0) - right)
    per_class = {name: dict(IoU=iou[i], pixels=float(label[i])) for i, name in enumerate(CLASSES)}
    statistics = dict(mIoU=dict(file='statistics.npz', sha256=sha256(folder / RUN / 'statistics.npz')))
    values = dict(metrics=metrics, per_class=per_class, images=COUNT, primary='mIoU', unit='%')
    one = metric('a', 0, 0.0, files=files | dict(statistics=f'{RUN}/statistics.npz'))
    return write(folder, [{**one, 'values': values, 'facts': facts(root, **changes) | dict(statistics=statistics)}])


def check(folder: Path, *data_roots: Path) -> Rescored:
    [found] = rescore(read_records([folder])[0], data_roots)
    return found


def test_an_intact_result_is_reproduced(tmp_path) -> None:
    found = check(result(tmp_path))
    assert not found.differences and found.labels == COUNT
    truth = mean_iou(tally(*zip(*[(label_map(i) - 1, label_map(i, 3) - 1) for i in range(COUNT)], strict=True), 3))
    assert found.values['metrics']['mIoU'] == pytest.approx(truth, abs=1e-9) and f'mIoU {truth:.2f} reproduced' in str(
        found
    )


def edit_record(folder: Path, *place: str, value: object) -> None:
    path = folder / 'results/a.0.jsonl'
    node = content = json.loads(path.read_text())
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    path.write_text(json.dumps(content) + '\n')


def save(path: Path, labels: np.ndarray) -> None:
    Image.fromarray(labels).save(path)


PNG = f'{RUN}/predictions/002.png'
DAMAGE = {
    'prediction': (lambda d: save(d / PNG, label_map(2, 5)), ['metrics.mIoU: ', 'other predictions or labels: 002']),
    'missing': (lambda d: (d / PNG).unlink(), ['images: 3.0 recomputed', 'no prediction or labels of: 002']),
    'unreadable': (lambda d: (d / PNG).write_bytes(b'PNG'), ['prediction of 002.png: not a readable picture']),
    'size': (lambda d: save(d / PNG, label_map(2)[:9]), ['prediction of 002.png: (9, 96) pixels, the labels (72, 96)']),
    'more': (lambda d: save(d / f'{RUN}/predictions/x.png', label_map(2)), ['labels of x.png: not a readable picture']),
    'metric': (lambda d: edit_record(d, 'values', 'metrics', 'mIoU', value=99.0), ['metrics.mIoU: ', '99.0 recorded']),
    'no metric': (lambda d: edit_record(d, 'values', 'metrics', 'mAcc', value=None), ['mAcc: ', 'None recorded']),
    'class': (lambda d: edit_record(d, 'values', 'per_class', 'sky', 'IoU', value=99.0), ['per_class.sky.IoU: ']),
    'images': (lambda d: edit_record(d, 'values', 'images', value=5), ['images: 4.0 recomputed, 5.0 recorded']),
    'labels': (
        lambda d: save(d / DATA / 'annotations/validation/001.png', label_map(1, 1)),
        ['per_class.sky.pixels: ', 'other predictions or labels: 001'],
    ),
    'counts': (
        lambda d: (d / RUN / 'statistics.npz').write_bytes(b'x'),
        ['counts per image: ', 'is not the file that was recorded'],
    ),
    'class unknown': (
        lambda d: edit_record(d, 'values', 'per_class', 'cat', value=dict(IoU=9.0)),
        ['per_class.cat.IoU: None recomputed, 9.0 recorded'],
    ),
    'no data': (lambda d: (d / DATA).rename(d / 'elsewhere'), ['data root']),
    'no predictions': (lambda d: edit_record(d, 'files', value={}), ['the record names no predictions']),
    'classes': (lambda d: edit_record(d, 'facts', 'data', 'classes', value=['c'] * 300), ['300 classes']),
}


@pytest.mark.parametrize('what', DAMAGE)
def test_what_is_damaged_is_named(what, tmp_path) -> None:
    damage, expected = DAMAGE[what]
    folder = result(tmp_path)
    damage(folder)
    text = str(check(folder))
    assert ('DIFFERENT' in text or 'NOT CHECKED' in text) and all(part in text for part in expected), text


def test_a_part_of_the_images_is_said(tmp_path) -> None:
    """Somebody may submit the easy images of a split."""
    folder = result(tmp_path)
    save(folder / DATA / 'annotations/validation/900.png', label_map(0))
    assert '4 images (of 5 that have labels there)' in str(check(folder))


def test_a_selection_of_the_classes(tmp_path) -> None:
    """The files have three classes, of which two are used: water, then sky."""
    folder = result(tmp_path, classes=['water', 'sky'], label_map={0: 1, 1: 255, 2: 0})
    meaning = np.array([1, 255, 0])
    labels = [meaning[label_map(i) - 1] for i in range(COUNT)]
    predictions = [np.where(label_map(i, 3) == 3, 0, 1) for i in range(COUNT)]
    for i, prediction in enumerate(predictions):
        save(folder / f'{RUN}/predictions/{i:03}.png', (prediction + 1).astype(np.uint8))
    assert check(folder).values['metrics']['mIoU'] == pytest.approx(mean_iou(tally(labels, predictions, 2)), abs=1e-9)


def test_objects(tmp_path) -> None:
    """The truth is that of pycocotools; the record has detections with another score."""
    names = ['cat', 'dog']
    written = coco_dict(names)
    root, folder = tmp_path / DATA, tmp_path / RUN / 'predictions'
    root.mkdir(parents=True)
    folder.mkdir(parents=True)
    (root / 'ann.json').write_text(json.dumps(written))
    rng = np.random.default_rng(0)
    found = [
        dict(image_id=o['image_id'], category_id=o['category_id'], score=float(rng.random()))
        | dict(bbox=(np.array(o['bbox']) + rng.integers(-3, 4, 4)).tolist())
        for o in written['annotations']
    ]
    (folder / 'instances.bbox.json').write_text(json.dumps(found))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(root / 'ann.json'))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / 'instances.bbox.json')), 'bbox')
        for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
            step()
    ap = 100 * evaluation.stats[0]
    assert 5 < ap < 95
    metrics = {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': 100 * evaluation.stats[1], 'coco/bbox_mAP_l': None}
    precision = evaluation.eval['precision'][:, :, :, 0, -1]
    per_class = {n: dict(bbox_mAP=100 * precision[:, :, i].mean(), instances=6) for i, n in enumerate(names)}
    values = dict(metrics=metrics, per_class=per_class, images=4, primary='coco/bbox_mAP', unit='AP')
    data = facts(root, labels=None, annotations='ann.json', images='', classes=names)
    one = metric('a', 0, 0.0, files=dict(predictions=f'{RUN}/predictions'), facts=data)
    result = check(write(tmp_path, [{**one, 'values': values}]))
    assert not result.differences and result.values['metrics']['coco/bbox_mAP'] == pytest.approx(ap, abs=1e-9)
    found[0]['image_id'] = 77
    (folder / 'instances.bbox.json').write_text(json.dumps(found))
    assert 'does not have: 77' in str(check(tmp_path))
    (folder / 'instances.bbox.json').write_text(json.dumps(found[1:]))
    assert 'metrics.coco/bbox_mAP: ' in str(check(tmp_path)) and 'per_class.cat.bbox_mAP: ' in str(check(tmp_path))


@pytest.mark.slow
def test_a_real_test_of_a_detector(detector, tmp_path) -> None:
    """Boxes and masks, with classes that the annotations lack, and counts per image."""
    cfg, folder = detector.cfg(), tmp_path / RUN
    checkpoint = detector.train(tmp_path / 'train', 150, seed=2)
    predictions = dict(predictions=folder / 'predictions')
    found = evaluate(cfg, str(checkpoint), detector.options(tmp_path / 'work'), **predictions)
    values = dict(
        metrics=measurements._finite(found.metrics),
        per_class={name: measurements._finite(of) for name, of in found.per_class.items()},
        **dict(images=found.images, primary='coco/bbox_mAP', unit='AP'),
    )
    data = inputs.dataset_layout(next(datasets_of(cfg, ('test',))), 'mmdet')
    statistics = write_statistics(found, folder)
    files = dict(predictions=f'{RUN}/predictions', statistics=f'{RUN}/statistics.npz')
    one = metric('a', 0, 0.0, files=files, facts=dict(data=data, statistics=statistics))
    result = check(write(tmp_path, [{**one, 'values': values}]), Path(data['root']))
    assert not result.differences and {'coco/segm_mAP', 'coco/bbox_mAP_50'} <= result.values['metrics'].keys()
    assert values['metrics']['coco/bbox_mAP'] > 0


def test_command(tmp_path, monkeypatch, capsys) -> None:
    folder = result(tmp_path / 'w')

    def run(*args: object) -> int:
        monkeypatch.setattr('sys.argv', ['report.py', *map(str, args)])
        return command.main()

    assert run(folder, '--rescore') == 0 and 'a, seed 0: mIoU' in capsys.readouterr().out
    assert run(folder, '--pack', tmp_path / 'a.zip') == 0
    # the archive has no labels: the reader's are used
    assert run(tmp_path / 'a.zip', '--rescore') == 1 and 'data root' in capsys.readouterr().out
    own = (folder / DATA).rename(tmp_path / 'scenes')
    assert run(tmp_path / 'a.zip', '--rescore', '--data-root', own) == 0
    save(folder / PNG, label_map(2, 5))
    assert run(folder, '--pack', tmp_path / 'a.zip') == 0  # replaces its own file
    capsys.readouterr()
    assert run(tmp_path / 'a.zip', '--rescore', '--data-root', own) == 1
    assert 'other predictions or labels: 002' in capsys.readouterr().out
    for args in (['--costs', 'x.json', '--rescore'], ['--data-root', own, '--pack', tmp_path / 'b.zip'], []):
        with pytest.raises(SystemExit):
            run(folder, *args)
    assert run(folder, '--pack', tmp_path / 'b.tar') == 2 and 'ends with .zip' in capsys.readouterr().err
