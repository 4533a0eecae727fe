"""Metrics as sums over images: what is kept of each image, so that a metric follows for any weights of the images.

An interval, a difference or a resampling needs the metric of a data set in which image ``i`` occurs ``weights[i]``
times. mIoU and AP are not means over images, so the counts behind them are kept instead: :class:`SegmentationCounts`
and :class:`DetectionMatches`. :class:`ClassificationScores` keeps the result of each image.
"""

import io
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from replk_mm.errors import UserError
from replk_mm.files import write_output

#: Unpacked bytes of a file that is read.
_MOST_BYTES = 2**29
#: Weights of detections that are in memory at a time.
_MOST_WEIGHTS = 2**22
#: Number of COCO's IoU thresholds, and its recall thresholds.
_THRESHOLDS = 10
_RECALLS = np.linspace(0, 1, 101)


def count_pixels(prediction: NDArray, label: NDArray, classes: int, ignore_index: int) -> NDArray[np.int64]:
    """Correct, predicted and labelled pixels of each class, ``(3, classes)``, where a map has a label.

    Args:
        prediction: Class indices ``(H, W)``; others count for no class.
        label: Class indices ``(H, W)``.
        classes: Their number.
        ignore_index: Label of pixels that are not scored.
    """
    scored = label != ignore_index
    prediction, label = prediction[scored], label[scored]
    parts = (prediction[prediction == label], prediction, label)
    return np.stack([np.bincount(ids, minlength=classes)[:classes] for ids in parts])


