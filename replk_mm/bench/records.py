"""The record of a suite: one measurement of one row and seed, a line of JSON in an append-only file.

A record is a dict with the keys of :data:`FIELDS`; ``docs/suites.md`` says what each holds. Files only grow, and a line is
there whole or is passed over when it is read, so that a process may be killed at any moment and results of several machines
merge by putting their files into one folder.

Figures in percent are 0..100: mIoU and accuracies, and COCO's AP too (``"unit": "AP"``), which COCO itself counts 0..1.
"""
import hashlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replk_mm.errors import printable

VERSION = 1
MEASUREMENTS = ('train', 'complexity', 'metric', 'curve', 'erf', 'shape_bias', 'speed', 'memory')
STATUSES = ('done', 'failed')

#: What a record must have, and of which type.
FIELDS: dict[str, tuple[type, ...]] = dict(
    version=(int,), suite=(str,), question=(str,), row=(str,), label=(str,), seed=(int,), measurement=(str,), status=(str,),
    reason=(str, type(None)), values=(dict,), protocol=(dict,), facts=(dict,), config=(dict,), checkpoint=(dict, type(None)),
    published=(dict, type(None)), git=(dict, type(None)), environment=(dict,), started=(str,), seconds=(int, float),
    files=(dict,), key=(str,))
#: What those of an earlier program lack.
_LATER: dict[str, tuple[type, ...]] = dict(asked=(list,))


def key_of(definition: Mapping[str, Any], seed: int, measurement: str) -> str:
    """What tells whether two records are of the same thing: SHA-256, in hexadecimal.

    Args:
        definition: Of the row, with the hash of its config and its data; plain data.
        seed: Of the training.
        measurement: One of :data:`MEASUREMENTS`.
    """
    return fingerprint([definition, seed, measurement])


