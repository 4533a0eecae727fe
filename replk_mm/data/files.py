"""Image files: a sample of them, reading one, recognizing one that is cut off."""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from replk_mm.errors import UserError

#: The label of pixels that are neither trained nor scored.
IGNORE_INDEX = 255
#: Files of a data set that are inspected before a run; the pipeline checks every file when it reads it.
SAMPLE = 64
#: What Pillow's decoders raise on damaged files.
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_T = TypeVar('_T')


def sample(items: Sequence[_T]) -> list[_T]:
    """Evenly spread items, :data:`SAMPLE` at most: the first, the last, and others between."""
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, min(SAMPLE, len(items)))})]


def check_image_file(path: str | Path) -> None:
    """Raise an error for an image of too many pixels, and for a cut-off JPEG, which OpenCV would fill with grey.

    Raises:
        OSError: If the file cannot be read, or is cut off.
        Image.DecompressionBombError: If the image has more than ``2 * Image.MAX_IMAGE_PIXELS`` pixels.
    """
    with Path(path).open('rb') as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        end = file.read()
    if not end:
        raise OSError('the file is empty')
    with Image.open(path) as image:
        # Phones append data to a JPEG; then only decoding tells.
        if image.format in ('JPEG', 'MPO') and b'\xff\xd9' not in end:
            try:
                image.load()
            except OSError as error:
                raise OSError(f'the file is cut off ({error})') from error


def read_image(path: Path) -> np.ndarray:
    """An image, ``(H, W, 3)`` BGR.

    Raises:
        UserError: If it does not exist, cannot be read, or has too many pixels.
    """
    if not path.is_file():
        raise UserError(f'{path}: no such image' + (' (it is a folder; name files)' if path.is_dir() else ''))
    try:
        check_image_file(path)
        image = cv2.imread(str(path))
    except (*UNDECODABLE, cv2.error) as error:
        raise UserError(f'{path}: not a readable image ({error})') from error
    if image is None:
        raise UserError(f'{path}: not a readable image (OpenCV cannot decode it)')
    return image
