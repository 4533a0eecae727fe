"""The figures in metrics.json against a confusion matrix of the exported label maps and the label files."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from tiny import tiny, trained  # noqa: F401

from replk_mm.data.scenes.spec import DEMO_CLASSES
from replk_mm.engine.evaluate import evaluate
from replk_mm.engine.record import evaluation_record, write_record

# ruff: noqa: F811 (fixtures that come from another file)
CLASSES = len(DEMO_CLASSES)
LOAD, PACK = dict(type='LoadImageFromFile'), dict(type='PackSegInputs')
RESIZED = [LOAD, dict(type='Resize', scale=(150, 100), keep_ratio=True), dict(type='LoadAnnotations'), PACK]
WAYS = {
    'whole': {},
    'whole, resized': {'test_dataloader.dataset.pipeline': RESIZED},
    'sliding, resized': {
        'test_dataloader.dataset.pipeline': RESIZED,
        'model.test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(40, 40)),
    },
    'test-time augmentation': {},
    'labels from zero': {'test_dataloader.dataset.reduce_zero_label': False},
}


def label_maps(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob('*.png'))}


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_figures_are_those_of_the_exported_maps(way, tiny, trained, tmp_path):
    data = tmp_path / 'data'
    shutil.copytree(tiny.data, data)
    labels_of = data / 'annotations' / 'validation'
    if way == 'labels from zero':
        for path in labels_of.glob('*.png'):
            Image.fromarray(np.asarray(Image.open(path)) - np.uint8(1)).save(path)  # 0, not labelled, becomes 255
    cfg, tta = tiny.cfg(WAYS[way]), way == 'test-time augmentation'
    result = evaluate(
        cfg,
        str(trained),
        tiny.options(tmp_path / 'work', data_root=str(data)),
        tta=tta,
        predictions=tmp_path / 'predictions',
    )
    write_record(evaluation_record(cfg, str(trained), result, tta), tmp_path / 'metrics.json')
    record = json.loads((tmp_path / 'metrics.json').read_text())

    labels, found = label_maps(labels_of), label_maps(tmp_path / 'predictions')
    assert labels.keys() == found.keys() and len(labels) == 2
    confusion = np.zeros((CLASSES, CLASSES), int)
    for name, label in labels.items():
        # ADE20K's files count classes from 1, and so do the exported ones; others count from 0, and 255 is not
        # labelled.
        first = 0 if way == 'labels from zero' else 1
        counts = (label != 255) if first == 0 else (label != 0)
        assert found[name].shape == label.shape and found[name].min() >= first and found[name].max() < CLASSES + first
        np.add.at(confusion, (label[counts] - first, found[name][counts] - first), 1)
    assert 0 < counts.mean() < 1 or counts.all()
    right, labelled = np.diag(confusion), confusion.sum(1)
    union = labelled + confusion.sum(0) - right
    some = union > 0
    iou = 100 * right[some] / union[some]
    metrics = record['metrics']
    assert metrics['mIoU'] == pytest.approx(iou.mean(), abs=1e-6) and iou.mean() > 5
    assert metrics['aAcc'] == pytest.approx(100 * right.sum() / confusion.sum(), abs=1e-6)
    assert metrics['mAcc'] == pytest.approx(100 * np.mean(right[labelled > 0] / labelled[labelled > 0]), abs=1e-6)
    assert metrics['mIoU_present'] == pytest.approx(
        100 * np.mean((right / np.maximum(union, 1))[labelled > 0]), abs=1e-6
    )
    assert record['per_class'].keys() == {DEMO_CLASSES[c] for c in np.flatnonzero(labelled)}
    for c in np.flatnonzero(labelled):
        assert record['per_class'][DEMO_CLASSES[c]]['IoU'] == pytest.approx(100 * right[c] / union[c], abs=1e-6)
        assert record['per_class'][DEMO_CLASSES[c]]['pixels'] == labelled[c]
