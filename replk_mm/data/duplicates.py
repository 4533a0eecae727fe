"""Images that a data set has twice, or that training and validation have in common: the same bytes."""
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from replk_mm.data.files import sample
from replk_mm.data.image_files import digest
from replk_mm.data.problems import Problem

_TRAIN = 'train'


def same_names(images: Mapping[str, Sequence[str]]) -> list[Problem]:
    """Images of other splits that training has under the same name; a sample of those of the same name and size is compared.

    Args:
        images: Paths by split.
    """
    trained = {path.rpartition('/')[2]: path for path in images.get(_TRAIN, ())}
    others = dict.fromkeys(path for split, paths in images.items() if split != _TRAIN for path in paths)
    pairs = [(trained[name], path) for path in others
             if (name := path.rpartition('/')[2]) in trained and trained[name] != path]
    candidates = [pair for pair in pairs if _size(pair[0]) == _size(pair[1]) != 0]
    return [_leak(first, path) for first, path in sample(candidates) if _digest(first) == _digest(path)]


def of_equal_size(images: Iterable[str]) -> dict[str, bytes]:
    """Digests of those files that another one is as long as: only these can be the same."""
    sizes: dict[int, list[str]] = defaultdict(list)
    for path in dict.fromkeys(images):
        sizes[_size(path)].append(path)
    return {path: found for size, paths in sizes.items() if size and len(paths) > 1 for path in paths
            if (found := _digest(path))}


def find(images: Mapping[str, Sequence[str]], digests: Mapping[str, bytes]) -> dict[str, list[Problem]]:
    """Images of the same content, by the split whose they are.

    Args:
        images: Paths by split; a file that two splits read is none of these, it is said of their data sets.
        digests: Of the files, as far as they are known.
    """
    groups: dict[bytes, dict[str, str]] = defaultdict(dict)  # the split of each path
    for split, paths in images.items():
        for path in paths:
            if path in digests:
                groups[digests[path]].setdefault(path, split)
    problems: dict[str, list[Problem]] = defaultdict(list)
    for group in groups.values():
        if len(group) == 1:
            continue
        first = {split: path for path, split in reversed(group.items())}
        for path, split in group.items():
            if split != _TRAIN and _TRAIN in first:
                problems[split].append(_leak(first[_TRAIN], path))
            elif path != first[split]:
                problems[split].append(Problem('duplicate-image', path, f'the same content as {first[split]}'))
    return problems


def _leak(trained: str, path: str) -> Problem:
    return Problem('leak', path, f'the same content as {trained}, which is trained with')


def _size(path: str) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


def _digest(path: str) -> bytes:
    try:
        return digest(path)
    except OSError:
        return b''
