"""COCO-style annotation files, read once a process: :func:`take` hands on what the checks have read."""
import gc
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from replk_mm.errors import UserError

#: What mmdet and pycocotools take for granted in every entry of a section.
KEYS = {'images': ('id', 'file_name', 'height', 'width'), 'categories': ('id', 'name'),
        'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area')}
#: Examples that a message gives of one kind.
SHOWN = 5
_MEND = "import json; p = {path}; d = json.load(open(p)); {what}; json.dump(d, open(p, 'w'))"

#: What is wrong, and what to do about it.
Problems = list[tuple[str, str]]
_read: dict[tuple, dict] = {}


def _key(path: Path) -> tuple:
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns


def read(path: Path) -> dict:
    """The content of an annotation file, its sections and their keys as they must be.

    Raises:
        UserError: If it is no JSON, or no annotation file.
    """
    key = _key(path)
    if key not in _read:
        _read[key] = _checked_structure(path, _parse(path))
    return _read[key]


def take(path: str | Path) -> dict | None:
    """What :func:`read` has read of a file, once: the caller may change it. None if it has not, or the file changed since."""
    return _read.pop(_key(Path(path)), None) if Path(path).is_file() else None


def forget(but: Iterable[Path] = ()) -> None:
    """Free what has been read, except of files that will be taken."""
    kept = {_key(path) for path in but if path.is_file()}
    for key in _read.keys() - kept:
        del _read[key]


def category_counts(data: dict) -> dict[str, int]:
    """Objects of every category by name, in the file's order."""
    objects = Counter(a['category_id'] for a in data.get('annotations', ()))
    return {c['name']: objects[c['id']] for c in data['categories']}


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path}: not a text file: byte {error.start:,} is not UTF-8\n'
                        f'Write or download it again; annotation files are JSON.') from error
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects and no garbage: looking for some takes as long as the rest
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        content = text.strip()
        if not content:
            raise UserError(f'{path}: the file is empty\nWrite or download it again.') from error
        cut = content.startswith('{') and not content.endswith('}')
        there = text[max(0, error.pos - 20):error.pos + 20]
        raise UserError(f'{path}: ' + ('the file is cut off: ' if cut else '') + f'no valid JSON at line {error.lineno}, '
                        f'column {error.colno} (character {error.pos:,} of {len(text):,}): {error.msg}\n'
                        f'There it has {there!r}. Write or download it again.') from error
    finally:
        if collecting:
            gc.enable()


def _checked_structure(path: Path, data: Any) -> dict:
    if not isinstance(data, dict):
        raise UserError(f'{path}: no annotation file: it holds a {type(data).__name__}, not an object of images, annotations '
                        f'and categories\n' + ('A list is what detections are written as. ' if isinstance(data, list) else '')
                        + 'Name the file with the annotations (ann_file of the data set).')
    problems: Problems = []
    for section, keys in KEYS.items():
        if section not in data and section == 'annotations':
            continue  # of test images; who needs them says so
        entries = data.get(section)
        if not isinstance(entries, list):
            found = f'is a {type(entries).__name__}' if section in data else f'is missing; there are {some(data)}'
            problems.append((f'{section!r} {found}', 'images, annotations and categories are lists.'))
            continue
        for key in ['', *keys]:
            lacking = [i for i, e in enumerate(entries) if not isinstance(e, dict)] if not key else [
                i for i, e in enumerate(entries) if key not in e]
            if lacking:
                named = some(f'{section}[{i}]' for i in lacking) if not key or key == 'id' else some(
                    f'id {entries[i].get("id")}' for i in lacking)
                problems.append((f'{len(lacking):,} of {len(entries):,} {section} '
                                 + (f'have no {key!r}: {named}' if key else f'are no objects: {named}'),
                                 how_to_add(path, section, key)))
                if not key:
                    break
    if not problems:
        problems = _wrong_types(data)
    refuse(path, problems)
    return data


def _wrong_types(data: dict) -> Problems:
    problems: Problems = []
    number, name = (int, float), (int, str)
    for section, key, kinds in (
            ('images', 'id', name), ('images', 'file_name', (str,)), ('images', 'width', number), ('images', 'height', number),
            ('categories', 'id', (int,)), ('categories', 'name', (str,)),
            ('annotations', 'id', name), ('annotations', 'image_id', name), ('annotations', 'category_id', (int,))):
        entries = data.get(section, ())
        wrong = [e[key] for e in entries if type(e[key]) not in kinds]
        if wrong:
            problems.append((f'{len(wrong):,} of {len(entries):,} {section} have a {key!r} that is no '
                             f'{" or ".join(k.__name__ for k in kinds)}: {some(map(repr, wrong))}', ''))
    return problems


def how_to_add(path: Path, section: str, key: str) -> str:
    """A command that adds what can be known, for paste; or what to do."""
    value = {'area': "a['bbox'][2] * a['bbox'][3]", 'iscrowd': '0'}.get(key)
    if section != 'annotations' or value is None:
        return 'Mend the program that wrote the file.'
    return mend(path, f"[a.setdefault('{key}', {value}) for a in d['annotations']]",
                "Add the boxes' areas (of masks, their own areas are better)" if key == 'area' else 'Say that none is a crowd')


def mend(path: Path, what: str, says: str) -> str:
    """A command for the shell that changes an annotation file ``d``."""
    program = _MEND.format(path=repr(str(path)), what=what)
    # Within double quotes it reads better, but there the shell takes these for its own.
    return f'{says}:\n  python -c ' + (shlex.quote(program) if set(program) & set('"$`\\!') else f'"{program}"')


def refuse(path: Path, problems: Problems) -> None:
    if problems:
        lines = [f'{path}: {problems[0][0]}', *(f'  and {what}' for what, _ in problems[1:])]
        raise UserError('\n'.join([*lines, *dict.fromkeys(remedy for _, remedy in problems if remedy)]))


def some(values: Iterable) -> str:
    """The first few of ``values``, said to be more."""
    shown = [str(value) for _, value in zip(range(SHOWN + 1), values, strict=False)]
    return ', '.join(shown[:SHOWN]) + (' ...' if len(shown) > SHOWN else '')
