"""Results of tests that were never run: label maps and detections made up, figures counted one pixel at a time."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from replk_mm.bench.compare import results

CLASSES = ('sky', 'road', 'car', 'cat')
IGNORED = 255


@pytest.fixture(autouse=True)
def known_configs(monkeypatch):
    """Results may name configs of the tests, as if these were in configs/."""
    monkeypatch.setattr(results, '_is_trusted', lambda path: True)


def config_text(kind: str, root: Path, classes: tuple[str, ...], **more) -> str:
    dataset = dict(
        type=kind,
        data_root=str(root),
        metainfo=dict(classes=classes, palette=[[40 * i + 20, 200 - 30 * i, 60] for i in range(len(classes))]),
        **more,
    )
    return f"""
default_scope = 'mmseg'
model = dict(type='EncoderDecoder', decode_head=dict(type='FCNHead', num_classes={len(classes)}))
test_dataloader = dict(dataset=dict(**{dataset!r}, pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]))
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
"""


def write_data(root: Path, labels: dict[str, np.ndarray], reduce_zero: bool = True) -> Path:
    """Class indices, 255 not labelled, as files of a data set with unlike images, and its config."""
    rng = np.random.default_rng(5)
    for name, label in labels.items():
        for folder in ('images', 'labels'):
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*label.shape, 3), dtype=np.uint8)).save(root / 'images' / f'{name}.png')
        ids = np.where(label == IGNORED, 0, label + 1) if reduce_zero else label
        Image.fromarray(ids.astype(np.uint8)).save(root / 'labels' / f'{name}.png')
    config = root / 'config.py'
    config.write_text(
        config_text(
            'BaseSegDataset',
            root,
            CLASSES,
            reduce_zero_label=reduce_zero,
            img_suffix='.png',
            data_prefix=dict(img_path='images', seg_map_path='labels'),
        )
    )
    return config


def tally(labels: list[np.ndarray], predictions: list[np.ndarray], classes: int) -> np.ndarray:
    """Confusion matrix (label, prediction), counted one pixel at a time."""
    found = np.zeros((classes, classes), int)
    for label, prediction in zip(labels, predictions, strict=True):
        for true, said in zip(label.ravel(), prediction.ravel(), strict=True):
            if true != IGNORED:
                found[true, said] += 1
    return found


def mean_iou(confusion: np.ndarray) -> float:
    """In percent, over classes in labels or predictions."""
    ious = []
    for c in range(len(confusion)):
        union = sum(confusion[c]) + sum(confusion[:, c]) - confusion[c, c]
        if union:
            ious.append(100 * confusion[c, c] / union)
    return sum(ious) / len(ious)


def write_result(
    folder: Path,
    config: Path,
    root: Path,
    labels: dict[str, np.ndarray],
    predictions: dict[str, np.ndarray],
    reduce_zero: bool = True,
    classes: tuple[str, ...] = CLASSES,
    iteration: int = 40,
) -> Path:
    """What tools/test.py --out writes."""
    for name, prediction in predictions.items():
        path = folder / 'predictions' / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((prediction + reduce_zero).astype(np.uint8)).save(path)
    confusion = tally(list(labels.values()), list(predictions.values()), len(classes))
    per_class = {}
    for c, name in enumerate(classes):
        if confusion[c].sum():
            union = confusion[c].sum() + confusion[:, c].sum() - confusion[c, c]
            per_class[name] = dict(
                IoU=100 * confusion[c, c] / union,
                Acc=100 * confusion[c, c] / confusion[c].sum(),
                pixels=int(confusion[c].sum()),
            )
    metrics = dict(aAcc=100 * np.trace(confusion) / confusion.sum(), mIoU=mean_iou(confusion), time=0.1)
    return write_metrics_file(folder, config, root, metrics, per_class, len(labels), iteration)


def write_metrics_file(
    folder: Path, config: Path, root: Path, metrics: dict, per_class: dict, images: int, iteration: int = 40
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.json').write_text(
        json.dumps(
            dict(
                metrics=metrics,
                per_class=per_class,
                config=str(config),
                reparameterized=None,
                seconds=1.5,
                checkpoint=dict(path=f'iter_{iteration}.pth', sha256=f'{iteration}', iteration=iteration, loaded='all'),
                protocol=dict(
                    mode='whole',
                    tta=False,
                    pipeline=[dict(type='LoadImageFromFile'), dict(type='Resize', scale=[64, 64])],
                ),
                data=dict(root=str(root), images=images),
                environment=dict(torch='2.13', threads=2),
            )
        )
    )
    return folder


def change_record(folder: Path, **changes) -> None:
    """Set keys of a metrics.json; ``a__b`` is ``b`` in ``a``."""
    path = folder / 'metrics.json'
    record = json.loads(path.read_text())
    for key, value in changes.items():
        node, *rest = record, *key.split('__')
        for part in rest[:-1]:
            node = node[int(part) if isinstance(node, list) else part]
        node[rest[-1]] = value
    path.write_text(json.dumps(record))


def made_up(seed: int, images: int = 6) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Labels of three classes with pixels not labelled, and two predictions, of which A's has a fourth class."""
    rng = np.random.default_rng(seed)
    labels, a, b = {}, {}, {}
    for i in range(images):
        shape = (7 + i, 9)
        label = rng.integers(0, 3, shape)
        labels[f'{i:02}'] = np.where(rng.random(shape) < 0.1, IGNORED, label)
        for found, wrong, classes in ((a, 0.5, 4), (b, 0.1 * i, 3)):
            found[f'{i:02}'] = np.where(rng.random(shape) < wrong, rng.integers(0, classes, shape), label)
    return labels, a, b
