"""Output files: atomic writes, protection of other files; and content hashes."""

import hashlib
import os
import re
import secrets
import zlib
from collections.abc import Iterable
from pathlib import Path

from replk_mm.errors import UserError

#: Marks the files that commands write: an entry of the metadata of checkpoints and JSON, a comment or a PNG chunk.
GENERATOR = {'generator': 'replk_mm'}
_MARK = re.compile(rb'(?s)(generator|Software).{1,12}replk_mm')
_COMMENT = b'<!-- generator: replk_mm -->\n'
# Kinds in which text after the end is a comment, or is ignored.
_TEXT_AT_END = ('.html', '.md', '.svg', '.pdf', '.jpg', '.jpeg', '.webp')
_CHUNK = b'tEXtSoftware\0replk_mm'


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write a file atomically: readers see either the old or the new content. A link is replaced, not followed.

    Args:
        path: The file; its folder is created if needed.
        content: Bytes, or text to encode as UTF-8.

    Returns:
        ``path``.

    Raises:
        OSError: If the file cannot be written; an existing file stays unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{secrets.token_hex(8)}.part')
    try:
        with part.open('xb') as file:  # a new file, with the permissions of the umask
            file.write(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_output(path: str | Path, content: bytes | str) -> Path:
    """Write a result of a command, see :func:`write_atomic`. Pages and pictures are marked as written by us.

    Raises:
        UserError: If it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    suffix = Path(path).suffix.lower()
    if suffix in _TEXT_AT_END and not _MARK.search(data[: 2**16]):
        data += _COMMENT
    elif suffix == '.png':  # a chunk after the header, with its length and checksum
        chunk = (len(_CHUNK) - 4).to_bytes(4, 'big') + _CHUNK + zlib.crc32(_CHUNK).to_bytes(4, 'big')
        data = data[:33] + chunk + data[33:]
    try:
        return write_atomic(path, data)
    except OSError as error:
        raise UserError(
            f'{path}: cannot be written ({error.strerror})\nChoose another output, or make room there.'
        ) from error


def check_outputs(paths: Iterable[str | Path], *, inputs: Iterable[str | Path] = (), overwrite: bool = False) -> None:
    """Check that a command replaces only files that it wrote itself. Call it before the work begins.

    Args:
        paths: The files that the command will write. Those with the mark of :func:`write_output` or :data:`GENERATOR`
            are its own, and beside them also kinds without a mark (``.txt``, ``.npz``, lists in JSON).
        inputs: The files that it reads. They are never replaced.
        overwrite: Whether to replace files of others, and links.

    Raises:
        UserError: For the first file that must not be replaced.
    """
    outputs, read = [Path(path) for path in paths], {os.path.realpath(path) for path in inputs}
    marked = {path for path in outputs if _is_marked(path)}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f'{path}: is an input of this command, and would be replaced\nChoose another output.')
        if path.is_dir() or (path.exists() and not path.is_file()):
            raise UserError(f'{path}: is not a regular file\nChoose another output.')
        unmarked = marked and path.suffix.lower() not in ('.html', '.md', '.png') and not path.is_symlink()
        if os.path.lexists(path) and not (path in marked or unmarked or overwrite):
            what = 'is a link' if path.is_symlink() else 'exists, and is not marked as written by replk_mm'
            raise UserError(f'{path}: {what}\nChoose another output, or replace it with --overwrite.')


def _is_marked(path: Path) -> bool:
    if path.is_symlink() or not path.is_file() or not os.access(path, os.R_OK):
        return False
    with path.open('rb') as file:
        head = file.read(2**16)
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_COMMENT)))
        return bool(_MARK.search(head) or _MARK.search(file.read()))


def sha256(path: str | Path) -> str:
    """Return the SHA-256 hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
