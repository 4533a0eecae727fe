"""Example predictions side by side: the same images for every row, with what should have been found."""
import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from replk_mm.bench.report.pictures import Album, Picture, Unusable, inside, read_labels, read_rgb

#: How many images are shown: more where few rows are beside each other.
MOST, FEWEST, FEW_ROWS = 6, 4, 4
WIDTH = 256

@dataclass(frozen=True)
class Shown:
    """A picture with what it shows in words; a missing one with the reason."""

    picture: Picture | None
    words: str


@dataclass
class Example:
    """One image.

    Attributes:
        name: Its path below the images.
        image: Itself.
        truth: Its labels.
        predictions: Of rows, by their number.
    """

    name: str
    image: Shown
    truth: Shown
    predictions: dict[int, Shown] = field(default_factory=dict)


@dataclass
class Data:
    """Where images and labels of a test split are, and what the labels mean; ``facts['data']`` of a record of the metric.

    Attributes:
        root: Folder of the data set.
        images: Folder of the images below it.
        labels: Folder of the label maps; '' if it has none.
        annotations: COCO's annotation file; '' if it has none.
        image_suffix: End of an image's name that a label map's does not have.
        label_suffix: What a label map's name ends with instead.
        classes: Names.
        palette: RGB of each class.
        ignored: Value of label files that is not scored; if it is 0, classes count from 1 in them.
    """

    root: Path
    images: str
    labels: str = ''
    annotations: str = ''
    image_suffix: str = '.jpg'
    label_suffix: str = '.png'
    classes: list[str] = field(default_factory=list)
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    ignored: int = 255

    @classmethod
    def of(cls, record: Mapping[str, Any], folder: Path) -> 'Data':
        """The data of a record in a work dir.

        Raises:
            Unusable: If they are not there.
        """
        stated = record['facts'].get('data')
        if not isinstance(stated, Mapping) or not stated.get('root') or '\0' in str(stated['root']):
            raise Unusable('the record does not say where its images are')
        classes = stated.get('classes') or []
        if not isinstance(classes, list):
            raise Unusable(f'the classes of its data are no list but {classes!r:.60}')
        named = Path(str(stated['root']))
        # Scenes of a suite are in its work dir, which may have been copied from another machine.
        try:
            root = next((path for path in (named, folder / 'data' / named.name) if path.is_dir()), None)
        except OSError as error:  # a name that is too long, for one
            raise Unusable(f'{str(named)!r:.100}: cannot be read ({error.strerror})') from error
        if root is None:
            raise Unusable(f'{named}: no such data root here')
        images, labels, annotations = (str(stated.get(key) or '') for key in ('images', 'labels', 'annotations'))
        data = cls(root, images, labels, annotations)
        data.image_suffix = str(stated.get('image_suffix') or data.image_suffix)
        data.label_suffix = str(stated.get('label_suffix') or data.label_suffix)
        data.classes = [str(name) for name in classes]
        data.palette = _palette(stated.get('palette'), len(data.classes))
        data.ignored = 0 if stated.get('ignored') == 0 else 255
        return data

    def image_of(self, prediction: str) -> Path:
        """The image of a prediction, both below their folders; predictions end with ``.png`` whatever images do."""
        return self.root / self.images / f'{prediction.removesuffix(".png")}.{self.image_suffix.rpartition(".")[2]}'

    def label_of(self, prediction: str) -> Path:
        """The label map of a prediction."""
        base = prediction.removesuffix('.png').removesuffix(self.image_suffix.rpartition('.')[0])
        return self.root / self.labels / f'{base}{self.label_suffix}'

    @cached_property
    def table(self) -> np.ndarray:
        """RGB of every value of a label file, ``(256, 3)``; what is no class is black."""
        colours = np.zeros((256, 3), np.uint8)
        first = 1 if self.ignored == 0 else 0
        known = self.palette[:256 - first]
        colours[first:first + len(known)] = np.array(known, np.uint8).reshape(-1, 3)
        return colours

    def name_of(self, value: int) -> str:
        """What a value of a label file stands for."""
        index = value - (self.ignored == 0)
        return self.classes[index] if 0 <= index < len(self.classes) else f'label {value}'


def _palette(given: Any, count: int) -> list[tuple[int, int, int]]:
    """A colour for each class, or for 255 labels of unknown classes: those given, or hues far from their neighbours'."""
    try:
        found = [(int(r) & 255, int(g) & 255, int(b) & 255) for r, g, b in given]
    except (TypeError, ValueError):
        found = []
    for i in range(len(found), count or 255):
        r, g, b = colorsys.hsv_to_rgb(i * 0.618 % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.25 * (i % 3))
        found.append((round(255 * r), round(255 * g), round(255 * b)))
    return found


def choose(names_of_rows: Iterable[set[str]]) -> list[str]:
    """Images that as many rows as possible have, evenly spread in the order of their names."""
    sets = list(names_of_rows)
    counts = {name: sum(name in names for names in sets) for name in set().union(*sets)}
    common = sorted(name for name, count in counts.items() if count == max(counts.values(), default=0))
    most = MOST if len(sets) <= FEW_ROWS else FEWEST
    return [common[round(i)] for i in np.linspace(0, len(common) - 1, min(most, len(common)))]


def of_label_maps(rows: Sequence[tuple[int, str, Path]], data: Data, album: Album) -> list[Example]:
    """Images, label maps and predicted ones.

    Args:
        rows: Number, label and folder of predictions of each.
        data: Of all of them.
        album: Takes the pictures and what is wrong with them.
    """
    names = {number: {path.relative_to(folder).as_posix() for path in folder.rglob('*.png')} for number, _, folder in rows}
    found = []
    for name in choose(names.values()):
        truth = _or_none(album, read_labels, data.label_of(name)) if data.labels else None
        example = Example(name, photo(data.image_of(name), name, album),
                          _map(truth, None, data, f'ground truth of {name}', album))
        for number, label, folder in rows:
            labels = _or_none(album, read_labels, folder / name) if name in names[number] else None
            example.predictions[number] = _map(labels, truth, data, f'{label}: {name}', album)
        found.append(example)
    return found


def photo(path: Path, name: str, album: Album) -> Shown:
    """An image of the data."""
    pixels = _or_none(album, read_rgb, path)
    picture = None if pixels is None else album.add(pixels, WIDTH, 'photo', name)
    return Shown(picture, path.name if picture else 'missing')


def _or_none(album: Album, read: Any, path: Path) -> Any:
    try:
        return read(path)
    except Unusable as error:
        album.problems.append(str(error))
        return None


def _map(labels: np.ndarray | None, truth: np.ndarray | None, data: Data, name: str, album: Album) -> Shown:
    picture = None if labels is None else album.add(data.table[labels], WIDTH, 'labels', name)
    if labels is None or picture is None:
        return Shown(None, 'missing')
    values, counts = np.unique(labels[labels != data.ignored], return_counts=True)
    largest = [f'{data.name_of(int(values[i]))} {100 * counts[i] / labels.size:.0f}\u00a0%' for i in np.argsort(-counts)[:4]]
    agreement = ''
    if truth is not None and truth.shape == labels.shape and (truth != data.ignored).any():
        scored = truth != data.ignored
        agreement = f'{100 * np.mean(labels[scored] == truth[scored]):.0f}\u00a0% of the scored pixels right; '
    return Shown(picture, agreement + ', '.join(largest))


def folder_of(record: Mapping[str, Any], work_dir: Path) -> Path | None:
    """The folder of a record's predictions; None if it names none.

    Raises:
        Unusable: If it is not there.
    """
    name = record['files'].get('predictions')
    return inside(work_dir, name) if name else None
