"""Boxes and masks of a COCO-style annotation file that cannot be meant so."""
from math import isfinite

import numpy as np

from replk_mm.data.coco import SHOWN, Problems, some

#: Annotations without a usable box or mask are left out by mmdet. COCO itself has two such boxes; one, or this share of all,
#: is taken for an accident, more for a mistake of whoever wrote the file.
TOLERATED = 0.01
#: Share of boxes reaching beyond their image from which they are taken for two corners instead of corner and size.
_CORNERS = 0.25
#: Numbers of a triangle, the smallest polygon.
_TRIANGLE = 6


def _is_accident(count: int, of: int) -> bool:
    return count <= max(1, TOLERATED * of) and count < of


def boxes(images: list[dict], objects: list[dict], train: bool) -> tuple[Problems, list[str]]:
    """Boxes that cannot be meant so: problems, and what is rare enough to be only noted.

    Args:
        images: Entries of the file.
        objects: Entries of the file.
        train: Whether they are trained with, not only scored.
    """
    shapeless = [a['id'] for a in objects if not isinstance(a['bbox'], list) or len(a['bbox']) != 4
                 or not all(isinstance(v, (int, float)) and isfinite(v) for v in a['bbox'])]
    if shapeless:
        return [(f'{len(shapeless):,} of {len(objects):,} annotations have a bbox that is not four numbers: ids '
                 f'{some(shapeless)}', 'A bbox is [x, y, width, height] in pixels.')], []
    sizes = {image['id']: (image['width'], image['height']) for image in images}
    objects = [a for a in objects if a['image_id'] in sizes]
    if not objects:
        return [], []
    x, y, w, h = np.array([a['bbox'] for a in objects], float).T
    width, height = np.array([sizes[a['image_id']] for a in objects], float).T
    flat = ~((w >= 1) & (h >= 1))
    outside = ~flat & ~((np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0)))
    beyond = ~flat & ((x + w > width + 2) | (y + h > height + 2))
    problems: Problems = []
    notes: list[str] = []
    for found, what in ((flat, 'are less than a pixel wide or high'), (outside, 'lie outside their image')):
        if not found.any():
            continue
        shown = some(f'{objects[i]["id"]} {objects[i]["bbox"]}' for i in np.flatnonzero(found)[:SHOWN + 1])
        if _is_accident(found.sum(), len(objects)):
            notes.append(f'boxes that {what}: {found.sum():,}, {"left out" if train else "hardly to be found"}, ids {shown}')
        else:
            relative = what.startswith('are') and np.max([x + w, y + h]) <= 1.5
            problems.append((f'{found.sum():,} of {len(objects):,} boxes {what}: ids {shown}',
                             'A bbox is [x, y, width, height] in pixels; mmdet leaves such annotations out.'
                             + (' These look like shares of the image\'s size.' if relative else '')))
    if beyond.mean() >= _CORNERS and not _is_accident(beyond.sum(), len(objects)):
        i = int(np.flatnonzero(beyond)[0])
        problems.append((f'{beyond.sum():,} of {len(objects):,} boxes reach beyond their image, id {objects[i]["id"]} '
                         f'{objects[i]["bbox"]} in {width[i]:.0f}x{height[i]:.0f} pixels first',
                         'A bbox is [x, y, width, height]; these look like [x1, y1, x2, y2].'))
    return problems, notes


def masks(images: list[dict], objects: list[dict], scored: bool) -> tuple[Problems, list[str]]:
    """Masks that cannot be read, or are of another image's size: problems, and what is rare enough to be only noted.

    Polygons are counted, not drawn.

    Args:
        images: Entries of the file.
        objects: Entries of the file, all with a ``segmentation``.
        scored: Whether pycocotools reads them; it fails on what mmdet leaves out of training.
    """
    sizes = {image['id']: [image['height'], image['width']] for image in images}
    strange, foreign, short, unreadable = [], [], [], False
    for a in objects:
        mask = a['segmentation']
        if type(mask) is list:
            if any(type(polygon) is not list for polygon in mask):
                strange.append(a['id'])
            elif any(len(polygon) < _TRIANGLE or len(polygon) % 2 for polygon in mask):
                short.append(f'{a["id"]} ({" and ".join(str(len(polygon)) for polygon in mask[:SHOWN])})')
                unreadable |= len(mask[0]) < _TRIANGLE  # it takes the first for what all are
        elif type(mask) is not dict or type(mask.get('counts')) not in (str, list) or type(mask.get('size')) is not list:
            strange.append(a['id'])
        elif mask['size'] != sizes.get(a['image_id'], mask['size']):
            foreign.append(f'{a["id"]} ({mask["size"]}, image {sizes[a["image_id"]]})')
    problems: Problems = []
    notes: list[str] = []
    count = f'of {len(objects):,} annotations have'
    if strange:
        problems.append((f"{len(strange):,} {count} a 'segmentation' that is neither polygons nor RLE: ids {some(strange)}",
                         "A 'segmentation' is a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...], or RLE, "
                         "{'size': [height, width], 'counts': ...}."))
    if foreign:
        problems.append((f'{len(foreign):,} {count} a mask (RLE) whose size is not its image\'s: ids {some(foreign)}',
                         'The size of an RLE is [height, width] of the image; write these masks again.'))
    if short:
        text = f'polygons that are not pairs of numbers, three or more: ids {some(short)} numbers'
        if (scored and unreadable) or not _is_accident(len(short), len(objects)):
            problems.append((f'{len(short):,} {count} {text}', 'A polygon is [x1, y1, x2, y2, x3, y3, ...] in pixels; remove '
                             'others, and annotations that have no other.'))
        else:
            notes.append(f'{len(short):,} annotations have {text}, {"misread" if scored else "left out"}')
    return problems, notes
