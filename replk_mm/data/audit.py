"""A whole check of the data sets of a config: every problem of every file, none of which stops it."""
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import cv2
from mmengine.config import Config

from replk_mm.data import coco, duplicates, metric_files, pairs, processes, releases
from replk_mm.data.checks import survey
from replk_mm.data.class_checks import disagreements
from replk_mm.data.class_heads import head_counts
from replk_mm.data.classes import classes_of
from replk_mm.data.datasets import placed_datasets
from replk_mm.data.files import IGNORED, sample
from replk_mm.data.image_files import undecodable
from replk_mm.data.leaves import leaves, same_data
from replk_mm.data.pairs import Seen, Task
from replk_mm.data.problems import BadData, Problem
from replk_mm.data.progress import Progress
from replk_mm.data.survey import Survey, Tally, doubts_about_zero
from replk_mm.errors import UserError

SPLITS = ('train', 'val', 'test')


@dataclass
class Audited:
    """A data set and what was found in it.

    Attributes:
        place: Where it stands in the config.
        split: ``'train'``, ``'val'`` or ``'test'``.
        type: Of data set.
        repeats: Whether it reads the files of one that is trained with, which is said of it.
        survey: What is known without opening images.
        tally: What was seen in the images.
        problems: All of them.
        classes: Pixels or objects of every class by name.
    """

    place: str
    split: str
    type: str
    repeats: bool
    survey: Survey
    tally: Tally = field(default_factory=Tally)
    problems: list[Problem] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)


@dataclass
class Audit:
    """What a whole check found.

    Attributes:
        config: The config's file.
        full: Whether every file was decoded.
        sets: The data sets, each once.
        problems: What concerns none of them alone.
        crop: Height and width that training crops to, pixels; None if it does not.
        seconds: How long it took.
    """

    config: str
    full: bool
    sets: list[Audited] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    crop: tuple[int, int] | None = None
    seconds: float = 0.0

    def found(self) -> Iterator[tuple[str, Problem]]:
        """All problems, with the split they were found in; '' if in none alone."""
        yield from (('', problem) for problem in self.problems)
        for one in self.sets:
            yield from ((one.split, problem) for problem in one.problems)

    def counts(self) -> Counter[str]:
        """Findings of each severity."""
        counts: Counter[str] = Counter()
        for _, problem in self.found():
            counts[problem.weight] += max(1, len(problem.items))
        return counts


def audit(cfg: Config, full: bool = False, jobs: int | None = None) -> Audit:
    """Check all data sets of a config, with a bar on standard error.

    Args:
        cfg: With data root and classes set. Not changed.
        full: Decode every file; otherwise a sample, and of all files what needs no decoding. Defaults to False.
        jobs: Processes; None for one a core.

    Raises:
        UserError: If the config itself cannot be used: a type of data sets that does not exist, for one.
    """
    start = time.monotonic()
    result = Audit(str(cfg.filename), full, crop=crop_of(cfg))
    labels = [count for path, count in head_counts(cfg.model).items() if '.decode_head' in path]
    _survey(cfg, result, labels[-1] if labels else None)
    work: list[tuple[Audited, Task]] = [
        (one, task) for one in result.sets for task in (one.survey.tasks if full else sample(one.survey.tasks))]
    digests: dict[str, bytes] = {}
    progress = Progress(len(work), 'images')
    rules = {one.place: replace(one.survey.rules, decode=True, hashes=full) for one in result.sets}
    asked = [(task, rules[one.place]) for one, task in work]
    with _no_threads():
        for i, seen in processes.each(_look, asked, jobs or processes.cores(), _crashed):
            one, task = work[i]
            one.tally.add(seen)
            if seen.digest:
                digests[task.image] = seen.digest
            progress.step()
    progress.end()
    images: dict[str, list[str]] = {}
    for one in result.sets:
        images.setdefault(one.split, []).extend(task.image for task in one.survey.tasks if not one.repeats)
    if not full:
        digests = duplicates.of_equal_size(path for paths in images.values() for path in paths)
    twice = duplicates.find(images, digests)
    doubts = doubts_about_zero([(one.survey, one.tally) for one in result.sets])
    for one, doubt in zip(result.sets, doubts, strict=True):
        one.problems += [*one.survey.problems, *one.tally.problems, *doubt, *twice.pop(one.split, [])]
        one.classes, absent = _classes(one)
        one.problems += absent
    result.problems += _config_problems(cfg)
    coco.forget()
    result.seconds = time.monotonic() - start
    return result


