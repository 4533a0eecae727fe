"""Run the data checks: on a sample of the files before training, or on every file."""

import multiprocessing
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from mmengine.config import Config

from replk_mm.data.checks import images
from replk_mm.data.checks.classes import check_classes
from replk_mm.data.checks.coco import check_annotations
from replk_mm.data.checks.dataset import (
    DatasetReport,
    Inspection,
    LabelFormat,
    Sample,
    check_absent_classes,
    check_reduce_zero_label,
)
from replk_mm.data.checks.pairs import check_folders, check_image_classes, check_pairs
from replk_mm.data.class_heads import classes_per_head
from replk_mm.data.coco import invalidate_cache
from replk_mm.data.datasets import dataset_class, is_classification, is_coco_style, named_datasets, named_metrics
from replk_mm.data.files import pick_evenly
from replk_mm.data.findings import Finding, Occurrence, raise_for_errors, summarize
from replk_mm.errors import UserError
from replk_mm.files import sha256
from replk_mm.logs import show_progress

SPLITS = ('train', 'val', 'test')
#: Images that a process inspects at a time.
_CHUNK = 16


@dataclass
class Audit:
    """The result of all checks."""

    config: str  #: the config file
    full: bool  #: whether every file was decoded, or a sample
    datasets: list[DatasetReport] = field(default_factory=list)  #: the data sets, each once
    general: list[Finding] = field(default_factory=list)  #: findings that concern no single data set
    seconds: float = 0.0  #: duration

    def findings(self) -> Iterator[tuple[str, Finding]]:
        """All findings with their split; '' for those of no single data set."""
        yield from (('', finding) for finding in self.general)
        for dataset in self.datasets:
            yield from ((dataset.split, finding) for finding in dataset.findings)

    def counts(self) -> Counter[str]:
        """Number of occurrences of each severity."""
        counts: Counter[str] = Counter()
        for _, finding in self.findings():
            counts[finding.severity] += len(finding.occurrences)
        return counts


def check_data(cfg: Config, splits: tuple[str, ...]) -> list[str]:
    """Check folders, annotations, classes and a sample of the images before a run.

    Training images in another split are an error of ``check_data`` the command, and only a warning here: some runs
    validate on training data on purpose.

    Returns:
        A line for each data set, and one for each code of warnings and notes.

    Raises:
        InvalidDataError: With the first errors and how to fix them.
        UserError: If the config cannot be used.
    """
    result = audit(cfg, splits=splits, jobs=1)
    findings = [finding for _, finding in result.findings()]
    findings = [replace(finding, severity='warning') if finding.code == 'leak' else finding for finding in findings]
    raise_for_errors(findings)
    return [*map(str, result.datasets), *summarize(findings)]


def audit(cfg: Config, full: bool = False, jobs: int | None = None, splits: tuple[str, ...] = SPLITS) -> Audit:
    """Check the data sets of a config; collect findings instead of raising them.

    Args:
        cfg: With data root and classes set. Not changed.
        full: Whether to decode every image, label map and mask, instead of a sample. Defaults to False.
        jobs: Number of processes. Defaults to one per core.
        splits: Data sets to check. Defaults to all.

    Raises:
        UserError: If the config itself cannot be used, for example because a data set type does not exist.
    """
    start = time.monotonic()
    result = Audit(str(cfg.filename), full, _list_datasets(cfg, splits, full))
    work = [(d, sample) for d in result.datasets for sample in (d.samples if full else pick_evenly(d.samples))]
    inspections = show_progress(_inspect_all(work, full, jobs), 'images', len(work), full)
    digests: dict[str, str] = {}
    for (dataset, sample), inspection in zip(work, inspections, strict=True):
        dataset.count(inspection)
        digests[sample.image] = inspection.digest
    for dataset in result.datasets:
        _look_for_classes(dataset)
    for dataset in result.datasets:
        check_absent_classes(dataset, [other for other in result.datasets if other.split == dataset.split])
    check_reduce_zero_label(result.datasets)
    result.general += check_classes(cfg, splits)
    result.general += _check_shared_images(result.datasets, digests if full else None)
    invalidate_cache()
    result.seconds = time.monotonic() - start
    return result


