"""Findings of the data checks: what is wrong, where, how severe it is, and how to fix it."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from replk_mm.errors import UserError, command_line
from replk_mm.logs import Note

SEVERITIES = ('error', 'warning', 'note')
#: Occurrences of one code that a message shows.
SHOWN = 5

_REPLACE = 'Replace these files, or remove each together with its image or label map.'
_LABELS = 'Write label maps as PNG with one 8-bit channel: the class index of each pixel.'
_BOX = 'A bbox is [x, y, width, height] in pixels. mmdetection ignores annotations with these boxes.'
_CLASSES = 'Name the classes: --classes NAME,NAME,...'

#: Severity and fix of each code. With an error, training would crash or learn something unintended; a warning is
#: probably a mistake; a note is for information. Codes are part of the JSON format.
CODES: dict[str, tuple[str, str]] = {
    # folders and pairs
    'data-root-missing': ('error', 'Name the folder of the data set with --data-root DIR.'),
    'folder-missing': ('error', 'Name the data root with --data-root DIR, or set data_prefix of the data set.'),
    'annotation-file-missing': ('error', 'Name the data root with --data-root DIR, or set ann_file of the data set.'),
    'ade-full-release': (
        'error',
        'Download http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip, the benchmark, and name its '
        'folder with --data-root.',
    ),
    'dataset-invalid': ('error', 'Fix the fields of the data set in the config, or the file they name.'),
    'no-images': ('error', 'Check the data root, or set img_suffix of the data set.'),
    'image-missing': ('error', 'Add the images, or remove the entries that name them.'),
    'label-missing': ('error', 'Add the label maps, or remove the images.'),
    'label-without-image': ('note', 'These label maps are not used. Add their images, or remove them.'),
    'suffix-ignored': ('warning', 'Rename or convert these images, or set img_suffix of the data set.'),
    'cityscapes-raw-labels': ('error', f'Convert the labels: {command_line("convert_cityscapes", "ROOT")}'),
    'leak': ('error', 'Remove these images from one of the two splits: scores on training images are too high.'),
    'duplicate-image': ('warning', 'Remove all copies but one: these images count more than once.'),
    # files
    'unreadable': ('error', _REPLACE),
    'size-mismatch': ('error', _REPLACE),
    'exif-turned': (
        'error',
        'Remove the tag, which training applies to the image only, and keep the pixels: exiftool -Orientation= FILE',
    ),
    'exif-orientation': (
        'warning',
        'Training applies this tag. If the annotation fits the pixels as stored, run exiftool -Orientation= FILE.',
    ),
    # label maps
    'label-channels': ('error', _LABELS),
    'label-lossy': ('error', f'JPEG changes the ids along every border. {_LABELS}'),
    'label-out-of-range': ('error', 'Name every class, or fix the labels.'),
    'label-all-ignored': ('warning', 'Check the labels: training learns nothing from these images.'),
    'nothing-labelled': ('error', 'There is nothing to learn from these labels, and nothing to score.'),
    'one-class': ('error', 'Use --classes background,NAME; a sigmoid head has out_channels=1 and use_sigmoid=True.'),
    'reduce-zero-pipeline': ('error', 'Set reduce_zero_label of the data set only; the pipeline uses that value.'),
    'reduce-zero-on': ('warning', 'If 0 is a class, set reduce_zero_label=False: with True classes shift by one.'),
    'reduce-zero-off': ('warning', 'If 0 is unlabeled, set reduce_zero_label=True: with False classes shift by one.'),
    'class-absent': ('note', 'The model cannot learn these classes here, and they have no score.'),
    'classes-order': (
        'warning',
        "Match classes by name: type='replk_mm.CocoDataset' for the data sets, type='replk_mm.CocoMetric' for the "
        'evaluators.',
    ),
    'classes-mismatch': ('error', _CLASSES),
    # annotation files
    'json-invalid': ('error', 'Write or download the file again.'),
    'coco-variant': ('note', 'Only replk_mm.CocoDataset and replk_mm.CocoMetric read such a file: use both as types.'),
    'coco-structure': ('error', 'Correct the program that wrote the file: https://cocodataset.org/#format-data'),
    'coco-no-annotations': ('error', 'Name a file with images and annotations (ann_file of the data set).'),
    'iscrowd-missing': ('error', "Use replk_mm.CocoMetric, or add 'iscrowd': 0 to every annotation."),
    'segmentation-missing': ('error', 'Add the masks, or use a config without masks (FCOS, Faster R-CNN).'),
    'id-repeated': ('error', 'Give each entry its own id.'),
    'name-repeated': ('error', 'Give each category its own name.'),
    'file-repeated': ('warning', 'Merge the entries of each image: it counts twice, each time with some objects only.'),
    'id-unscorable': ('error', 'Use replk_mm.CocoMetric, or count ids from 1: pycocotools reads id 0 as "not found".'),
    'crowds': ('warning', 'Set iscrowd=0 for single objects: crowds are neither trained nor scored.'),
    'image-unknown': ('error', 'Add the images, or remove these annotations.'),
    'category-unknown': ('error', 'Add the categories, or remove these annotations.'),
    'stated-size': ('error', 'Replace these images, or correct their width and height in the annotation file.'),
    'bbox-flat': ('error', _BOX),
    'bbox-outside': ('error', _BOX),
    'bbox-corners': ('error', 'Write each bbox as [x, y, width, height]; these look like [x1, y1, x2, y2].'),
    'bbox-beyond': ('note', 'Training clips these boxes to the image.'),
    'mask-undecodable': (
        'error',
        'A segmentation is a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...], or an RLE of the image size.',
    ),
    'metric-file': ('error', 'Set ann_file of the metric to that of the data set.'),
}


class Occurrence(NamedTuple):
    """One of several occurrences of a finding."""

    message: str  #: what is wrong
    entry: str = ''  #: the entry of the file, such as ``'annotation 7'``
    path: str = ''  #: the file; default: that of the finding


@dataclass(frozen=True)
class Finding:
    """What a check found: one fault, or all faults of one kind in a file or folder."""

    code: str  #: a key of :data:`CODES`
    path: str  #: file or folder
    message: str  #: what is wrong; of several occurrences, their number and the first ones
    expected: str = ''  #: valid values
    fix: str = ''  #: what to do; default: that of the code
    severity: str = ''  #: one of :data:`SEVERITIES`; default: that of the code
    occurrences: tuple[Occurrence, ...] = ()  #: all occurrences; default: one, with the message

    def __post_init__(self) -> None:
        severity, fix = CODES[self.code]
        object.__setattr__(self, 'severity', self.severity or severity)
        object.__setattr__(self, 'fix', self.fix or fix)
        occurrences = self.occurrences or (Occurrence(self.message),)
        object.__setattr__(self, 'occurrences', tuple(o._replace(path=o.path or self.path) for o in occurrences))

    def __str__(self) -> str:
        return f'{self.path}: {self.message}' + (f'; expected: {self.expected}' if self.expected else '')


class InvalidDataError(UserError):
    """Raised for data that cannot be used; ``findings`` has everything the checks found."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        # A missing data root is found by the checks of each split.
        errors = list({str(finding): finding for finding in findings if finding.severity == 'error'}.values())
        lines = [str(finding) for finding in errors[:SHOWN]]
        if len(errors) > SHOWN:
            lines.append(f'... and {len(errors) - SHOWN:,} more ({command_line("check_data", "CONFIG")} lists all)')
        super().__init__('\n'.join([*lines, *dict.fromkeys(finding.fix for finding in errors[:SHOWN])]))
        self.findings = list(findings)


def raise_for_errors(findings: Sequence[Finding]) -> None:
    """Raise :class:`InvalidDataError` if any finding is an error."""
    if any(finding.severity == 'error' for finding in findings):
        raise InvalidDataError(findings)


def summarize(findings: Iterable[Finding]) -> list[str]:
    """One line for each code of warnings and notes: the first finding, the number of others, and what to do."""
    groups: dict[tuple[int, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.severity != 'error':
            groups[SEVERITIES.index(finding.severity), finding.code].append(finding)
    return [
        Note(
            f'{first.severity}: {first}'
            + (f' (and {len(rest)} more)' if rest else '')
            + (f'. {first.fix}' if first.severity == 'warning' else ''),
            logging.WARNING if first.severity == 'warning' else logging.INFO,
        )
        for (_, _), (first, *rest) in sorted(groups.items(), key=lambda item: item[0][0])
    ]
