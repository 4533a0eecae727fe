"""Files of records (:class:`replk_mm.bench.schema.Record`), a line of JSON each.

Files are only appended to, and incomplete lines are skipped. Processes may be killed at any moment, and results of
several machines merge by copying their files into one folder.

Records may be those of other people: :func:`resolve_inside` and :func:`read_inside` open every file that they name.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from replk_mm.bench.schema import record_problem
from replk_mm.errors import printable
from replk_mm.files import write_atomic

#: Largest file that is read for a record, and longest line of records, in bytes.
MAX_FILE_BYTES, MAX_LINE_BYTES = 256 * 2**20, 4 * 2**20


class StoredRecord(dict[str, Any]):
    """A record, and the work dir that it was read from, without links."""

    def __init__(self, content: Mapping[str, Any], folder: Path) -> None:
        super().__init__(content)
        self.folder = folder


def resolve_inside(path: Path, *folders: Path) -> Path:
    """The path of a file or folder that a record names, without links.

    Raises:
        ValueError: If it is in none of the folders, whose paths have no links.
    """
    found = Path(os.path.realpath(path))
    if not any(found.is_relative_to(folder) for folder in folders):
        raise ValueError(f'leads outside of {", ".join(map(str, folders))}')
    return found


def read_inside(path: Path, *folders: Path) -> bytes:
    """The content of a file that a record names; see :func:`resolve_inside`.

    Raises:
        ValueError: If it is elsewhere, not a regular file, or larger than :data:`MAX_FILE_BYTES`.
        OSError: If it cannot be read.
    """
    found = resolve_inside(path, *folders)
    size = found.stat().st_size
    if not found.is_file():  # opening a FIFO waits for its writer
        raise ValueError('not a regular file')
    if size > MAX_FILE_BYTES:
        raise ValueError(f'larger than {MAX_FILE_BYTES // 2**20} MiB')
    return found.read_bytes()


def append_record(record: Mapping[str, Any], path: Path) -> None:
    """Add a record to a file: with one write, and on the disk when this returns.

    Args:
        record: Plain data.
        path: The file; it and its folder are created if needed.

    Raises:
        ValueError: If it is not a record, or holds a number that is not finite.
        OSError: If it cannot be written.
    """
    wrong = record_problem(record)
    if wrong:
        raise ValueError(f'{path}: {wrong}')
    line = json.dumps(record, default=str).encode() + b'\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+b') as file:
        # A process that was killed while it wrote has left part of a line.
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = b'\n' * (file.read() != b'\n') + line
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def record_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files of records: the given ones, and of a folder those in its ``results`` or in itself."""
    found: list[Path] = []
    for path in map(Path, paths):
        folder = path / 'results' if (path / 'results').is_dir() else path
        found += sorted(folder.glob('*.jsonl')) if folder.is_dir() else [path]
    return found


def read_records(paths: Iterable[str | Path]) -> tuple[list[StoredRecord], list[str]]:
    """Read records.

    Of several records with one key, the one started last counts, but a failure never replaces a result. Different keys
    of one measurement mean that the definition of the row changed: the record started last counts, and results under
    another key are reported. Of several work dirs, the first counts, and records of the others that differ are
    reported.

    Args:
        paths: Files, work dirs or folders of files.

    Returns:
        The records that count, in the order of their files; and the skipped ones, ``'FILE:LINE: why'`` each.
    """
    complaints: list[str] = []
    counting: dict[tuple, tuple[str, StoredRecord]] = {}
    for path in record_files(paths):
        for new in _lines(path, complaints):
            what = tuple(new[1][field] for field in ('suite', 'row', 'seed', 'measurement'))
            kept = counting.setdefault(what, new)
            old_record, record = kept[1], new[1]
            differing = [name for name in ('key', 'status', 'values') if old_record[name] != record[name]]
            merged = old_record.folder != record.folder
            if merged:
                replaces = old_record['status'] == 'failed' and record['status'] == 'done'
            elif 'key' in differing:
                replaces = record['started'] >= old_record['started']
            else:
                old, late = ((r['status'] == 'done', r['started']) for r in (old_record, record))
                replaces = late >= old
            counting[what], skipped = (new, kept) if replaces else (kept, new)
            done = skipped[1]['status'] == 'done'
            if (merged and differing and (done or replaces)) or ('key' in differing and done):
                why = 'its row is defined differently than in the later record'
                if merged:
                    why = f'{" and ".join(differing)} differ from the record of another folder, which counts,'
                complaints.append(f'{skipped[0]}: {", ".join(map(str, what[1:]))}: {why} at {counting[what][0]}')
    return [record for _, record in counting.values()], [printable(complaint) for complaint in complaints]


def latest_records(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a row and seed that count, by measurement, from their file if there is one."""
    return {record['measurement']: record for record in (read_records([path])[0] if path.exists() else [])}


def records_since(path: Path, offset: int) -> list[dict[str, Any]]:
    """Records that were added to a file since it had ``offset`` bytes."""
    return [record for _, record in _lines(path, [], offset)] if path.exists() else []


def _work_dir(path: Path) -> Path:
    """The work dir of a file of records, without links: above ``results``, or else the file's folder."""
    folder = path.absolute().parent
    return Path(os.path.realpath(folder.parent if folder.name == 'results' else folder))


def _lines(path: Path, complaints: list[str], offset: int = 0) -> Iterator[tuple[str, StoredRecord]]:
    folder = _work_dir(path)
    try:
        content = read_inside(path, folder)
    except (OSError, ValueError) as error:
        complaints.append(f'{path}: cannot be read ({getattr(error, "strerror", None) or error})')
        return
    for number, line in enumerate(content[offset:].split(b'\n'), 1):
        if not line.strip():
            continue
        if len(line) > MAX_LINE_BYTES:
            complaints.append(f'{path}:{number}: longer than {MAX_LINE_BYTES // 2**20} MiB')
            continue
        try:
            record = json.loads(line)
            wrong = record_problem(record)
        except (ValueError, RecursionError):
            wrong = 'not JSON; its process was killed while it wrote, or the file is damaged'
        if wrong:
            complaints.append(f'{path}:{number}: {wrong}')
        else:
            yield f'{path}:{number}', StoredRecord(record, folder)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that is whole whenever it is read."""
    write_atomic(path, json.dumps(content, indent=1) + '\n')


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
