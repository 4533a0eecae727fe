"""Check a COCO-style annotation file: all annotations, and whether the images exist."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from replk_mm.data import coco
from replk_mm.data.checks.dataset import DatasetReport, Sample
from replk_mm.data.checks.pairs import image_key
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.coco import Annotation
from replk_mm.data.datasets import as_list, has_own_index
from replk_mm.data.files import list_names, pick_evenly
from replk_mm.data.findings import InvalidDataError, Occurrence
from replk_mm.errors import format_list

#: mmdetection ignores annotations without a usable box. COCO itself has two: this share of all is only a warning.
_TOLERATED = 0.01
#: Share of crowds from which to warn; COCO itself has 1 %.
_FEW_CROWDS = 0.1
#: Share of boxes beyond their image from which they look like [x1, y1, x2, y2].
_CORNERS = 0.25


def check_annotations(
    report: DatasetReport, dataset: dict, scope: str, metrics: Sequence[dict] | None, full: bool
) -> None:
    """Check all annotations of a data set.

    Args:
        report: Receives findings, samples and the number of objects of every class.
        dataset: Its config; its annotation file exists.
        scope: Default scope of the config.
        metrics: Configs of its metrics; None for training data.
        full: Whether to decode all masks. Otherwise all scored masks and a sample of the training masks are decoded.
    """
    file, prefix = annotation_file(dataset), dataset.get('data_prefix') or {}
    assert file is not None
    report.labels_at = str(file)
    scoring = [m for m in metrics or () if str(m.get('type')).endswith('CocoMetric') and not m.get('format_only')]
    for metric in metrics or ():
        if metric.get('ann_file') and coco.annotation_path(Path(metric['ann_file'])).resolve() != file.resolve():
            report.add('metric-file', report.key, f'the metric reads {metric["ann_file"]}, but the data set {file}')
    folder = Path(report.root) / (prefix.get(image_key(prefix)) or '')
    try:
        data = coco.read_annotations(file, folder)
    except InvalidDataError as error:
        report.findings += error.findings
        return
    images, objects = data['images'], data.get('annotations', [])
    smallest = (dataset.get('filter_cfg') or {}).get('min_size', 0)
    # Training also leaves out what has 'ignore'; COCO's metric does not read it.
    single = [a for a in objects if not (a.get('iscrowd') or metrics is None and a.get('ignore'))]
    counts = coco.category_counts({**data, 'annotations': single})
    report.class_names = dict(enumerate(classes_of(dataset, scope) or ()))
    report.object_counts = {**dict.fromkeys(report.class_names.values(), 0), **counts}
    report.is_used = metrics is None or bool(scoring)
    # pycocotools itself reads the file for the metric of mmdet.
    strict_metric = any(m.get('ann_file') and not str(m['type']).startswith('replk_mm.') for m in scoring)
    if variants := data['variants']:
        is_error = strict_metric or not has_own_index(dataset, scope)
        report.add('coco-variant', file, '; '.join(variants), severity='error' if is_error else '')
    if folder.is_dir():  # a missing folder is reported elsewhere
        _find_images(report, data, folder)
    if not images or not objects and report.is_used:
        report.add('coco-no-annotations', file, f'there are no {"annotations" if images else "images"}')
    elif metrics is None and all(min(i['width'], i['height']) < smallest for i in images):
        report.add('no-images', file, f'filter_cfg.min_size={smallest} removes all images', fix='Set filter_cfg.')
    elif (crowds := len(objects) - len(single)) > _FEW_CROWDS * len(objects):
        message = f"{crowds:,} of {len(objects):,} annotations have 'iscrowd': 1" + " or 'ignore'" * (metrics is None)
        report.add('crowds', file, message, severity='' if single or not report.is_used else 'error')
    if len({type(image['id']) for image in images}) > 1:  # COCO's evaluation would turn all of them into text
        report.add('coco-structure', file, 'ids of images are partly numbers and partly text')
    _check_repeated(report, data)
    _check_references(report, objects, 'image', {image['id'] for image in images})
    _check_references(report, objects, 'category', {category['id'] for category in data['categories']})
    if strict_metric:
        of = f'of {len(objects):,} annotations'
        lost = _occurrences(objects, lambda a: '' if 'iscrowd' in a else "no 'iscrowd'")
        _report(report, 'iscrowd-missing', lost, f"{len(lost):,} {of} have no 'iscrowd'")
        lost = _occurrences(objects, lambda a: '' if isinstance(a['id'], int) and a['id'] else f'id {a["id"]!r}')
        _report(report, 'id-unscorable', lost, f'pycocotools cannot score {len(lost):,} {of}')
    _check_boxes(report, data)
    loads_masks = any(s.get('load', s).get('with_mask') for s in dataset.get('pipeline', ()) if isinstance(s, dict))
    if loads_masks or any('segm' in as_list(metric.get('metric', 'bbox')) for metric in scoring):
        _check_masks(report, data, check_all=full or bool(scoring))


def _report(
    report: DatasetReport, code: str, occurrences: Sequence[Occurrence], message: str, severity: str = ''
) -> None:
    """Report occurrences in the annotation file, if there are any."""
    if occurrences:
        message = f'{message}: {format_list(f"{found.entry}: {found.message}" for found in occurrences)}'
        report.add(code, report.labels_at, message, severity=severity, occurrences=tuple(occurrences))


def _occurrences(objects: Sequence[Annotation], check: Callable[[Annotation], str | None]) -> list[Occurrence]:
    """The annotations for which ``check`` returns a message."""
    return [Occurrence(message, f'annotation {a["id"]}') for a in objects if (message := check(a))]


def _find_images(report: DatasetReport, data: coco.AnnotationFile, folder: Path) -> None:
    listed = functools.cache(list_names)
    absent: list[Occurrence] = []
    for image in data['images']:
        path = folder / image['file_name']
        if path.name in listed(path.parent):
            report.samples.append(Sample(str(path), stated_size=(image['width'], image['height'])))
        else:
            absent.append(Occurrence(f'no file {image["file_name"]}', f'image {image["id"]}', str(path)))
    _report(report, 'image-missing', absent, f'{len(absent):,} of {len(data["images"]):,} images are not in {folder}')


def _check_repeated(report: DatasetReport, data: coco.AnnotationFile) -> None:
    """Report ids, names and files that occur more than once."""
    for code, section, key in (
        ('id-repeated', 'images', 'id'),
        ('id-repeated', 'annotations', 'id'),
        ('id-repeated', 'categories', 'id'),
        ('name-repeated', 'categories', 'name'),
        ('file-repeated', 'images', 'file_name'),
    ):
        counts = Counter(entry[key] for entry in data.get(section, ()))  # type: ignore[attr-defined]
        repeated = [Occurrence(f'{key} {v!r} occurs {n} times', section) for v, n in counts.items() if n > 1]
        _report(report, code, repeated, f'{len(repeated):,} {key}s of {section} occur more than once')


def _check_references(report: DatasetReport, objects: Sequence[Annotation], section: str, ids: set) -> None:
    """Report annotations of an image or category that the file lacks."""
    key = f'{section}_id'
    lost = _occurrences(objects, lambda a: '' if a[key] in ids else f'{key} {a[key]!r}')  # type: ignore[literal-required]
    message = f'{len(lost):,} of {len(objects):,} annotations have an unknown {key} (known: {format_list(ids)})'
    _report(report, f'{section}-unknown', lost, message)


def _check_boxes(report: DatasetReport, data: coco.AnnotationFile) -> None:
    """Report boxes that mmdetection ignores, or that reach beyond their image."""
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
    for code, found, message in (
        ('bbox-flat', flat, 'are less than a pixel wide or high, or have no area'),
        ('bbox-outside', outside, 'are outside of their image'),
        ('bbox-beyond', beyond, 'reach beyond their image'),
    ):
        count, total = int(found.sum()), len(objects)
        is_rare = count <= max(1, _TOLERATED * total) and count < total
        severity = 'warning' if is_rare and code != 'bbox-beyond' else ''
        if code == 'bbox-beyond' and not is_rare and count >= _CORNERS * total:
            code = 'bbox-corners'
        occurrences = [
            Occurrence(f'{objects[i]["bbox"]} in {width[i]:g}x{height[i]:g} pixels', f'annotation {objects[i]["id"]}')
            for i in np.flatnonzero(found)
        ]
        _report(report, code, occurrences, f'{count:,} of {total:,} boxes {message}', severity)


def _check_masks(report: DatasetReport, data: coco.AnnotationFile, check_all: bool) -> None:
    """Report missing masks, and masks that pycocotools cannot decode."""
    objects = data.get('annotations', [])
    lost = _occurrences(objects, lambda a: '' if a.get('segmentation') else "no 'segmentation'")
    _report(report, 'segmentation-missing', lost, f'{len(lost):,} of {len(objects):,} annotations have no mask')
    sizes = {image['id']: (int(image['height']), int(image['width'])) for image in data['images']}
    masked = [a for a in objects if a.get('segmentation') and a['image_id'] in sizes]
    masked = masked if check_all else pick_evenly(masked)
    bad = _occurrences(masked, lambda a: coco.mask_error(a.get('segmentation'), *sizes[a['image_id']]))
    _report(report, 'mask-undecodable', bad, f'{len(bad):,} of {len(masked):,} masks cannot be decoded')
