"""Two detection results, image by image: exported detections matched with the annotated objects as in COCO."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from replk_mm.analysis.statistics import MeanScores
from replk_mm.bench.compare.results import DataSource, Result, load_result_config
from replk_mm.bench.records import read_inside
from replk_mm.data import coco
from replk_mm.data.classes import annotation_file
from replk_mm.data.coco_dataset import CocoIndex
from replk_mm.data.datasets import datasets_of
from replk_mm.errors import UserError, command_line, format_list
from replk_mm.logs import show_progress

#: IoU from which a detection is right.
IOU = 0.5
_COUNTED = ('found', 'missed', 'false')
#: Images matched at a time, which bounds the memory.
_CHUNK = 100


@dataclass
class Objects:
    """The annotated objects of a config's test data."""

    api: COCO  #: their index in pycocotools, with ids counted from 1
    images: dict[int | str, dict]  #: entries of the annotation file, by id
    folder: Path  #: of the images
    classes: dict[int, str]  #: names of the file's categories by id


@dataclass
class Matches:
    """The matched objects and detections of one image."""

    found: set[int] = field(default_factory=set)  #: ids of objects that were found
    missed: set[int] = field(default_factory=set)  #: ids of objects that were not; crowds are in neither
    false: list[dict] = field(default_factory=list)  #: detections that match nothing, entries as COCO has them
    right: list[dict] = field(default_factory=list)  #: detections that match an object


class DetectionImages:
    """The images of two detection results.

    Args:
        pair: The results.
        source: Where data, config and classes are.
        root: Data root, None for the config's own.
        kind: ``'bbox'`` or ``'segm'``: what IoU is computed of.
        min_score: Minimum score of detections.

    Raises:
        UserError: If annotations or detections are missing, or are not those of the tests.
    """

    figure = 'F1'
    overall_figure = 'mean F1 of the images'
    unit = ''

    def __init__(
        self, pair: tuple[Result, Result], source: DataSource, root: str | None, kind: str, min_score: float
    ) -> None:
        self.kind = kind
        self.definition = (
            'an object is found if a detection of its class, not below the score threshold, has IoU 0.5 with it, '
            'matched as in COCO (highest score first, each object once; detections in crowds count neither way); F1 of '
            'an image is 2 found / (2 found + missed + false), and 1 without objects and detections; score threshold '
            f'{min_score:g}, IoU of {"boxes" if kind == "bbox" else "masks"}'
        )
        self.objects = open_objects(pair[0], source, root, kind)
        self.detections = [open_detections(result, self.objects, kind, min_score) for result in pair]
        self.matches = [match(self.objects, part, list(self.objects.images), kind) for part in self.detections]
        #: Found, missed and false of A and B, ``(2, images, 3)``.
        self.counts = np.array(
            [[(len(m.found), len(m.missed), len(m.false)) for m in part.values()] for part in self.matches]
        )
        found, missed, false = np.moveaxis(self.counts, -1, 0)
        total = 2 * found + missed + false
        #: F1 of A and B in [0, 1], ``(2, images)``.
        self.f1 = np.where(total > 0, 2 * found / np.maximum(total, 1), 1.0)
        #: Of A and B.
        self.statistics = tuple(MeanScores(tuple(map(str, self.objects.images)), f1, (0.0, 1.0)) for f1 in self.f1)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.objects.images)

    def scores(self) -> list[dict[str, Any]]:
        """F1 and counts of each image."""
        scores = []
        for n, (key, image) in enumerate(self.objects.images.items()):
            a, b = map(float, self.f1[:, n])
            counts = {
                f'{name}_{letter}': int(self.counts[j, n, k])
                for j, letter in enumerate('ab')
                for k, name in enumerate(_COUNTED)
            }
            scores.append(dict(image=image['file_name'], id=key, a=a, b=b, difference=b - a, **counts))
        return scores

    def extras(self) -> dict[str, Any]:
        """Counts and mean F1 of all images."""
        totals = {}
        for letter, counts, f1 in zip('ab', self.counts, self.f1, strict=True):
            totals[letter] = dict(zip(_COUNTED, map(int, counts.sum(0)), strict=True)) | dict(mean_f1=float(f1.mean()))
        return dict(totals=totals)


