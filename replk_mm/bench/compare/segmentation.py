"""Two segmentation results image by image: labels and predictions as the test read them, pixels counted and scored."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image
from rich.console import Console
from rich.progress import track

from replk_mm.bench.compare.results import Result, Source, config_of
from replk_mm.data.checks.audit import check_data
from replk_mm.data.datasets import as_list, dataset_class, datasets_of
from replk_mm.data.files import IGNORE_INDEX
from replk_mm.errors import UserError

DEFINITION = (
    'mIoU of an image: the mean of IoU over the classes in its labels or in its prediction; accuracy: the '
    'share of its labelled pixels that are right; both in %, pixels without a label not counted'
)


@dataclass
class Labels:
    """The labelled images of a config's test data, read as a test reads them.

    Attributes:
        names: Of the images: their paths below the image folder without suffix, as predictions are named.
        entries: What the data set knows of each, and its loading step.
        classes: Names.
        palette: RGB of each class.
        ignore_index: The label that is not scored.
        first: Id of the first class in exported label maps.
    """

    names: list[str]
    entries: list[tuple[dict, Callable[[dict], dict]]]
    classes: list[str]
    palette: list[list[int]]
    ignore_index: int
    first: int

    def read(self, index: int) -> np.ndarray:
        """Class indices ``(H, W)`` of an image."""
        info, load = self.entries[index]
        return np.asarray(load({**info, 'seg_fields': []})['gt_seg_map'])

    def prediction(self, index: int, result: Result) -> np.ndarray:
        """Class indices ``(H, W)`` that a result predicts, beyond the classes where none is.

        Raises:
            UserError: If the file cannot be read.
        """
        path = result.predictions / f'{self.names[index]}.png'
        try:
            return np.asarray(Image.open(path)) - np.uint8(self.first)
        except Exception as error:  # decoders raise anything
            raise UserError(f'{path}: cannot be read ({error})\nTest again with --out {result.file.parent}.') from error


def open_labels(pair: tuple[Result, Result], source: Source, root: str | None) -> Labels:
    """The labels that two results were tested against, by the config of the first.

    Raises:
        UserError: If data or predictions are missing.
    """
    result = pair[0]
    cfg = config_of(result, source, root)
    check_data(cfg, ('test',))
    scope = cfg.get('default_scope', 'mmengine')
    datasets = []
    for part in datasets_of(cfg, ('test',)):
        if not hasattr(dataset_class(part, scope), 'get_label_map'):
            raise UserError(
                f'{cfg.filename}: {part["type"]} is not a data set of label maps, unlike that of '
                f'{result.file}\nName the config of the test with --config FILE.'
            )
        with DATASETS.switch_scope_and_registry(scope) as registry:
            datasets.append(registry.build({**part, 'pipeline': [_loading_step(cfg, part)], 'test_mode': True}))
    entries = [(built.get_data_info(i), built.pipeline) for built in datasets for i in range(len(built))]
    meta = datasets[0].metainfo
    metric: dict = next((m for m in as_list(cfg.get('test_evaluator')) if str(m.get('type')).endswith('IoUMetric')), {})
    labels = Labels(
        _exported_names([info['img_path'] for info, _ in entries], cfg),
        entries,
        list(meta['classes']),
        [list(c) for c in meta['palette']],
        metric.get('ignore_index', IGNORE_INDEX),
        int(meta['reduce_zero_label']),
    )
    for result in pair:
        folder = result.predictions
        there = {str(path.relative_to(folder).with_suffix('')) for path in folder.rglob('*.png')}
        missing, strange = sorted(set(labels.names) - there), sorted(there - set(labels.names))
        if missing or strange:
            example = f'{missing[0]}.png is missing' if missing else f'{strange[0]}.png is of no image'
            raise UserError(
                f'{folder}: not predictions of the {len(labels.names)} images: {len(missing)} '
                f'missing, {len(strange)} of other images ({example})\nName the data of the test with '
                f'--data-root DIR, or test again with --out {result.file.parent}. --no-images compares the '
                f'figures alone.'
            )
    return labels


def _exported_names(images: list[str], cfg: Config) -> list[str]:
    # As `export_predictions` and `IoUMetric` name them; an image may be a link to somewhere else.
    roots = [
        Path(part.get('data_root') or '', (part.get('data_prefix') or {}).get('img_path') or '').resolve()
        for part in datasets_of(cfg, ('test',))
    ]
    root = Path(os.path.commonpath(roots))
    folders = [Path(image).resolve().parent for image in images]
    return [
        str(Path(folder.relative_to(root) if folder.is_relative_to(root) else '', Path(image).stem))
        for image, folder in zip(images, folders, strict=True)
    ]


def _loading_step(cfg: Config, dataset: dict) -> dict:
    def steps(node) -> Iterator[dict]:
        for part in node if isinstance(node, (list, tuple)) else [node]:
            if isinstance(part, dict):
                yield part
                yield from steps(part.get('transforms', []))
            else:
                yield from steps(part)

    pipelines = steps([dataset.get('pipeline', []), cfg.get('tta_pipeline', [])])
    return next(
        (step for step in pipelines if str(step.get('type')).endswith('LoadAnnotations')), dict(type='LoadAnnotations')
    )


@dataclass
class Counts:
    """Pixels of every image and class, ``(images, classes)`` uint32; the first axis of two is A and B."""

    intersect: np.ndarray
    predicted: np.ndarray
    labelled: np.ndarray

    @property
    def union(self) -> np.ndarray:
        """``(2, images, classes)``."""
        return self.predicted + self.labelled - self.intersect


def count(labels: Labels, results: tuple[Result, Result]) -> Counts:
    """Count the pixels of all images, one image at a time.

    Raises:
        UserError: If a prediction is not of its image's size.
    """
    images, classes = len(labels.names), len(labels.classes)
    found = Counts(
        np.zeros((2, images, classes), np.uint32),
        np.zeros((2, images, classes), np.uint32),
        np.zeros((images, classes), np.uint32),
    )

    def amounts(ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids, minlength=classes)[:classes]

    for i in track(range(images), 'images', console=Console(stderr=True), disable=not sys.stderr.isatty()):
        label = labels.read(i)
        counted = label != labels.ignore_index
        found.labelled[i] = amounts(label[counted])
        for j, result in enumerate(results):
            prediction = labels.prediction(i, result)
            if prediction.shape != label.shape:
                raise UserError(
                    f'{result.predictions / labels.names[i]}.png: {prediction.shape} pixels, the labels '
                    f'{label.shape} ({labels.entries[i][0]["seg_map_path"]})\nName the data of the test '
                    f'with --data-root DIR, or test again.'
                )
            prediction, true = prediction[counted], label[counted]
            found.predicted[j, i] = amounts(prediction)
            found.intersect[j, i] = amounts(prediction[prediction == true])
    return found


def check_reproduced(result: Result, labels: Labels, counts: Counts, which: int) -> None:
    """Compare the counts of all images with the result's own figures: same labels, same predictions.

    Raises:
        UserError: If a class has another number of labelled pixels, or another IoU.
    """
    labelled, intersect, union = (
        part.sum(0, dtype=np.int64) for part in (counts.labelled, counts.intersect[which], counts.union[which])
    )
    present = {name: int(labelled[c]) for c, name in enumerate(labels.classes) if labelled[c]}
    stated = result.sizes()
    for name in {**stated, **present}:
        if stated.get(name, 0) != present.get(name, 0):
            raise UserError(
                f'{result.file}: the labels are not those of the test: {present.get(name, 0)} pixels of '
                f'{name} now, {stated.get(name, 0)} then\nName data and classes of the test with '
                f'--data-root, --config, --classes and --cfg-options.'
            )
    for name in stated:  # classes of the labels, which are those of the test
        c, iou = labels.classes.index(name), result.record.per_class[name].get('IoU')
        if iou is None or abs(100 * intersect[c] / union[c] - iou) > 1e-6:
            raise UserError(
                f'{result.predictions}: not the predictions of {result.file}: IoU of {name} is '
                f'{100 * intersect[c] / union[c]:.4f} by them, and {iou} there\nTest again with --out '
                f'{result.file.parent}.'
            )


def scores(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """mIoU and accuracy of every image in percent, ``(2, images)`` each; NaN without labelled pixels."""
    union, pixels = counts.union, counts.labelled.sum(1)
    iou = np.divide(counts.intersect, union, out=np.zeros(union.shape), where=union > 0)
    labelled, present = np.where(pixels > 0, pixels, np.nan), np.where(pixels > 0, (union > 0).sum(2), np.nan)
    return 100 * iou.sum(2) / present, 100 * counts.intersect.sum(2) / labelled


def miou_difference(counts: Counts) -> Callable[[np.ndarray], np.ndarray]:
    """The difference of the data set's mIoU in percent, for ``paired_bootstrap``.

    The mean is over the classes in labels or predictions of the images drawn.
    """
    parts = [(counts.intersect[j].astype(float), counts.union[j].astype(float)) for j in (0, 1)]

    def miou(times: np.ndarray, intersect: np.ndarray, union: np.ndarray) -> np.ndarray:
        of = times @ union
        iou = np.divide(times @ intersect, of, out=np.zeros(of.shape), where=of > 0)
        occurring = (of > 0).sum(1)
        return 100 * iou.sum(1) / np.where(occurring > 0, occurring, np.nan)

    return lambda times: miou(times, *parts[1]) - miou(times, *parts[0])
