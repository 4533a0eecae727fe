"""Check a COCO-style annotation file: all annotations, and whether the images exist."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from replk_mm.data import coco
from replk_mm.data.checks.dataset import DataSet, Task
from replk_mm.data.checks.pairs import image_key
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.datasets import as_list
from replk_mm.data.files import sample
from replk_mm.data.findings import InvalidDataError, Item
from replk_mm.errors import format_list

#: mmdetection ignores annotations without a usable box. COCO itself has two; one, or this share, is an accident.
_TOLERATED = 0.01
#: Share of boxes reaching beyond their image from which they are taken for two corners instead of corner and size.
_CORNERS = 0.25


def survey(one: DataSet, dataset: dict, scope: str, metrics: Sequence[dict] | None, full: bool) -> None:
    """Check all annotations of a data set.

    Args:
        one: Receives problems, tasks and the number of objects of every class.
        dataset: Its config; its annotation file exists.
        scope: Default scope of the config.
        metrics: Configs of its metrics; None if it is trained with.
        full: Whether to decode all masks; otherwise all that are scored, and a sample of those that are trained with.
    """
    file, prefix = annotation_file(dataset), dataset.get('data_prefix') or {}
    assert file is not None
    one.where = str(file)
    folder = Path(one.root) / (prefix.get(image_key(prefix)) or '')
    scored = [
        metric
        for metric in metrics or ()
        if str(metric.get('type')).endswith('CocoMetric') and not metric.get('format_only')
    ]
    masks = any('segm' in as_list(metric.get('metric', 'bbox')) for metric in scored) or any(
        step.get('load', step).get('with_mask') for step in dataset.get('pipeline', ()) if isinstance(step, dict)
    )
    for metric in metrics or ():
        if metric.get('ann_file') and Path(metric['ann_file']).resolve() != file.resolve():
            one.report('metric-file', one.place, f'the metric reads {metric["ann_file"]}, but the data set {file}')
    try:
        data = coco.read_annotations(file)
    except InvalidDataError as error:
        one.problems += error.problems
        return
    one.objects = {**dict.fromkeys(classes_of(dataset, scope) or (), 0), **coco.category_counts(data)}
    if folder.is_dir():  # otherwise that is reported
        _find_images(one, data, folder)
    images, objects = data['images'], data.get('annotations', [])
    if not images or not objects and (metrics is None or scored):
        one.report('coco-no-annotations', file, f'there are no {"annotations" if images else "images"}')
    _repeated(one, data)
    _unknown(one, objects, 'image', {image['id'] for image in images})
    _unknown(one, objects, 'category', {category['id'] for category in data['categories']})
    if any(metric.get('ann_file') for metric in scored):  # pycocotools reads the file, not a copy by mmdetection
        lost = _items(objects, lambda a: '' if 'iscrowd' in a else "no 'iscrowd'")
        _report(one, 'iscrowd-missing', lost, f"{len(lost):,} of {len(objects):,} annotations have no 'iscrowd'")
        lost = _items(objects, lambda a: '' if isinstance(a['id'], int) and a['id'] else f'id {a["id"]!r}')
        _report(one, 'id-unscorable', lost, f'pycocotools cannot score {len(lost):,} of {len(objects):,} annotations')
    _boxes(one, data)
    if masks:
        _masks(one, data, all_of_them=full or bool(scored))


def _report(one: DataSet, kind: str, items: Sequence[Item], text: str, severity: str = '') -> None:
    """Report items of the annotation file, if there are any."""
    if items:
        examples = format_list(f'{item.entry}: {item.found}' for item in items)
        one.report(kind, one.where, f'{text}: {examples}', severity=severity, items=tuple(items))


def _items(objects: Sequence[coco.Annotation], found: Callable[[coco.Annotation], str | None]) -> list[Item]:
    """The annotations for which ``found`` returns a text."""
    return [Item(text, f'annotation {a["id"]}') for a in objects if (text := found(a))]


def _find_images(one: DataSet, data: coco.AnnotationFile, folder: Path) -> None:
    there: dict[Path, set[Path]] = {}  # by folder: listing each is faster than looking for every image
    absent: list[Item] = []
    for image in data['images']:
        path = folder / image['file_name']
        if path.parent not in there:
            there[path.parent] = set(path.parent.iterdir()) if path.parent.is_dir() else set()
        if path in there[path.parent]:
            one.tasks.append(Task(str(path), stated=(image['width'], image['height'])))
        else:
            absent.append(Item(f'no file {image["file_name"]}', f'image {image["id"]}', str(path)))
    _report(one, 'image-missing', absent, f'{len(absent):,} of {len(data["images"]):,} images are not in {folder}')


def _repeated(one: DataSet, data: coco.AnnotationFile) -> None:
    images, objects, categories = data['images'], data.get('annotations', []), data['categories']
    for kind, section, key, values in (
        ('id-repeated', 'images', 'id', [image['id'] for image in images]),
        ('id-repeated', 'annotations', 'id', [a['id'] for a in objects]),
        ('id-repeated', 'categories', 'id', [category['id'] for category in categories]),
        ('name-repeated', 'categories', 'name', [category['name'] for category in categories]),
        ('file-repeated', 'images', 'file_name', [image['file_name'] for image in images]),
    ):
        twice = [
            Item(f'{key} {value!r} occurs {count} times', section)
            for value, count in Counter(values).items()
            if count > 1
        ]
        _report(one, kind, twice, f'{len(twice):,} {key}s of {section} occur more than once')


def _unknown(one: DataSet, objects: Sequence[coco.Annotation], what: str, known: set) -> None:
    key = f'{what}_id'
    lost = [Item(f'{key} {a[key]!r}', f'annotation {a["id"]}') for a in objects if a[key] not in known]  # type: ignore
    _report(one, f'{what}-unknown', lost, f'{len(lost):,} of {len(objects):,} annotations have an unknown {key}')


def _boxes(one: DataSet, data: coco.AnnotationFile) -> None:
    """Boxes that mmdetection ignores, or that reach beyond their image."""
    sizes = {image['id']: (image['width'], image['height']) for image in data['images']}
    objects = [a for a in data.get('annotations', ()) if a['image_id'] in sizes]
    if not objects:
        return
    x, y, w, h = np.array([a['bbox'] for a in objects]).T
    width, height = np.array([sizes[a['image_id']] for a in objects]).T
    inner_w, inner_h = np.minimum(x + w, width) - np.maximum(x, 0), np.minimum(y + h, height) - np.maximum(y, 0)
    flat = (w < 1) | (h < 1) | (np.array([a['area'] for a in objects]) <= 0)
    outside = ~flat & ((inner_w <= 0) | (inner_h <= 0))
    beyond = ~flat & ~outside & ((x + w > width + 2) | (y + h > height + 2) | (x < -2) | (y < -2))
    for kind, found, text in (
        ('bbox-flat', flat, 'are less than a pixel wide or high, or have no area'),
        ('bbox-outside', outside, 'are outside of their image'),
        ('bbox-beyond', beyond, 'reach beyond their image'),
    ):
        count, of = int(found.sum()), len(objects)
        accident = count <= max(1, _TOLERATED * of) and count < of
        severity = 'warning' if accident and kind != 'bbox-beyond' else ''
        if kind == 'bbox-beyond' and not accident and count >= _CORNERS * of:
            kind = 'bbox-corners'
        items = [
            Item(f'{objects[i]["bbox"]} in {width[i]:g}x{height[i]:g} pixels', f'annotation {objects[i]["id"]}')
            for i in np.flatnonzero(found)
        ]
        _report(one, kind, items, f'{count:,} of {of:,} boxes {text}', severity)


def _masks(one: DataSet, data: coco.AnnotationFile, all_of_them: bool) -> None:
    """Missing masks, and those that pycocotools cannot decode; of all, or of a sample."""
    objects = data.get('annotations', [])
    lost = _items(objects, lambda a: '' if a.get('segmentation') else "no 'segmentation'")
    _report(one, 'segmentation-missing', lost, f'{len(lost):,} of {len(objects):,} annotations have no mask')
    sizes = {image['id']: (int(image['height']), int(image['width'])) for image in data['images']}
    having = [a for a in objects if a.get('segmentation') and a['image_id'] in sizes]
    having = having if all_of_them else sample(having)
    bad = _items(having, lambda a: coco.mask_error(a.get('segmentation'), *sizes[a['image_id']]))
    _report(one, 'mask-undecodable', bad, f'{len(bad):,} of {len(having):,} masks cannot be decoded')