def open_objects(a: Result, source: DataSource, root: str | None, kind: str) -> Objects:
    """The objects that a result was scored with.

    Args:
        a: The result, for its config and classes.
        source: Where data are.
        root: Data root.
        kind: ``'bbox'`` or ``'segm'``.

    Raises:
        UserError: If annotations are missing or have other objects than those of the test.
    """
    cfg = load_result_config(a, source, root)
    parts = list(datasets_of(cfg, ('test',)))
    file = annotation_file(parts[0]) if len(parts) == 1 else None
    if file is None:
        raise UserError(
            f'{cfg.filename}: images can be compared with one COCO-style annotation file only\n'
            f'--no-images compares the figures alone.'
        )
    if not file.is_file():
        raise UserError(f'{file}: no such annotation file\nName the folder of the data set with --data-root DIR.')
    folder = Path(parts[0].get('data_root') or '', (parts[0].get('data_prefix') or {}).get('img') or '')
    data: Any = coco.read_annotations(file, folder)
    coco.invalidate_cache()
    counts = coco.category_counts({**data, 'annotations': [o for o in data['annotations'] if not o.get('iscrowd')]})
    expected = {**a.sizes(), 'images': a.record.data.get('images')}
    for name, size in expected.items():
        now = len(data['images']) if name == 'images' else counts.get(name)
        if now != size:
            raise UserError(
                f'{file}: the annotations are not those of the test: {name}: {now} now, {size} in '
                f'{a.file}\nName the data of the test with --data-root DIR.'
            )
    classes = {category['id']: category['name'] for category in data['categories']}
    # A test may score some of the categories only; crowds of the others change nothing.
    scored = [o for o in data['annotations'] if classes[o['category_id']] in a.record.per_class or o.get('iscrowd')]
    if kind == 'segm' and any(not o.get('segmentation') for o in scored):
        raise UserError(f'{file}: there are objects without a mask (segmentation)\nCompare boxes: --kind bbox.')
    return Objects(
        CocoIndex({**data, 'annotations': scored}), {image['id']: image for image in data['images']}, folder, classes
    )


def open_detections(result: Result, objects: Objects, kind: str, min_score: float) -> COCO:
    """The exported detections of a result with at least the minimum score.

    Raises:
        UserError: If there are none, or of other images or categories than the annotations'.
    """
    file = result.predictions / f'instances.{kind}.json'
    if not file.is_file():
        raise UserError(
            f'{file}: no such file, so that images of {result.letter} cannot be compared'
            + (' by masks (--kind bbox compares boxes)' if kind == 'segm' else '')
            + f'\n{command_line("test", "CONFIG", "CHECKPOINT", "--out", result.file.parent)} writes it; '
            f'--no-images compares figures alone.'
        )
    try:
        sure = [
            check_detection(entry, objects, kind)
            for entry in json.loads(read_inside(file, result.predictions))
            if entry['score'] >= min_score
        ]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{file}: not a list of detections as COCO has them ({error})\nTest again with --out {result.file.parent}.'
        ) from error
    strange = {d['image_id'] for d in sure} - objects.images.keys() or {
        d['category_id'] for d in sure
    } - objects.classes.keys()
    if strange:
        raise UserError(
            f'{file}: detections are in images or of categories that the annotations do not have: ids '
            f'{format_list(sorted(strange, key=str))}\nName the data of the test with --data-root DIR.'
        )
    return CocoIndex({**objects.api.dataset, 'annotations': sure})


def check_detection(entry: dict, objects: Objects, kind: str) -> dict:
    """A validated detection for pycocotools, which checks nothing.

    Raises:
        ValueError: If its mask cannot be decoded.
        TypeError, KeyError: If it is no detection as COCO has them.
    """
    found = dict(image_id=entry['image_id'], category_id=entry['category_id'], score=float(entry['score']), iscrowd=0)
    image = objects.images.get(entry['image_id'])
    if kind == 'segm' and image:
        mask = entry['segmentation']
        wrong = coco.mask_error(mask, image['height'], image['width'])
        if wrong or isinstance(mask, list):
            raise ValueError(wrong or 'a mask of polygons')
        return found | dict(segmentation=mask, bbox=masks.toBbox(mask).tolist(), area=float(masks.area(mask)))
    x, y, width, height = map(float, entry['bbox'])
    return found | dict(bbox=[x, y, width, height], area=width * height)


def match(objects: Objects, detections: COCO, ids: Sequence[int | str], kind: str) -> dict[int | str, Matches]:
    """Match the detections of images with pycocotools.

    Args:
        objects: Annotated.
        detections: Of one result.
        ids: Of images.
        kind: ``'bbox'`` or ``'segm'``: what IoU is taken of.
    """
    found: dict[int | str, Matches] = {i: Matches() for i in ids}
    starts = range(0, len(ids), _CHUNK)
    for start in show_progress(starts, 'images'):
        evaluation = COCOeval(objects.api, detections, kind)
        evaluation.params.imgIds = ids[start : start + _CHUNK]
        evaluation.params.iouThrs, evaluation.params.areaRng = np.array([IOU]), [[0, 1e10]]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
        for one in filter(None, evaluation.evalImgs):
            to = found[one['image_id']]
            for i, taken, ignored in zip(one['gtIds'], one['gtMatches'][0], one['gtIgnore'], strict=True):
                if not ignored:
                    (to.found if taken else to.missed).add(i)
            for i, taken, ignored in zip(one['dtIds'], one['dtMatches'][0], one['dtIgnore'][0], strict=True):
                if not ignored:
                    (to.right if taken else to.false).append(detections.anns[i])
    return found
