"""Files of a data set: which of them are looked into, whether one is whole, how a decoder fails, the label that is ignored."""
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

#: The label of pixels that are neither trained nor scored.
IGNORED = 255
#: Files whose content is looked at before a run; the pipeline checks every file when it reads it.
SAMPLE = 64
#: What Pillow's decoders raise.
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

# What a complete file of the format ends with.
_ENDS = {b'\xff\xd8\xff': (b'\xff\xd9', 'JPEG'), b'\x89PNG': (b'IEND', 'PNG')}
#: Bytes at the end among which the mark is looked for first.
_TAIL = 4096
_Item = TypeVar('_Item')


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
        return 'the file is empty'
    for magic, (end, name) in _ENDS.items():
        if head.startswith(magic) and end not in tail and not _appended_to(path, end):
            return f'the file is cut off: {size:,} bytes, and a {name} file\'s end mark is not among the last'
    return None


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
