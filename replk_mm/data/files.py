"""Whether an image file is whole, found from its ends without decoding it."""
from pathlib import Path

# What a complete file of the format ends with.
_ENDS = {b'\xff\xd8\xff': (b'\xff\xd9', 'JPEG'), b'\x89PNG': (b'IEND', 'PNG')}
#: Bytes at the end among which the mark is looked for; cameras append a little after it.
_TAIL = 4096


def damage(path: Path) -> str | None:
    """What is wrong with an image file, or None. Looks at its first and last bytes only.

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
        if head.startswith(magic) and end not in tail:
            return f'the file is cut off: {size:,} bytes, and a {name} file\'s end mark is not among the last'
    return None
