"""The gallery of a report: test images on which its best rows differ most, with ground truth and predictions."""

import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from replk_mm.bench.records import MAX_FILE_BYTES, read_inside, resolve_inside
from replk_mm.bench.report.pictures import Album, Picture, SplitFiles
from replk_mm.bench.report.structures import ProtocolGroup, Record, ReportRow
from replk_mm.errors import format_list
from replk_mm.visualize import colorize, draw_instances

#: Rows and images of a gallery.
MOST_ROWS, MOST_IMAGES = 6, 5
#: Width of a picture, in pixels; the page shows it smaller until it is selected.
WIDTH = 640
#: Detections that are drawn: of at least this score, and this many at most.
LEAST_SCORE, MOST_OBJECTS = 0.3, 40


@dataclass
class Example:
    """One image with its ground truth, and predictions and scores of rows by their number."""

    name: str
    image: Picture
    truth: Picture
    predictions: dict[int, Picture] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)


@dataclass
class Predictions:
    """Predictions of a row's first seed that has some, and scores of images in percent, if it has counts per image."""

    row: ReportRow
    record: Record
    folder: Path
    scores: dict[str, float] = field(default_factory=dict)


@dataclass
class Gallery:
    """The gallery of one protocol.

    Attributes:
        rows: The leader, the rest of the best group, and the rows behind it, as far as they have predictions.
        data: What they were tested on; None if it is missing.
        examples: The images.
        figure: What the images were chosen by; '' if they are spread evenly.
        missing: What is missing, with the reason.
        key: Names and RGB of the classes that label maps show.
    """

    rows: list[ReportRow] = field(default_factory=list)
    data: SplitFiles | None = None
    examples: list[Example] = field(default_factory=list)
    figure: str = ''
    missing: list[str] = field(default_factory=list)
    key: list[tuple[str, Sequence[int]]] = field(default_factory=list)
    least_score = LEAST_SCORE

    @property
    def objects(self) -> bool:
        """Whether it shows objects, not label maps."""
        return bool(self.data and self.data.annotations and not self.data.labels)


def open_gallery(group: ProtocolGroup, album: Album) -> Gallery:
    """The gallery of a group.

    Args:
        group: Rows of one protocol.
        album: Of the page.
    """
    found, shown, why = Gallery(), [], ''
    absent: dict[str, list[str]] = {}
    members = group.comparison.members if group.comparison else ()
    for row in sorted(group.rows, key=lambda row: row.name not in members):
        for i, record in enumerate(row.of('metric')):
            try:
                shown.append(Predictions(row, record, _predictions_of(record)))
                if row.name in group.scores:
                    counts = group.scores[row.name][i]
                    pairs = zip(counts.images, counts.per_image(), strict=True)
                    found.figure, shown[-1].scores = counts.image_figure, {k: float(v) for k, v in pairs if v == v}
                break
            except Exception as error:  # the record may hold anything
                why = _reason(error)
        else:
            absent.setdefault(why, []).append(row.label)
        if len(shown) == MOST_ROWS:
            break
    found.missing += [f'Predictions of {format_list(labels)}: {why}' for why, labels in absent.items()]
    for one in shown:
        try:
            found.data = found.data or album.data_of(one.record)
        except Exception as error:
            why = _reason(error)
    if found.data is None:
        found.missing += [f'Images and ground truth: {why}'] * bool(shown)
        return found
    found.rows = [one.row for one in shown]
    try:
        (_add_objects if found.objects else _add_label_maps)(found, shown, found.data, album)
    except Exception as error:  # a damaged file costs only its pictures
        found.missing.append(f'Images of {found.data.root}: {type(error).__name__}: {_reason(error)}')
    if not found.examples and not found.missing:
        found.missing.append('Predictions: their folders are empty')
    return found


def _predictions_of(record: Record) -> Path:
    name = record['files'].get('predictions')
    if not name:
        raise ValueError('recorded without predictions')
    folder = resolve_inside(record.folder / str(name), record.folder / 'runs')
    if not folder.is_dir():
        raise ValueError('no such folder in the work dir')
    return folder


def _reason(error: Exception) -> str:
    return ' '.join(str(error).split('\n')[:3]) or type(error).__name__


