"""Problems of data sets: one finding, how severe its kind is, and what to do about it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from replk_mm.errors import UserError, command_line

SEVERITIES = ('error', 'warning', 'note')
#: Examples of one kind in a message.
SHOWN = 5

_REPLACE = 'Replace these files, or remove each with its partner.'
_LABELS = 'Write label maps as PNG with one 8-bit channel: the class index of each pixel.'
_BOX = 'A bbox is [x, y, width, height] in pixels; mmdetection ignores annotations with such boxes.'

#: Severity and remedy of each kind of problem. An error would stop a training or make it learn something else than is
#: meant; a warning is probably a mistake; a note is worth knowing. Names are part of the JSON format.
KINDS: dict[str, tuple[str, str]] = {
    # folders and pairs
    'data-root-missing': ('error', 'Name the folder of the data set with --data-root DIR.'),
    'folder-missing': ('error', 'Name the data root with --data-root DIR, or set data_prefix of the data set.'),
    'annotation-file-missing': ('error', 'Name the data root with --data-root DIR, or set ann_file of the data set.'),
    'ade-full-release': (
        'error',
        'Download the benchmark, http://data.csail.mit.edu/places/ADEchallenge/'
        'ADEChallengeData2016.zip, and name its folder with --data-root.',
    ),
    'dataset-invalid': ('error', 'Fix the fields of the data set in the config, or the file they name.'),
    'no-images': ('error', 'Check the data root, or set img_suffix of the data set.'),
    'image-missing': ('error', 'Add the images, or remove the entries that name them.'),
    'label-missing': ('error', 'Add the label maps, or remove the images.'),
    'label-without-image': ('note', 'Nothing reads these label maps; add their images, or remove them.'),
    'suffix-ignored': ('warning', 'Rename or convert these images, or set img_suffix of the data set.'),
    'cityscapes-raw-labels': ('error', f'Convert the labels: {command_line("convert_cityscapes", "ROOT")}'),
    'leak': ('warning', 'Scores on images that were trained on are too good; remove them from one of the two.'),
    'duplicate-image': ('warning', 'These images count twice; remove all but one.'),
    # files
    'unreadable': ('error', _REPLACE),
    'size-mismatch': ('error', _REPLACE),
    'exif-turned': (
        'error',
        'Training rotates the image by its EXIF tag, but not the label: rotate the pixels and '
        'drop the tag (exiftran -ai), or rotate the label map.',
    ),
    'exif-orientation': (
        'warning',
        'Training rotates the image by its EXIF tag: make sure that the label was drawn on '
        'the rotated image, or drop the tag.',
    ),
    # label maps
    'label-channels': ('error', _LABELS),
    'label-lossy': ('error', f'JPEG changes label ids at every border. {_LABELS}'),
    'label-out-of-range': ('error', 'Set num_classes of every head and the classes of the data, or fix the labels.'),
    'label-all-ignored': ('warning', 'Nothing is learned from such images; check their labels.'),
    'reduce-zero-pipeline': ('error', 'Set reduce_zero_label at the data set only; the pipeline takes it from there.'),
    'reduce-zero-on': ('warning', 'If 0 is a class, set reduce_zero_label=False: with True classes are off by one.'),
    'reduce-zero-off': ('warning', 'If 0 is unlabeled, set reduce_zero_label=True: with False classes are off by one.'),
    'class-absent': ('note', 'These classes can be neither learned nor scored here.'),
    'classes-order': (
        'warning',
        "Match classes by name: type='replk_mm.CocoDataset' at the data sets, and "
        "type='replk_mm.CocoMetric' at the evaluators.",
    ),
    'classes-mismatch': ('error', 'Name the classes: --classes NAME,NAME,...'),
    # annotation files
    'json-invalid': ('error', 'Write or download the file again.'),
    'coco-structure': ('error', 'Correct the program that wrote the file: https://cocodataset.org/#format-data'),
    'coco-no-annotations': ('error', 'Name a file with images and annotations (ann_file of the data set).'),
    'iscrowd-missing': ('error', "Add 'iscrowd': 0 to every annotation; pycocotools needs it to score."),
    'segmentation-missing': ('error', 'Add the masks, or use a config without masks (FCOS, Faster R-CNN).'),
    'id-repeated': ('error', 'Give each entry an id of its own.'),
    'name-repeated': ('error', 'Give each category a name of its own.'),
    'file-repeated': ('warning', 'These images count twice, each time with some of the objects; merge their entries.'),
    'id-unscorable': ('error', 'Number the annotations from 1: pycocotools takes id 0 for "not found".'),
    'image-unknown': ('error', 'Add the images, or remove these annotations.'),
    'category-unknown': ('error', 'Add the categories, or remove these annotations.'),
    'stated-size': ('error', 'Replace these images, or correct their width and height in the annotation file.'),
    'bbox-flat': ('error', _BOX),
    'bbox-outside': ('error', _BOX),
    'bbox-corners': ('error', 'A bbox is [x, y, width, height]; these look like [x1, y1, x2, y2].'),
    'bbox-beyond': ('note', 'Training clips these boxes to the image.'),
    'mask-undecodable': (
        'error',
        'A segmentation is a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...], or an '
        'RLE of the size of its image.',
    ),
    'metric-file': ('error', 'Set ann_file of the metric to that of the data set.'),
}


class Item(NamedTuple):
    """One of several findings of a kind: what was found, in which entry of the file, or in which other file."""

    found: str
    entry: str = ''
    path: str = ''


@dataclass(frozen=True)
class Problem:
    """A finding, or all findings of one kind in a file or folder.

    Attributes:
        kind: A key of :data:`KINDS`.
        path: The file or folder.
        found: What was found; of several findings, their number and the first ones.
        allowed: What it may be. Defaults to nothing.
        remedy: What to do. Defaults to the kind's.
        severity: One of :data:`SEVERITIES`. Defaults to the kind's.
        items: All findings, where there are several.
    """

    kind: str
    path: str
    found: str
    allowed: str = ''
    remedy: str = ''
    severity: str = ''
    items: tuple[Item, ...] = ()

    def __post_init__(self) -> None:
        severity, remedy = KINDS[self.kind]
        object.__setattr__(self, 'severity', self.severity or severity)
        object.__setattr__(self, 'remedy', self.remedy or remedy)

    def __str__(self) -> str:
        return f'{self.path}: {self.found}' + (f'; allowed: {self.allowed}' if self.allowed else '')

    def occurrences(self) -> Iterator[tuple[str, str, str]]:
        """Path, entry and finding of every single item."""
        for item in self.items or (Item(self.found),):
            yield item.path or self.path, item.entry, item.found


class InvalidDataError(UserError):
    """Data that cannot be used; ``problems`` has all findings."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        errors = [problem for problem in problems if problem.severity == 'error']
        lines = [str(problem) for problem in errors[:SHOWN]]
        if len(errors) > SHOWN:
            lines.append(f'... and {len(errors) - SHOWN:,} more ({command_line("check_data", "CONFIG")} lists all)')
        super().__init__('\n'.join([*lines, *dict.fromkeys(problem.remedy for problem in errors[:SHOWN])]))
        self.problems = list(problems)


def reject_errors(problems: Sequence[Problem]) -> None:
    """Raise :class:`InvalidDataError` if any problem is an error."""
    if any(problem.severity == 'error' for problem in problems):
        raise InvalidDataError(problems)


def summary_lines(problems: Iterable[Problem]) -> list[str]:
    """A line for each kind of warning and note, with the first file and the number of others."""
    kinds: dict[tuple[str, str], list[Problem]] = defaultdict(list)
    for problem in problems:
        if problem.severity != 'error':
            kinds[problem.severity, problem.kind].append(problem)
    return [
        f'{severity}: {first}' + (f' (and {len(rest)} more)' if rest else '')
        for (severity, _), (first, *rest) in sorted(kinds.items(), key=lambda item: SEVERITIES.index(item[0][0]))
    ]
