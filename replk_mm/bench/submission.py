"""Submissions: the results of a suite in one archive.

Archives may be those of strangers: they are unpacked to a temporary folder, of bounded size, and nothing in them runs.
"""

import contextlib
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from replk_mm.bench import records
from replk_mm.errors import UserError, command_line, format_list
from replk_mm.files import GENERATOR

SUFFIX = '.zip'
#: Files of an archive, and their bytes together.
MOST_FILES, MOST_BYTES = 100_000, 2 * 2**30
_MANIFEST, _CONTENT = 'submission.json', {**GENERATOR, 'format': 1}


def pack(paths: Sequence[str | Path], archive: Path) -> int:
    """Write the records of one work dir, the files that they name and the configs to an archive.

    The same results give the same bytes. Checkpoints, logs and data sets are left out.

    Args:
        paths: Work dir, or files of records in one.
        archive: The file, which is replaced.

    Returns:
        Number of files.

    Raises:
        UserError: If there are no records, or of several work dirs, or a file is missing or cannot be written.
    """
    found, complaints = records.read_records(paths)
    folders = {record.folder for record in found}
    if len(folders) != 1 or complaints:
        why = complaints[0] if complaints else f'{len(folders)} work dirs with records, expected one'
        raise UserError(f'{format_list(paths)}: cannot be packed: {why}\nReports merge archives: pack each work dir.')
    [folder], path, part = folders, archive, archive.with_name(f'.{archive.name}.part')
    content = {f'results/{file.name}': file for file in records.record_files(paths)}
    try:
        for record in found:
            run = folder / 'runs' / record['row'] / str(record['seed'])
            dumped = [file for place in ('test_logs/*/*.py', 'train/*.py', 'config.py') for file in run.glob(place)]
            if dumped:  # the config that ran, as text
                content[f'runs/{record["row"]}/{record["seed"]}/config.txt'] = dumped[-1]
            for name in (name for what, name in record['files'].items() if what != 'work_dir'):  # with checkpoints
                path = folder / name
                if not path.exists():
                    raise ValueError('missing, though a record names it\nRun its measurement again.')
                inside = [file for file in path.rglob('*') if file.is_file()] if path.is_dir() else [path]
                content |= {file.relative_to(folder).as_posix(): file for file in inside}
        with zipfile.ZipFile(part, 'w') as file:
            # The first file, not compressed, marks the archive as written by us.
            file.writestr(zipfile.ZipInfo(_MANIFEST), json.dumps(_CONTENT))
            for name, path in sorted(content.items()):  # dated 1980
                file.writestr(zipfile.ZipInfo(name), records.read_inside(path, folder), zipfile.ZIP_DEFLATED)
            _check(file.infolist())
        part.replace(archive)
    except (OSError, ValueError) as error:
        where = (error.filename or archive) if isinstance(error, OSError) else path
        raise UserError(f'{where}: {getattr(error, "strerror", None) or error}\n{archive} was not written.') from error
    finally:
        part.unlink(missing_ok=True)
    return len(content) + 1


@contextlib.contextmanager
def open_submissions(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """The results to read in place of ``paths``: archives are unpacked to a folder of the context.

    Raises:
        UserError: If an archive is not a submission, or too large.
    """
    with tempfile.TemporaryDirectory(prefix='replk_mm_') as temporary:
        found = list(map(Path, paths))
        for i, path in enumerate(found):
            if path.suffix.lower() == SUFFIX and path.is_file():
                found[i] = Path(temporary, quote(str(path), safe='')[-200:])  # reports show it
                _unpack(path, found[i])
        yield found


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as file:
            total = _check(file.infolist())
            if shutil.disk_usage(folder.parent).free < total + 2**28:
                raise ValueError(f'{folder.parent} has no room for {total / 2**20:.0f} MiB')
            # Writes no more than the stated sizes, and a link as a file with its target as text.
            file.extractall(folder)
        found = records.read_json(folder / _MANIFEST)
        if found.get('format') != _CONTENT['format']:
            raise ValueError(f'{_MANIFEST} does not state format {_CONTENT["format"]}')
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        packed = command_line('report', 'WORK_DIR', '--pack', 'FILE.zip')
        raise UserError(f'{archive}: not a submission: {error or "damaged"}\nWrite one with: {packed}') from error


def _check(entries: Sequence[zipfile.ZipInfo]) -> int:
    """Bytes of an archive's files; ValueError if they are too many, or a file has no place in a submission."""
    total = sum(entry.file_size for entry in entries)
    if len(entries) > MOST_FILES or total > MOST_BYTES:
        limits = f'at most {MOST_FILES:,} of {MOST_BYTES >> 20:,} MiB'
        raise ValueError(f'{len(entries):,} files of {total >> 20:,} MiB; {limits}')
    for entry in entries:
        first, *others = entry.filename.split('/')
        if entry.filename != _MANIFEST and not (first in ('results', 'runs') and others and '..' not in others):
            raise ValueError(f'{entry.filename[:200]!r} is neither {_MANIFEST} nor in results/ or runs/')
        if entry.file_size > records.MAX_FILE_BYTES:
            raise ValueError(f'{entry.filename[:200]!r} is larger than {records.MAX_FILE_BYTES >> 20} MiB')
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others may take any memory
            raise ValueError(f'{entry.filename[:200]!r} is not compressed by deflate')
    return total
