"""A data set under check: what is known before its images are opened, and what was counted in them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replk_mm.data.files import IGNORE_INDEX
from replk_mm.data.findings import Problem

#: Share of files from which an id counts as occurring in nearly all of them.
_NEARLY_ALL = 0.9
_ADE_CLASSES = 150


@dataclass(frozen=True)
class Task:
    """An image to inspect, with its label map, or with the width and height that an annotation file states."""

    image: str
    label: str | None = None
    stated: tuple[float, float] | None = None


@dataclass(frozen=True)
class Rules:
    """What holds for every image of a data set.

    Attributes:
        num_classes: Number of classes that label maps may hold; None does not check ids.
        reduce_zero: Whether 0 is ignored and 1 is the first class.
        hashes: Whether to hash the image files, to find duplicates.
    """

    num_classes: int | None = None
    reduce_zero: bool = False
    hashes: bool = False


@dataclass
class Seen:
    """What was found in an image and its label map.

    Attributes:
        problems: What is wrong.
        size: Width and height of the image, pixels; None if it cannot be read.
        pixels: Pixels of every id of the label map.
        digest: SHA-256 of the image file, if requested.
    """

    problems: list[Problem] = field(default_factory=list)
    size: tuple[int, int] | None = None
    pixels: Mapping[int, int] = field(default_factory=dict)
    digest: str = ''


@dataclass
class DataSet:
    """A data set and what was found in it.

    Attributes:
        place: Its path in the config.
        split: ``'train'``, ``'val'`` or ``'test'``.
        type: Its class, as the config names it.
        root: Its folder.
        where: Folder of the label maps, or annotation file.
        problems: All problems found.
        tasks: Its images.
        rules: What holds for each of them.
        names: Class names by label id (label maps).
        objects: Number of objects of every class (annotations); None for label maps.
        inspected: Number of images inspected.
        pixels: Pixels of every label id.
        files: Number of label maps that contain an id.
        labels: Number of label maps read.
        sizes: Number of images of each width and height.
    """

    place: str
    split: str
    type: str
    root: str
    where: str = ''
    problems: list[Problem] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    rules: Rules = Rules()
    names: dict[int, str] = field(default_factory=dict)
    objects: dict[str, int] | None = None
    inspected: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    files: Counter[int] = field(default_factory=Counter)
    labels: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def report(self, kind: str, path: str | Path, found: str, **more: Any) -> None:
        """Add a :class:`Problem`."""
        self.problems.append(Problem(kind, str(path), found, **more))

    def add(self, seen: Seen) -> None:
        """Count what was found in one image."""
        self.inspected += 1
        self.problems += seen.problems
        self.pixels.update(seen.pixels)
        self.files.update(seen.pixels.keys())
        self.labels += bool(seen.pixels)
        if seen.size:
            self.sizes[seen.size] += 1

    def class_counts(self) -> dict[str, int]:
        """Pixels or objects of every class by name."""
        if self.objects is not None:
            return self.objects
        names = self.names or {i: f'id {i}' for i in sorted(self.pixels) if i != IGNORE_INDEX}
        return {name: self.pixels[i] for i, name in names.items()}

    def line(self) -> str:
        """One line: how many images, of which sizes and classes."""
        unit = 'pixels' if self.objects is None else 'objects'
        parts = (
            [
                f'{len(self.tasks):,} images{" with labels" if self.objects is None else ""}',
                f'{self.inspected:,} inspected',
            ]
            if self.tasks
            else ['no images inspected']
        )
        if self.sizes:
            ordered = sorted(self.sizes, key=lambda size: size[0] * size[1])
            parts.append(f'{"x".join(map(str, ordered[0]))} to {"x".join(map(str, ordered[-1]))} pixels')
        counts = self.class_counts()
        if counts:
            occurring = sum(map(bool, counts.values()))
            parts.append(f'{occurring} of {len(counts)} classes occur, {sum(counts.values()):,} {unit}')
        return f'{self.split}: {self.root} ({self.type}): {", ".join(parts)}'


def report_absent_classes(one: DataSet) -> None:
    """Report classes that do not occur, if that is certain, or if none occurs in the files inspected."""
    counts = one.class_counts()
    absent = [name for name, count in counts.items() if not count]
    complete = one.objects is not None or 0 < one.labels == len(one.tasks)
    none = one.labels > 0 and len(absent) == len(counts)
    if absent and (complete or none):
        text = f'{len(absent)} of {len(counts)} classes do not occur: {", ".join(absent)}'
        one.report('class-absent', one.where, text, severity='warning' if none else '')


def report_doubts_about_zero(sets: Sequence[DataSet]) -> None:
    """Report a ``reduce_zero_label`` that seems to be the wrong way round, from the ids in the label maps.

    Data sets of one root and the same rules are judged together: a small one may lack the last class.
    """
    for one in sets:
        count, reduce_zero, zeros = one.rules.num_classes, one.rules.reduce_zero, one.files[0]
        alike = [other for other in sets if (other.root, other.rules) == (one.root, one.rules)]
        ids = one.files.keys() - {IGNORE_INDEX}
        if not count or count < 2 or not ids:
            continue
        text = f'reduce_zero_label={reduce_zero} with {count} classes, but '
        if (
            reduce_zero
            and max(ids) == count - 1
            and not any(other.files[count] for other in alike)
            and (IGNORE_INDEX in one.files or not zeros or len(ids) == count)
        ):
            text += f'the highest id is {max(ids)}' + (', and 255 occurs' if IGNORE_INDEX in one.files else '')
            one.report('reduce-zero-on', one.where, text, allowed=f'0 (ignored) and 1..{count}')
        elif not reduce_zero and max(ids) == count:
            one.report('reduce-zero-off', one.where, f'{text}ids reach {count}', allowed=f'0..{count - 1}')
        elif not reduce_zero and count == _ADE_CLASSES and zeros >= _NEARLY_ALL * one.labels > 1:
            one.report(
                'reduce-zero-off',
                one.where,
                f'{text}{zeros:,} of {one.labels:,} label maps have 0, which is "other" in ADE20K\'s files',
            )
