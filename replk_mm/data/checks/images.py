"""Inspect one image and its label map: can training read them, and do they fit each other and the classes?"""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from replk_mm.data import cityscapes
from replk_mm.data.checks.dataset import Rules, Seen, Task
from replk_mm.data.files import IGNORE_INDEX
from replk_mm.data.findings import Problem
from replk_mm.errors import format_list
from replk_mm.files import sha256

#: EXIF's tag of the camera's orientation. Values 5 to 8 swap width and height; OpenCV, which training uses, follows it.
ORIENTATION = 0x0112
#: Pillow's modes with one channel of integers.
_LABEL_MODES = ('1', 'L', 'P', 'I', 'I;16', 'I;16B')
#: JPEGs are decoded at an eighth of their size: every byte is read, and the pixels are not needed.
_REDUCTION = 8


class Picture(NamedTuple):
    """Width and height as training reads them, as stored in the file, and the EXIF orientation (1: none)."""

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int

    def __str__(self) -> str:
        return f'{self.size[0]}x{self.size[1]} pixels'


def inspect(task: Task, rules: Rules) -> Seen:
    """Inspect an image, and its label map if it has one. Raises nothing, whatever the files contain."""
    seen = Seen()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        try:
            picture = _read_image(task.image)
        except Exception as error:  # decoders raise anything
            seen.problems.append(_unreadable('image-missing', task.image, error))
            picture = None
        if picture:
            seen.size = picture.size
            seen.problems += _against_stated(task, picture)
            seen.digest = sha256(task.image) if rules.hashes else ''
        if task.label is not None:
            try:
                pixels = _read_label(task.label, seen.problems)
            except Exception as error:
                seen.problems.append(_unreadable('label-missing', task.label, error))
                pixels = None
            if pixels is not None:
                seen.problems += _against_image(task, picture, pixels) if picture else []
                problems, seen.pixels = _count_ids(task.label, pixels, rules)
                seen.problems += problems
    return seen


def _unreadable(missing: str, path: str, error: Exception) -> Problem:
    if isinstance(error, FileNotFoundError):
        link = ' (a link that leads nowhere)' if Path(path).is_symlink() else ''
        return Problem(missing, path, f'no such file{link}')
    if isinstance(error, OSError) and error.strerror:
        return Problem('unreadable', path, f'cannot be read: {error.strerror}')
    if Path(path).stat().st_size == 0:
        return Problem('unreadable', path, 'the file is empty')
    what = 'the file is cut off' if 'truncated' in str(error).lower() else 'cannot be decoded'
    return Problem('unreadable', path, f'{what} ({error})')


def _read_image(path: str) -> Picture:
    with Image.open(path) as image:
        stored, kind = image.size, image.format
        image.draft(None, (max(1, image.width // _REDUCTION), max(1, image.height // _REDUCTION)))
        image.load()
        # Pillow rotates a TIFF by itself.
        turned = image.getexif().get(ORIENTATION, 1) if kind != 'TIFF' else 1
    turned = turned if turned in range(1, 9) else 1
    return Picture(stored[::-1] if turned > 4 else stored, stored, turned)


def _against_stated(task: Task, picture: Picture) -> list[Problem]:
    if task.stated is None or picture.size == task.stated:
        return []
    width, height = task.stated
    return [Problem('stated-size', task.image, f'{picture}, but {width:g}x{height:g} in the annotation file')]


def _against_image(task: Task, picture: Picture, pixels: np.ndarray) -> list[Problem]:
    size = pixels.shape[::-1]
    if size == picture.size:
        # A rotation by 180 degrees, or of a square, does not show in the size.
        if picture.orientation in (2, 3, 4) or picture.orientation > 4 and size[0] == size[1]:
            return [Problem('exif-orientation', task.image, f'EXIF orientation {picture.orientation}', '1')]
        return []
    if size == picture.stored:
        return [
            Problem(
                'exif-turned',
                task.image,
                f'{picture} when rotated by its EXIF tag (orientation '
                f'{picture.orientation}), but its label {size[0]}x{size[1]}',
            )
        ]
    return [Problem('size-mismatch', str(task.label), f'{size[0]}x{size[1]} pixels, but its image {picture}')]


def _read_label(path: str, problems: list[Problem]) -> np.ndarray | None:
    """Ids of a label map ``(H, W)``; None if the file is no label map, which is added to ``problems``."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
        if image.mode not in _LABEL_MODES:
            problems.append(Problem('label-channels', path, not_a_label_map(pixels)))
            return None
        if image.format in ('JPEG', 'MPO'):
            problems.append(Problem('label-lossy', path, 'a JPEG file', 'PNG'))
    return pixels


def _count_ids(path: str, pixels: np.ndarray, rules: Rules) -> tuple[list[Problem], dict[int, int]]:
    """Problems of the ids of a label map ``(H, W)``, and the number of pixels of each id."""
    if pixels.dtype.itemsize == 1:
        counts = np.bincount(pixels.view(np.uint8).ravel(), minlength=256)
        found = {int(i): int(counts[i]) for i in np.flatnonzero(counts)}
    else:
        found = {int(i): int(n) for i, n in zip(*np.unique(pixels, return_counts=True), strict=True)}
    if rules.num_classes is None:
        return [], found
    valid = range(int(rules.reduce_zero), rules.num_classes + rules.reduce_zero)
    ignored = {0, IGNORE_INDEX} if rules.reduce_zero else {IGNORE_INDEX}
    if strange := [i for i in found if i not in valid and i not in ignored]:
        return [out_of_range(path, strange, rules.num_classes, rules.reduce_zero)], found
    if not any(i in valid for i in found):
        return [Problem('label-all-ignored', path, f'no pixel of a class, only {format_list(found)}')], found
    return [], found


def not_a_label_map(pixels: np.ndarray) -> str:
    """What to report of a label file with colour channels, or with something else than integers."""
    if pixels.ndim == 2:
        return f'pixels of type {pixels.dtype}; a label map has integers, the class index of each pixel'
    return f'{pixels.shape[-1]} channels; a label map has one, the class index of each pixel'


def out_of_range(path: str, found: Collection[int], num_classes: int, reduce_zero: bool) -> Problem:
    """The problem of label ids, as stored in the file, that belong to no class."""
    valid = f'1..{num_classes} (0 and 255 are ignored)' if reduce_zero else f'0..{num_classes - 1} (255 is ignored)'
    text = f'label ids {format_list(found)} are out of range of the {num_classes} classes'
    valid += f' with reduce_zero_label={reduce_zero}'
    if not reduce_zero and num_classes == len(cityscapes.IDS) and max(found) < cityscapes.NUM_IDS:
        return Problem('cityscapes-raw-labels', path, f'{text}; they may be raw ids of Cityscapes', valid)
    return Problem('label-out-of-range', path, text, valid)
