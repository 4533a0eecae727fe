"""Images that a data set has twice, or that training and validation have in common: the same file, or the same bytes."""
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from replk_mm.data.files import sample
from replk_mm.data.image_files import digest
from replk_mm.data.problems import Problem
from replk_mm.data.progress import Progress

_TRAIN = 'train'
# Bytes in the middle and at the end, which tell nearly all files of one size apart.
_GLIMPSE = 4096


def same_names(images: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Images of other splits that are trained with: the same file, or one of the same name and content.

    Of those of the same name and size a sample is compared.

    Args:
        images: Paths by split.
    """
    shared = [problem for problems in _same_files(images).values() for problem in problems]
    said = {problem.path for problem in shared}
    trained = {path.rpartition('/')[2]: path for path in images.get(_TRAIN, ())}
    others = dict.fromkeys(path for split, paths in images.items() if split != _TRAIN for path in paths if path not in said)
    pairs = [(trained[name], path) for path in others if (name := path.rpartition('/')[2]) in trained]
    candidates = [pair for pair in pairs if _size(pair[0]) == _size(pair[1]) != 0]
    return shared + [_leak(first, path) for first, path in sample(candidates) if _read(digest, first) == _read(digest, path)]


def of_equal_size(images: Iterable[str]) -> dict[str, bytes]:
    """Digests of those files that another one is as long as, and like where both are read: only these can be the same.

    A bar on standard error shows how far it has come.
    """
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(images):
        sizes[_size(path)].append(path)
    groups = [paths for size, paths in sizes.items() if size and len(paths) > 1]
    progress = Progress(sum(map(len, groups)), 'images of equal size')
    found = {}
    for paths in groups:
        alike: dict[bytes, list[str]] = defaultdict(list)
        for path in paths:
            alike[_read(_glimpse, path)].append(path)
            progress.step()
        found.update({path: _read(digest, path) for some in alike.values() if len(some) > 1 for path in some})
    progress.end()
    return {path: content for path, content in found.items() if content}


def find(images: Mapping[str, Sequence[str]], digests: Mapping[str, bytes]) -> dict[str, list[Problem]]:
    """Images that are trained with, and others of the same content, by the split whose they are.

    Args:
        images: Paths by split, without those of data sets that are known to be trained with as a whole.
        digests: Of the files, as far as they are known.
    """
    problems = _same_files(images)
    said = {(split, problem.path) for split, found in problems.items() for problem in found}
    groups: dict[bytes, dict[str, str]] = defaultdict(dict)  # the split of each path
    for split, paths in images.items():
        for path in paths:
            if path in digests and (split, path) not in said:
                groups[digests[path]].setdefault(path, split)
    for group in groups.values():
        first = {split: path for path, split in reversed(group.items())}
        for path, split in group.items():
            if split != _TRAIN and _TRAIN in first:
                problems[split].append(_leak(first[_TRAIN], path))
            elif path != first[split]:
                problems[split].append(Problem('duplicate-image', path, f'the same content as {first[split]}'))
    return problems


def _same_files(images: Mapping[str, Sequence[str]]) -> dict[str, list[Problem]]:
    """Files that are trained with and belong to another split too, by that split."""
    problems: dict[str, list[Problem]] = defaultdict(list)
    folders: dict[str, str] = {}  # as they are without links and '..', each looked up once

    def place(path: str) -> tuple[str, str]:
        name = path.rpartition('/')[2]
        folder = path[:len(path) - len(name)]
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        return folders[folder], name

    trained = set(map(place, images.get(_TRAIN, ())))
    for split, paths in images.items():
        if split != _TRAIN:
            problems[split] += [Problem('leak', path, 'the same file is trained with')
                                for path in dict.fromkeys(paths) if place(path) in trained]
    return problems


def _leak(trained: str, path: str) -> Problem:
    return Problem('leak', path, f'the same content as {trained}, which is trained with')


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _glimpse(path: str) -> bytes:
    with Path(path).open('rb') as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(size // 2)
        middle = file.read(_GLIMPSE)
        file.seek(max(0, size - _GLIMPSE))
        return middle + file.read(_GLIMPSE)


def _read(how: Callable[[str], bytes], path: str) -> bytes:
    try:
        return how(path)
    except OSError:
        return b''
