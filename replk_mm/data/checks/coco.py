"""Check a COCO-style annotation file: all annotations, and whether the images exist."""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from replk_mm.data import coco
from replk_mm.data.checks.dataset import DataSet, Task
from replk_mm.data.checks.pairs import image_key
from replk_mm.data.classes import annotation_file, classes_of
from replk_mm.data.datasets import as_list
from replk_mm.data.problems import BadData, Item, Problem, some

#: mmdetection ignores annotations without a usable box. COCO itself has two; one, or this share of all, is an accident.
_TOLERATED = 0.01
#: Share of boxes reaching beyond their image from which they are taken for two corners instead of corner and size.
_CORNERS = 0.25


@dataclass(frozen=True)
class Use:
    """What a run does with an annotation file.

    Attributes:
        train: Whether it trains with the annotations.
        scored: Whether it scores detections with them.
        own_file: Whether the metric names the file, so that pycocotools reads it; otherwise it gets a copy from mmdetection.
        masks: Whether it loads or scores masks.
        classes: Names of the classes that count; None for all.
        keep_empty: Whether it trains with images without objects.
        min_size: Images with a shorter side are not trained with, pixels.
    """

    train: bool = False
    scored: bool = False
    own_file: bool = False
    masks: bool = False
    classes: tuple[str, ...] | None = None
    keep_empty: bool = True
    min_size: int = 0


def use_of(dataset: dict, scope: str, metrics: Sequence[dict] | None) -> Use:
    """What a run does with the annotation file of a data set.

    Args:
        dataset: Its config.
        scope: Default scope of the config.
        metrics: Configs of its metrics; None if it is trained with.
    """
    filters = dataset.get('filter_cfg') or {}
    scored = [m for m in metrics or () if str(m.get('type')).endswith('CocoMetric') and not m.get('format_only')]
    masks = any('segm' in as_list(m.get('metric', 'bbox')) for m in scored) or any(
        step.get('load', step).get('with_mask') for step in dataset.get('pipeline', ()) if isinstance(step, dict))
    return Use(train=metrics is None, scored=bool(scored), own_file=any(m.get('ann_file') for m in scored), masks=masks,
               classes=classes_of(dataset, scope), keep_empty=not filters.get('filter_empty_gt', False),
               min_size=filters.get('min_size', 0))


def survey(one: DataSet, dataset: dict, scope: str, metrics: Sequence[dict] | None, full: bool) -> None:
    """Check all annotations of a data set.

    Args:
        one: Receives problems, tasks and the number of objects of every class.
        dataset: Its config.
        scope: Default scope of the config.
        metrics: Configs of its metrics; None if it is trained with.
        full: Whether to decode masks that are only trained with too; the pipeline checks those when it loads them.
    """
    file, prefix = annotation_file(dataset), dataset.get('data_prefix') or {}
    assert file is not None
    one.where = str(file)
    folder = Path(one.root) / (prefix.get(image_key(prefix)) or '')
    use = use_of(dataset, scope, metrics)
    for metric in metrics or ():
        if metric.get('ann_file') and Path(metric['ann_file']).resolve() != file.resolve():
            one.problems.append(Problem('metric-file', one.place, f'the metric reads {metric["ann_file"]}, but the data set {file}'))
    try:
        data = coco.read(file)
    except BadData as error:
        one.problems += error.problems
        return
    if not folder.is_dir():
        return  # reported as a whole
    there: dict[Path, set[Path]] = {}  # by folder: listing each is faster than looking for every image
    here, absent = [], []
    for image in data['images']:
        path = folder / image['file_name']
        if path.parent not in there:
            there[path.parent] = set(path.parent.iterdir()) if path.parent.is_dir() else set()
        (here if path in there[path.parent] else absent).append(image)
    one.tasks = [Task(str(folder / image['file_name']), stated=(image['width'], image['height'])) for image in here]
    one.objects = {**dict.fromkeys(use.classes or (), 0), **coco.category_counts(data)}
    one.problems += _check(file, data, use)
    if absent:
        one.problems.append(Problem(
            'image-missing', str(file), f'{len(absent):,} of {len(data["images"]):,} images are not in {folder}: '
            f'{some(image["file_name"] for image in absent)}', items=tuple(
                Item('no such file', f'image {image["id"]}', str(folder / image['file_name'])) for image in absent)))
    if use.masks:
        one.problems += _masks(file, data, decode=full or use.scored)


