"""COCO-style annotation files: reading and validating them, and decoding their masks."""

import functools
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image as PILImage
from pycocotools import mask as rle
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from replk_mm.data.findings import InvalidDataError, Item, Problem
from replk_mm.errors import format_list

_Id = int | str
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Side = Annotated[float, Field(ge=1, lt=1e6)]
_STRICT = ConfigDict(extra='allow', strict=True)
#: Pixels beyond which a polygon's coordinates are a mistake; pycocotools needs memory for the whole outline.
_FARTHEST = 1e5
_MOST_POINTS = 1e5
#: Pixels of the largest image that Pillow decodes; no measure in pixels is larger.
_LARGEST = 2 * (PILImage.MAX_IMAGE_PIXELS or 2**27)


class Image(TypedDict):
    """What mmdetection and pycocotools need of an image; so do the following of theirs."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: _Id
    file_name: str
    height: _Side
    width: _Side


class Category(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: int
    name: str


class Annotation(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: _Id
    image_id: _Id
    category_id: int
    bbox: Annotated[list[_Number], Field(min_length=4, max_length=4)]
    area: _Number
    iscrowd: NotRequired[Annotated[int, Field(ge=0, le=1)]]


class AnnotationFile(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    images: list[Image]
    categories: list[Category]
    annotations: NotRequired[list[Annotation]]  # test images have none


_FILE = TypeAdapter(AnnotationFile)


def read_annotations(path: Path) -> AnnotationFile:
    """The content of an annotation file; of the last few files it is kept until :func:`invalidate_cache`.

    Raises:
        InvalidDataError: If the file is no JSON, or lacks something that readers need.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise InvalidDataError([Problem('annotation-file-missing', str(path), error.strerror or str(error))]) from error
    return _read(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, time: int) -> AnnotationFile:
    try:
        return _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidDataError([Problem('json-invalid', str(path), f'cannot be read: {error.strerror}')]) from error
    except ValidationError as error:
        raise InvalidDataError(_problems(path, error)) from error


def invalidate_cache() -> None:
    """Free the files that were read."""
    _read.cache_clear()


def _problems(path: Path, error: ValidationError) -> list[Problem]:
    """A problem for each field that is wrong, with all entries where it is."""
    found: dict[tuple, dict[str, Item]] = {}
    for one in error.errors(include_url=False, include_context=False):
        place, text = one['loc'], one['msg']
        if one['type'] == 'json_invalid':
            what = 'the file is cut off' if 'EOF' in text else 'not valid JSON'
            what = what if path.stat().st_size else 'the file is empty'
            return [Problem('json-invalid', str(path), f'{what} ({text})')]
        entry = f'{place[0]}[{place[1]}]' if len(place) > 1 else ''
        field = str(place[2]) if len(place) > 2 else ''
        if one['type'] == 'missing':
            entry, field = (entry, str(place[-1])) if entry else (str(place[0]), '')
            text = f'no {field!r}' if field else 'this section is missing'
        else:
            text = f'{field} {one["input"]!r:.60}: {text}'.strip()
        found.setdefault((place[:1], field, one['type']), {}).setdefault(entry, Item(text, entry))
    return [
        Problem(
            'coco-structure',
            str(path),
            f'{len(items):,} entries: ' * (len(items) > 1)
            + format_list(f'{entry or "file"}: {item.found}' for entry, item in items.items()),
            items=tuple(items.values()),
        )
        for items in found.values()
    ]


def category_counts(data: Any) -> dict[str, int]:
    """Objects of every category by name, in the order of the file."""
    objects = Counter(a['category_id'] for a in data.get('annotations', ()))
    counts: dict[str, int] = {}
    for category in data['categories']:  # of which two may have one name
        counts[category['name']] = counts.get(category['name'], 0) + objects[category['id']]
    return counts


def _decompressed(counts: str | bytes) -> np.ndarray:
    """The runs of a compressed RLE (pycocotools, common/maskApi.c), which pycocotools 2.0.11 itself reads unchecked.

    A character holds five bits of a number, the lowest first, and whether more follow; from the fourth run on, numbers
    are differences to the run before the last. A string that ends within a number makes pycocotools read and write past
    the end of its memory.

    Raises:
        ValueError: If the string is malformed.
    """
    codes = np.frombuffer(counts.encode() if isinstance(counts, str) else counts, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((codes & 32) == 0)
    if len(codes) == 0 or codes.min() < 0 or codes.max() > 63 or len(ends) == 0 or ends[-1] != len(codes) - 1:
        raise ValueError('its string is cut off or malformed')
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if places.max() > 8:
        raise ValueError('a run has more digits than any image has pixels')
    runs = np.add.reduceat((codes & 31) << 5 * places, starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << 5 * (ends - starts + 1), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs


def mask_error(mask: object, height: int, width: int) -> str | None:
    """Why pycocotools cannot decode a mask; None if it can.

    Args:
        mask: The ``segmentation`` of an annotation or detection: polygons, or RLE.
        height: Height of its image, pixels.
        width: Width of its image, pixels.
    """
    try:
        if isinstance(mask, dict):
            counts = mask['counts']
            if mask['size'] != [height, width]:
                return f'RLE of size {mask["size"]!r:.40}, but the image is {height}x{width} (height x width)'
            if height * width > _LARGEST:
                return f'more than {_LARGEST:,} pixels'
            runs = _decompressed(counts) if isinstance(counts, (str, bytes)) else np.array(counts)
            if runs.ndim != 1 or runs.dtype.kind not in 'iu' or (runs < 0).any() or (runs > height * width).any():
                return 'runs that are no numbers of pixels'
            total = int(runs.sum())
            return (
                None if total == height * width else (f'runs of {total:,} pixels, but the image has {height * width:,}')
            )
        if not isinstance(mask, list) or not mask:
            return f'{mask!r:.40} is neither polygons nor RLE'
        for polygon in mask:
            points = np.array(polygon, np.float64)
            if points.ndim != 1 or len(points) < 6 or len(points) % 2 or len(points) > _MOST_POINTS:
                return f'a polygon of {len(polygon)} values; it needs pairs of coordinates, three or more'
            if not np.abs(points).max() < _FARTHEST:
                return 'a polygon with coordinates that are no pixels'
        rle.frPyObjects(mask, height, width)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        return f'cannot be decoded ({error})'
    return None
