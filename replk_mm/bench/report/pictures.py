"""Pictures within a page: scaled to a sensible width, encoded, and no more bytes of them than the page may have."""
import base64
import io
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from replk_mm.data.files import UNDECODABLE

#: Of all pictures of a page together, in bytes as they stand in it.
MOST_BYTES = 12 * 2**20
#: What is opened at all.
_MOST_PIXELS, _MOST_FILE_BYTES = 64 * 2**20, 64 * 2**20


class Unusable(Exception):
    """A file of a record that cannot be shown; the text says which and why."""


@dataclass(frozen=True)
class Picture:
    """A picture as the page takes it.

    Attributes:
        source: A ``data:`` address.
        width: In pixels.
        height: Likewise.
    """

    source: str
    width: int
    height: int


@dataclass
class Album:
    """The pictures of one page.

    Attributes:
        left: Bytes that it may still take.
        problems: What could not be shown, and why.
    """

    left: int = MOST_BYTES
    problems: list[str] = field(default_factory=list)

    def add(self, pixels: np.ndarray, width: int, kind: str, name: str) -> Picture | None:
        """Encode a picture; None, and a problem, if the page has no room left for it.

        Args:
            pixels: ``(H, W, 3)`` RGB, uint8.
            width: At most; wider ones are made smaller.
            kind: ``'photo'``, which JPEG suits; ``'drawing'``; or ``'labels'``, whose colours are not mixed.
            name: For the problem.
        """
        image = Image.fromarray(pixels)
        if image.width > width:
            size = width, max(1, round(image.height * width / image.width))
            image = image.resize(size, Image.Resampling.NEAREST if kind == 'labels' else Image.Resampling.LANCZOS)
        memory = io.BytesIO()
        if kind == 'photo':
            image.save(memory, 'JPEG', quality=82)
        else:
            few = image.getcolors(256)
            image = image.quantize(len(few), dither=Image.Dither.NONE) if few else image
            image.save(memory, 'PNG', optimize=True)
        source = f'data:image/{"jpeg" if kind == "photo" else "png"};base64,{base64.b64encode(memory.getvalue()).decode()}'
        if len(source) > self.left:
            self.problems.append(f'{name}: left out, all pictures of a page together take {MOST_BYTES // 2**20} MiB at most')
            return None
        self.left -= len(source)
        return Picture(source, image.width, image.height)


def inside(folder: Path, name: Any) -> Path:
    """A file or folder that a record names, which must lie in its work dir.

    Raises:
        Unusable: If it does not, or is not there.
    """
    # By its name: a link within the work dir, to where there is room, is the user's own.
    place = Path(os.path.normpath(str(name)))
    if '\0' in str(name) or place.is_absolute() or place.parts[:1] == (os.pardir,):
        raise Unusable(f'{name!r}: not in the work dir {folder}')
    path = folder / place
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, for one
        raise Unusable(f'{name!r:.100}: cannot be read ({error.strerror})') from error
    if not there:
        raise Unusable(f'{path}: not there')
    return path


def read_rgb(path: Path) -> np.ndarray:
    """A picture's pixels, ``(H, W, 3)`` uint8.

    Raises:
        Unusable: If it cannot be read.
    """
    return _read(path, 'RGB')


def read_labels(path: Path) -> np.ndarray:
    """A label map ``(H, W)``, uint8, as the file has it: of a palette file the places in the palette.

    Raises:
        Unusable: If it cannot be read, or is no label map.
    """
    found = _read(path, None)
    if found.ndim != 2:
        raise Unusable(f'{path}: not a label map ({found.shape[-1]} channels)')
    return found.astype(np.uint8)


def _read(path: Path, mode: str | None) -> np.ndarray:
    try:
        if not path.is_file():
            raise Unusable(f'{path}: not there')
        if path.stat().st_size > _MOST_FILE_BYTES:
            raise Unusable(f'{path}: larger than {_MOST_FILE_BYTES // 2**20} MiB')
        with Image.open(path) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise Unusable(f'{path}: {opened.width} x {opened.height} pixels are too many')
            return np.array(opened.convert(mode) if mode else opened)
    except UNDECODABLE as error:
        raise Unusable(f'{path}: not a readable picture ({type(error).__name__})') from error