@contextmanager
def _no_threads() -> Iterator[None]:
    """OpenCV's threads are not there in a process that was forked, which would wait for them."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def _look(job: tuple[Task, pairs.Rules]) -> Seen:
    task, rules = job
    try:
        return pairs.inspect(task, rules)
    except Exception as error:  # whatever a file makes a library raise, the other files are looked at
        return Seen([undecodable(task.image, error)])


def _crashed(job: tuple[Task, pairs.Rules], status: int) -> Seen:
    task, _ = job
    with_label = f', or its label {task.label}' if task.label else ''
    how = f'was killed (signal {-status})' if status < 0 else f'ended with status {status}'
    return Seen([Problem('decoder-crash', task.image, f'the process that decoded it{with_label} {how}')])


def _survey(cfg: Config, result: Audit, num_classes: int | None) -> None:
    """List the data sets of all splits, those of the same files once."""
    scope = cfg.get('default_scope', 'mmengine')
    found = leaves(cfg, SPLITS)
    result.problems += same_data(found)
    known: dict[tuple, Audited] = {}
    seen: set[str] = set()
    for leaf in found:
        if leaf.key in seen:
            continue
        seen.add(leaf.key)
        about = survey(leaf.config, scope, num_classes, leaf.metrics, result.full, leaf.suffixes)
        before = known.get((leaf.files, leaf.rules))
        if before:  # looked at already, for a use that may ask less of it
            before.survey.problems += [problem for problem in about.problems if problem not in before.survey.problems]
            continue
        one = Audited(leaf.place, leaf.split, str(leaf.config['type']), bool(leaf.repeats), about)
        known[leaf.files, leaf.rules] = one
        if about.tasks:
            one.problems += releases.count_differs(leaf.config, scope, leaf.split, len(about.tasks))
        if about.objects is not None:
            about.objects = {**dict.fromkeys(classes_of(leaf.config, scope) or (), 0), **about.objects}
        result.sets.append(one)


def _classes(one: Audited) -> tuple[dict[str, int], list[Problem]]:
    """Pixels or objects of every class by name, and those that do not occur, if everything has been looked at."""
    known, count = one.survey, one.survey.rules.num_classes
    if known.objects is not None:
        names, complete = known.objects, True
    else:
        first = int(known.rules.reduce_zero)
        ids = known.classes or {i: f'class {i}' for i in range(first, first + (count or 0))}
        ids = ids or {i: f'id {i}' for i in sorted(one.tally.pixels) if i != IGNORED}
        names = {name: one.tally.pixels[i] for i, name in ids.items()}
        complete = one.tally.looked == len(known.tasks) and one.tally.labels > 0
    absent = [name for name, number in names.items() if not number]
    if not absent or not complete:
        return dict(names), []
    return dict(names), [Problem('class-absent', known.where, f'{len(absent)} of {len(names)} classes do not occur: '
                                 + ', '.join(absent))]


def _config_problems(cfg: Config) -> list[Problem]:
    """Classes that data, annotations and heads do not agree on, and metrics that compare with other files."""
    splits = tuple(split for split in SPLITS if cfg.get(f'{split}_dataloader'))
    refused, _ = disagreements(cfg, splits)  # the rest is said of each data set
    problems = [_as_problem('classes-mismatch', error) for error in refused]
    for split in splits:
        try:
            metric_files.check(cfg, split)
        except BadData:
            continue  # said of the data set
        except UserError as error:
            problems.append(_as_problem('metric-file', error))
    return problems


def _as_problem(kind: str, error: UserError) -> Problem:
    first, _, remedy = str(error).partition('\n')
    path, _, found = first.partition(': ')
    return Problem(kind, path, found or first, remedy=remedy)


def crop_of(cfg: Config) -> tuple[int, int] | None:
    """Height and width that training crops images to, pixels; None if it does not."""
    for _, dataset in placed_datasets(cfg, ('train',)):
        for step in dataset.get('pipeline', ()):
            size = step.get('crop_size') if isinstance(step, dict) and 'Crop' in str(step.get('type')) else None
            if size:
                return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return None
