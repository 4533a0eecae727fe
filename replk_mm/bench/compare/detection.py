"""Two detection results image by image: exported detections matched with the annotated objects as COCO does."""
import contextlib
import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config
from pycocotools import mask as masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from replk_mm.bench.compare.results import Result, Source, config_of
from replk_mm.data import coco
from replk_mm.data.classes import annotation_file, listed
from replk_mm.data.datasets import datasets_of
from replk_mm.data.problems import some
from replk_mm.errors import UserError

#: IoU from which a detection is right.
IOU = 0.5
DEFINITION = ('an object is found if a detection of its class, not below the score threshold, has IoU 0.5 with it, matched as '
              'COCO does (surest first, each object once; detections in crowds count neither way); F1 of an image is 2 found '
              '/ (2 found + missed + false), and 1 where there is nothing to find and nothing was found')
#: Images matched at a time, which bounds the memory.
_CHUNK = 100


@dataclass
class Objects:
    """The annotated objects of a config's test data.

    Attributes:
        api: pycocotools' index of them, their ids counted from 1.
        images: Entries of the annotation file, by id.
        folder: Of the images.
        classes: Names of the file's categories by id.
    """

    api: COCO
    images: dict[int | str, dict]
    folder: Path
    classes: dict[int, str]


@dataclass
class Matches:
    """What became of the objects and detections of one image.

    Attributes:
        found: Ids of objects that were found.
        missed: Ids of objects that were not; crowds are in neither.
        false: Detections that match nothing, entries as COCO has them.
        right: Detections that match an object.
    """

    found: set[int] = field(default_factory=set)
    missed: set[int] = field(default_factory=set)
    false: list[dict] = field(default_factory=list)
    right: list[dict] = field(default_factory=list)


def open_objects(a: Result, source: Source, root: str | None, kind: str) -> Objects:
    """The objects that a result was scored with.

    Args:
        a: The result, for its config and classes.
        source: Where data are.
        root: Data root.
        kind: ``'bbox'`` or ``'segm'``.

    Raises:
        UserError: If annotations are missing or have other objects than those of the test.
    """
    cfg = config_of(a, source, root)
    file, folder = _files(cfg, a)
    if not file.is_file():
        raise UserError(f'{file}: no such annotation file\nName the folder of the data set with --data-root DIR.')
    data = coco.read(file)
    coco.forget()
    counts = coco.category_counts({**data, 'annotations': [o for o in data.get('annotations', ()) if not o.get('iscrowd')]})
    for name, size in a.sizes().items():
        if counts.get(name) != size:
            raise UserError(f'{file}: the annotations are not those of the test: {counts.get(name, "no")} objects of {name} '
                            f'now, {size} in {a.file}\nName the data of the test with --data-root DIR.')
    if len(data['images']) != a.record['data'].get('images'):
        raise UserError(f'{file}: {len(data["images"])} images, and {a.record["data"].get("images")} in {a.file}\n'
                        f'Name the data of the test with --data-root DIR.')
    classes = {category['id']: category['name'] for category in data['categories']}
    # A test may score some of the categories only; crowds of the others change nothing.
    scored = [o for o in data['annotations'] if classes[o['category_id']] in a.record['per_class'] or o.get('iscrowd')]
    if kind == 'segm' and any(not o.get('segmentation') for o in scored):
        raise UserError(f'{file}: there are objects without a mask (segmentation)\nCompare boxes: --kind bbox.')
    # Ids may be texts, or 0, which pycocotools takes for "no match".
    objects = [{**o, 'id': i, 'iscrowd': int(o.get('iscrowd') or 0)} for i, o in enumerate(scored, 1)]
    return Objects(_index(data['images'], data['categories'], objects), {image['id']: image for image in data['images']},
                   folder, classes)


def _files(cfg: Config, result: Result) -> tuple[Path, Path]:
    parts = list(datasets_of(cfg, ('test',)))
    file = annotation_file(parts[0]) if len(parts) == 1 else None
    if file is None:
        kinds = listed([str(part.get('type')) for part in parts])
        raise UserError(f'{cfg.filename}: images of {result.file} can be compared with one COCO-style annotation file only; '
                        f'its test data are {kinds}\n--no-images compares the figures alone.')
    return file, Path(parts[0].get('data_root') or '', (parts[0].get('data_prefix') or {}).get('img') or '')


