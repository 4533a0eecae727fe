"""What can be wrong with a COCO-style annotation file and its images, found before a run.

All annotations are looked at, which takes about three seconds for 860,000 of them, as many as COCO trains with; of the images
only a sample is opened.
"""
from collections import Counter
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from PIL import Image

from replk_mm.data.coco import SHOWN, Problems, how_to_add, mend, read, refuse, some
from replk_mm.data.files import damage

#: Images that are opened, evenly spread over the file.
SAMPLE = 64
#: Annotations without a usable box are left out by mmdet. COCO itself has two such; more than this share is a mistake.
TOLERATED = 0.01
#: Share of boxes reaching beyond their image from which they are taken for two corners instead of corner and size.
_CORNERS = 0.25
_ORIENTATION = 0x0112  # EXIF; 5 to 8 swap width and height, which image readers follow


@dataclass(frozen=True)
class Use:
    """What a run does with an annotation file.

    Attributes:
        train: Train with its annotations.
        masks: Load masks, or score them.
        scored: Compare detections with it.
        classes: Names of the classes that count; None for all.
        keep_empty: Train with images that have no object too.
        min_size: Images with a shorter side are left out of training, pixels.
    """

    train: bool
    masks: bool = False
    scored: bool = True
    classes: tuple[str, ...] | None = None
    keep_empty: bool = True
    min_size: int = 0


def check(path: Path, images_dir: Path, use: Use) -> str:
    """Check the content of an annotation file, and a sample of its images.

    Returns:
        A line that says what was looked at.

    Raises:
        UserError: With all kinds of problem found, each counted and with its first examples.
    """
    data = read(path)
    images, objects = data['images'], data.get('annotations', [])
    problems: Problems = []
    if (use.train or use.scored) and 'annotations' not in data:
        problems.append(("there is no 'annotations'",
                         f'{"Training" if use.train else "Scoring"} needs annotations; name a file that has them (ann_file).'))
    for section in ('images', 'annotations', 'categories'):
        problems += _repeated(section, [e['id'] for e in data.get(section, ())])
    problems += _repeated('categories', [c['name'] for c in data['categories']], 'name')
    for key, section in (('image_id', 'images'), ('category_id', 'categories')):
        known = {e['id'] for e in data[section]}
        lost = [a for a in objects if a[key] not in known]
        if lost:
            missing = list(dict.fromkeys(a[key] for a in lost))
            problems.append((f'{len(lost):,} of {len(objects):,} annotations have a {key} that {section} do not have: '
                             f'{some(missing)} (annotations {some(a["id"] for a in lost)})',
                             f'Add the {section}, or remove these annotations.'))
    if not images:
        problems.append(("'images' is empty", 'Name a file with images (ann_file).'))
    problems += _lacking_keys(path, objects, use)
    found, notes = _boxes(images, objects)
    problems += found
    problems += _on_disk(images, images_dir)
    if not problems and use.train and not use.keep_empty:
        found, left = _without_objects(data, use)
        problems, notes = problems + found, [*notes, *left]
    refuse(path, problems)
    kinds = len(data['categories'])
    return '; '.join([f'data {path}: {len(images):,} images, {len(objects):,} objects of {kinds} categories, '
                      f'{min(SAMPLE, len(images))} images opened', *notes])


def _repeated(section: str, values: list, key: str = 'id') -> Problems:
    if len(set(values)) == len(values):
        return []
    twice = [value for value, count in Counter(values).items() if count > 1]
    return [(f'{len(twice):,} of the {section} have a {key} that others have too: {some(twice)}',
             f'Give each of the {section} a {key} of its own.')]


def _lacking_keys(path: Path, objects: list[dict], use: Use) -> Problems:
    """What only some uses need: masks, and what pycocotools reads when it compares."""
    problems: Problems = []
    if use.masks:
        lacking = [a['id'] for a in objects if not a.get('segmentation')]
        if lacking:
            problems.append((f"{len(lacking):,} of {len(objects):,} annotations have no 'segmentation', and the config "
                             f'{"trains" if use.train else "scores"} masks: ids {some(lacking)}',
                             'Use a config without masks for boxes only (FCOS, Faster R-CNN), or add the masks.'))
    if use.scored:
        lacking = [a['id'] for a in objects if 'iscrowd' not in a]
        if lacking:
            problems.append((f"{len(lacking):,} of {len(objects):,} annotations have no 'iscrowd', which pycocotools needs to "
                             f'score: ids {some(lacking)}', how_to_add(path, 'annotations', 'iscrowd')))
        if 'info' not in read(path) and info_needed():
            problems.append(("there is no 'info', which this pycocotools needs to score", mend(
                path, "d['info'] = {}", 'Add an empty one')))
    return problems


def info_needed() -> bool:
    """Whether the installed pycocotools fails on files without 'info' when it reads detections; some releases do."""
    from pycocotools.coco import COCO
    with redirect_stdout(StringIO()):
        probe = COCO()
        probe.dataset = dict(images=[dict(id=1)], categories=[dict(id=1, name='')], annotations=[])
        probe.createIndex()
        try:
            probe.loadRes([dict(image_id=1, category_id=1, bbox=[0, 0, 1, 1], score=1.0)])
        except KeyError:
            return True
    return False


