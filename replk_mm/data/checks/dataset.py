"""The report on one data set, and the checks that need the counts of all its label maps."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from replk_mm.data.files import IGNORE_INDEX
from replk_mm.data.findings import Finding
from replk_mm.errors import format_list

#: Share of label maps from which an id counts as present in nearly all of them.
_NEARLY_ALL = 0.9
_ADE_CLASSES = 150


@dataclass(frozen=True)
class Sample:
    """An image to inspect, with its label map, or with its (width, height) according to the annotation file."""

    image: str
    label: str | None = None
    stated_size: tuple[float, float] | None = None


@dataclass(frozen=True)
class LabelFormat:
    """The ids that label maps of a data set may contain."""

    num_classes: int | None = None  #: number of classes; None does not check ids
    reduce_zero_label: bool = False  #: whether 0 is ignored and 1 is the first class


@dataclass
class Inspection:
    """What one image and its label map contain."""

    findings: list[Finding] = field(default_factory=list)  #: what is wrong
    size: tuple[int, int] | None = None  #: width and height of the image, pixels; None if it is unreadable
    pixel_counts: Mapping[int, int] = field(default_factory=dict)  #: pixels of every label id
    digest: str = ''  #: SHA-256 of the image file, if requested


@dataclass
class DatasetReport:
    """A data set, its findings and its statistics."""

    key: str  #: its path in the config, such as ``train_dataloader.dataset``
    split: str  #: ``'train'``, ``'val'`` or ``'test'``
    type: str  #: its type in the config
    root: str  #: its folder
    labels_at: str = ''  #: folder of the label maps, or annotation file
    findings: list[Finding] = field(default_factory=list)  #: all findings
    samples: list[Sample] = field(default_factory=list)  #: its images
    label_format: LabelFormat = LabelFormat()  #: valid label ids
    class_names: dict[int, str] = field(default_factory=dict)  #: class names by label id
    is_used: bool = True  #: whether its labels are trained or scored as they are in the files
    #: number of objects (annotations) or images (classification) of every class; None for label maps
    object_counts: dict[str, int] | None = None
    counted: str = 'objects'  #: what ``object_counts`` counts
    inspected: int = 0  #: number of images inspected
    pixel_counts: Counter[int] = field(default_factory=Counter)  #: pixels of every label id
    map_counts: Counter[int] = field(default_factory=Counter)  #: number of label maps that contain an id
    maps_read: int = 0  #: number of label maps read
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  #: number of images of each width and height

    def add(self, code: str, path: str | Path, message: str, **more: Any) -> None:
        """Add a :class:`Finding`."""
        self.findings.append(Finding(code, str(path), message, **more))

    def count(self, inspection: Inspection) -> None:
        """Add the findings and statistics of one image."""
        self.inspected += 1
        self.findings += inspection.findings
        self.pixel_counts.update(inspection.pixel_counts)
        self.map_counts.update(inspection.pixel_counts.keys())
        self.maps_read += bool(inspection.pixel_counts)
        if inspection.size:
            self.sizes[inspection.size] += 1

    @property
    def unit(self) -> str:
        """The unit of :meth:`class_counts`."""
        return 'pixels' if self.object_counts is None else self.counted

    def class_counts(self) -> dict[str, int]:
        """Pixels, objects or images of every class."""
        if self.object_counts is not None:
            return self.object_counts
        names = self.class_names or {i: f'id {i}' for i in sorted(self.pixel_counts) if i != IGNORE_INDEX}
        return {name: self.pixel_counts[i] for i, name in names.items()}

    def __str__(self) -> str:
        parts = [f'{len(self.samples):,} images' if self.samples else 'no images inspected']
        if self.samples and self.object_counts is None:
            parts.append(f'{sum(sample.label is not None for sample in self.samples):,} with labels')
        if self.samples:
            parts.append(f'{self.inspected:,} inspected')
        if self.sizes:
            ordered = sorted(self.sizes, key=lambda size: size[0] * size[1])
            extremes = dict.fromkeys(f'{width}x{height}' for width, height in (ordered[0], ordered[-1]))
            parts.append(f'{" to ".join(extremes)} pixels')
        if counts := self.class_counts():
            occurring = sum(map(bool, counts.values()))
            parts.append(f'{occurring} of {len(counts)} classes occur, {sum(counts.values()):,} {self.unit}')
        return f'{self.split}: {self.root} ({self.type}): {", ".join(parts)}'


def check_absent_classes(report: DatasetReport, split: Sequence[DatasetReport]) -> None:
    """Report classes that do not occur in the labels, and labels that leave a split nothing to learn or to score."""
    counts, are_maps = report.class_counts(), report.object_counts is None
    names = list(report.class_names.values()) or list(counts)
    absent = [name for name in names if not counts.get(name)]
    errors = {finding.code for finding in report.findings if finding.severity == 'error'}
    if not absent or are_maps and (not report.maps_read or errors & {'label-out-of-range', 'cityscapes-raw-labels'}):
        return
    occurring, trains = len(names) - len(absent), report.split == 'train'
    in_split = {name for name in names if any(other.class_counts().get(name) for other in split)}
    message = f'{len(absent)} of {len(names)} classes do not occur: {format_list(absent, 10)}'
    is_sample, fix = are_maps and report.maps_read < len(report.samples), ''
    if are_maps:
        ids = format_list(sorted(report.pixel_counts), 10)
        message += f'; ids in {report.maps_read:,} of {len(report.samples):,} label maps: {ids}'
        fix = _fitting_settings(report, occurring)
    if occurring < 2 and are_maps or not occurring and report.is_used and not errors:
        code = 'one-class' if occurring else 'nothing-labelled'
        severity = 'error' if report.is_used and len(in_split) < 1 + (trains and are_maps) else 'warning'
    elif is_sample and 2 * occurring > len(names):
        return  # a sample may lack rare classes
    else:
        code, severity = 'class-absent', 'warning' if trains else 'note'
    report.add(code, report.labels_at, message, severity=severity, fix=fix)


def _fitting_settings(report: DatasetReport, occurring: int) -> str:
    """The settings that fit the ids in the label maps."""
    ids, first = report.map_counts.keys(), int(report.label_format.reduce_zero_label)
    if occurring < 2:
        advice = ['If 0 is a class, set reduce_zero_label=False of every data set.'] * (first and 0 in ids)
        advice += ['If 255 is a class, replace it by the index of the class: 255 is ignored.'] * (IGNORE_INDEX in ids)
        return ' '.join(advice) or 'Add labels of another class, such as the background.'
    count = max(ids - {IGNORE_INDEX}) + 1 - first
    return f'If no id is larger, name {count} classes: --classes NAME,...' if count < len(report.class_names) else ''


def check_reduce_zero_label(reports: Sequence[DatasetReport]) -> None:
    """Report a ``reduce_zero_label`` that contradicts the ids in the label maps.

    A small data set may lack the last class: data sets of one root and format are judged together.
    """
    for report in reports:
        count, reduces = report.label_format.num_classes, report.label_format.reduce_zero_label
        zeros, ids = report.map_counts[0], report.map_counts.keys() - {IGNORE_INDEX}
        if not count or count < 2 or not ids:
            continue
        alike = [r for r in reports if (r.root, r.label_format) == (report.root, report.label_format)]
        last_class_occurs = any(other.map_counts[count] for other in alike)
        has_ignored = IGNORE_INDEX in report.map_counts
        message = f'reduce_zero_label={reduces} with {count} classes, but '
        if reduces and max(ids) == count - 1 and not last_class_occurs:
            if has_ignored or not zeros or len(ids) == count:
                message += f'the highest id is {max(ids)}' + (', and 255 occurs' if has_ignored else '')
                report.add('reduce-zero-on', report.labels_at, message, expected=f'0 (ignored) and 1..{count}')
        elif not reduces and max(ids) == count:
            report.add('reduce-zero-off', report.labels_at, f'{message}ids reach {count}', expected=f'0..{count - 1}')
        elif not reduces and count == _ADE_CLASSES and zeros >= _NEARLY_ALL * report.maps_read > 1:
            message += f'{zeros:,} of {report.maps_read:,} label maps have 0, which is "other" in the files of ADE20K'
            report.add('reduce-zero-off', report.labels_at, message)
