"""Pictures of a report: receptive fields, and the same images for every row with ground truth and predictions."""

import base64
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
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel

from replk_mm.bench.report.load import ProtocolGroup, Record, ReportRow
from replk_mm.visualize import colorize, draw_instances, make_palette

#: Of all pictures of a page together, in bytes as they stand in it.
MOST_BYTES = 12 * 2**20
#: Width of a picture, in pixels.
WIDTH, HEAT_MAP_WIDTH = 256, 520
#: Detections that are drawn: of at least this score, and this many at most.
LEAST_SCORE, MOST_OBJECTS = 0.3, 40


@dataclass(frozen=True)
class Picture:
    """A picture and its description; ``source`` is a ``data:`` URL, or None if the picture is missing."""

    source: Markup | None = None
    words: str = 'missing'
    width: int = 0
    height: int = 0


@dataclass
class Example:
    """One image with its ground truth, and the predictions of rows by their number."""

    name: str
    image: Picture
    truth: Picture
    predictions: dict[int, Picture] = field(default_factory=dict)


class SplitFiles(BaseModel):
    """Images and labels of a test split: ``facts['data']`` of the metric's record.

    Attributes:
        root: Folder of the data set.
        images: Folder of the images below it.
        labels: Folder of the label maps; None if it has none.
        annotations: COCO's annotation file; None if it has none.
        image_suffix: End of an image's name that label maps replace.
        label_suffix: End of a label map's name in place of it.
        classes: Names.
        palette: RGB of each class.
        ignored: Value of label files that is not scored; if it is 0, classes count from 1 in them.
    """

    root: Path
    images: str = ''
    labels: str | None = None
    annotations: str | None = None
    image_suffix: str = '.jpg'
    label_suffix: str = '.png'
    classes: list[str] = []
    palette: list[tuple[int, int, int]] = []
    ignored: int | None = 255

    def model_post_init(self, _: Any) -> None:
        """Give every class a colour; where they are unknown, 255 labels."""
        self.palette += make_palette(len(self.classes) or 255)[len(self.palette) :]

    @property
    def first(self) -> int:
        """Label of the first class in label files."""
        return 1 if self.ignored == 0 else 0

    def image_of(self, prediction: str) -> Path:
        """The image of a prediction, both below their folders; predictions end with ``.png`` whatever images do."""
        return self.root / self.images / f'{prediction.removesuffix(".png")}.{self.image_suffix.rpartition(".")[2]}'

    def label_of(self, prediction: str) -> Path:
        """The label map of a prediction."""
        base = prediction.removesuffix('.png').removesuffix(self.image_suffix.rpartition('.')[0])
        return self.root / (self.labels or '') / f'{base}{self.label_suffix}'


