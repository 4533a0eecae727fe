"""Boxes and masks of a COCO-style annotation file that cannot be meant so."""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from replk_mm.data.problems import SHOWN, Item, Problem, some

#: Annotations without a usable box or mask are left out by mmdet. COCO itself has two such boxes; one, or this share of all,
#: is taken for an accident, more for a mistake of whoever wrote the file.
TOLERATED = 0.01
#: Share of boxes reaching beyond their image from which they are taken for two corners instead of corner and size.
_CORNERS = 0.25
#: Numbers of a triangle, the smallest polygon.
TRIANGLE = 6
#: Beyond this a number of pixels is none: not even the largest image has as many in all.
_HUGE = 1e12

#: Width and height of images by id, pixels.
Sizes = Mapping[Any, tuple[float, float]]


def _is_accident(count: int, of: int) -> bool:
    return count <= max(1, TOLERATED * of) and count < of


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number that can be a measure in pixels."""
    return isinstance(value, (int, float)) and -_HUGE < value < _HUGE


def sizes(images: Sequence[dict]) -> tuple[Sizes, list[Problem]]:
    """The sizes of the images by id, of those that have one, and what is wrong with the others that state one."""
    images = [i for i in images if 'width' in i and 'height' in i]
    good = {i['id']: (i['width'], i['height']) for i in images
            if is_number(i['width']) and is_number(i['height']) and min(i['width'], i['height']) >= 1}
    bad = [i for i in images if i['id'] not in good]
    return good, [Problem('size-invalid', '', f'{len(bad):,} of {len(images):,} images have no size: ids '
                          + some(f'{i["id"]} ({i["width"]!r:.20} x {i["height"]!r:.20})' for i in bad), items=tuple(
                              Item(f'{i["width"]!r:.20} x {i["height"]!r:.20}', f'image {i["id"]}') for i in bad)
                          )] if bad else []


def _invalid(kind: str, wrong: list[dict], of: int, key: str, what: str) -> list[Problem]:
    return [Problem(kind, '', f'{len(wrong):,} of {of:,} annotations have {what}: ids {some(a["id"] for a in wrong)}',
                    items=tuple(Item(f'{key} {a[key]!r:.80}', f'annotation {a["id"]}') for a in wrong))] if wrong else []


def boxes(image_sizes: Sizes, objects: Sequence[dict], train: bool) -> list[Problem]:
    """Boxes that cannot be meant so: errors, or warnings if they are so few that it may be an accident.

    Args:
        image_sizes: Of the images whose size is known.
        objects: Entries of the file; what is said of those without a box or an area is not repeated here.
        train: Whether they are trained with, not only scored.
    """
    count = len(objects)
    strange = [a for a in objects if 'area' in a and not is_number(a['area'])]
    problems = _invalid('area-invalid', strange, count, 'area', 'an area that is no number')
    problems += _invalid('coco-type', [a for a in objects if a.get('iscrowd', 0) not in (0, 1)], count, 'iscrowd',
                         'an iscrowd that is neither 0 nor 1')
    objects = [a for a in objects if 'bbox' in a]
    shapeless = [a for a in objects if not isinstance(a['bbox'], list) or len(a['bbox']) != 4
                 or not all(map(is_number, a['bbox']))]
    problems += _invalid('bbox-invalid', shapeless, count, 'bbox', 'a bbox that is not four numbers')
    unusable = {id(a) for a in [*strange, *shapeless]}
    objects = [a for a in objects if a['image_id'] in image_sizes and id(a) not in unusable]
    if not objects:
        return problems
    x, y, w, h = np.array([a['bbox'] for a in objects], float).T
    area = np.array([a.get('area', 1) for a in objects], float)
    width, height = np.array([image_sizes[a['image_id']] for a in objects], float).T
    flat = ~((w >= 1) & (h >= 1))
    outside = ~flat & ~((np.minimum(x + w, width) > np.maximum(x, 0)) & (np.minimum(y + h, height) > np.maximum(y, 0)))
    empty = ~flat & ~outside & (area <= 0)
    beyond = ~flat & ~outside & ((x + w > width + 2) | (y + h > height + 2) | (x < -2) | (y < -2))

    def items(found: np.ndarray) -> tuple[Item, ...]:
        return tuple(Item(f'{objects[i]["bbox"]} in {width[i]:.0f}x{height[i]:.0f} pixels', f'annotation {objects[i]["id"]}')
                     for i in np.flatnonzero(found))

    for kind, found, what in (('bbox-flat', flat, 'are less than a pixel wide or high'),
                              ('bbox-outside', outside, 'lie outside their image'),
                              ('area-not-positive', empty, 'have an area of 0 or less')):
        if not found.any():
            continue
        shown = some(f'{objects[i]["id"]} {objects[i]["bbox"]}' for i in np.flatnonzero(found)[:SHOWN + 1])
        if _is_accident(found.sum(), len(objects)):
            problems.append(Problem(kind, '', f'boxes that {what}: {found.sum():,}, '
                                    f'{"left out" if train else "hardly to be found"}, ids {shown}', severity='warning',
                                    items=items(found)))
        else:
            relative = kind == 'bbox-flat' and np.max([x + w, y + h]) <= 1.5
            problems.append(Problem(
                kind, '', f'{found.sum():,} of {len(objects):,} boxes {what}: ids {shown}',
                remedy='A bbox is [x, y, width, height] in pixels; mmdet leaves such annotations out. These look like shares '
                       "of the image's size." if relative else '', items=items(found)))
    if beyond.any():
        i = int(np.flatnonzero(beyond)[0])
        corners = beyond.mean() >= _CORNERS and not _is_accident(beyond.sum(), len(objects))
        problems.append(Problem(
            'bbox-corners' if corners else 'bbox-beyond', '', f'{beyond.sum():,} of {len(objects):,} boxes reach beyond their '
            f'image, id {objects[i]["id"]} {objects[i]["bbox"]} in {width[i]:.0f}x{height[i]:.0f} pixels first',
            items=items(beyond)))
    return problems


def masks(image_sizes: Sizes, objects: Sequence[dict], scored: bool) -> list[Problem]:
    """Masks that cannot be read, or are of another image's size: errors, or warnings if they are few and can be passed over.

    Polygons are counted, not drawn.

    Args:
        image_sizes: Of the images whose size is known.
        objects: Entries of the file, all with a ``segmentation``.
        scored: Whether pycocotools reads them; it fails on what mmdet leaves out of training.
    """
    strange: list[Item] = []
    foreign: list[Item] = []
    short: list[Item] = []
    unreadable = False
    for a in objects:
        mask = a['segmentation']
        if type(mask) is list:
            if any(type(polygon) is not list for polygon in mask):
                strange.append(Item('no polygons', str(a['id'])))
            elif any(len(polygon) < TRIANGLE or len(polygon) % 2 for polygon in mask):
                short.append(Item(' and '.join(str(len(polygon)) for polygon in mask[:SHOWN]), str(a['id'])))
                unreadable |= len(mask[0]) < TRIANGLE  # it takes the first for what all are
        elif type(mask) is not dict or type(mask.get('counts')) not in (str, list) or type(mask.get('size')) is not list:
            strange.append(Item(f'a {type(mask).__name__}', str(a['id'])))
        elif a['image_id'] in image_sizes and mask['size'] != list(image_sizes[a['image_id']])[::-1]:
            foreign.append(Item(f'{mask["size"]}, image {list(image_sizes[a["image_id"]])[::-1]}', str(a['id'])))

    def entries(found: list[Item], what: str) -> tuple[Item, ...]:
        return tuple(Item(f'{what}{item.found}', f'annotation {item.entry}') for item in found)

    problems: list[Problem] = []
    count = f'of {len(objects):,} annotations have'
    if strange:
        problems.append(Problem(
            'mask-kind', '', f"{len(strange):,} {count} a 'segmentation' that is neither polygons nor RLE: "
            f'ids {some(item.entry for item in strange)}', items=entries(strange, '')))
    if foreign:
        problems.append(Problem(
            'mask-size', '', f"{len(foreign):,} {count} a mask (RLE) whose size is not its image's: "
            f'ids {some(f"{item.entry} ({item.found})" for item in foreign)}', items=entries(foreign, 'RLE of size ')))
    if short:
        text = ('polygons that are not pairs of numbers, three or more: '
                f'ids {some(f"{item.entry} ({item.found})" for item in short)} numbers')
        harmful = (scored and unreadable) or not _is_accident(len(short), len(objects))
        problems.append(Problem(
            'polygon-short', '', f'{len(short):,} {count} {text}' if harmful else
            f'{len(short):,} annotations have {text}, {"misread" if scored else "left out"}',
            severity='error' if harmful else 'warning', items=entries(short, 'numbers in its polygons: ')))
    return problems
