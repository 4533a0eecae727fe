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

from replk_mm.data.findings import Finding, InvalidDataError, Occurrence
from replk_mm.errors import format_list

_Id = int | str
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Side = Annotated[float, Field(ge=1, lt=1e6)]
_STRICT = ConfigDict(extra='allow', strict=True)
#: Largest coordinate of a polygon, pixels: pycocotools needs memory for the whole outline.
_MAX_COORDINATE = 1e5
_MAX_VALUES = 1e5
#: Pixels of the largest image that Pillow decodes.
_MAX_PIXELS = 2 * (PILImage.MAX_IMAGE_PIXELS or 2**27)


class Image(TypedDict):
    """An image, with the keys that mmdetection and pycocotools need."""

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
    """The content of an annotation file; the last few files are cached until :func:`invalidate_cache`.

    Raises:
        InvalidDataError: If the file is no JSON, or lacks something that readers need.
    """
    try:
        state = path.stat()
    except OSError as error:
        message = error.strerror or str(error)
        raise InvalidDataError([Finding('annotation-file-missing', str(path), message)]) from error
    return _read_annotations(path, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_annotations(path: Path, size: int, time: int) -> AnnotationFile:
    try:
        return _FILE.validate_json(path.read_bytes())
    except OSError as error:
        raise InvalidDataError([Finding('json-invalid', str(path), f'cannot be read: {error.strerror}')]) from error
    except ValidationError as error:
        raise InvalidDataError(_findings(path, error)) from error


def invalidate_cache() -> None:
    """Free the memory of the files that were read."""
    _read_annotations.cache_clear()


def _findings(path: Path, error: ValidationError) -> list[Finding]:
    """A finding for each invalid field, with all its entries."""
    groups: dict[tuple, dict[str, Occurrence]] = {}
    for fault in error.errors(include_url=False, include_context=False):
        location, message = fault['loc'], fault['msg']
        if fault['type'] == 'json_invalid':
            what = 'the file is cut off' if 'EOF' in message else 'not valid JSON'
            what = what if path.stat().st_size else 'the file is empty'
            return [Finding('json-invalid', str(path), f'{what} ({message})')]
        entry = f'{location[0]}[{location[1]}]' if len(location) > 1 else ''
        field = str(location[2]) if len(location) > 2 else ''
        if fault['type'] == 'missing':
            entry, field = (entry, str(location[-1])) if entry else (str(location[0]), '')
            message = f'no {field!r}' if field else 'this section is missing'
        else:
            message = f'{field} {fault["input"]!r:.60}: {message}'.strip()
        group = groups.setdefault((location[:1], field, fault['type']), {})
        group.setdefault(entry, Occurrence(message, entry))
    findings = []
    for group in groups.values():
        message = f'{len(group):,} entries: ' if len(group) > 1 else ''
        message += format_list(f'{entry or "file"}: {found.message}' for entry, found in group.items())
        findings.append(Finding('coco-structure', str(path), message, occurrences=tuple(group.values())))
    return findings


def category_counts(data: Any) -> dict[str, int]:
    """Number of objects of every category, in the order of the file."""
    objects = Counter(a['category_id'] for a in data.get('annotations', ()))
    counts: dict[str, int] = {}
    for category in data['categories']:  # two may have the same name
        counts[category['name']] = counts.get(category['name'], 0) + objects[category['id']]
    return counts


def _decompress(counts: str | bytes) -> np.ndarray:
    """The runs of a compressed RLE (pycocotools, common/maskApi.c). pycocotools 2.0.11 does not validate them.

    Each character holds five bits of a number, lowest first, and a bit that says whether more follow. From the fourth
    run on, numbers are differences to the run before the last. If a string ends within a number, pycocotools reads and
    writes past the end of its memory.

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
    """The reason why pycocotools cannot decode a mask; None if it can.

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
            if height * width > _MAX_PIXELS:
                return f'more than {_MAX_PIXELS:,} pixels'
            runs = _decompress(counts) if isinstance(counts, (str, bytes)) else np.array(counts)
            if runs.ndim != 1 or runs.dtype.kind not in 'iu' or (runs < 0).any() or (runs > height * width).any():
                return 'runs that are not pixel counts'
            total = int(runs.sum())
            return None if total == height * width else f'runs of {total:,} pixels of {height * width:,} in the image'
        if not isinstance(mask, list) or not mask:
            return f'{mask!r:.40} is neither polygons nor RLE'
        for polygon in mask:
            points = np.array(polygon, np.float64)
            if points.ndim != 1 or len(points) < 6 or len(points) % 2 or len(points) > _MAX_VALUES:
                return f'a polygon of {len(polygon)} values; it needs pairs of coordinates, three or more'
            if not np.abs(points).max() < _MAX_COORDINATE:
                return 'a polygon with coordinates far outside of any image'
        rle.frPyObjects(mask, height, width)
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        return f'cannot be decoded ({error})'
    return None
