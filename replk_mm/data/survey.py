"""What is known of a data set before its images are opened, and what is known of it when they have been."""
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from replk_mm.data.files import IGNORED
from replk_mm.data.pairs import Rules, Seen, Task
from replk_mm.data.problems import Problem

#: Share of files from which an id counts as being in nearly all of them.
_NEARLY_ALL = 0.9
_ADE_CLASSES = 150


@dataclass
class Survey:
    """A data set, its images not opened yet.

    Attributes:
        root: Its folder.
        problems: What is wrong with folders, names and annotations.
        tasks: Its images, with label maps or stated sizes.
        rules: What holds for each.
        classes: Names of the classes by the id that label maps have for them; by category id with annotations.
        objects: Objects of every class by name, of annotations; None of label maps.
        where: Folder of the label maps, or annotation file.
        line: What a log says of it, but for the number of images opened.
    """

    root: str
    problems: list[Problem] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)
    rules: Rules = Rules()
    classes: dict[int, str] = field(default_factory=dict)
    objects: dict[str, int] | None = None
    where: str = ''
    line: str = ''


@dataclass
class Tally:
    """What has been seen in the files of a data set; grows with every one.

    Attributes:
        looked: Images looked at.
        problems: What is wrong with them.
        pixels: Pixels of every label id.
        files: Label maps that have an id, by id.
        labels: Label maps read.
        sizes: Images of each width and height.
    """

    looked: int = 0
    problems: list[Problem] = field(default_factory=list)
    pixels: Counter[int] = field(default_factory=Counter)
    files: Counter[int] = field(default_factory=Counter)
    labels: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, seen: Seen) -> None:
        self.looked += 1
        self.problems += seen.problems
        self.pixels.update(seen.pixels)
        self.files.update(seen.pixels.keys())
        self.labels += bool(seen.pixels)
        if seen.size:
            self.sizes[seen.size] += 1

    def add_all(self, several: Iterable[Seen]) -> 'Tally':
        for seen in several:
            self.add(seen)
        return self


def doubts_about_zero(looked: Sequence[tuple[Survey, Tally]]) -> list[list[Problem]]:
    """Whether ``reduce_zero_label`` seems to be the wrong way round, judged by the ids of all label maps together.

    Args:
        looked: Data sets. One lacks a class that another of the same root has, as a small validation set may.

    Returns:
        The doubts about each.
    """
    ids: dict[tuple, set[int]] = defaultdict(set)
    for survey, tally in looked:
        ids[_meaning(survey)].update(tally.files)
    return [_doubts(survey, tally, ids[_meaning(survey)]) for survey, tally in looked]


def _meaning(survey: Survey) -> tuple:
    return survey.root, survey.rules.num_classes, survey.rules.reduce_zero


def _doubts(survey: Survey, tally: Tally, anywhere: set[int]) -> list[Problem]:
    """See :func:`doubts_about_zero`; ``anywhere`` has the ids of all data sets that follow the same rules."""
    count, reduce_zero = survey.rules.num_classes, survey.rules.reduce_zero
    ids = {i for i in tally.files if i != IGNORED}
    if not count or count < 2 or not ids:
        return []
    top, zeros = max(ids), tally.files[0]
    if reduce_zero and top == count - 1 and count not in anywhere:
        everything = ids == set(range(count))
        if IGNORED in tally.files or not zeros or everything:
            why = (f'every id from 0 to {top} occurs, and {count} does not' if everything else
                   f'the highest id is {top}, and ' + ('255 occurs' if IGNORED in tally.files else 'no file has 0'))
            return [Problem('reduce-zero-on', survey.where, f'reduce_zero_label=True with {count} classes, but {why}',
                            f'0 (ignored) and 1..{count}')]
    if not reduce_zero and top == count:
        return [Problem('reduce-zero-off', survey.where, f'reduce_zero_label=False with {count} classes, but ids reach {top}',
                        f'0..{count - 1}')]
    if not reduce_zero and count == _ADE_CLASSES and zeros >= _NEARLY_ALL * tally.labels > 1:
        return [Problem('reduce-zero-off', survey.where, f'reduce_zero_label=False, but {zeros:,} of {tally.labels:,} label '
                        f'maps have 0, as ADE20K\'s have for what is none of the {count} classes')]
    return []