def _choose(found: Gallery, rows: Sequence[tuple[Iterable[str], Mapping[str, float]]]) -> list[str]:
    """Images that as many rows as possible have: those whose scores are furthest apart.

    Without scores of two rows, or if all are equal, the images are spread evenly over their sorted names.

    Args:
        found: Its figure is removed in this case.
        rows: Names of the images of each row, and their scores.
    """
    counts = Counter(name for names, _ in rows for name in names)
    most = max(counts.values(), default=0)
    common = sorted(name for name, count in counts.items() if count == most)
    scores = {name: [of[name] for _, of in rows if name in of] or [0.0] for name in common}
    spread = {name: max(values) - min(values) for name, values in scores.items()}
    if any(spread.values()):
        return sorted(common, key=lambda name: -spread[name])[:MOST_IMAGES]
    found.figure = ''
    return [common[round(i)] for i in np.linspace(0, len(common) - 1, min(MOST_IMAGES, len(common)))]


def _add_label_maps(found: Gallery, shown: Sequence[Predictions], data: SplitFiles, album: Album) -> None:
    names, occurring = dict(enumerate(data.classes, data.first)), set()
    unlabelled = False

    def drawn(labels: np.ndarray | Picture, truth: np.ndarray | Picture | None, name: str) -> Picture:
        if isinstance(labels, Picture):
            return labels
        words = []
        if isinstance(truth, np.ndarray) and truth.shape == labels.shape and (truth != data.ignored).any():
            scored = truth != data.ignored
            right = np.count_nonzero((labels == truth) & scored) / np.count_nonzero(scored)
            words = [f'{100 * right:.0f}\u00a0% of the scored pixels right; ']
        counts = np.array(Image.fromarray(labels).histogram())  # a sort would take seconds
        values = [value for value in np.flatnonzero(counts) if value != data.ignored]
        occurring.update(values)
        largest = [
            f'{names.get(int(value), f"label {value}")} {100 * counts[value] / labels.size:.0f}\u00a0%'
            for value in sorted(values, key=lambda value: -counts[value])[:4]
        ]
        picture = colorize(labels - np.uint8(data.first), data.palette)[..., ::-1]
        return album.add(picture, ''.join([*words, ', '.join(largest)]), name, WIDTH, 'labels')

    files = [{p.relative_to(one.folder).as_posix() for p in one.folder.rglob('*.png')} for one in shown]
    scores = [{f'{name}.png': value for name, value in one.scores.items()} for one in shown]
    for name in _choose(found, list(zip(files, scores, strict=True))):
        truth = album.read(data.label_of(name), *data.folders, mode=None) if data.labels else Picture()
        if isinstance(truth, np.ndarray):  # to the labels of predictions
            truth = data.classes_of_values[truth] + np.uint8(data.first)
            unlabelled |= bool((truth == data.ignored).any())
        image = album.add(album.read(data.image_of(name), *data.folders), data.image_of(name).name, name, WIDTH)
        example = Example(name.removesuffix('.png'), image, drawn(truth, None, f'ground truth of {name}'))
        for one, of_row, of_image in zip(shown, files, scores, strict=True):
            if name in of_row:
                labels = album.read(one.folder / name, one.folder, mode=None)
                example.predictions[one.row.number] = drawn(labels, truth, f'{one.row.label}: {name}')
            if name in of_image:
                example.scores[one.row.number] = of_image[name]
        found.examples.append(example)
    found.key = [(names[i], data.palette[i - data.first]) for i in names if i in occurring]
    found.key += [('not labelled', (0, 0, 0))] * unlabelled


