"""Run the checks: on a sample of the files before a training, or on all of them."""

import multiprocessing
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from replk_mm.data import coco
from replk_mm.data.checks import coco as coco_checks
from replk_mm.data.checks import images, pairs
from replk_mm.data.checks.classes import class_problems
from replk_mm.data.checks.dataset import DataSet, Seen, Task, report_absent_classes, report_doubts_about_zero
from replk_mm.data.class_heads import classes_per_head
from replk_mm.data.datasets import crop_of, dataset_class, is_coco_style, named_datasets, named_metrics
from replk_mm.data.files import sample
from replk_mm.data.findings import Item, Problem, reject_errors, summary_lines
from replk_mm.errors import UserError
from replk_mm.files import sha256

SPLITS = ('train', 'val', 'test')
#: Images that a process inspects at a time.
_CHUNK = 16


@dataclass
class Audit:
    """Everything the checks found.

    Attributes:
        config: The config file.
        full: Whether every file was decoded, or a sample.
        sets: The data sets, each once.
        problems: Problems that concern no single data set.
        crop: Height and width of the training crop, pixels; None if unknown.
        seconds: Duration.
    """

    config: str
    full: bool
    sets: list[DataSet] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    crop: tuple[int, int] | None = None
    seconds: float = 0.0

    def found(self) -> Iterator[tuple[str, Problem]]:
        """All problems with the split they were found in; '' for those of no single data set."""
        yield from (('', problem) for problem in self.problems)
        for one in self.sets:
            yield from ((one.split, problem) for problem in one.problems)

    def counts(self) -> Counter[str]:
        """Number of findings of each severity."""
        counts: Counter[str] = Counter()
        for _, problem in self.found():
            counts[problem.severity] += max(1, len(problem.items))
        return counts


def check_data(cfg: Config, splits: tuple[str, ...]) -> list[str]:
    """Check the data sets of a config before they are used: folders, annotations, classes, and a sample of the images.

    Returns:
        A line for each data set, and one for each kind of warning and note.

    Raises:
        UserError: If the data cannot be used, with the first errors and what to do.
    """
    result = audit(cfg, splits=splits, jobs=1)
    problems = [problem for _, problem in result.found()]
    reject_errors(problems)
    return [*(one.line() for one in result.sets), *summary_lines(problems)]


def audit(cfg: Config, full: bool = False, jobs: int | None = None, splits: tuple[str, ...] = SPLITS) -> Audit:
    """Check the data sets of a config; problems are collected, not raised.

    Args:
        cfg: With data root and classes set. Not changed.
        full: Whether to decode every image, label map and mask, instead of a sample. Defaults to False.
        jobs: Number of processes. Defaults to one a core.
        splits: Whose data sets. Defaults to all.

    Raises:
        UserError: If the config itself cannot be used, for example a type of data set that does not exist.
    """
    start = time.monotonic()
    result = Audit(str(cfg.filename), full, _survey(cfg, splits, full), crop=crop_of(cfg) if 'model' in cfg else None)
    work = [(one, task) for one in result.sets for task in (one.tasks if full else sample(one.tasks))]
    digests: dict[str, str] = {}
    shown = track(
        _inspect_all(work, full, jobs),
        'images',
        len(work),
        console=Console(stderr=True),
        disable=not (full and sys.stderr.isatty()),
    )
    for (one, task), seen in zip(work, shown, strict=True):
        one.add(seen)
        digests[task.image] = seen.digest
    for one in result.sets:
        report_absent_classes(one)
    report_doubts_about_zero(result.sets)
    result.problems += class_problems(cfg, splits)
    result.problems += _shared_images(result.sets, digests if full else None)
    coco.invalidate_cache()
    result.seconds = time.monotonic() - start
    return result