def _check(file: Path, data: coco.AnnotationFile, use: Use) -> list[Problem]:
    images, objects, categories = data['images'], data.get('annotations', []), data['categories']
    problems = []
    if not images or (use.train or use.scored) and 'annotations' not in data:
        problems.append(Problem('coco-no-annotations', str(file), f"there are no {'annotations' if images else 'images'}"))
    for kind, key, entries in (('id-repeated', 'id', images), ('id-repeated', 'id', objects), ('id-repeated', 'id', categories),
                               ('name-repeated', 'name', categories), ('file-repeated', 'file_name', images)):
        section = 'images' if entries is images else 'annotations' if entries is objects else 'categories'
        counts = Counter(entry[key] for entry in entries)  # type: ignore[attr-defined]
        twice = [Item(f'{key} {value!r} occurs {count} times', section) for value, count in counts.items() if count > 1]
        problems += _problem(kind, file, twice, f'{len(twice):,} {key}s of {section} occur more than once')
    for kind, key, known in (('image-unknown', 'image_id', {image['id'] for image in images}),
                             ('category-unknown', 'category_id', {category['id'] for category in categories})):
        lost = _items(objects, lambda a, key=key, known=known: f'{key} {a[key]!r}' if a[key] not in known else '')
        problems += _problem(kind, file, lost, f'{len(lost):,} of {len(objects):,} annotations have an unknown {key}')
    if use.own_file:
        lost = _items(objects, lambda a: '' if 'iscrowd' in a else "no 'iscrowd'")
        problems += _problem('iscrowd-missing', file, lost, f"{len(lost):,} of {len(objects):,} annotations have no 'iscrowd'")
        lost = _items(objects, lambda a: '' if isinstance(a['id'], int) and a['id'] else f'id {a["id"]!r}')
        problems += _problem('id-unscorable', file, lost, f'pycocotools cannot score {len(lost):,} of {len(objects):,} '
                                                          'annotations')
    problems += _boxes(file, data)
    return problems + (_left_out(file, data, use) if use.train and not problems else [])


def _items(objects: Sequence[coco.Annotation], found) -> list[Item]:
    """The annotations for which ``found(annotation)`` returns a text."""
    return [Item(text, f'annotation {a["id"]}') for a in objects if (text := found(a))]


def _problem(kind: str, file: Path, items: Sequence[Item], text: str, severity: str = '', remedy: str = '') -> list[Problem]:
    examples = some(f'{item.entry}: {item.found}' for item in items)
    return [Problem(kind, str(file), f'{text}: {examples}', '', remedy, severity, tuple(items))] if items else []


def _boxes(file: Path, data: coco.AnnotationFile) -> list[Problem]:
    """Boxes that mmdetection ignores, or that reach beyond their image."""
    sizes = {image['id']: (image['width'], image['height']) for image in data['images']}
    objects = [a for a in data.get('annotations', ()) if a['image_id'] in sizes]
    if not objects:
        return []
    x, y, w, h = np.array([a['bbox'] for a in objects]).T
    width, height = np.array([sizes[a['image_id']] for a in objects]).T
    flat = (w < 1) | (h < 1) | (np.array([a['area'] for a in objects]) <= 0)
    outside = ~flat & ((np.minimum(x + w, width) <= np.maximum(x, 0)) | (np.minimum(y + h, height) <= np.maximum(y, 0)))
    beyond = ~flat & ~outside & ((x + w > width + 2) | (y + h > height + 2) | (x < -2) | (y < -2))
    problems = []
    for kind, found, text in (('bbox-flat', flat, 'are less than a pixel wide or high, or have no area'),
                              ('bbox-outside', outside, 'are outside of their image'),
                              ('bbox-beyond', beyond, 'reach beyond their image')):
        count = int(found.sum())
        accident = count <= max(1, _TOLERATED * len(objects)) and count < len(objects)
        if kind == 'bbox-beyond':
            kind, severity = ('bbox-corners', '') if count >= _CORNERS * len(objects) and not accident else (kind, '')
        else:
            severity = 'warning' if accident else ''
        relative = kind == 'bbox-flat' and max((x + w).max(), (y + h).max()) <= 1.5
        items = [Item(f'{objects[i]["bbox"]} in {width[i]:g}x{height[i]:g} pixels', f'annotation {objects[i]["id"]}')
                 for i in np.flatnonzero(found)]
        problems += _problem(kind, file, items, f'{count:,} of {len(objects):,} boxes {text}', severity, remedy=(
            'A bbox is [x, y, width, height] in pixels; these look like fractions of the image size.' if relative else ''))
    return problems


def _masks(file: Path, data: coco.AnnotationFile, decode: bool) -> list[Problem]:
    """Missing masks, and those that pycocotools cannot decode."""
    objects = data.get('annotations', [])
    lost = _items(objects, lambda a: '' if a.get('segmentation') else "no 'segmentation'")
    problems = _problem('segmentation-missing', file, lost, f'{len(lost):,} of {len(objects):,} annotations have no mask')
    if decode:
        sizes = {image['id']: (int(image['height']), int(image['width'])) for image in data['images']}
        bad = _items(objects, lambda a: coco.mask_problem(a['segmentation'], *sizes[a['image_id']])  # type: ignore
                     if a.get('segmentation') and a['image_id'] in sizes else '')
        problems += _problem('mask-undecodable', file, bad, f'{len(bad):,} of {len(objects):,} masks cannot be decoded')
    return problems


def _left_out(file: Path, data: coco.AnnotationFile, use: Use) -> list[Problem]:
    """The images that mmdetection does not train with: those without an object of a class, and small ones."""
    images = data['images']
    ids = {c['id'] for c in data['categories'] if use.classes is None or c['name'] in use.classes}
    having = {a['image_id'] for a in data.get('annotations', ()) if a['category_id'] in ids}
    reasons = [(image, 'no object of a class' if image['id'] not in having and not use.keep_empty else
                f'{image["width"]:g}x{image["height"]:g} pixels' if min(image['width'], image['height']) < use.min_size else '')
               for image in images]
    items = [Item(reason, f'image {image["id"]}') for image, reason in reasons if reason]
    kind = 'nothing-to-train' if len(items) == len(images) else 'left-out'
    return _problem(kind, file, items, f'{len(items):,} of {len(images):,} images are not trained with')