def _list_datasets(cfg: Config, splits: Sequence[str], full: bool) -> list[DatasetReport]:
    """Reports on the data sets, without their images. Data sets of the same files and use are listed once."""
    scope = cfg.get('default_scope', 'mmengine')
    counts = [count for path, count in classes_per_head(cfg.get('model', {})).items() if '.decode_head' in path]
    reports: dict[str, DatasetReport] = {}
    for split in splits:
        for key, dataset in named_datasets(cfg, (split,)):
            kind, is_coco = dataset_class(dataset, scope), is_coco_style(dataset, scope)
            metrics = None if split == 'train' else list(named_metrics(cfg, split).values())
            use = str(({**dataset, 'pipeline': None, 'test_mode': None}, metrics if is_coco else split == 'train'))
            if use in reports:
                continue
            root = str(dataset.get('data_root') or '.')
            report = reports[use] = DatasetReport(key, split, str(dataset['type']), root)
            check_folders(report, dataset)
            missing = {finding.code for finding in report.findings}
            has_labels = hasattr(kind, 'get_label_map') and (dataset.get('data_prefix') or {}).get('seg_map_path')
            if is_coco and not missing & {'data-root-missing', 'annotation-file-missing'}:
                check_annotations(report, dataset, scope, metrics, full)
            elif is_classification(dataset, scope) and not missing:
                check_image_classes(report, dataset, scope)
            elif has_labels and not missing:
                check_pairs(report, dataset, scope, counts[-1] if counts else None)
                report.is_used &= metrics is None or not all(metric.get('format_only') for metric in metrics)
    return list(reports.values())


def _look_for_classes(dataset: DatasetReport) -> None:
    """Read more label maps while those of the sample have fewer than two classes."""
    sample = set(pick_evenly(dataset.samples))
    for other in (other for other in dataset.samples if other not in sample):
        counts, is_read = dataset.class_counts().values(), dataset.inspected == len(dataset.samples)
        if is_read or not dataset.maps_read or sum(map(bool, counts)) >= min(2, len(counts)):
            break
        dataset.count(images.inspect_sample(other, dataset.label_format))


def _inspect_all(
    work: Sequence[tuple[DatasetReport, Sample]], hash_images: bool, jobs: int | None
) -> Iterator[Inspection]:
    samples: list[Sample] = [sample for _, sample in work]
    formats: list[LabelFormat] = [dataset.label_format for dataset, _ in work]
    inspect = partial(images.inspect_sample, hash_image=hash_images)
    if jobs == 1 or len(work) <= _CHUNK:
        yield from map(inspect, samples, formats)
        return
    # Where processes can be forked, importing everything again would take longer than most data sets.
    method = 'fork' if 'fork' in multiprocessing.get_all_start_methods() else None
    with ProcessPoolExecutor(jobs, multiprocessing.get_context(method), initializer=_ignore_interrupts) as pool:
        try:
            yield from pool.map(inspect, samples, formats, chunksize=_CHUNK)
        except BrokenProcessPool as error:
            raise UserError(
                'a process died while it decoded images: out of memory, or a file that crashes its decoder\n'
                'Run again with --jobs 1.'
            ) from error


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all processes; the parent ends them


def _check_shared_images(datasets: Sequence[DatasetReport], digests: Mapping[str, str] | None) -> list[Finding]:
    """Report training images that belong to another split too, and images that occur twice in a split.

    Args:
        datasets: The data sets.
        digests: SHA-256 of all images. None compares paths, and hashes a sample of the images of equal names.
    """
    folders = {folder: folder.resolve() for d in datasets for folder in {Path(s.image).parent for s in d.samples}}
    by_split: dict[str, dict[Path, str]] = defaultdict(dict)  # image by its path without links
    for dataset in datasets:
        for sample in dataset.samples:
            path = Path(sample.image)
            by_split[dataset.split].setdefault(folders[path.parent] / path.name, sample.image)
    training = by_split.pop('train', {})
    if digests is None:
        digests = _hash_same_names(training, by_split.values())
    findings = []
    training_digests: dict[str, str] = {}
    for split, paths in {'train': training, **by_split}.items():
        seen: dict[str, str] = {}
        found: dict[str, list[Occurrence]] = {'leak': [], 'duplicate-image': []}
        for resolved, image in paths.items():
            digest = digests.get(image, '')
            original = training_digests.get(digest) or (training.get(resolved) if split != 'train' else None)
            if original:
                found['leak'].append(Occurrence(f'the same image as {original}, a training image', path=image))
            elif digest in seen:
                found['duplicate-image'].append(Occurrence(f'the same image as {seen[digest]}', path=image))
            elif digest:
                seen[digest] = image
        if split == 'train':
            training_digests = seen
        for code, occurrences in found.items():
            if occurrences:
                first = f'{occurrences[0].path} is {occurrences[0].message}'
                message = f'{len(occurrences):,} of {len(paths):,} images: {first}'
                findings.append(Finding(code, f'{split} data', message, occurrences=tuple(occurrences)))
    return findings


def _hash_same_names(training: Mapping[Path, str], others: Iterable[Mapping[Path, str]]) -> dict[str, str]:
    """SHA-256 of a sample of the images that have the name of a training image, and of these."""
    names = {path.name: image for path, image in training.items()}
    pairs = [
        (names[path.name], image)
        for images_of_split in others
        for path, image in images_of_split.items()
        if path.name in names and path not in training
    ]
    digests = {}
    for image in {image for pair in pick_evenly(pairs) for image in pair}:
        with suppress(OSError):
            digests[image] = sha256(image)
    return digests