def _index(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    api = COCO()
    api.dataset = dict(images=images, categories=categories, annotations=annotations)
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def open_detections(result: Result, objects: Objects, kind: str, least_score: float) -> COCO:
    """The exported detections of a result that are sure enough.

    Raises:
        UserError: If there are none, or of other images or categories than the annotations'.
    """
    file = result.predictions / f'instances.{kind}.json'
    if not file.is_file():
        raise UserError(f'{file}: no such file, so that images of {result.letter} cannot be compared'
                        + (' by masks (--kind bbox compares boxes)' if kind == 'segm' else '')
                        + f'\ntools/test.py --out {result.file.parent} writes it; --no-images compares the figures alone.')
    try:
        # Dropped while parsing: a detector writes a hundred a image, most of them unsure.
        read = json.loads(file.read_text(encoding='utf-8'), object_hook=lambda entry: entry if entry.get(
            'score', 1) >= least_score else None)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f'{file}: cannot be read as JSON ({error})\nTest again with --out {result.file.parent}.') from error
    needed = {'image_id', 'category_id', 'score', 'bbox', *(['segmentation'] if kind == 'segm' else [])}
    if not isinstance(read, list) or not all(d is None or isinstance(d, dict) and needed <= d.keys() for d in read):
        raise UserError(f'{file}: no list of detections with {", ".join(sorted(needed))}\n'
                        f'Test again with --out {result.file.parent}.')
    sure = [detection for detection in read if detection is not None]
    for i, detection in enumerate(sure):
        wrong = _problem(detection, objects, kind)
        if wrong:
            raise UserError(f'{file}: detection {i} is none: {wrong}\nTest again with --out {result.file.parent}.')
    strange = ({d['image_id'] for d in sure} - objects.images.keys()
               or {d['category_id'] for d in sure} - objects.classes.keys())
    if strange:
        raise UserError(f'{file}: detections are in images or of categories that the annotations do not have: ids '
                        f'{some(sorted(strange, key=str))}\nName the data of the test with --data-root DIR.')
    for i, detection in enumerate(sure, 1):
        if kind == 'segm':
            detection['area'] = float(masks.area(detection['segmentation']))
        else:
            detection['area'] = detection['bbox'][2] * detection['bbox'][3]
        detection.update(id=i, iscrowd=0)
    return _index(objects.api.dataset['images'], objects.api.dataset['categories'], sure)


def _problem(detection: dict, objects: Objects, kind: str) -> str | None:
    """What is wrong with a detection, or None. pycocotools, which is compiled, asks for no proof of what it is given."""
    bbox, image_id = detection['bbox'], detection['image_id']
    if not all(isinstance(detection[key], (int, str)) for key in ('image_id', 'category_id')):
        return 'an id that is no number or text'
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(coco.is_number(part) for part in (*bbox, detection['score'])):
        return f'bbox {str(bbox):.60}, score {str(detection["score"]):.20}'
    if kind == 'bbox' or image_id not in objects.images:
        return None
    mask, image = detection['segmentation'], objects.images[image_id]
    if not isinstance(mask, dict) or not isinstance(mask.get('counts'), str) or mask.get('size') != [
            image['height'], image['width']]:
        return f"its mask is no compressed RLE of the image's size, {image['height']}x{image['width']}"
    return coco.mask_problem(mask, image['height'], image['width'])


def match(objects: Objects, detections: COCO, ids: Iterable[int | str], kind: str,
          progress: Callable[[int, int], None] = lambda done, of: None) -> dict[int | str, Matches]:
    """Match the detections of images with pycocotools.

    Args:
        objects: Annotated.
        detections: Of one result.
        ids: Of images.
        kind: ``'bbox'`` or ``'segm'``: what IoU is taken of.
        progress: Called with images done and images in all.
    """
    chosen = list(ids)
    found: dict[int | str, Matches] = {i: Matches() for i in chosen}
    for start in range(0, len(chosen), _CHUNK):
        evaluation = COCOeval(objects.api, detections, kind)
        evaluation.params.imgIds = chosen[start:start + _CHUNK]
        evaluation.params.iouThrs, evaluation.params.areaRng = np.array([IOU]), [[0, 1e10]]
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.evaluate()
        for one in evaluation.evalImgs:
            if one is not None:
                _add(found[one['image_id']], one, detections)
        progress(min(start + _CHUNK, len(chosen)), len(chosen))
    return found


def _add(to: Matches, one: dict, detections: COCO) -> None:
    for i, taken, ignored in zip(one['gtIds'], one['gtMatches'][0], one['gtIgnore'], strict=True):
        if not ignored:
            (to.found if taken else to.missed).add(i)
    for i, taken, ignored in zip(one['dtIds'], one['dtMatches'][0], one['dtIgnore'][0], strict=True):
        if not ignored:
            (to.right if taken else to.false).append(detections.anns[i])


def counts(matches: Iterable[Matches]) -> np.ndarray:
    """Objects found, objects missed and false detections of every image, ``(images, 3)``."""
    return np.array([(len(m.found), len(m.missed), len(m.false)) for m in matches], dtype=np.int64).reshape(-1, 3)


def f1(of: np.ndarray) -> np.ndarray:
    """F1 in [0, 1] of :func:`counts`, over its last axis; see :data:`DEFINITION`."""
    found, missed, false = np.moveaxis(of, -1, 0)
    total = 2 * found + missed + false
    return np.where(total > 0, 2 * found / np.maximum(total, 1), 1.0)