@dataclass(frozen=True, eq=False, kw_only=True)
class PerImageScores(ABC):
    """A metric of one checkpoint, as sums over the images of a data set."""

    image_figure: ClassVar[str]  #: what :meth:`per_image` returns
    images: tuple[str, ...]  #: names of the images
    classes: tuple[str, ...]  #: names of the classes

    def score(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        """The metric of weighted images, averaged over the classes that they have; NaN if they have none.

        Args:
            weights: How often each image occurs, ``(draws, images)``, not negative; None weights all images with 1.

        Returns:
            ``(draws,)``, in percent.
        """
        values = self.per_class(weights)
        present = ~np.isnan(values)
        with np.errstate(invalid='ignore'):
            return np.where(present, values, 0).sum(1) / present.sum(1)

    @abstractmethod
    def per_class(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        """The metric of each class, ``(draws, classes)``, in percent; NaN where a class does not occur.

        Args:
            weights: See :meth:`score`.
        """

    @abstractmethod
    def per_image(self) -> NDArray[np.float64]:
        """A score of each image for itself, ``(images,)``, in percent; NaN where nothing is labelled or predicted."""

    @abstractmethod
    def only(self, name: str) -> 'PerImageScores':
        """The scores of one class."""

    def _check_weights(self, weights: NDArray | None) -> NDArray[np.float64]:
        found = np.ones((1, len(self.images))) if weights is None else np.asarray(weights, np.float64)
        if found.ndim != 2 or found.shape[1] != len(self.images):
            raise ValueError(f'weights {found.shape} are not (draws, {len(self.images)} images)')
        return found

    def save(self, path: Path) -> None:
        """Write an ``.npz`` file.

        Raises:
            UserError: If it cannot be written.
        """
        memory = io.BytesIO()
        content = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez_compressed(memory, allow_pickle=False, kind=np.asarray(type(self).__name__), **content)
        write_output(path, memory.getvalue())

    @staticmethod
    def load(source: Path | bytes) -> 'PerImageScores':
        """Read what :meth:`save` wrote.

        Args:
            source: The file, or its content.

        Raises:
            UserError: If it is something else.
        """
        try:
            memory = io.BytesIO(source if isinstance(source, bytes) else source.read_bytes())
            if sum(entry.file_size for entry in zipfile.ZipFile(memory).infolist()) > _MOST_BYTES:
                raise ValueError(f'more than {_MOST_BYTES // 2**20} MiB')
            memory.seek(0)
            content: dict[str, Any] = dict(np.load(memory, allow_pickle=False))
            kind = {kind.__name__: kind for kind in PerImageScores.__subclasses__()}[str(content.pop('kind'))]
            content |= {name: tuple(map(str, content[name])) for name in ('images', 'classes')}
            return kind(**content)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            name = 'statistics' if isinstance(source, bytes) else source
            raise UserError(f'{name}: not the per-image counts of a test ({error})\nTest again with --out.') from error


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentationCounts(PerImageScores):
    """Confusion counts of each image, for mIoU over the classes in labels or predictions.

    The arrays take 12 bytes per image and class: 3.6 MB for ADE20K's 2,000 images and 150 classes, and about a tenth of
    that in a file.
    """

    image_figure = 'mIoU'
    intersection: NDArray[np.integer]  #: correctly predicted pixels, ``(images, classes)``, uint32
    predicted: NDArray[np.integer]  #: predicted pixels with a label
    label: NDArray[np.integer]  #: labelled pixels

    def __post_init__(self) -> None:
        shape = len(self.images), len(self.classes)
        for name in ('intersection', 'predicted', 'label'):
            found = np.asarray(getattr(self, name))
            if found.shape != shape:
                raise ValueError(f'{name} {found.shape} is not (images, classes) {shape}')
            object.__setattr__(self, name, found.astype(np.uint32))

    def only(self, name: str) -> 'SegmentationCounts':
        chosen = [self.classes.index(name)]
        counts: Any = {key: getattr(self, key)[:, chosen] for key in ('intersection', 'predicted', 'label')}
        return replace(self, classes=(name,), **counts)

    def per_class(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        weights = self._check_weights(weights)
        # float64 sums of pixels are exact up to 2**53
        intersection, predicted, label = (
            weights @ counts.astype(np.float64) for counts in (self.intersection, self.predicted, self.label)
        )
        with np.errstate(invalid='ignore'):
            return 100 * intersection / (predicted + label - intersection)

    def per_image(self) -> NDArray[np.float64]:
        """mIoU of each image over the classes in its labels or its prediction."""
        union = self.predicted + self.label - self.intersection
        with np.errstate(invalid='ignore'):
            return 100 * (self.intersection / np.maximum(union, 1)).sum(1) / (union > 0).sum(1)


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationScores(PerImageScores):
    """Class and result of each image, for top-1 accuracy over all images."""

    image_figure = 'top-1 accuracy'
    label: NDArray[np.integer]  #: index of the class, ``(images,)``; -1 if the image is not scored
    correct: NDArray[np.bool_]  #: whether the prediction is right, ``(images,)``

    def __post_init__(self) -> None:
        if not len(self.images) == len(self.label) == len(self.correct):
            raise ValueError('an image lacks its class or its result')

    def score(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        """Accuracy of weighted images, ``(draws,)``, in percent; the mean over images, not over classes."""
        weights = self._check_weights(weights)[:, self.label >= 0]
        with np.errstate(invalid='ignore'):
            return 100 * weights @ self.correct[self.label >= 0] / weights.sum(1)

    def per_class(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        scored, count = self.label >= 0, len(self.classes)
        label, correct, weights = self.label[scored], self.correct[scored], self._check_weights(weights)[:, scored]
        with np.errstate(invalid='ignore'):
            draws = [np.bincount(label, w * correct, count) / np.bincount(label, w, count) for w in weights]
        return 100 * np.reshape(draws, (-1, count))

    def per_image(self) -> NDArray[np.float64]:
        """100 where the prediction is right, and 0 elsewhere."""
        return np.where(self.label >= 0, 100.0 * self.correct, np.nan)

    def only(self, name: str) -> 'ClassificationScores':
        return replace(self, classes=(name,), label=np.where(self.label == self.classes.index(name), 0, -1))


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionMatches(PerImageScores):
    """Detections as COCO's evaluation matched them, for AP over IoU 0.5 to 0.95, all areas, 100 detections per image.

    A data set with repeated images has the same AP by pycocotools, but for detections of one class and image with equal
    scores, which it orders by the copies.

    The arrays take 8 bytes per detection and 4 per object: 4 MB for 100 detections on each of COCO's 5,000 images.
    """

    image_figure = 'R-precision'
    #: index of the image of each detection, ``(detections,)``; by class, then by falling score
    detection_image: NDArray[np.int32]
    #: bit ``t`` is set if the detection matches an object at IoU ``0.5 + 0.05 * t``; uint16
    matched: NDArray[np.uint16]
    #: bit ``t`` is set if it counts neither as right nor as false, as one that matches a crowd; uint16
    ignored: NDArray[np.uint16]
    #: where the detections of each class begin and the last ends, ``(classes + 1,)``
    detection_bounds: NDArray[np.int64]
    object_image: NDArray[np.int32]  #: index of the image of each object that is not a crowd, ``(objects,)``; by class
    object_bounds: NDArray[np.int64]  #: the same of the objects

    def __post_init__(self) -> None:
        for image, bounds in ((self.detection_image, self.detection_bounds), (self.object_image, self.object_bounds)):
            if len(bounds) != len(self.classes) + 1 or (np.diff(bounds, prepend=0, append=len(image)) < 0).any():
                raise ValueError('the numbers of detections or objects per class do not add up')
            if len(image) and not 0 <= image.min() <= image.max() < len(self.images):
                raise ValueError('a detection or an object is of none of the images')
        if not len(self.detection_image) == len(self.matched) == len(self.ignored):
            raise ValueError('a detection lacks its matches')

    @classmethod
    def from_coco(cls, evaluation: Any) -> 'DetectionMatches':
        """Take the matches of an evaluation.

        Args:
            evaluation: ``pycocotools.cocoeval.COCOeval`` with COCO's own settings, after ``evaluate()``.
        """
        ids, categories = list(evaluation.params.imgIds), evaluation.params.catIds
        position = {key: i for i, key in enumerate(ids)}
        bits = 1 << np.arange(_THRESHOLDS)
        detections, objects = [np.zeros((3, 0), np.int64)], [np.zeros(0, np.int64)]
        bounds = np.zeros((2, len(categories) + 1), np.int64)
        for k in range(len(categories)):
            first = k * len(evaluation.params.areaRng) * len(ids)  # the first range is of all areas
            of_class = [entry for entry in evaluation.evalImgs[first : first + len(ids)] if entry]
            scores = np.concatenate([entry['dtScores'] for entry in of_class] or [[]])
            order = np.argsort(-scores, kind='mergesort')  # pycocotools' order of equal scores
            columns = [np.zeros((3, 0), np.int64)]
            for entry in of_class:
                image, ignored = position[entry['image_id']], np.asarray(entry['dtIgnore'], bool)
                matched = (np.asarray(entry['dtMatches']) != 0) & ~ignored
                columns.append(np.stack([np.full(ignored.shape[1], image), bits @ matched, bits @ ignored]))
                objects.append(np.full(np.count_nonzero(np.asarray(entry['gtIgnore']) == 0), image))
            detections.append(np.concatenate(columns, axis=1)[:, order])
            bounds[:, k + 1] = bounds[0, k] + len(order), sum(map(len, objects))
        image, matched, ignored = np.concatenate(detections, axis=1)
        coco = evaluation.cocoGt
        return cls(
            images=tuple(str(coco.imgs[key].get('file_name', key)) for key in ids),
            classes=tuple(str(coco.cats[key]['name']) for key in categories),
            detection_image=image.astype(np.int32),
            matched=matched.astype(np.uint16),
            ignored=ignored.astype(np.uint16),
            detection_bounds=bounds[0],
            object_image=np.concatenate(objects).astype(np.int32),
            object_bounds=bounds[1],
        )

    def only(self, name: str) -> 'DetectionMatches':
        k = self.classes.index(name)
        (a, b), (c, d) = self.detection_bounds[k : k + 2], self.object_bounds[k : k + 2]
        detections: Any = {key: getattr(self, key)[a:b] for key in ('detection_image', 'matched', 'ignored')}
        bounds: Any = dict(detection_bounds=np.array([0, b - a]), object_bounds=np.array([0, d - c]))
        return replace(self, classes=(name,), object_image=self.object_image[c:d], **detections, **bounds)

    def per_class(self, weights: NDArray | None = None) -> NDArray[np.float64]:
        weights = self._check_weights(weights)
        step = max(1, _MOST_WEIGHTS // max(1, *np.diff(self.detection_bounds)))
        values = np.zeros((len(weights), len(self.classes)))
        bounds = zip(pairwise(self.detection_bounds), pairwise(self.object_bounds), strict=True)
        for k, (detections, objects) in enumerate(bounds):
            for draws in (slice(start, start + step) for start in range(0, len(weights), step)):
                values[draws, k] = self._average_precision(weights[draws], slice(*detections), slice(*objects))
        return values

    def per_image(self) -> NDArray[np.float64]:
        """R-precision of each image at IoU 0.5: of the R detections with the highest scores, the share that is right.

        R is the number of objects of a class in the image, and the sums are over the classes.
        """
        right, total = np.zeros((2, len(self.images)))
        for detections, objects in zip(pairwise(self.detection_bounds), pairwise(self.object_bounds), strict=True):
            of_class = slice(*detections)
            counted = (self.ignored[of_class] & 1) == 0
            image, matched = self.detection_image[of_class][counted], self.matched[of_class][counted]
            count = np.bincount(self.object_image[slice(*objects)], minlength=len(self.images))
            order = np.argsort(image, kind='stable')  # which keeps the order by score
            image, matched = image[order], matched[order]
            first = np.arange(len(image)) - np.searchsorted(image, image) < count[image]
            right += np.bincount(image[first], matched[first] & 1, minlength=len(self.images))
            total += count
        with np.errstate(invalid='ignore'):
            return 100 * right / total

    def _average_precision(self, weights: NDArray, detections: slice, objects: slice) -> NDArray[np.float64]:
        """AP of a class in percent, ``(draws,)``: the mean over IoU and recall thresholds of the precision envelope."""
        total = weights[:, self.object_image[objects]].sum(1)
        matched, ignored = self.matched[detections], self.ignored[detections]
        of_detection = weights[:, self.detection_image[detections]]
        seen_by_all = of_detection.cumsum(1)
        found = np.zeros(len(weights))
        for bit in 1 << np.arange(_THRESHOLDS):
            # Only right detections raise the recall, and a false one never has the highest precision from there on.
            right = np.flatnonzero(matched & bit)
            hidden = (ignored & bit) != 0
            seen = (of_detection * ~hidden).cumsum(1) if hidden.any() else seen_by_all
            true = of_detection[:, right].cumsum(1)
            precision = true / (seen[:, right] + np.spacing(1))
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            with np.errstate(invalid='ignore', divide='ignore'):
                recall = np.round(true / total[:, None], 12)  # sums of fractions may miss 1/2, a threshold
            reached = np.searchsorted(_RECALLS, recall, side='right')
            found += (envelope * np.diff(reached, axis=1, prepend=0)).sum(1) / len(_RECALLS)
        return np.where(total > 0, 100 * found / _THRESHOLDS, np.nan)
