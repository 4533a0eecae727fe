"""Masks of a COCO-style annotation file, decoded as far as it takes to know that they can be."""
from collections.abc import Sequence

import numpy as np

from replk_mm.data.coco_shapes import is_number
from replk_mm.data.problems import Item, Problem, some

#: Longest outline of a polygon, and farthest corner, pixels.
_LONGEST = 1_000_000


def undecodable(objects: Sequence[dict]) -> list[Problem]:
    """Polygons of something else than numbers, and RLE whose runs do not add up to its size.

    pycocotools is not asked: it takes a string that it is given for runs, and some of its releases write past their memory.

    Args:
        objects: Entries of the file, all with a ``segmentation``.
    """
    numberless: list[Item] = []
    broken: list[Item] = []
    for a in objects:
        mask, entry = a['segmentation'], f'annotation {a["id"]}'
        if isinstance(mask, list):
            wrong = [v for polygon in mask if isinstance(polygon, list) and not _all_numbers(polygon)
                     for v in polygon if not is_number(v)]
            if wrong:
                numberless.append(Item(f'{wrong[0]!r:.40} in a polygon', entry))
            elif problem := mask_problem(mask):
                numberless.append(Item(problem, entry))
        elif isinstance(mask, dict) and (problem := rle_problem(mask)):
            broken.append(Item(problem, entry))
    return [Problem(kind, '', f'{len(found):,} of {len(objects):,} annotations have {what}: '
                    + some(f'{item.entry} ({item.found})' for item in found), items=tuple(found))
            for kind, found, what in (('polygon-number', numberless, 'polygons of something else than numbers'),
                                      ('rle-broken', broken, 'a mask (RLE) that cannot be decoded')) if found]


def _all_numbers(polygon: list) -> bool:
    # COCO's polygons have 50 million of them: their sum tells whether one is NaN.
    return not polygon or set(map(type, polygon)) <= {int, float} and all(
        is_number(of(polygon)) for of in (min, max, sum))


def mask_problem(mask: object, size: Sequence[int] | None = None) -> str | None:
    """Why a mask must not be given to pycocotools, or None: it takes memory and time for whatever numbers it is given.

    Args:
        mask: The ``segmentation`` of an annotation.
        size: Height and width of its image; None if unknown.
    """
    if isinstance(mask, dict):
        if size is not None and mask.get('size') != list(size):
            return f'RLE of size {mask.get("size")!r:.40}, and the image is {size[0]}x{size[1]}'
        return rle_problem(mask)
    if not isinstance(mask, list) or not all(isinstance(polygon, list) and _all_numbers(polygon) for polygon in mask):
        return 'neither polygons nor RLE'
    for polygon in mask:
        points = np.array(polygon[:len(polygon) // 2 * 2], float).reshape(-1, 2)
        if len(points) and max(np.abs(points).max(), np.abs(points - np.roll(points, 1, 0)).max(1).sum()) > _LONGEST:
            return f'a polygon whose outline is longer than {_LONGEST:,} pixels'
    return None


def rle_problem(mask: dict) -> str | None:
    """What is wrong with the runs of an RLE, or None."""
    size, counts = mask.get('size'), mask.get('counts')
    if not isinstance(size, list) or len(size) != 2 or not all(type(v) is int and v > 0 for v in size):
        return f'size {size!r:.40}'
    if not isinstance(counts, (str, list)):
        return None  # named by the check of its kind
    try:
        runs = decompressed(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    except (ValueError, TypeError, OverflowError) as error:
        return f'counts: {error}'
    if runs.ndim != 1 or (runs < 0).any() or (runs > size[0] * size[1]).any():  # their sum could overflow to the right one
        return 'counts: a run of less than no pixels, or of more than there are'
    total = int(runs.sum())
    wanted = size[0] * size[1]
    return None if total == wanted else f'runs of {total:,} pixels, and {size[0]}x{size[1]} is {wanted:,}'


def decompressed(text: str) -> np.ndarray:
    """The runs of a compressed RLE: five bits a character from the lowest, the sixth says that more follow; from the fourth
    run on, the difference to the run before the last (pycocotools, common/maskApi.c).

    Raises:
        ValueError: If it is none.
    """
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    if len(codes) == 0:
        return codes
    if codes.min() < 0 or codes.max() > 63:
        raise ValueError('characters that no RLE has')
    ends = np.flatnonzero(~(codes & 32).astype(bool))
    if len(ends) == 0 or ends[-1] != len(codes) - 1:
        raise ValueError('cut off within a run')
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 8:
        raise ValueError('a run of more digits than any image has pixels')
    values = np.add.reduceat((codes & 31) << 5 * places, starts)
    values -= np.where(codes[ends] & 16, np.int64(1) << 5 * (ends - starts + 1), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
