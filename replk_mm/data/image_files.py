"""One image file, looked at: can training read it, and does it read what is meant?"""
import hashlib
import re
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from replk_mm.data.files import EMPTY, MAX_PIXELS, damage
from replk_mm.data.problems import Problem

#: EXIF's tag of how the camera was held. Values 5 to 8 swap width and height; OpenCV, which training reads with, follows it.
ORIENTATION = 0x0112
#: Step of the deepest feature maps, pixels.
DEEPEST_STRIDE = 32
# Formats whose usual modes OpenCV is known to read; it is asked about all others.
_USUAL = {'JPEG': ('L', 'RGB', 'CMYK'), 'PNG': ('1', 'L', 'LA', 'P', 'RGB', 'RGBA', 'I;16')}
#: Formats that are another, with something behind it that their readers pass over: photographs of cameras and phones.
_SAME = {'MPO': 'JPEG'}
# A JPEG is decoded at an eighth of its size: every byte of it is read and the pixels are not wanted.
_REDUCTION = 8


@dataclass(frozen=True)
class Picture:
    """What is known of an image that could be read.

    Attributes:
        size: Width and height as training reads it, turned by EXIF; pixels.
        stored: Width and height as stored.
        orientation: EXIF's, 1 if it says nothing.
    """

    size: tuple[int, int]
    stored: tuple[int, int]
    orientation: int


def opened(path: str) -> tuple[list[Problem], Image.Image | None]:
    """Open an image file and read its header, if it can be an image and is whole.

    Returns:
        What is wrong, and the image, not decoded; None if there is none to decode.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return [Problem('not-a-file', path, 'a folder, or something else that is no file')], None
        problem = damage(Path(path))
    except FileNotFoundError:
        link = Path(path).is_symlink()
        return [Problem('broken-link', path, f'a link to {Path(path).readlink()}, which does not exist') if link else
                Problem('image-missing', path, 'no such file')], None
    except OSError as error:
        return [Problem('unreadable', path, f'cannot be read: {error.strerror or error}')], None
    if problem:
        return [Problem('empty-file' if problem == EMPTY else 'cut-off', path, problem)], None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            return [], Image.open(path)
    except UnidentifiedImageError:
        return [Problem('not-an-image', path, f'cannot be decoded: no known format; it begins with {_head(path)}')], None
    except Image.DecompressionBombError as error:
        pixels = re.search(r'\d+', str(error))
        return [Problem('too-large', path, f'{int(pixels[0]):,} pixels' if pixels else str(error),
                        allowed=f'at most {MAX_PIXELS:,} pixels')], None
    except Exception as error:  # decoders raise anything
        return [undecodable(path, error)], None


def undecodable(path: str, error: Exception) -> Problem:
    """The problem of a file that a decoder fails on."""
    return Problem('undecodable', path, f'cannot be decoded ({error})')


def _head(path: str) -> str:
    with Path(path).open('rb') as file:
        return repr(file.read(16))[1:]


def digest(path: str) -> bytes:
    """A hash of a file's content.

    Raises:
        OSError: If it cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with Path(path).open('rb') as file:
        while block := file.read(2**20):
            found.update(block)
    return found.digest()


def inspect(path: str, decode: bool) -> tuple[list[Problem], Picture | None]:
    """Look at an image that training reads with OpenCV, in colour.

    Args:
        path: The file.
        decode: Decode it too; otherwise only its header, its first and its last bytes are read.

    Returns:
        What is wrong, and what is known of it; None if it cannot be read.
    """
    problems, image = opened(path)
    if image is None:
        return problems, None
    with image:
        stored = image.size
        try:
            problems += _of_mode(path, image)
        except Exception as error:  # to know how many pictures there are, Pillow reads their headers
            return [*problems, undecodable(path, error)], None
        if min(stored) < DEEPEST_STRIDE:
            problems.append(Problem('image-tiny', path, f'{stored[0]}x{stored[1]} pixels',
                                    allowed=f'sides of at least {DEEPEST_STRIDE} pixels'))
        if decode and (failure := _decoding(path, image)):
            return [*problems, failure], None
        turned = _orientation(image)
    return problems, Picture(stored[::-1] if turned > 4 else stored, stored, turned)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, as far as OpenCV follows it."""
    # Of a TIFF Pillow says the turned size. A PNG has its EXIF before the pixels, or Pillow would decode them to look.
    if image.format == 'TIFF' or image.format == 'PNG' and 'exif' not in image.info:
        return 1
    try:
        found = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # what is no EXIF raises anything, and OpenCV ignores it
        return 1
    return found if 1 <= found <= 8 else 1


def _of_mode(path: str, image: Image.Image) -> list[Problem]:
    problems = []
    if image.mode == 'CMYK':
        problems.append(Problem('image-cmyk', path, 'colours of print (CMYK)', allowed='RGB or grey'))
    if image.mode.startswith(('I', 'F')):
        problems.append(Problem('image-16-bit', path, f'more than 8 bits a channel (mode {image.mode})', allowed='8 bits'))
    kind = _SAME.get(str(image.format), image.format)
    if kind == image.format and getattr(image, 'is_animated', False):
        problems.append(Problem('image-animated', path, f'{getattr(image, "n_frames", 2)} pictures', allowed='one'))
    elif image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
        problems.append(Problem('image-alpha', path, f'transparency (mode {image.mode})'))
    wanted = Image.registered_extensions().get(Path(path).suffix.lower())
    if wanted and _SAME.get(wanted, wanted) != kind:
        problems.append(Problem('format-suffix', path, f'a {image.format} file'))
    return problems


def _decoding(path: str, image: Image.Image) -> Problem | None:
    """Decode an image as far as it takes to know that it can be."""
    kind = _SAME.get(str(image.format), image.format)
    try:
        if kind == 'JPEG':
            image.draft('L', (max(1, image.width // _REDUCTION), max(1, image.height // _REDUCTION)))
        image.load()
        if image.mode not in _USUAL.get(str(kind), ()) and kind != 'JPEG':
            content = np.fromfile(path, np.uint8)
            if cv2.imdecode(content, cv2.IMREAD_COLOR) is None:
                return Problem('undecodable', path, f'OpenCV, which training reads with, does not read this {image.format} '
                                                    f'file (mode {image.mode})')
    except Exception as error:  # from OSError to cv2.error
        return undecodable(path, error)
    return None
