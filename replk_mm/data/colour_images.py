"""Photographs as training reads them: with OpenCV, in colour."""
from pathlib import Path

import cv2
import numpy as np

from replk_mm.data.files import damage, oversize
from replk_mm.errors import UserError


def read_image(path: Path) -> np.ndarray:
    """An image, ``(H, W, 3)`` BGR.

    Raises:
        UserError: If it does not exist, cannot be read, or has too many pixels to be read.
    """
    if not path.is_file():
        raise UserError(f'{path}: no such image' + (' (it is a folder; name files)' if path.is_dir() else ''))
    try:
        problem = damage(path) or oversize(path)
        image = None if problem else cv2.imread(str(path))
    except (OSError, cv2.error) as error:
        problem, image = str(error), None
    if image is None:
        raise UserError(f'{path}: not a readable image ({problem or "unknown format"})')
    return image
