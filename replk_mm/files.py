"""Atomic writes and content hashes."""

import hashlib
import os
from pathlib import Path

from replk_mm.errors import UserError


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write a file atomically: readers see either the old or the new content.

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
    part = path.with_name(f'{path.name}.{os.getpid()}.part')
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def write_output(path: str | Path, content: bytes | str) -> Path:
    """Write a result of a command, see :func:`write_atomic`.

    Raises:
        UserError: If it cannot be written.
    """
    try:
        return write_atomic(path, content)
    except OSError as error:
        raise UserError(
            f'{path}: cannot be written ({error.strerror})\nChoose another folder with --out DIR, or make room there.'
        ) from error


def sha256(path: str | Path) -> str:
    """Return the SHA-256 hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open('rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