def fingerprint(data: object) -> str:
    """SHA-256 of plain data, in hexadecimal; the order of a dict's keys does not matter."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def complaint(record: object) -> str | None:
    """Why something is no record of this version; None if it is one."""
    if not isinstance(record, dict):
        return f'no record: {type(record).__name__} instead of an object'
    version = record.get('version')
    if version != VERSION:
        return f'version {version!r}; this replk_mm reads version {VERSION}'
    for name, types in {**FIELDS, **{name: types for name, types in _LATER.items() if name in record}}.items():
        if name not in record:
            return f'the record has no {name!r}'
        if not isinstance(record[name], types) or isinstance(record[name], bool):
            return f'{name!r} is {type(record[name]).__name__} instead of {" or ".join(t.__name__ for t in types)}'
    if record['measurement'] not in MEASUREMENTS:
        return f'measurement {record["measurement"]!r} is none of {", ".join(MEASUREMENTS)}'
    if record['status'] not in STATUSES:
        return f'status {record["status"]!r} is neither done nor failed'
    if record['status'] == 'failed' and not record['reason']:
        return 'failed without a reason'
    place = _not_finite(record)
    return f'{place} is not a finite number' if place else None


def _not_finite(node: object, place: str = '') -> str | None:
    """Where the first number that is infinite or not a number is."""
    if isinstance(node, float):
        return None if math.isfinite(node) else place
    if isinstance(node, Mapping):
        parts: Iterable[tuple[str, object]] = ((f'{place}.{key}' if place else str(key), value) for key, value in node.items())
    elif isinstance(node, (list, tuple)):
        parts = ((f'{place}[{i}]', value) for i, value in enumerate(node))
    else:
        return None
    return next((found for found in (_not_finite(value, where) for where, value in parts) if found), None)


def append(record: Mapping[str, Any], path: Path) -> None:
    """Add a record to a file: with one write, and on the disk when this returns.

    Args:
        record: Plain data.
        path: Of the file; it and its folder are made if need be.

    Raises:
        ValueError: If it is no record, or holds a number that is not finite.
        OSError: If it cannot be written.
    """
    wrong = complaint(record)
    if wrong:
        raise ValueError(f'{path}: {wrong}')
    line = json.dumps(record, allow_nan=False).encode() + b'\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        # A process that was killed while it wrote has left part of a line.
        if size and os.pread(file, 1, size - 1) != b'\n':
            line = b'\n' + line
        written = os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)
    if written != len(line):
        raise OSError(f'{path}: only {written} of {len(line)} bytes could be written; is the disk full?')


def file_of(work_dir: Path, row: str, seed: int) -> Path:
    """The file that holds the records of a row and seed."""
    return work_dir / 'results' / f'{row}.{seed}.jsonl'


def files_in(paths: Iterable[str | Path]) -> list[Path]:
    """Files of records: those named, and of a folder those in its ``results`` or in itself."""
    found: list[Path] = []
    for path in map(Path, paths):
        folder = path / 'results' if (path / 'results').is_dir() else path
        found += sorted(folder.glob('*.jsonl')) if folder.is_dir() else [path]
    return found


def read(paths: Iterable[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """Read records.

    Of several with one key the one that was started last counts, but one that is done never gives way to one that failed. Of
    one measurement of a row and seed under different keys, the row's definition has changed; that started last counts, and
    nothing is said of one that failed before.

    Args:
        paths: Files, work dirs or folders of files.

    Returns:
        The records that count, in the order of their files; and what was passed over, ``'FILE:LINE: why'`` each.
    """
    complaints: list[str] = []
    lines = [line for path in files_in(paths) for line in _lines(path, complaints)]
    by_key: dict[str, tuple[str, dict]] = {}
    for place, record in lines:
        known = by_key.get(record['key'])
        if known is None or _rank(record) >= _rank(known[1]):
            by_key[record['key']] = place, record
    latest: dict[tuple, tuple[str, dict]] = {}
    for place, record in by_key.values():
        known = latest.get(_what(record))
        if known and known[1]['started'] > record['started']:
            place, record, known = *known, (place, record)
        if known and known[1]['status'] == 'done':
            complaints.append(f'{known[0]}: {record["row"]}, seed {record["seed"]}, {record["measurement"]}: of another '
                              f'definition of the row than the later record at {place}')
        latest[_what(record)] = place, record
    return [record for _, record in latest.values()], [printable(complaint) for complaint in complaints]


def since(path: Path, offset: int) -> list[dict[str, Any]]:
    """Records that have come to a file since it had so many bytes; damaged lines are passed over."""
    if not path.exists():
        return []
    return [record for _, record in _lines(path, [], offset)]


def _rank(record: Mapping[str, Any]) -> tuple[bool, str]:
    return record['status'] == 'done', record['started']


def _what(record: Mapping[str, Any]) -> tuple[str, str, int, str]:
    return record['suite'], record['row'], record['seed'], record['measurement']


def _lines(path: Path, complaints: list[str], offset: int = 0) -> Iterable[tuple[str, dict]]:
    try:
        text = path.read_bytes()
    except OSError as error:
        complaints.append(f'{path}: cannot be read ({error.strerror})')
        return
    for number, line in enumerate(text[offset:].split(b'\n'), 1):
        if not line.strip():
            continue
        place = f'{path}:{number}'
        try:
            record = json.loads(line)
            wrong = complaint(record)
        except RecursionError:
            wrong = 'nested too deeply for a record'
        except ValueError:
            wrong = 'not JSON; its process was ended while it wrote, or the file is damaged'
        if wrong:
            complaints.append(f'{place}: {wrong}')
        else:
            yield place, record


def by_suite(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records of every suite, in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record['suite'], []).append(record)
    return found


@dataclass(frozen=True)
class Spread:
    """Several values of one thing, as of several seeds.

    Attributes:
        mean: Of all.
        deviation: The sample's standard deviation (divided by n - 1); None for a single value.
        count: How many.
    """

    mean: float
    deviation: float | None
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and deviation of at least one value."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
