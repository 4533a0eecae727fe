"""Recompute metrics from predictions and labels, to check results of other people.

No config is read: a record states where images and labels are, and what they mean.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm.bench.records import StoredRecord, read_inside, resolve_inside
from replk_mm.bench.report.comparison import read_scores
from replk_mm.bench.report.pictures import Album, Picture, SplitFiles
from replk_mm.bench.report.tables import leaves, number, primary_metric
from replk_mm.errors import format_list
from replk_mm.evaluation.per_image import DetectionMatches, PerImageScores, SegmentationCounts, count_pixels


@dataclass
class Rescored:
    """The metric of one record, from its predictions.

    Attributes:
        record: Of the metric.
        root: Data set of the labels; None if it was not found.
        labels: Number of images that have labels there.
        values: Recomputed, as in the record: ``metrics``, ``per_class`` and ``images``.
        differences: What is not as in the record, or is missing, one line each.
    """

    record: StoredRecord
    root: Path | None = None
    labels: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        name, metric = f'{self.record["row"]}, seed {self.record["seed"]}', primary_metric(self.record)[0]
        if self.differences:
            return '\n  '.join([f'{name}: {"DIFFERENT" if self.values else "NOT CHECKED"}', *self.differences])
        value, images = self.values['metrics'][metric], self.values['images']
        part = f' (of {self.labels:,} that have labels there)' if images != self.labels else ''
        return f'{name}: {metric} {value:.2f} reproduced from {images:,} images{part}, labels in {self.root}'


def rescore(found: Iterable[StoredRecord], data_roots: Iterable[str | Path] = ()) -> Iterator[Rescored]:
    """Recompute the metrics of those of the records that have one.

    Args:
        found: Records.
        data_roots: Data sets, beside those in ``data`` of the work dirs.
    """
    album = Album(data_roots)
    for record in found:
        if record['measurement'] == 'metric' and record['status'] == 'done':
            result = Rescored(record)
            try:
                folder = resolve_inside(record.folder / str(record['files']['predictions']), record.folder / 'runs')
                data = album.data_of(record)
                result.root = data.root
                compute = _score_objects if data.annotations and not data.labels else _score_label_maps
                result.differences += _compare(result, compute(result, data, folder))
            except Exception as error:  # the files of other people may hold anything
                why = 'the record names no predictions' if isinstance(error, KeyError) else str(error)
                result.differences.append(f'{why or type(error).__name__}')
            yield result


def _score_label_maps(result: Rescored, data: SplitFiles, folder: Path) -> PerImageScores:
    classes, first, album = data.classes, data.first, Album()
    if not 0 < len(classes) <= 256:
        raise ValueError(f'{len(classes)} classes; label maps have 8 bits')
    counts = {}
    for path in sorted(folder.rglob('*.png')):
        name = path.relative_to(folder).as_posix()
        prediction: Any = album.read(path, folder, mode=None)
        label: Any = album.read(data.label_of(name), *data.folders, mode=None)
        both = dict(prediction=prediction, labels=label).items()
        problems = [f'{what} of {name}: {found.words}' for what, found in both if isinstance(found, Picture)]
        if not problems and prediction.shape != label.shape:
            problems = [f'prediction of {name}: {prediction.shape} pixels, the labels {label.shape}']
        if not problems:
            pixels = count_pixels(prediction - np.uint8(first), data.classes_of_values[label], len(classes), 255)
            counts[name.removesuffix('.png')] = pixels
        result.differences += problems
    if not counts:
        raise ValueError(f'{folder}: no predictions with labels')
    folders = os.walk(resolve_inside(data.root / (data.labels or ''), *data.folders))
    result.labels = sum(name.endswith(data.label_suffix) for _, _, files in folders for name in files)
    correct, predicted, labelled = np.stack(list(counts.values()), axis=1)
    scores = SegmentationCounts(
        images=tuple(counts), classes=tuple(classes), intersection=correct, predicted=predicted, label=labelled
    )
    right, pixels, present = correct.sum(0), labelled.sum(0), np.flatnonzero(labelled.sum(0))
    iou, accuracy = scores.per_class()[0], 100 * right / np.maximum(pixels, 1)
    means = dict(mIoU_present=iou[present].mean(), mAcc=accuracy[present].mean(), aAcc=100 * right.sum() / pixels.sum())
    result.values = dict(
        metrics=dict(mIoU=float(scores.score()[0])) | {name: float(value) for name, value in means.items()},
        per_class={classes[i]: dict(IoU=float(iou[i]), pixels=int(pixels[i])) for i in present},
        images=len(counts),
    )
    return scores


def _score_objects(result: Rescored, data: SplitFiles, folder: Path) -> PerImageScores:
    from pycocotools.cocoeval import COCOeval

    from replk_mm.bench.compare.detection import Objects, check_detection
    from replk_mm.data import coco
    from replk_mm.data.coco_dataset import CocoIndex
    from replk_mm.evaluation.coco_metric import STATS

    file = coco.annotation_path(data.root / str(data.annotations))
    written: Any = coco.read_annotations(resolve_inside(file, *data.folders))
    classes = {category['id']: category['name'] for category in written['categories']}
    objects = Objects(CocoIndex(written), {i['id']: i for i in written['images']}, data.root / data.images, classes)
    result.labels = len(objects.images)
    result.values = dict(metrics={}, per_class={}, images=result.labels)
    scores = None
    for file in (folder / 'instances.segm.json', folder / 'instances.bbox.json'):
        if not os.path.lexists(file):
            continue
        kind = file.suffixes[0][1:]
        detections = [check_detection(entry, objects, kind) for entry in json.loads(read_inside(file, folder))]
        if strange := {d['image_id'] for d in detections} - objects.images.keys():
            raise ValueError(
                f'{file}: detections in images that {data.annotations} does not have: {format_list(strange)}'
            )
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(objects.api, CocoIndex({**written, 'annotations': detections}), kind)
            evaluation.params.catIds = sorted(key for key, name in classes.items() if name in data.classes)
            for step in (evaluation.evaluate, evaluation.accumulate, evaluation.summarize):
                step()
        scores = DetectionMatches.from_coco(evaluation)
        stats = {f'coco/{kind}_{name}': 100 * float(evaluation.stats[i]) for name, i in STATS.items()}
        result.values['metrics'] |= {name: value if value >= 0 else math.nan for name, value in stats.items()}
        rows = zip(scores.classes, scores.per_class()[0].tolist(), np.diff(scores.object_bounds).tolist(), strict=True)
        for name, value, count in rows:
            if count:
                result.values['per_class'].setdefault(name, dict(instances=count))[f'{kind}_mAP'] = value
    if scores is None:
        raise ValueError(f'{folder}: no instances.bbox.json')
    return scores


def _compare(result: Rescored, scores: PerImageScores) -> Iterator[str]:
    """What differs in the figures of the record, and in the counts per image that it names."""
    record, (metric, _) = result.record, primary_metric(result.record)
    if metric not in result.values['metrics']:
        yield f'{metric}: cannot be recomputed'
    new = dict(leaves(result.values))
    old = dict(leaves({name: record['values'].get(name) for name in result.values}))
    figures = {place.rpartition('.')[2] for place in new}
    for place in {**old, **new}:
        both = place in old and place in new
        # A record may have other metrics, and classes may have more figures.
        compared = both if place.startswith('metrics') else place.rpartition('.')[2] in figures
        if compared and not _equal(number(old, place), number(new, place)):
            yield f'{place}: {number(new, place)!r:.13} recomputed, {number(old, place)!r:.13} recorded'
    if 'statistics' in record['files'] or record['facts'].get('statistics'):  # unlike in older records
        try:
            then, now = (
                dict(zip(s.images, s.per_image().tolist(), strict=True)) for s in (read_scores(record), scores)
            )
            for what, names in (
                ('no prediction or labels of', then.keys() - now.keys()),
                ('not tested', now.keys() - then.keys()),
                (
                    'tested with other predictions or labels',
                    {n for n in then.keys() & now.keys() if not _equal(then[n], now[n])},
                ),
            ):
                if names:
                    yield f'{what}: {format_list(sorted(names))}'
        except (OSError, ValueError) as error:
            yield f'counts per image: {getattr(error, "strerror", None) or error}'


def _equal(a: float | None, b: float | None) -> bool:
    values = [value for value in (a, b) if value is not None and not math.isnan(value)]
    return not values or len(values) == 2 and abs(values[0] - values[1]) < 1e-6
