"""Inspect one image and its label map: are both readable, and do they fit each other and the classes?"""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from replk_mm.data import cityscapes
from replk_mm.data.checks.dataset import Inspection, LabelFormat, Sample
from replk_mm.data.files import IGNORE_INDEX
from replk_mm.data.findings import Finding
from replk_mm.errors import format_list
from replk_mm.files import sha256

#: The EXIF tag of the orientation, which OpenCV applies in training. Values 5 to 8 swap width and height.
ORIENTATION = 0x0112
#: Modes of Pillow with one channel of integers.
_LABEL_MODES = ('1', 'L', 'P', 'I', 'I;16', 'I;16B')
#: JPEGs are decoded at an eighth of their size: that reads every byte, and the pixels are not needed.
_REDUCTION = 8


class ImageSize(NamedTuple):
    """(width, height) as training reads the image, as stored in the file, and the EXIF orientation (1: none)."""

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int

    def __str__(self) -> str:
        rotated = f' after rotation by EXIF orientation {self.orientation}' if self.size != self.stored else ''
        return f'{self.size[0]}x{self.size[1]} pixels{rotated}'


def inspect_sample(sample: Sample, label_format: LabelFormat, hash_image: bool = False) -> Inspection:
    """Inspect an image, and its label map if it has one. Raises nothing, whatever the files contain."""
    result = Inspection()
    size = None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', Image.DecompressionBombWarning)
        try:
            size = read_size(sample.image)
            result.size = size.size
            if sample.stated_size:
                result.findings += check_annotated_size(sample.image, size, sample.stated_size)
            result.digest = sha256(sample.image) if hash_image else ''
        except Exception as error:  # decoders raise anything
            result.findings.append(_unreadable('image-missing', sample.image, error))
        if sample.label is not None:
            try:
                labels = _read_labels(sample.label, result.findings)
            except Exception as error:
                result.findings.append(_unreadable('label-missing', sample.label, error))
            else:
                if labels is not None:
                    if size:
                        result.findings += check_annotated_size(sample.image, size, labels.shape[::-1], sample.label)
                    findings, result.pixel_counts = _count_ids(sample.label, labels, label_format)
                    result.findings += findings
    return result


def _unreadable(missing: str, path: str, error: Exception) -> Finding:
    if isinstance(error, FileNotFoundError):
        return Finding(missing, path, 'no such file' + ' (a broken link)' * Path(path).is_symlink())
    if isinstance(error, OSError) and error.strerror:
        return Finding('unreadable', path, f'cannot be read: {error.strerror}')
    if Path(path).stat().st_size == 0:
        return Finding('unreadable', path, 'the file is empty')
    what = 'the file is cut off' if 'truncated' in str(error).lower() else 'cannot be decoded'
    return Finding('unreadable', path, f'{what} ({error})')


def read_size(path: str) -> ImageSize:
    """The size of an image, which is decoded to be sure that it can be."""
    with Image.open(path) as image:
        stored, kind = image.size, image.format
        image.draft(None, (max(1, image.width // _REDUCTION), max(1, image.height // _REDUCTION)))
        image.load()
        exif = Image.Exif()  # not `getexif`, which reads XMP too: OpenCV does not
        exif.load(image.info.get('exif', b'') if kind != 'TIFF' else b'')  # Pillow itself rotates a TIFF
        orientation = exif.get(ORIENTATION, 1)
    orientation = orientation if orientation in range(1, 9) else 1
    return ImageSize(stored[::-1] if orientation > 4 else stored, stored, orientation)


def check_annotated_size(path: str, image: ImageSize, size: tuple, label: str | None = None) -> list[Finding]:
    """Findings for the (width, height) of an annotation: of a label map, or as an annotation file states it."""
    if size == image.size:
        # The size does not show a mirrored image, a rotation by 180 degrees, or that of a square.
        is_hidden = image.orientation != 1 and image.size == image.stored
        return [Finding('exif-orientation', path, f'EXIF orientation {image.orientation}', '1')] if is_hidden else []
    if label and size != image.stored:
        return [Finding('size-mismatch', label, f'{size[0]}x{size[1]} pixels, but its image has {image}')]
    where = 'in its label map' if label else 'in the annotation file'
    code = 'exif-turned' if size == image.stored else 'stated-size'
    return [Finding(code, path, f'{image}, but {size[0]:g}x{size[1]:g} {where}')]


def _read_labels(path: str, findings: list[Finding]) -> np.ndarray | None:
    """Ids of a label map ``(H, W)``; None if the file is no label map, which is added to ``findings``."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
        if image.mode not in _LABEL_MODES:
            findings.append(Finding('label-channels', path, describe_channels(pixels)))
            return None
        if image.format in ('JPEG', 'MPO'):
            findings.append(Finding('label-lossy', path, 'a JPEG file', 'PNG'))
    return pixels


def _count_ids(path: str, labels: np.ndarray, label_format: LabelFormat) -> tuple[list[Finding], dict[int, int]]:
    """Findings for the ids of a label map ``(H, W)``, and the number of pixels of each id."""
    if labels.dtype.itemsize == 1:  # many times faster than sorting
        numbers = np.bincount(labels.astype(np.uint8).ravel(), minlength=256)  # of one bit: 0 and 1, as training reads
        ids = np.flatnonzero(numbers)
        numbers = numbers[ids]
    else:
        ids, numbers = np.unique(labels, return_counts=True)
    counts = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
    if label_format.num_classes is None:
        return [], counts
    first = int(label_format.reduce_zero_label)
    valid = range(first, label_format.num_classes + first)
    ignored = {0, IGNORE_INDEX} if first else {IGNORE_INDEX}
    if invalid := [i for i in counts if i not in valid and i not in ignored]:
        return [out_of_range(path, invalid, label_format)], counts
    if not any(i in valid for i in counts):
        return [Finding('label-all-ignored', path, f'no pixel of a class, only ids {format_list(counts)}')], counts
    return [], counts


def describe_channels(pixels: np.ndarray) -> str:
    """The message for a label file with colour channels, or with values other than integers."""
    if pixels.ndim == 2:
        return f'pixels of type {pixels.dtype}; a label map has integers, the class index of each pixel'
    return f'{pixels.shape[-1]} channels; a label map has one, the class index of each pixel'


def out_of_range(path: str, ids: Collection[int], label_format: LabelFormat) -> Finding:
    """The finding for label ids, as stored in the file, that belong to no class."""
    count, reduces = label_format.num_classes, label_format.reduce_zero_label
    assert count is not None
    expected = f'1..{count} (0 and 255 are ignored)' if reduces else f'0..{count - 1} (255 is ignored)'
    expected += f' with reduce_zero_label={reduces}'
    message = f'label ids {format_list(ids)} are out of range of the {count} classes'
    if not reduces and count == len(cityscapes.IDS) and max(ids) < cityscapes.NUM_IDS:
        return Finding('cityscapes-raw-labels', path, f'{message}; they may be raw ids of Cityscapes', expected)
    fix = 'Write the label maps with these ids, or name a class for each id up to the largest: --classes NAME,...'
    return Finding('label-out-of-range', path, message, expected, fix)
