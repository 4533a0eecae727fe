"""Files of a data set: which there are, which are looked into, whether one is whole, how decoders fail, the ignored label."""
import os
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

#: The label of pixels that are neither trained nor scored.
IGNORED = 255
#: Files whose content is looked at before a run; the pipeline checks every file when it reads it.
SAMPLE = 64
#: What Pillow's decoders raise, given what no encoder has written.
UNDECODABLE = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError,
               MemoryError, RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
#: Pixels of an image beyond which Pillow refuses to decode it: a small file may unpack to more than any memory.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**29)
#: What :func:`damage` says of a file without content.
EMPTY = 'the file is empty'

# What a complete file of the format ends with.
_ENDS = {b'\xff\xd8\xff': (b'\xff\xd9', 'JPEG'), b'\x89PNG': (b'IEND', 'PNG')}
#: Bytes at the end among which the mark is looked for first.
_TAIL = 4096
_Item = TypeVar('_Item')


@dataclass
class Listing:
    """Files below a folder, paths relative to it: those that mmengine's readers see, and links that lead nowhere."""

    files: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)

    def names(self, suffix: str) -> set[str]:
        """Those that end with ``suffix``, without it."""
        return {file[:len(file) - len(suffix)] for file in self.files if file.endswith(suffix)}


def listing(folder: str | Path, recursive: bool = True, hidden: bool = False) -> Listing:
    """List a folder as ``mmengine.fileio.list_dir_or_file`` does, which mmseg finds its images with: links are followed.

    Args:
        folder: The folder.
        recursive: Its folders too. Defaults to True.
        hidden: Files whose names begin with a point too. Defaults to False.

    Raises:
        OSError: If a folder cannot be read.
    """
    found = Listing()
    folders: list[tuple[str, str, frozenset[str]]] = [(str(folder), '', frozenset())]
    while folders:
        place, prefix, above = folders.pop()
        real = os.path.realpath(place)
        if real in above:  # a link to a folder above, which would go on for ever
            continue
        above |= {real}
        with os.scandir(place) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir():
                    folders += [(entry.path, f'{name}/', above)] if recursive else []
                elif hidden or not entry.name.startswith('.'):
                    if entry.is_file():
                        found.files.add(name)
                    elif entry.is_symlink():
                        found.dead.add(name)
    return found


def sample(items: Sequence[_Item]) -> list[_Item]:
    """Evenly spread ones, :data:`SAMPLE` at most: the first, the last, and others between."""
    return [items[i] for i in sorted({round(i) for i in np.linspace(0, len(items) - 1, min(SAMPLE, len(items)))})]


def damage(path: Path) -> str | None:
    """What is wrong with an image file, or None. Looks at its first and last bytes; at all of it if those do not tell.

    Formats other than JPEG and PNG are left to their decoder.
    """
    with path.open('rb') as file:
        head = file.read(8)
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL))
        tail = file.read()
    if not head:
        return EMPTY
    for magic, (end, name) in _ENDS.items():
        if head.startswith(magic) and end not in tail and not _appended_to(path, end):
            return f'the file is cut off: {size:,} bytes, and a {name} file\'s end mark is not among the last'
    # OpenCV makes room for it before it reads.
    longest = _longest_part(path) if head.startswith(b'\x89PNG') else 0
    return f'the file is damaged: it announces a part of {longest:,} bytes, and has {size:,}' if longest > size else None


def oversize(path: Path) -> str | None:
    """What is wrong with an image of more than :data:`MAX_PIXELS` by its header, or None. Decodes nothing.

    Formats that Pillow does not know are left to their decoder; OpenCV has a limit of its own.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                pixels = opened.width * opened.height
    except Image.DecompressionBombError as error:
        found = re.search(r'\d+', str(error))
        pixels = int(found[0]) if found else MAX_PIXELS + 1
    except Exception:  # its decoder says what is wrong
        return None
    return f'{pixels:,} pixels, and at most {MAX_PIXELS:,} are read; cut it into tiles, or scale it down' if (
        pixels > MAX_PIXELS) else None


def _longest_part(path: Path) -> int:
    """Length of a PNG's longest part as its header has it, bytes."""
    longest = 0
    with path.open('rb') as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[:4], 'big')
            longest = max(longest, length)
            if head[4:] == b'IEND':  # what follows is no part of it
                break
            file.seek(length + 4, os.SEEK_CUR)
    return longest


def _appended_to(path: Path, end: bytes) -> bool:
    """Whether a whole image is followed by something else: phones put a film of any length behind a photograph."""
    if end not in path.read_bytes():
        return False  # decoders take what follows for pixels
    try:  # the mark may be a preview's, which stands before the image
        with Image.open(path) as opened:
            opened.load()
    except Image.DecompressionBombError:
        pass  # not this question
    except UNDECODABLE:
        return False
    return True