def _add_objects(found: Gallery, shown: Sequence[Predictions], data: SplitFiles, album: Album) -> None:
    from replk_mm.data.coco import annotation_path, locate_images

    written: Any = _read_json(annotation_path(data.root / str(data.annotations)), *data.folders)
    ids = {str(image['file_name']): str(image['id']) for image in written['images'] if 'file_name' in image}
    located = dict(zip(ids, locate_images(list(ids), data.root / data.images), strict=True))
    ids = {located[name]: key for name, key in ids.items()}
    classes = {category['id']: str(category['name']) for category in written['categories']}
    order = sorted(classes)
    colours = [data.palette[i % len(data.palette)] for i in range(len(order))]

    def drawn(pixels: np.ndarray | Picture, things: Sequence[dict], name: str) -> Picture:
        if isinstance(pixels, Picture):
            return pixels
        shown = Image.fromarray(pixels)
        shown.thumbnail((WIDTH, 4 * WIDTH))
        surest = sorted(things, key=lambda thing: -thing.get('score', 1.0))[:MOST_OBJECTS]
        objects = [
            _object(thing, order, pixels.shape[:2], (shown.height, shown.width))
            for thing in surest
            if thing['category_id'] in classes and thing.get('score', 1.0) >= LEAST_SCORE
        ]
        picture = draw_instances(np.array(shown)[..., ::-1], objects, [classes[c] for c in order], colours)
        counts = Counter(classes[order[thing['label']]] for thing in objects)
        words = ', '.join(f'{count} {of}' for of, count in counts.items()) or 'nothing'
        return album.add(picture[..., ::-1], words, name, WIDTH)

    truths, of_rows, failed = _by_image(written.get('annotations', [])), {}, {}
    for one in shown:
        try:
            of_rows[one.row.number] = _by_image(_detections(one.folder))
        except Exception as error:  # a damaged file costs only the pictures of its row
            failed[one.row.number] = album.missing(f'{one.row.label}: detections', error)
    scores = {one.row.number: {located.get(k, k): v for k, v in one.scores.items()} for one in shown}
    names = [
        ([name for name, key in ids.items() if name in scores[number] or key in of_row], scores[number])
        for number, of_row in of_rows.items()
    ]
    for name in _choose(found, names):
        pixels = album.read(data.root / data.images / name, *data.folders)
        example = Example(name, album.add(pixels, Path(name).name, name, WIDTH), Picture(), dict(failed))
        example.truth = album.attempt(f'ground truth of {name}', drawn, pixels, truths.get(ids[name], []))
        example.scores = {number: of[name] for number, of in scores.items() if name in of}
        for one in shown:
            if one.row.number in of_rows:
                things = of_rows[one.row.number].get(ids[name], [])
                example.predictions[one.row.number] = album.attempt(f'{one.row.label}: {name}', drawn, pixels, things)
        found.examples.append(example)


def _read_json(path: Path, *folders: Path) -> Any:
    content = read_inside(path, *folders)
    if content.startswith(b'\x1f\x8b'):
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_FILE_BYTES)
    return json.loads(content)


def _detections(folder: Path) -> list[dict]:
    """Those with masks if there are any."""
    for file in (folder / 'instances.segm.json', folder / 'instances.bbox.json'):
        if os.path.lexists(file):
            return _read_json(file, folder)
    return []


def _by_image(things: Iterable[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for thing in things:
        found.setdefault(str(thing['image_id']), []).append(thing)
    return found


def _object(thing: Mapping[str, Any], order: Sequence[Any], size: Sequence[int], shown: Sequence[int]) -> dict:
    """A COCO object of an image of ``size`` as :func:`replk_mm.visualize.draw_instances` takes it at size ``shown``."""
    found: dict[str, Any] = dict(label=order.index(thing['category_id']))
    if 'score' in thing:
        found['score'] = float(thing['score'])
    scale = np.array(shown[::-1]) / size[::-1]
    if thing.get('segmentation'):
        found['mask'] = _mask(thing['segmentation'], size, shown, scale)
    if 'bbox' in thing:
        corner, extent = np.array(thing['bbox'], float).reshape(2, 2) * scale
    else:
        corner, extent = np.reshape(cv2.boundingRect(found['mask'].astype('u1')), (2, 2))
    return found | dict(box=[*corner, *(corner + extent)])


def _mask(segmentation: Any, size: Sequence[int], shown: Sequence[int], scale: np.ndarray) -> np.ndarray:
    """A COCO segmentation, polygons or run lengths, as bool ``shown``; a full mask of each object would take seconds.

    Raises:
        ValueError: If it is none, or not of an image of ``size``.
    """
    from pycocotools import mask

    from replk_mm.data.coco import mask_error, run_lengths

    problem = mask_error(segmentation, *size)
    if problem:
        raise ValueError(problem)
    if isinstance(segmentation, list):
        outlines = [(np.reshape(polygon, (-1, 2)) * scale).ravel().tolist() for polygon in segmentation]
        return mask.decode(mask.merge(mask.frPyObjects(outlines, *shown))).astype(bool)
    rows, columns = (np.arange(n) * of // n for n, of in zip(shown, size, strict=True))
    ends = np.cumsum(run_lengths(segmentation['counts']))  # column by column, background first
    return np.searchsorted(ends, rows[:, None] + size[0] * columns, side='right') % 2 == 1
