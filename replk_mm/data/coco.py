"""COCO-style annotation files, read once a process: :func:`take` hands on what the checks have read."""
import gc
import json
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replk_mm.data.problems import BadData, Item, Problem, refuse, some

_NUMBER, _NAME = (int, float), (int, str)
#: What mmdet and pycocotools take for granted in every entry of a section, and its types; of those without, others tell.
KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    'images': dict(id=_NAME, file_name=(str,), height=_NUMBER, width=_NUMBER), 'categories': dict(id=(int,), name=(str,)),
    'annotations': dict(id=_NAME, image_id=_NAME, category_id=(int,), bbox=(), area=())}
# Of an entry without one of these there is still something to say; without another, nothing tells what it belongs to.
_MEASURES = {'height', 'width', 'bbox', 'area'}
_MEND = "import json; p = {path}; d = json.load(open(p)); {what}; json.dump(d, open(p, 'w'))"


@dataclass
class Content:
    """What an annotation file says.

    Attributes:
        data: The file's object. Entries of the sections in :data:`KEYS` have the keys that tell what they belong to, and no
            key of a wrong type; others are left out.
        ids: Of all images and of all categories, of those that are left out too; nothing of a section that is none.
        problems: What is wrong with sections, keys and types; all of ``data`` is as in the file if that is nothing.
    """

    data: dict
    ids: dict[str, set] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


_read: dict[tuple, Content] = {}


def _key(path: Path) -> tuple:
    state = path.stat()
    return str(path.resolve()), state.st_size, state.st_mtime_ns


def content(path: Path) -> Content:
    """What an annotation file says, and what is wrong with its sections and their keys.

    Raises:
        BadData: If it is no JSON, or no annotation file.
    """
    key = _key(path)
    if key not in _read:
        _read[key] = _checked(path, _parse(path))
    return _read[key]


def read(path: Path) -> dict:
    """The content of an annotation file, its sections and their keys as they must be.

    Raises:
        BadData: If it is no JSON, or no annotation file, or anything is missing.
    """
    found = content(path)
    refuse(found.problems, path)
    return found.data


def take(path: str | Path) -> dict | None:
    """What :func:`read` has read of a file, once: the caller may change it. None if it has not, or the file changed since."""
    found = _read.pop(_key(Path(path)), None) if Path(path).is_file() else None
    return found.data if found and not found.problems else None


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


def _checked(path: Path, data: Any) -> Content:
    if not isinstance(data, dict):
        raise _unreadable('coco-structure', path, f'no annotation file: it holds a {type(data).__name__}, not an object of '
                          'images, annotations and categories', ('A list is what detections are written as. ' if isinstance(
                              data, list) else '') + 'Name the file with the annotations (ann_file of the data set).')
    found = Content(dict(data))
    for section, keys in KEYS.items():
        if section not in data and section == 'annotations':
            continue  # of test images; who needs them says so
        entries = data.get(section)
        if isinstance(entries, list):
            found.data[section], problems = _usable(path, section, entries)
            if section != 'annotations':
                kinds = keys['id']
                found.ids[section] = {e['id'] for e in entries if isinstance(e, dict) and type(e.get('id')) in kinds}
        else:
            found.data[section] = []
            what = f'is a {type(entries).__name__}' if section in data else f'is missing; there are {some(data)}'
            problems = [Problem('coco-structure', str(path), f'{section!r} {what}',
                                remedy='images, annotations and categories are lists.')]
        found.problems += problems
    return found


def _usable(path: Path, section: str, entries: list) -> tuple[list[dict], list[Problem]]:
    """The entries of a section as :class:`Content` has them, and what is wrong with the others."""
    problems: list[Problem] = []
    spoilt: dict[int, set[str]] = {}
    strange = [i for i, e in enumerate(entries) if not isinstance(e, dict)]
    if strange:
        problems.append(Problem(
            'coco-structure', str(path), f'{len(strange):,} of {len(entries):,} {section} are no objects: '
            + some(f'{section}[{i}]' for i in strange), remedy=how_to_add(path, section, ''),
            items=tuple(Item('no object', f'{section}[{i}]') for i in strange)))
    for key, kinds in KEYS[section].items():
        lacking = [i for i, e in enumerate(entries) if isinstance(e, dict) and key not in e]
        if lacking:
            named = [f'{section}[{i}]' if key == 'id' else f'id {entries[i].get("id")}' for i in lacking]
            problems.append(Problem(
                'coco-key-missing', str(path), f'{len(lacking):,} of {len(entries):,} {section} have no {key!r}: '
                + some(named), remedy=how_to_add(path, section, key),
                items=tuple(Item(f'no {key!r}', f'{section} {entry}') for entry in named)))
        wrong = [i for i, e in enumerate(entries)
                 if isinstance(e, dict) and key in e and type(e[key]) not in kinds] if kinds else []
        if wrong:
            meant = ' or '.join(k.__name__ for k in kinds)
            problems.append(Problem(
                'coco-type', str(path), f'{len(wrong):,} of {len(entries):,} {section} have a {key!r} that is no {meant}: '
                + some(repr(entries[i][key])[:80] for i in wrong),
                items=tuple(Item(f'{key} {entries[i][key]!r:.80}', f'{section}[{i}]') for i in wrong)))
        for i in (*lacking, *wrong):
            spoilt.setdefault(i, set()).add(key)
    return entries if not problems else [
        {key: value for key, value in e.items() if key not in spoilt[i]} if i in spoilt else e
        for i, e in enumerate(entries) if isinstance(e, dict) and spoilt.get(i, set()) <= _MEASURES], problems


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
