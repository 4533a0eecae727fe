"""Pictures of a report: receptive fields, and the same images for every row with ground truth and predictions."""

import base64
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel

from replk_mm.bench.records import MAX_FILE_BYTES, read_inside, resolve_inside
from replk_mm.bench.report.load import ProtocolGroup, Record, ReportRow
from replk_mm.visualize import colorize, draw_instances, make_palette

#: Of all pictures of a page together, in bytes as they stand in it.
MOST_BYTES = 12 * 2**20
#: Pixels of a picture that is read, and its longer side.
MOST_PIXELS, MOST_SIDE = 2**26, 2**14
#: Rows of a protocol that plots and pictures show: the best ones.
MOST_ROWS = 40
#: Width of a picture, in pixels.
WIDTH, HEAT_MAP_WIDTH = 256, 520
#: Detections that are drawn: of at least this score, and this many at most.
LEAST_SCORE, MOST_OBJECTS = 0.3, 40


@dataclass(frozen=True)
class Picture:
    """A picture and its description; ``source`` is None if it is missing, and ``words`` are the reason."""

    source: Markup | None = None
    words: str = 'no such file'
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
        folders: Where its files may be, links resolved; not part of a record.
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
    folders: tuple[Path, ...] = ()

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

    Records may be those of other people. Their ``files`` must be in ``runs`` of the work dir, their data in ``data``
    there or in a folder that the user names; see :func:`replk_mm.bench.records.resolve_inside`.

    Args:
        data_roots: Data sets that the page may show images of.
        left: Bytes that it may take.

    Attributes:
        problems: Pictures that are missing, with the reason.
        outside: Data sets that are neither in ``data`` of a work dir nor in ``data_roots``.
    """

    def __init__(self, data_roots: Iterable[str | Path] = (), left: int = MOST_BYTES) -> None:
        self.data_roots, self.left = [Path(os.path.realpath(root)) for root in data_roots], left
        self.problems: list[str] = []
        self.outside: set[Path] = set()

    def missing(self, name: object, reason: object) -> Picture:
        """A picture that is missing; the page shows why in its place, and below."""
        words = ' '.join(str(reason).split('\n')[:3]) or type(reason).__name__
        self.problems.append(f'{name}: {words}')
        return Picture(words=words)

    def attempt(self, name: str, draw: Callable[..., Picture], *args: Any) -> Picture:
        """The picture ``draw(*args, name)``; it is missing if the drawing fails."""
        try:
            return draw(*args, name)
        except Exception as error:  # damaged data raise anything
            return self.missing(name, error)

    def add(
        self, pixels: np.ndarray | Picture, words: str, name: str, width: int = WIDTH, kind: str = 'photo'
    ) -> Picture:
        """Encode a picture, if the page has room left for it.

        Args:
            pixels: ``(H, W, 3)`` RGB, uint8; a missing picture stays missing.
            words: What it shows.
            name: For the problem.
            width: At most, and a quarter of the largest height; larger ones are made smaller.
            kind: ``'photo'``, which JPEG suits; ``'drawing'``; or ``'labels'``, whose colours are not mixed.
        """
        if isinstance(pixels, Picture):
            return pixels
        image, memory = Image.fromarray(pixels), io.BytesIO()
        method = Image.Resampling.NEAREST if kind == 'labels' else Image.Resampling.LANCZOS
        image.thumbnail((width, 4 * width), method)
        if kind == 'photo':
            image.save(memory, 'JPEG', quality=82)
        else:
            few = image.getcolors(256)
            image = image.quantize(len(few), dither=Image.Dither.NONE) if few else image
            image.save(memory, 'PNG', optimize=True)
        data = base64.b64encode(memory.getvalue()).decode()
        source = f'data:image/{"jpeg" if kind == "photo" else "png"};base64,{data}'
        if len(source) > self.left:
            return self.missing(
                name, f'left out, all pictures of a page together take {MOST_BYTES // 2**20} MiB at most'
            )
        self.left -= len(source)
        return Picture(Markup(source), words, image.width, image.height)

    def read(self, path: Path, *folders: Path, mode: str | None = 'RGB') -> np.ndarray | Picture:
        """The pixels of a file in ``folders``, ``(H, W, 3)`` uint8, of a label map ``(H, W)`` (``mode=None``)."""
        try:
            with Image.open(io.BytesIO(read_inside(path, *folders))) as opened:
                width, height = opened.size
                if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
                    raise ValueError(f'{width} x {height} pixels are too many')
                pixels = np.array(opened.convert(mode) if mode else opened, np.uint8)
                if mode is None and pixels.ndim != 2:
                    raise ValueError(f'not a label map, {pixels.shape[-1]} channels')
                return pixels
        except Exception as error:  # Pillow raises whatever a damaged file makes its decoders run into
            why = error if isinstance(error, ValueError) else getattr(error, 'strerror', None) or type(error).__name__
            return self.missing(path, f'not a readable picture ({why})')

    def data_of(self, record: Record) -> SplitFiles:
        """The data that a record of the metric was measured on.

        Raises:
            ValueError: If the record does not state them, or they are missing or elsewhere.
        """
        stated = record['facts'].get('data') or {}
        data = SplitFiles.model_validate({k: v for k, v in stated.items() if v is not None and v != ''})
        folders = (record.folder / 'data', *self.data_roots)
        # A work dir may have been copied from another machine, and have its scenes in it.
        named = [root for root in folders[1:] if root.name == data.root.name]
        for place in (record.folder / data.root, folders[0] / data.root.name, *named):
            root = Path(os.path.realpath(place))
            if root.is_dir() and any(root.is_relative_to(folder) for folder in folders):
                return data.model_copy(update=dict(root=root, folders=folders))
        if (record.folder / data.root).is_dir():
            self.outside.add(record.folder / data.root)
        raise ValueError(f'data root {data.root}: missing, or outside of {folders[0]} and not in --data-root')


def heat_map(record: Record, words: str, album: Album) -> Picture | None:
    """The receptive field or the profile of robustness of a record; None if it has no picture."""
    name = record['files'].get('heat_map') or record['files'].get('profile')
    if not name:
        return None
    pixels = album.read(record.folder / str(name), record.folder / 'runs')
    return album.add(pixels, words, str(name), HEAT_MAP_WIDTH, 'drawing')


def sheet(group: ProtocolGroup, album: Album) -> tuple[list[ReportRow], SplitFiles, list[Example]] | None:
    """The same images for the best rows of a group that have predictions; None if there are none."""
    rows: list[tuple[ReportRow, Path]] = []
    data = None
    for row in group.rows[:MOST_ROWS]:
        for record in row.of('metric'):
            name = record['files'].get('predictions')
            try:
                if name:
                    folder = resolve_inside(record.folder / str(name), record.folder / 'runs')
                    data = data or album.data_of(record)
                    rows.append((row, folder))
                    break
            except Exception as error:  # the record may hold anything
                album.missing(f'{row.label}, seed {record["seed"]}, {name!r:.100}', error)
    if data is None:
        return None
    try:
        found = (_objects if data.annotations and not data.labels else _label_maps)(rows, data, album)
    except Exception as error:  # a damaged file costs only its pictures
        album.missing(f'{data.root}: examples cannot be shown', f'{type(error).__name__}: {error}')
        return None
    return ([row for row, _ in rows], data, found) if found else None


def _choose(names_of_rows: Iterable[Iterable[str]]) -> list[str]:
    """Images that as many rows as possible have, evenly spread over their sorted names: six, or four of many rows."""
    sets = [set(names) for names in names_of_rows]
    counts = Counter(name for names in sets for name in names)
    most = max(counts.values(), default=0)
    common = sorted(name for name, count in counts.items() if count == most)
    return [common[round(i)] for i in np.linspace(0, len(common) - 1, min(6 if len(sets) <= 4 else 4, len(common)))]


def _label_maps(rows: Sequence[tuple[ReportRow, Path]], data: SplitFiles, album: Album) -> list[Example]:
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
        names = dict(enumerate(data.classes, data.first))
        largest = [
            f'{names.get(int(value), f"label {value}")} {100 * counts[value] / labels.size:.0f}\u00a0%'
            for value in sorted(values, key=lambda value: -counts[value])[:4]
        ]
        picture = colorize(labels - np.uint8(data.first), data.palette)[..., ::-1]
        return album.add(picture, ''.join([*words, ', '.join(largest)]), name, kind='labels')

    available = {row.number: {p.relative_to(folder).as_posix() for p in folder.rglob('*.png')} for row, folder in rows}
    found = []
    for name in _choose(available.values()):
        truth = album.read(data.label_of(name), *data.folders, mode=None) if data.labels else Picture()
        image = album.add(album.read(data.image_of(name), *data.folders), data.image_of(name).name, name)
        example = Example(name, image, drawn(truth, None, f'ground truth of {name}'))
        for row, folder in rows:
            if name in available[row.number]:
                labels = album.read(folder / name, folder, mode=None)
                example.predictions[row.number] = drawn(labels, truth, f'{row.label}: {name}')
        found.append(example)
    return found


def _objects(rows: Sequence[tuple[ReportRow, Path]], data: SplitFiles, album: Album) -> list[Example]:
    from replk_mm.data.coco import annotation_path, locate_images

    written: Any = _read_json(annotation_path(data.root / str(data.annotations)), *data.folders)
    ids = {str(image['file_name']): str(image['id']) for image in written['images'] if 'file_name' in image}
    ids = dict(zip(locate_images(list(ids), data.root / data.images), ids.values(), strict=True))
    classes = {category['id']: str(category['name']) for category in written['categories']}
    order = sorted(classes)
    colours = [data.palette[i % len(data.palette)] for i in range(len(order))]

    def drawn(pixels: np.ndarray, things: Sequence[dict], name: str) -> Picture:
        shown = Image.fromarray(pixels)
        shown.thumbnail((2 * WIDTH, 8 * WIDTH))
        surest = sorted(things, key=lambda thing: -thing.get('score', 1.0))[:MOST_OBJECTS]
        objects = [
            _object(thing, order, pixels.shape[:2], (shown.height, shown.width))
            for thing in surest
            if thing['category_id'] in classes and thing.get('score', 1.0) >= LEAST_SCORE
        ]
        picture = draw_instances(np.array(shown)[..., ::-1], objects, [classes[c] for c in order], colours)
        counts = Counter(classes[order[thing['label']]] for thing in objects)
        words = ', '.join(f'{count} {of}' for of, count in counts.items()) or 'nothing'
        return album.add(picture[..., ::-1], words, name, 2 * WIDTH)

    truths, of_rows, failed = _by_image(written.get('annotations', [])), {}, {}
    for row, folder in rows:
        try:
            of_rows[row.number] = _by_image(_detections(folder))
        except Exception as error:  # a damaged file costs only the pictures of its row
            failed[row.number] = album.missing(f'{row.label}: detections', error)
    found = []
    for name in _choose([name for name, key in ids.items() if key in of_row] for of_row in of_rows.values()):
        pixels = album.read(data.root / data.images / name, *data.folders)
        if isinstance(pixels, Picture):
            found.append(Example(name, pixels, pixels, {row.number: pixels for row, _ in rows}))
            continue
        example = Example(name, album.add(pixels, Path(name).name, name), Picture(), dict(failed))
        example.truth = album.attempt(f'ground truth of {name}', drawn, pixels, truths.get(ids[name], []))
        for row, _ in rows:
            if row.number in of_rows:
                things = of_rows[row.number].get(ids[name], [])
                example.predictions[row.number] = album.attempt(f'{row.label}: {name}', drawn, pixels, things)
        found.append(example)
    return found


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