def _boxes(images: list[dict], objects: list[dict]) -> tuple[Problems, list[str]]:
    """Boxes that cannot be meant so: problems, and what is rare enough to be only noted."""
    shapeless = [a['id'] for a in objects if not isinstance(a['bbox'], list) or len(a['bbox']) != 4
                 or not all(isinstance(v, (int, float)) for v in a['bbox'])]
    if shapeless:
        return [(f'{len(shapeless):,} of {len(objects):,} annotations have a bbox that is not four numbers: ids '
                 f'{some(shapeless)}', 'A bbox is [x, y, width, height] in pixels.')], []
    sizes = {image['id']: (image['width'], image['height']) for image in images}
    objects = [a for a in objects if a['image_id'] in sizes]
    if not objects:
        return [], []
    x, y, w, h = np.array([a['bbox'] for a in objects], float).T
    width, height = np.array([sizes[a['image_id']] for a in objects], float).T
    flat = ~((w >= 1) & (h >= 1))  # NaN is flat too
    outside = ~flat & ~((np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0)))
    beyond = ~flat & ((x + w > width + 2) | (y + h > height + 2))
    problems: Problems = []
    notes: list[str] = []
    for found, what in ((flat, 'are less than a pixel wide or high'), (outside, 'lie outside their image')):
        if not found.any():
            continue
        shown = some(f'{objects[i]["id"]} {objects[i]["bbox"]}' for i in np.flatnonzero(found)[:SHOWN + 1])
        if found.mean() < TOLERATED:
            notes.append(f'{found.sum():,} boxes {what} and are left out')
        else:
            relative = what.startswith('are') and np.max([x + w, y + h]) <= 1.5
            problems.append((f'{found.sum():,} of {len(objects):,} boxes {what}: ids {shown}',
                             'A bbox is [x, y, width, height] in pixels; mmdet leaves such annotations out.'
                             + (' These look like shares of the image\'s size.' if relative else '')))
    if beyond.mean() >= _CORNERS:
        i = int(np.flatnonzero(beyond)[0])
        problems.append((f'{beyond.sum():,} of {len(objects):,} boxes reach beyond their image, id {objects[i]["id"]} '
                         f'{objects[i]["bbox"]} in {width[i]:.0f}x{height[i]:.0f} pixels first',
                         'A bbox is [x, y, width, height]; these look like [x1, y1, x2, y2].'))
    return problems, notes


def _on_disk(images: list[dict], folder: Path) -> Problems:
    names = [image['file_name'] for image in images]
    present = {parent: set(_files(folder / parent)) for parent in {name.rpartition('/')[0] for name in names}}
    absent = [name for name in names if name.rpartition('/')[2] not in present[name.rpartition('/')[0]]]
    problems: Problems = []
    if absent:
        problems.append((f'{len(absent):,} of {len(names):,} images are not in {folder}: {some(absent)}',
                         'Add the images, name their folder (data_prefix.img of the data set), or remove them from the file.'))
    gone = set(absent)
    here = [image for image in images if image['file_name'] not in gone]
    wrong = [text for i in sorted({round(i) for i in np.linspace(0, len(here) - 1, min(SAMPLE, len(here)))})
             for text in [_image_problem(folder / here[i]['file_name'], here[i])] if text]
    if wrong:
        problems.append(('; '.join(wrong[:SHOWN]) + (f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''),
                         'Replace these images, or mend their width and height in the file.'))
    return problems


def _files(folder: Path) -> Iterable[str]:
    return (p.name for p in folder.iterdir()) if folder.is_dir() else ()


def _image_problem(path: Path, image: dict) -> str | None:
    problem = damage(path)
    if problem:
        return f'{path}: {problem}'
    try:
        with Image.open(path) as opened:
            size = opened.size[::-1] if opened.getexif().get(_ORIENTATION, 1) > 4 else opened.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow's decoders raise
        return f'{path}: cannot be decoded ({error})'
    stated = image['width'], image['height']
    return None if size == stated else f'{path}: {size[0]}x{size[1]} pixels, and {stated[0]}x{stated[1]} in the file'


def _without_objects(data: dict, use: Use) -> tuple[Problems, list[str]]:
    ids = {c['id'] for c in data['categories'] if use.classes is None or c['name'] in use.classes}
    having = {a['image_id'] for a in data['annotations'] if a['category_id'] in ids}
    usable = [i for i in data['images'] if i['id'] in having and min(i['width'], i['height']) >= use.min_size]
    if not usable:
        return [(f'none of the {len(data["images"]):,} images has an object of a class'
                 + (f' and a side of {use.min_size} pixels' if use.min_size else ''),
                 'Check the classes (--classes) and filter_cfg of the data set.')], []
    left = len(data['images']) - len(usable)
    return [], [f'{left:,} images without objects are left out of training'] if left else []
