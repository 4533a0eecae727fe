"""COCO-style annotation files, read once a process: :func:`take` hands on what the checks have read."""
import gc
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from replk_mm.data.problems import BadData, Item, Problem, refuse, some

#: What mmdet and pycocotools take for granted in every entry of a section.
KEYS = {'images': ('id', 'file_name', 'height', 'width'), 'categories': ('id', 'name'),
        'annotations': ('id', 'image_id', 'category_id', 'bbox', 'area')}
_MEND = "import json; p = {path}; d = json.load(open(p)); {what}; json.dump(d, open(p, 'w'))"
_read: dict[tuple, dict] = {}


def _key(path: Path) -> tuple:
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns


def read(path: Path) -> dict:
    """The content of an annotation file, its sections and their keys as they must be.

    Raises:
        BadData: If it is no JSON, or no annotation file.
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
    counts: dict[str, int] = {}
    for c in data['categories']:  # of which two may have one name
        counts[c['name']] = counts.get(c['name'], 0) + objects[c['id']]
    return counts


def _unreadable(kind: str, path: Path, found: str, remedy: str = '') -> BadData:
    problem = Problem(kind, str(path), found, remedy=remedy)
    return BadData(f'{path}: {found}\n{problem.advice}', [problem])


def _parse(path: Path) -> Any:
    try:
        text = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
        raise _unreadable('json-not-text', path, f'not a text file: byte {error.start:,} is not UTF-8') from error
    except OSError as error:
        raise _unreadable('unreadable', path, f'cannot be read: {error.strerror or error}') from error
    collecting = gc.isenabled()
    gc.disable()  # millions of new objects and no garbage: looking for some takes as long as the rest
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        content = text.strip()
        if not content:
            raise _unreadable('json-empty', path, 'the file is empty') from error
        cut = content.startswith('{') and not content.endswith('}')
        there = text[max(0, error.pos - 20):error.pos + 20]
        raise _unreadable(
            'json-cut-off' if cut else 'json-invalid', path,
            ('the file is cut off: ' if cut else '') + f'no valid JSON at line {error.lineno}, column {error.colno} '
            f'(character {error.pos:,} of {len(text):,}): {error.msg}',
            f'There it has {there!r}. Write or download it again.') from error
    except RecursionError as error:
        raise _unreadable('json-nesting', path, 'lists or objects nested too deeply to be read') from error
    except ValueError as error:  # a number of thousands of digits
        raise _unreadable('json-invalid', path, f'no valid JSON: {error}') from error
    finally:
        if collecting:
            gc.enable()


def _checked_structure(path: Path, data: Any) -> dict:
    if not isinstance(data, dict):
        raise _unreadable('coco-structure', path, f'no annotation file: it holds a {type(data).__name__}, not an object of '
                          'images, annotations and categories', ('A list is what detections are written as. ' if isinstance(
                              data, list) else '') + 'Name the file with the annotations (ann_file of the data set).')
    problems: list[Problem] = []
    for section, keys in KEYS.items():
        if section not in data and section == 'annotations':
            continue  # of test images; who needs them says so
        entries = data.get(section)
        if not isinstance(entries, list):
            found = f'is a {type(entries).__name__}' if section in data else f'is missing; there are {some(data)}'
            problems.append(Problem('coco-structure', str(path), f'{section!r} {found}',
                                    remedy='images, annotations and categories are lists.'))
            continue
        strange = [i for i, e in enumerate(entries) if not isinstance(e, dict)]
        if strange:
            problems.append(Problem(
                'coco-structure', str(path), f'{len(strange):,} of {len(entries):,} {section} are no objects: '
                + some(f'{section}[{i}]' for i in strange), remedy=how_to_add(path, section, ''),
                items=tuple(Item('no object', f'{section}[{i}]') for i in strange)))
        for key in keys if not strange else ():
            lacking = [f'{section}[{i}]' if key == 'id' else f'id {e.get("id")}'
                       for i, e in enumerate(entries) if key not in e]
            if lacking:
                problems.append(Problem(
                    'coco-key-missing', str(path), f'{len(lacking):,} of {len(entries):,} {section} have no {key!r}: '
                    + some(lacking), remedy=how_to_add(path, section, key),
                    items=tuple(Item(f'no {key!r}', f'{section} {entry}') for entry in lacking)))
    refuse(problems or _wrong_types(path, data), path)
    return data


def _wrong_types(path: Path, data: dict) -> list[Problem]:
    problems: list[Problem] = []
    number, name = (int, float), (int, str)
    for section, key, kinds in (
            ('images', 'id', name), ('images', 'file_name', (str,)), ('images', 'width', number), ('images', 'height', number),
            ('categories', 'id', (int,)), ('categories', 'name', (str,)),
            ('annotations', 'id', name), ('annotations', 'image_id', name), ('annotations', 'category_id', (int,))):
        entries = data.get(section, ())
        wrong = [(i, e[key]) for i, e in enumerate(entries) if type(e[key]) not in kinds]
        if wrong:
            meant = ' or '.join(k.__name__ for k in kinds)
            problems.append(Problem(
                'coco-type', str(path), f'{len(wrong):,} of {len(entries):,} {section} have a {key!r} that is no {meant}: '
                + some(repr(value)[:80] for _, value in wrong),
                items=tuple(Item(f'{key} {value!r:.80}', f'{section}[{i}]') for i, value in wrong)))
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
