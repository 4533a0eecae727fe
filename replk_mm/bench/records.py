"""Files of records (:class:`replk_mm.bench.schema.Record`), a line of JSON each.

Files are only appended to, and incomplete lines are skipped. Processes may be killed at any moment, and results of
several machines merge by copying their files into one folder.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from replk_mm.bench.schema import record_problem
from replk_mm.errors import printable
from replk_mm.files import write_atomic


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


def read_records(paths: Iterable[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read records.

    Of several records with one key, the one started last counts, but a failure never replaces a result. Different keys
    of one measurement mean that the definition of the row changed: the record started last counts, and results under
    another key are reported.

    Args:
        paths: Files, work dirs or folders of files.

    Returns:
        The records that count, in the order of their files; and the skipped ones, ``'FILE:LINE: why'`` each.
    """
    complaints: list[str] = []
    by_key: dict[str, tuple[str, dict]] = {}
    for path in record_files(paths):
        for place, record in _lines(path, complaints):
            known = by_key.get(record['key'])
            if known is None or _precedence(record) >= _precedence(known[1]):
                by_key[record['key']] = place, record
    counting: dict[tuple, tuple[str, dict]] = {}
    for new in by_key.values():
        what = tuple(new[1][field] for field in ('suite', 'row', 'seed', 'measurement'))
        older, newer = sorted([counting.get(what, new), new], key=lambda entry: entry[1]['started'])
        if older is not newer and older[1]['status'] == 'done':
            complaints.append(
                f'{older[0]}: {", ".join(map(str, what[1:]))}: its row is defined differently than in '
                f'the later record at {newer[0]}'
            )
        counting[what] = newer
    return [record for _, record in counting.values()], [printable(complaint) for complaint in complaints]


def latest_records(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a row and seed that count, by measurement, from their file if there is one."""
    return {record['measurement']: record for record in (read_records([path])[0] if path.exists() else [])}


def records_since(path: Path, offset: int) -> list[dict[str, Any]]:
    """Records that were added to a file since it had ``offset`` bytes."""
    return [record for _, record in _lines(path, [], offset)] if path.exists() else []


def _precedence(record: Mapping[str, Any]) -> tuple[bool, str]:
    return record['status'] == 'done', record['started']


def _lines(path: Path, complaints: list[str], offset: int = 0) -> Iterator[tuple[str, dict]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        complaints.append(f'{path}: cannot be read ({error.strerror})')
        return
    for number, line in enumerate(content[offset:].split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            wrong = record_problem(record)
        except (ValueError, RecursionError):
            wrong = 'not JSON; its process was killed while it wrote, or the file is damaged'
        if wrong:
            complaints.append(f'{path}:{number}: {wrong}')
        else:
            yield f'{path}:{number}', record


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


def group_by_suite(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of every suite, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record['suite'], []).append(record)
    return found
