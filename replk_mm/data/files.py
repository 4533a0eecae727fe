"""Read image files, and recognize truncated ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from replk_mm.errors import UserError

#: The label of pixels that are neither trained nor scored.
IGNORE_INDEX = 255
#: Files of a data set that are inspected before a run; the pipeline checks every file that it reads.
INSPECTED_FILES = 64
_T = TypeVar('_T')


def pick_evenly(items: Sequence[_T]) -> list[_T]:
    """At most :data:`INSPECTED_FILES` items at even distances, the first and the last among them."""
    count = min(INSPECTED_FILES, len(items))
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, count)})]


def list_names(folder: Path) -> set[str]:
    """Names of the files in a folder; listing it once is faster than looking for every file."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def check_image_file(path: str | Path) -> None:
    """Reject images with too many pixels, and truncated JPEGs, which OpenCV would fill with grey.

    Raises:
        OSError: If the file cannot be read, or is truncated.
        Image.DecompressionBombError: If the image has more than ``2 * Image.MAX_IMAGE_PIXELS`` pixels.
    """
    with Path(path).open('rb') as file:
        file.seek(max(0, file.seek(0, 2) - 4096))
        end = file.read()
    if not end:
        raise OSError('the file is empty')
    with Image.open(path) as image:
        # Phones append data to a JPEG: without the end marker near the end, decode it to be sure.
        if image.format in ('JPEG', 'MPO') and b'\xff\xd9' not in end:
            try:
                image.load()
            except OSError as error:
                raise OSError(f'the file is cut off ({error})') from error


def read_image(path: Path) -> np.ndarray:
    """An image ``(H, W, 3)``, uint8 BGR.

    Raises:
        UserError: If it does not exist, cannot be read, or has too many pixels.
    """
    if not path.is_file():
        raise UserError(f'{path}: no such image' + (' (it is a folder; name files)' if path.is_dir() else ''))
    try:
        check_image_file(path)
        image = cv2.imread(str(path))
    except Exception as error:  # decoders raise anything
        raise UserError(f'{path}: not a readable image ({error})') from error
    if image is None:
        raise UserError(f'{path}: not a readable image (OpenCV cannot decode it)')
    return image
