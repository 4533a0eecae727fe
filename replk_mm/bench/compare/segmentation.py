"""Two segmentation results image by image: pixels counted, checked against the results' own figures, and scored."""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from replk_mm.bench.compare.labels import Labels
from replk_mm.bench.compare.results import Result
from replk_mm.errors import UserError

DEFINITION = ('mIoU of an image: the mean of IoU over the classes in its labels or in its prediction; accuracy: the share of '
              'its labelled pixels that are right; both in %, pixels without a label not counted')


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


def count(labels: Labels, results: tuple[Result, Result], progress: Callable[[int, int], None]) -> Counts:
    """Count the pixels of all images, one image at a time.

    Args:
        labels: Of the data.
        results: A and B.
        progress: Called with images done and images in all.

    Raises:
        UserError: If a file cannot be read, or a prediction is not of its image's size.
    """
    images, classes = len(labels.names), len(labels.classes)
    found = Counts(np.zeros((2, images, classes), np.uint32), np.zeros((2, images, classes), np.uint32),
                   np.zeros((images, classes), np.uint32))

    def amounts(ids: np.ndarray) -> np.ndarray:
        return np.bincount(ids, minlength=classes)[:classes]

    for i in range(images):
        label = labels.read(i)
        counted = label != labels.ignore_index
        true = label[counted]
        found.labelled[i] = amounts(true)
        for j, result in enumerate(results):
            prediction = labels.prediction(i, result)
            if prediction.shape != label.shape:
                raise UserError(f'{result.predictions / labels.names[i]}.png: {_size(prediction)} pixels, the labels '
                                f'{_size(label)} ({labels.entries[i][0]["seg_map_path"]})\nThe data are not those of the '
                                f'test: name them with --data-root DIR, or test again.')
            prediction = prediction[counted]
            found.predicted[j, i] = amounts(prediction)
            found.intersect[j, i] = amounts(prediction[prediction == true])
        progress(i + 1, images)
    return found


def _size(pixels: np.ndarray) -> str:
    return f'{pixels.shape[1]}x{pixels.shape[0]}' + (f'x{pixels.shape[2]}' if pixels.ndim > 2 else '')


def check_reproduced(result: Result, labels: Labels, counts: Counts, which: int) -> None:
    """Compare the counts of all images with the result's own figures: same labels, same predictions.

    Raises:
        UserError: If a class is unknown, or has another number of labelled pixels, or another IoU.
    """
    labelled = counts.labelled.sum(0, dtype=np.int64)
    present = {labels.classes[c]: int(labelled[c]) for c in np.flatnonzero(labelled)}
    stated = result.sizes()
    for name in dict.fromkeys([*stated, *present]):
        if stated.get(name, 0) != present.get(name, 0):
            raise UserError(f'{result.file}: the labels are not those of the test: {present.get(name, 0)} pixels of {name} '
                            f'now, {stated.get(name, 0)} then\nName data and classes of the test with --data-root, --classes '
                            f'and --cfg-options.')
    intersect, union = counts.intersect[which].sum(0, dtype=np.int64), counts.union[which].sum(0, dtype=np.int64)
    for name, figures in result.record['per_class'].items():
        if name not in labels.classes:
            raise UserError(f'{result.file}: there is a class {name}, which the config of the test does not have\n'
                            f'Name config and classes of the test with --config and --classes.')
        c, stated_iou = labels.classes.index(name), figures.get('IoU')
        found = 100 * intersect[c] / union[c]
        if stated_iou is None or abs(found - stated_iou) > 1e-6:
            raise UserError(f'{result.predictions}: these are not the predictions of {result.file}: IoU of {name} is '
                            f'{found:.4f} by them, and {"absent" if stated_iou is None else f"{stated_iou:.4f}"} there\n'
                            f'Test again with --out {result.file.parent}.')


def scores(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """mIoU and accuracy of every image in percent, ``(2, images)`` each; NaN without labelled pixels."""
    union = counts.union
    iou = np.divide(counts.intersect, union, out=np.zeros(union.shape), where=union > 0)
    pixels = counts.labelled.sum(1)
    labelled = np.where(pixels > 0, pixels, np.nan)
    present = np.where(pixels > 0, (union > 0).sum(2), np.nan)
    return 100 * iou.sum(2) / present, 100 * counts.intersect.sum(2) / labelled


def miou_difference(counts: Counts) -> Callable[[np.ndarray], np.ndarray]:
    """For :func:`~replk_mm.bench.compare.statistics.paired_bootstrap`: of the data set's mIoU in percent, which is the mean
    over the classes in labels or predictions of the images drawn."""
    parts = [(counts.intersect[j].astype(float), counts.union[j].astype(float)) for j in (0, 1)]

    def miou(times: np.ndarray, intersect: np.ndarray, union: np.ndarray) -> np.ndarray:
        among, of = times @ intersect, times @ union
        iou = np.divide(among, of, out=np.full(of.shape, np.nan), where=of > 0)
        occurring = ~np.isnan(iou)
        return 100 * np.nansum(iou, 1) / np.where(occurring.any(1), occurring.sum(1), np.nan)

    return lambda times: miou(times, *parts[1]) - miou(times, *parts[0])