def _survey(cfg: Config, splits: Sequence[str], full: bool) -> list[DataSet]:
    """The data sets, their images not opened; those of the same files and use once."""
    scope = cfg.get('default_scope', 'mmengine')
    labels = [count for path, count in classes_per_head(cfg.get('model', {})).items() if '.decode_head' in path]
    found: dict[str, DataSet] = {}
    for split in splits:
        for place, dataset in named_datasets(cfg, (split,)):
            kind, is_coco = dataset_class(dataset, scope), is_coco_style(dataset, scope)
            metrics = None if split == 'train' else list(named_metrics(cfg, split).values())
            key = str(({**dataset, 'pipeline': None, 'test_mode': None}, metrics if is_coco else split == 'train'))
            if key in found:
                continue
            one = found[key] = DataSet(place, split, str(dataset['type']), str(dataset.get('data_root') or '.'))
            pairs.missing_folders(one, dataset)
            missing = {problem.kind for problem in one.problems}
            if is_coco and not missing & {'data-root-missing', 'annotation-file-missing'}:
                coco_checks.survey(one, dataset, scope, metrics, full)
            elif (
                not missing
                and hasattr(kind, 'get_label_map')
                and (dataset.get('data_prefix') or {}).get('seg_map_path')
            ):
                pairs.survey(one, dataset, scope, labels[-1] if labels else None)
    return list(found.values())


def _inspect_all(work: Sequence[tuple[DataSet, Task]], full: bool, jobs: int | None) -> Iterator[Seen]:
    tasks = [task for _, task in work]
    rules = [replace(one.rules, hashes=full) for one, _ in work]
    if jobs == 1 or len(work) <= _CHUNK:
        yield from map(images.inspect, tasks, rules)
        return
    # Where processes can be forked, importing everything again would take longer than most data sets.
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(jobs, multiprocessing.get_context(method), initializer=_ignore_interrupts) as pool:
        try:
            yield from pool.map(images.inspect, tasks, rules, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise UserError(
                'a process ended while it decoded images: out of memory, or a file that crashes its '
                'decoder\nRun again with --jobs 1.'
            ) from error


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent ends them


def _shared_images(sets: Sequence[DataSet], digests: dict[str, str] | None) -> list[Problem]:
    """Images that are trained on and belong to another split too, or that occur twice in a split.

    Args:
        sets: The data sets.
        digests: Hashes of all images. None compares paths, and hashes a sample of the images with the name of another.
    """
    folders = {folder: folder.resolve() for one in sets for folder in {Path(task.image).parent for task in one.tasks}}
    by_split: dict[str, dict[Path, str]] = defaultdict(dict)  # paths by paths without links
    for one in sets:
        for task in one.tasks:
            path = Path(task.image)
            by_split[one.split].setdefault(folders[path.parent] / path.name, task.image)
    trained = by_split.pop('train', {})
    if digests is None:
        names = {real.name: image for real, image in trained.items()}
        same = sample(
            [
                (names[real.name], image)
                for paths in by_split.values()
                for real, image in paths.items()
                if real.name in names and real not in trained
            ]
        )
        digests = {}
        for image in {image for pair in same for image in pair}:
            with suppress(OSError):
                digests[image] = sha256(image)
    problems = []
    in_training: dict[str, str] = {}
    for split, paths in {'train': trained, **by_split}.items():
        seen: dict[str, str] = {}
        found: dict[str, list[Item]] = {'leak': [], 'duplicate-image': []}
        for real, image in paths.items():
            content = digests.get(image, '')
            other = in_training.get(content) or (trained[real] if split != 'train' and real in trained else None)
            if other:
                found['leak'].append(Item(f'the content of {other}, which is trained on', path=image))
            elif content in seen:
                found['duplicate-image'].append(Item(f'the content of {seen[content]}', path=image))
            elif content:
                seen[content] = image
        if split == 'train':
            in_training = seen
        problems += [
            Problem(
                kind,
                f'{split} data',
                f'{len(items):,} of {len(paths):,} images: {items[0].path} has {items[0].found}',
                items=tuple(items),
            )
            for kind, items in found.items()
            if items
        ]
    return problems