class Album:
    """The pictures of one page.

    Args:
        folders: The work dir of a record, by ``id``.
        left: Bytes that it may take.

    Attributes:
        problems: Pictures that are missing, with the reason.
        outside: Data sets outside of the work dirs that the page shows images of.
    """

    def __init__(self, folders: Mapping[int, Path], left: int = MOST_BYTES) -> None:
        self.folders, self.left = folders, left
        self.problems: list[str] = []
        self.outside: set[Path] = set()

    def add(self, pixels: np.ndarray, words: str, name: str, width: int = WIDTH, kind: str = 'photo') -> Picture:
        """Encode a picture, if the page has room left for it.

        Args:
            pixels: ``(H, W, 3)`` RGB, uint8.
            words: What it shows.
            name: For the problem.
            width: At most; wider ones are made smaller.
            kind: ``'photo'``, which JPEG suits; ``'drawing'``; or ``'labels'``, whose colours are not mixed.
        """
        image, memory = Image.fromarray(pixels), io.BytesIO()
        if image.width > width:
            size = width, max(1, round(image.height * width / image.width))
            image = image.resize(size, Image.Resampling.NEAREST if kind == 'labels' else Image.Resampling.LANCZOS)
        if kind == 'photo':
            image.save(memory, 'JPEG', quality=82)
        else:
            few = image.getcolors(256)
            image = image.quantize(len(few), dither=Image.Dither.NONE) if few else image
            image.save(memory, 'PNG', optimize=True)
        data = base64.b64encode(memory.getvalue()).decode()
        source = f'data:image/{"jpeg" if kind == "photo" else "png"};base64,{data}'
        if len(source) > self.left:
            self.problems.append(
                f'{name}: left out, all pictures of a page together take {MOST_BYTES // 2**20} MiB at most'
            )
            return Picture()
        self.left -= len(source)
        return Picture(Markup(source), words, image.width, image.height)

    def read(self, path: Path, mode: str | None = 'RGB') -> np.ndarray | None:
        """A picture's pixels, ``(H, W, 3)`` uint8, or as the file has them; None and a problem if it is unreadable."""
        try:
            with Image.open(path) as opened:
                return np.array(opened.convert(mode) if mode else opened, np.uint8)
        except Exception as error:  # Pillow raises whatever a damaged file makes its decoders run into
            self.problems.append(f'{path}: not a readable picture ({type(error).__name__})')
            return None

    def labels(self, path: Path) -> np.ndarray | None:
        """A label map ``(H, W)``; None, and a problem, if it cannot be read."""
        found = self.read(path, None)
        if found is not None and found.ndim != 2:
            self.problems.append(f'{path}: not a label map ({found.shape[-1]} channels)')
            return None
        return found

    def photo(self, path: Path, name: str) -> Picture:
        """An image of the data."""
        pixels = self.read(path)
        return Picture() if pixels is None else self.add(pixels, path.name, name)

    def place(self, record: Record, what: str) -> Path | None:
        """A file or folder that a record names; None if it names none.

        Raises:
            ValueError: If it does not lie in the record's work dir.
        """
        name = record['files'].get(what)
        if not name:
            return None
        # Checked by name only: a link inside the work dir is the user's own.
        place = Path(os.path.normpath(str(name)))
        if place.is_absolute() or place.parts[:1] == (os.pardir,):
            raise ValueError(f'{name!r:.100}: not in the work dir {self.folders[id(record)]}')
        return self.folders[id(record)] / place

    def data_of(self, record: Record) -> SplitFiles:
        """The data that a record of the metric was measured on.

        Raises:
            ValueError: If the record does not state them, or they are missing.
        """
        stated = record['facts'].get('data') or {}
        data = SplitFiles.model_validate({k: v for k, v in stated.items() if v is not None and v != ''})
        # Scenes of a suite are in its work dir, which may have been copied from another machine.
        copied = self.folders[id(record)] / 'data' / data.root.name
        if not data.root.is_dir() and not copied.is_dir():
            raise ValueError(f'{data.root}: no such data root here')
        return data if data.root.is_dir() else data.model_copy(update=dict(root=copied))


def heat_map(record: Record, words: str, album: Album) -> Picture | None:
    """The receptive field of a record; None if it has no picture."""
    try:
        path = album.place(record, 'heat_map')
    except ValueError as error:
        album.problems.append(str(error))
        return Picture()
    pixels = album.read(path) if path else None
    if pixels is None:
        return Picture() if path else None
    return album.add(pixels, words, str(path), HEAT_MAP_WIDTH, 'drawing')


def sheet(group: ProtocolGroup, album: Album) -> tuple[list[ReportRow], SplitFiles, list[Example]] | None:
    """The same images for every row of a group that has predictions; None if there are none."""
    rows: list[tuple[ReportRow, Path]] = []
    data = None
    for row in group.rows:
        for record in row.of('metric'):
            try:
                folder = album.place(record, 'predictions')
                if folder:
                    data = data or album.data_of(record)
                    rows.append((row, folder))
                    break
            except (ValueError, OSError) as error:
                album.problems.append(f'{row.label}, seed {record["seed"]}: {_first_line(error)}')
    if data is None:
        return None
    try:
        found = (_objects if data.annotations and not data.labels else _label_maps)(rows, data, album)
    except Exception as error:  # a damaged file costs only its pictures
        album.problems.append(f'{data.root}: examples cannot be shown ({type(error).__name__}: {_first_line(error)})')
        return None
    if found and not any(data.root.resolve().is_relative_to(folder.resolve()) for folder in album.folders.values()):
        album.outside.add(data.root)
    return ([row for row, _ in rows], data, found) if found else None


def _first_line(error: Exception) -> str:
    return ' '.join(str(error).split('\n')[:3])


def _choose(names_of_rows: Iterable[Iterable[str]]) -> list[str]:
    """Images that as many rows as possible have, evenly spread over their sorted names: six, or four of many rows."""
    sets = [set(names) for names in names_of_rows]
    counts = Counter(name for names in sets for name in names)
    common = sorted(name for name, count in counts.items() if count == max(counts.values()))
    return [common[round(i)] for i in np.linspace(0, len(common) - 1, min(6 if len(sets) <= 4 else 4, len(common)))]


