"""Pictures of a report: the album of a page, the data that it may show, and heat maps."""

import base64
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from pydantic import BaseModel

from replk_mm.bench.records import read_inside
from replk_mm.bench.report.structures import Record
from replk_mm.visualize import make_palette

#: Of all pictures of a page together, in bytes as they stand in it.
MOST_BYTES = 12 * 2**20
#: Pixels of a picture that is read, and its longer side.
MOST_PIXELS, MOST_SIDE = 2**26, 2**14
#: Rows of a protocol that plots and heat maps show: the best ones.
MOST_ROWS = 40
#: Width of a heat map, in pixels.
HEAT_MAP_WIDTH = 520


@dataclass(frozen=True)
class Picture:
    """A picture and its description; ``source`` is None if it is missing, and ``words`` are the reason."""

    source: Markup | None = None
    words: str = 'no such file'
    width: int = 0
    height: int = 0


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
        label_map: Class of each value, counted from the first class, where a data set has more classes than are used.
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
    label_map: dict[int, int] = {}
    folders: tuple[Path, ...] = ()

    def model_post_init(self, _: Any) -> None:
        """Give every class a colour; where they are unknown, 255 labels."""
        self.palette += make_palette(len(self.classes) or 255)[len(self.palette) :]

    @property
    def first(self) -> int:
        """Label of the first class in label files."""
        return 1 if self.ignored == 0 else 0

    @property
    def classes_of_values(self) -> np.ndarray:
        """Class of each value, ``(256,)``, of label files; 255 is not scored."""
        classes = np.arange(256, dtype=np.uint8) - np.uint8(self.first)
        classes[[255 if self.ignored is None else self.ignored, 255]] = 255
        for old, new in self.label_map.items():
            classes[old + self.first] = new
        return classes

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

    def add(self, pixels: np.ndarray | Picture, words: str, name: str, width: int, kind: str = 'photo') -> Picture:
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
        stated = record['facts'].get('data')
        if not stated:
            raise ValueError('the record does not state its data')
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
