"""Whether an image file is whole, found from its end if possible and without decoding it."""
from pathlib import Path

from PIL import Image

# What a complete file of the format ends with.
_ENDS = {b'\xff\xd8\xff': (b'\xff\xd9', 'JPEG'), b'\x89PNG': (b'IEND', 'PNG')}
#: Bytes at the end among which the mark is looked for first.
_TAIL = 4096


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
    except (OSError, SyntaxError, ValueError):  # as Pillow's decoders raise
        return False
    except Image.DecompressionBombError:
        pass  # not this question
    return True