def _label_maps(rows: Sequence[tuple[ReportRow, Path]], data: SplitFiles, album: Album) -> list[Example]:
    def drawn(labels: np.ndarray | None, truth: np.ndarray | None, name: str) -> Picture:
        if labels is None:
            return Picture()
        words = []
        if truth is not None and truth.shape == labels.shape and (truth != data.ignored).any():
            scored = truth != data.ignored
            words = [f'{100 * np.mean(labels[scored] == truth[scored]):.0f}\u00a0% of the scored pixels right; ']
        values, counts = np.unique(labels[labels != data.ignored], return_counts=True)
        names = dict(enumerate(data.classes, data.first))
        largest = [
            f'{names.get(int(values[i]), f"label {values[i]}")} {100 * counts[i] / labels.size:.0f}\u00a0%'
            for i in np.argsort(-counts)[:4]
        ]
        picture = colorize(labels - np.uint8(data.first), data.palette)[..., ::-1]
        return album.add(picture, ''.join([*words, ', '.join(largest)]), name, kind='labels')

    available = {row.number: {p.relative_to(folder).as_posix() for p in folder.rglob('*.png')} for row, folder in rows}
    found = []
    for name in _choose(available.values()):
        truth = album.labels(data.label_of(name)) if data.labels else None
        example = Example(name, album.photo(data.image_of(name), name), drawn(truth, None, f'ground truth of {name}'))
        for row, folder in rows:
            labels = album.labels(folder / name) if name in available[row.number] else None
            example.predictions[row.number] = drawn(labels, truth, f'{row.label}: {name}')
        found.append(example)
    return found


def _objects(rows: Sequence[tuple[ReportRow, Path]], data: SplitFiles, album: Album) -> list[Example]:
    from replk_mm.data.coco import invalidate_cache, read_annotations

    written: Any = read_annotations(data.root / str(data.annotations), data.root / data.images)
    invalidate_cache()
    ids = {str(image['file_name']): image['id'] for image in written['images']}
    classes = {category['id']: str(category['name']) for category in written['categories']}
    order = sorted(classes)
    colours = [data.palette[i % len(data.palette)] for i in range(len(order))]

    def drawn(pixels: np.ndarray, things: Sequence[dict], name: str) -> Picture:
        surest = sorted(things, key=lambda thing: -thing.get('score', 1.0))[:MOST_OBJECTS]
        objects = [
            _object(thing, order, pixels.shape[:2])
            for thing in surest
            if thing['category_id'] in classes and thing.get('score', 1.0) >= LEAST_SCORE
        ]
        picture = draw_instances(pixels[..., ::-1], objects, [classes[c] for c in order], colours)
        counts = Counter(classes[order[thing['label']]] for thing in objects)
        words = ', '.join(f'{count} {of}' for of, count in counts.items()) or 'nothing'
        return album.add(picture[..., ::-1], words, name, 2 * WIDTH)

    truths = _by_image(written['annotations'])
    of_rows = {row.number: _by_image(_detections(folder)) for row, folder in rows}
    found = []
    for name in _choose([name for name, key in ids.items() if key in of_row] for of_row in of_rows.values()):
        path = data.root / data.images / name
        example = Example(name, album.photo(path, name), Picture())
        pixels = album.read(path) if example.image.source else None
        if pixels is not None:
            example.truth = drawn(pixels, truths.get(ids[name], []), f'ground truth of {name}')
            for row, _ in rows:
                things = of_rows[row.number].get(ids[name], [])
                example.predictions[row.number] = drawn(pixels, things, f'{row.label}: {name}')
        found.append(example)
    return found


def _detections(folder: Path) -> list[dict]:
    """Those with masks if there are any."""
    for file in (folder / 'instances.segm.json', folder / 'instances.bbox.json'):
        if file.is_file():
            return json.loads(file.read_bytes())
    return []


def _by_image(things: Iterable[dict]) -> dict[Any, list[dict]]:
    found: dict[Any, list[dict]] = {}
    for thing in things:
        found.setdefault(thing['image_id'], []).append(thing)
    return found


def _object(thing: Mapping[str, Any], order: Sequence[Any], size: tuple[int, ...]) -> dict[str, Any]:
    """A COCO object as :func:`replk_mm.visualize.draw_instances` takes it."""
    found: dict[str, Any] = dict(label=order.index(thing['category_id']))
    if 'score' in thing:
        found['score'] = float(thing['score'])
    if thing.get('segmentation'):
        found['mask'] = _mask(thing['segmentation'], *size)
    x, y, width, height = map(float, thing['bbox'] if 'bbox' in thing else cv2.boundingRect(found['mask'].astype('u1')))
    return found | dict(box=[x, y, x + width, y + height])


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A COCO segmentation, polygons or run lengths, as ``(H, W)`` bool.

    Raises:
        ValueError: If it is none, or of another size.
    """
    from pycocotools import mask

    from replk_mm.data.coco import mask_error

    problem = mask_error(segmentation, height, width)
    if problem:
        raise ValueError(problem)
    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation['counts'], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return mask.decode(segmentation).astype(bool)
