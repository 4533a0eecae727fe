"""COCO-style annotation files: reading and validating them, and decoding their masks."""

import functools
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image as PILImage
from pycocotools import mask as rle
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from replk_mm.data.files import list_names
from replk_mm.data.findings import Finding, InvalidDataError, Occurrence
from replk_mm.errors import format_list

_Id = int | str
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Side = Annotated[int | float, Field(ge=1, lt=1e6)]
_OPEN = ConfigDict(extra='allow')
#: Largest coordinate of a polygon, pixels: pycocotools needs memory for the whole outline.
_MAX_COORDINATE = 1e5
_MAX_VALUES = 1e5
#: Pixels of the largest image that Pillow decodes.
_MAX_PIXELS = 2 * (PILImage.MAX_IMAGE_PIXELS or 2**27)


class Image(TypedDict):
    """An image, with the keys that mmdetection and pycocotools need."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]
    id: _Id
    file_name: str
    height: _Side
    width: _Side


class Category(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    id: int
    name: str


class Annotation(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    id: _Id
    image_id: _Id
    category_id: int
    bbox: Annotated[list[_Number], Field(min_length=4, max_length=4)]
    area: _Number
    iscrowd: NotRequired[Annotated[int, Field(ge=0, le=1)]]


class AnnotationFile(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    images: list[Image]
    categories: list[Category]
    annotations: NotRequired[list[Annotation]]  # test images have none
    variants: NotRequired[list[str]]  # what the reader changed


_FILE = TypeAdapter(AnnotationFile)


def annotation_path(path: Path) -> Path:
    """The annotation file: ``NAME.json.gz`` if ``NAME.json`` does not exist."""
    packed = path.with_name(f'{path.name}.gz')
    return packed if not path.exists() and packed.is_file() else path


def read_annotations(path: Path, images: Path | None = None) -> AnnotationFile:
    """The content of an annotation file; the last few files are cached until :func:`invalidate_cache`.

    It accepts variants of annotation tools that pycocotools does not, if they are unambiguous, and lists them.

    Args:
        path: The file, see :func:`annotation_path`.
        images: Folder of the images. If given, file names are relative to it; see :func:`locate_images`.

    Raises:
        InvalidDataError: If the file is no JSON, or lacks something that readers need.
    """
    path = annotation_path(path)
    try:
        state = path.stat()
    except OSError as error:
        message = error.strerror or str(error)
        raise InvalidDataError([Finding('annotation-file-missing', str(path), message)]) from error
    data = _read_annotations(path, state.st_size, state.st_mtime_ns)
    names = [image['file_name'] for image in data['images']]
    located = names if images is None else locate_images(names, images)
    if located == names:
        return data
    moved = [f'{old} is {new}' for old, new in zip(names, located, strict=True) if old != new]
    entries: Any = [{**image, 'file_name': name} for image, name in zip(data['images'], located, strict=True)]
    variant = f'{len(moved):,} file names have other folders: in {images}, {moved[0]}'
    return {**data, 'images': entries, 'variants': [*data['variants'], variant]}


@functools.lru_cache(maxsize=4)
def _read_annotations(path: Path, size: int, time: int) -> AnnotationFile:
    variants: list[str] = []
    try:
        content = path.read_bytes()
        if content.startswith(b'\x1f\x8b'):
            content = gzip.decompress(content)
            variants.append('compressed by gzip')
        if (encoding := json.detect_encoding(content[:4])) != 'utf-8':  # Windows writes a byte order mark, or UTF-16
            content = content.decode(encoding).encode()
            variants.append(f'encoded as {encoding}')
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        message = f'cannot be read: {getattr(error, "strerror", None) or error}'
        raise InvalidDataError([Finding('json-invalid', str(path), message)]) from error
    try:
        data = _FILE.validate_json(content, strict=True)
    except ValidationError as strict:
        try:
            data = _FILE.validate_json(content, strict=False)
        except ValidationError as error:
            raise InvalidDataError(_findings(path, content, error)) from error
        others = {f.occurrences[0].message.partition(':')[0]: f.occurrences for f in _findings(path, content, strict)}
        variants += [f'{len(found):,} values such as {first} are of another type' for first, found in others.items()]
    ids = {image['id'] for image in data['images']}
    by_text = {str(i): i for i in ids}
    objects = data.get('annotations', [])
    by_other = [a for a in objects if a['image_id'] not in ids and str(a['image_id']) in by_text]
    if by_other:
        first = by_other[0]['image_id']
        variants.append(f'{len(by_other):,} annotations have image_id {first!r} for image {by_text[str(first)]!r}')
        for annotation in by_other:
            annotation['image_id'] = by_text[str(annotation['image_id'])]
    return {**data, 'variants': variants}


def locate_images(names: Sequence[str], folder: Path) -> list[str]:
    """Paths of images in their folder, from the file names in an annotation file.

    Exporters write backslashes, absolute paths, or folders of their own. Of a path that does not exist, the longest end
    that exists is used, unless two paths have it in common.
    """
    listed = functools.cache(list_names)
    found = {}
    for name in names:
        parts = name.replace('\\', '/').split('/')
        ends = [name, *('/'.join(parts[i:]) for i in range(len(parts)))] if len(parts) > 1 else []
        found[name] = next((end for end in ends if end and Path(end).name in listed((folder / end).parent)), name)
    counts = Counter(found.values())
    return [found[name] if counts[found[name]] == 1 else name for name in names]


def invalidate_cache() -> None:
    """Free the memory of the files that were read."""
    _read_annotations.cache_clear()


def _findings(path: Path, content: bytes, error: ValidationError) -> list[Finding]:
    """A finding for each invalid field, with all its entries."""
    groups: dict[tuple, dict[str, Occurrence]] = {}
    for fault in error.errors(include_url=False, include_context=False):
        location, message = fault['loc'], fault['msg']
        if fault['type'] == 'json_invalid':
            what = 'the file is cut off' if 'EOF' in message else 'not valid JSON'
            what = what if content else 'the file is empty'
            fix = 'Save the file as UTF-8.' if 'unicode' in message else ''
            return [Finding('json-invalid', str(path), f'{what} ({message})', fix=fix)]
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
    """Number of objects of every category that is a class, in the order of the file.

    Exporters add a category without objects: the supercategory of all others (Roboflow), or the background (labelme).
    """
    objects = Counter(a['category_id'] for a in data.get('annotations', ()))
    parents = [category.get('supercategory') for category in data['categories']]
    counts: dict[str, int] = {}
    for category in data['categories']:  # two may have the same name
        name, own = category['name'], objects[category['id']]
        is_root = len(parents) > 1 and parents.count(name) == len(parents) - 1 and category.get('supercategory') != name
        if own or not objects or not (is_root or name.lower().strip('_') == 'background'):
            counts[name] = counts.get(name, 0) + own
    return counts


def run_lengths(counts: str | bytes | list) -> np.ndarray:
    """The runs of an RLE, compressed (pycocotools, common/maskApi.c) or not. pycocotools 2.0.11 does not validate them.

    Each character holds five bits of a number, lowest first, and a bit that says whether more follow. From the fourth
    run on, numbers are differences to the run before the last. If a string ends within a number, pycocotools reads and
    writes past the end of its memory.

    Raises:
        ValueError: If the string is malformed.
    """
    if not isinstance(counts, (str, bytes)):
        return np.array(counts)
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
            runs = run_lengths(counts)
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
