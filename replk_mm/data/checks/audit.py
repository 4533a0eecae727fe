"""Run the checks: on a sample of the files before a training, or on all of them."""
import multiprocessing
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmengine.config import Config
from rich.console import Console
from rich.progress import track

from replk_mm.data import coco
from replk_mm.data.checks import coco as coco_checks
from replk_mm.data.checks import images, pairs
from replk_mm.data.checks.classes import class_problems
from replk_mm.data.checks.dataset import DataSet, Rules, Seen, Task, absent_classes, doubts_about_zero
from replk_mm.data.class_heads import head_counts
from replk_mm.data.datasets import coco_style, crop_of, dataset_class, placed_datasets, placed_metrics
from replk_mm.data.files import sample
from replk_mm.data.problems import Item, Problem, reject_errors, summary_lines
from replk_mm.errors import UserError

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
    digests: dict[str, bytes] = {}
    shown = track(_inspect_all(work, full, jobs), 'images', len(work), console=Console(stderr=True),
                  disable=not (full and sys.stderr.isatty()))
    for (one, task), seen in zip(work, shown, strict=True):
        one.add(seen)
        digests[task.image] = seen.digest
    for one in result.sets:
        one.problems += absent_classes(one)
    result.problems += class_problems(cfg, splits)
    result.problems += _shared_images(result.sets, digests if full else None)
    result.problems += doubts_about_zero(result.sets)
    coco.forget()
    result.seconds = time.monotonic() - start
    return result


def _survey(cfg: Config, splits: Sequence[str], full: bool) -> list[DataSet]:
    """The data sets, their images not opened; those of the same files and use once."""
    scope = cfg.get('default_scope', 'mmengine')
    labels = [count for path, count in head_counts(cfg.model).items() if '.decode_head' in path] if 'model' in cfg else []
    found: dict[str, DataSet] = {}
    for split in splits:
        for place, dataset in placed_datasets(cfg, (split,)):
            kind = dataset_class(dataset, scope)
            metrics = None if split == 'train' else list(placed_metrics(cfg, split).values())
            is_coco = coco_style(dataset, scope)
            key = str(({**dataset, 'pipeline': None, 'test_mode': None}, split == 'train', is_coco and coco_checks.use_of(
                dataset, scope, metrics)))
            if key in found:
                continue
            one = found[key] = DataSet(place, split, str(dataset['type']), str(dataset.get('data_root') or '.'))
            one.problems += pairs.missing_folders(dataset)
            if is_coco and not any(p.kind in ('data-root-missing', 'annotation-file-missing') for p in one.problems):
                coco_checks.survey(one, dataset, scope, metrics, full)
            elif not one.problems and hasattr(kind, 'get_label_map') and (dataset.get('data_prefix') or {}).get('seg_map_path'):
                pairs.survey(one, dataset, scope, labels[-1] if labels else None)
    return list(found.values())


def _inspect_all(work: Sequence[tuple[DataSet, Task]], full: bool, jobs: int | None) -> Iterator[Seen]:
    tasks = [task for _, task in work]
    rules: list[Rules] = [replace(one.rules, hashes=full) for one, _ in work]
    if jobs == 1 or len(work) <= _CHUNK:
        yield from map(images.inspect, tasks, rules)
        return
    # Where processes can be forked, importing everything again would take longer than most data sets.
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(jobs, multiprocessing.get_context(method), initializer=_ignore_interrupts) as pool:
        try:
            yield from pool.map(images.inspect, tasks, rules, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise UserError('a process ended while it decoded images: out of memory, or a file that crashes its decoder\n'
                            'Run again with --jobs 1.') from error


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent ends them


def _shared_images(sets: Sequence[DataSet], digests: Mapping[str, bytes] | None) -> list[Problem]:
    """Images that are trained on and belong to another split too, or that occur twice in a split.

    Args:
        sets: The data sets.
        digests: Hashes of all images. None compares paths, and hashes a sample of the images with the name of another.
    """
    folders = {folder: folder.resolve() for one in sets for folder in {Path(task.image).parent for task in one.tasks}}
    by_split: dict[str, dict[Path, str]] = defaultdict(dict)  # paths by paths without links
    for one in sets:
        for path in map(Path, (task.image for task in one.tasks)):
            by_split[one.split].setdefault(folders[path.parent] / path.name, str(path))
    trained = by_split.get('train', {})
    problems = []
    if digests is None:
        names = {real.name: path for real, path in trained.items()}
        same = sample([(names[real.name], path) for split, paths in by_split.items() if split != 'train'
                       for real, path in paths.items() if real.name in names and real not in trained])
        digests = {path: images.digest(path) for pair in same for path in pair}
    first: dict[bytes, str] = {}
    for split, paths in sorted(by_split.items(), key=lambda item: item[0] != 'train'):
        seen: dict[bytes, str] = {}
        shared, twice = [], []
        for real, path in paths.items():
            content = digests.get(path, b'')
            if split != 'train' and (real in trained or content in first):
                shared.append((path, trained.get(real) or first[content]))
            elif content in seen:
                twice.append((path, seen[content]))
            elif content:
                seen[content] = path
        if split == 'train':
            first = seen
        for kind, found, text in (('leak', shared, 'are trained on too'), ('duplicate-image', twice, 'occur twice')):
            if found:
                problems.append(Problem(
                    kind, f'{split} data', f'{len(found):,} of {len(paths):,} images {text}: {found[0][0]} has the content of '
                    f'{found[0][1]}', items=tuple(Item(f'the content of {other}', path=path) for path, other in found)))
    return problems
