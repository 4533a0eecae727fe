"""Sheets that show, for each image: itself, the ground truth, what A and B found, and where they differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from replk_mm.bench.compare.results import Result
from replk_mm.data.files import read_image
from replk_mm.engine.predict import write_picture
from replk_mm.visualize import color_legend, draw_instances, draw_text, image_grid, overlay

if TYPE_CHECKING:
    from replk_mm.bench.compare.detection import Matches, Objects
    from replk_mm.bench.compare.segmentation import Labels

#: Okabe and Ito's blue, orange and bluish green (RGB), which readers with any colour vision tell apart, and greys.
A, B, TRUTH = (0, 114, 178), (230, 159, 0), (0, 158, 115)
NEITHER, BOTH, NO_LABEL = (40, 40, 40), (150, 150, 150), (255, 255, 255)
#: Width of a picture, and its greatest height, in pixels.
WIDTH, HEIGHT = 280, 360
_CAPTION = 18
_OPACITY = 0.65
#: Images on one sheet.
PER_SHEET = 8


@dataclass
class Rows:
    """What a sheet shows.

    Attributes:
        rows: Of five pictures ``(H, W, 3)`` BGR each, with a caption.
        key: What colours (RGB) mean.
        classes: Names of the classes.
        palette: RGB of each class; empty if colours do not mean classes.
        occurring: For each row, indices of the classes in it.
    """

    rows: list[list[tuple[np.ndarray, str]]]
    key: list[tuple[Sequence[int], str]]
    classes: list[str] = field(default_factory=list)
    palette: list[list[int]] = field(default_factory=list)
    occurring: list[np.ndarray] = field(default_factory=list)


def _grey(image: np.ndarray) -> np.ndarray:
    """Without colours of its own, so that those drawn over it can be told."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)


def _pale(image: np.ndarray) -> np.ndarray:
    return (0.45 * _grey(image) + 130).astype(np.uint8)


def label_difference(image: np.ndarray, label: np.ndarray, a: np.ndarray, b: np.ndarray, ignored: int) -> np.ndarray:
    """Colour the pixels of an image by who is right, ``(H, W, 3)`` BGR; where both are, the image shows, pale.

    Args:
        image: ``(H, W, 3)`` BGR.
        label: Class indices ``(H, W)``.
        a: What A predicts.
        b: What B predicts.
        ignored: Label of pixels that are not scored.
    """
    found, right_a, right_b = _pale(image), a == label, b == label
    for where, colour in (
        (right_a & ~right_b, A),
        (right_b & ~right_a, B),
        (~right_a & ~right_b, NEITHER),
        (label == ignored, NO_LABEL),
    ):
        found[where] = colour[::-1]
    return found


def label_rows(labels: 'Labels', pair: tuple[Result, Result], changed: Sequence[dict]) -> Rows:
    """Pictures of label maps of the images that changed."""
    found = Rows(
        [],
        [
            (A, 'right in A only'),
            (B, 'right in B only'),
            (NEITHER, 'wrong in both'),
            (BOTH, 'right in both'),
            (NO_LABEL, 'no label'),
        ],
        labels.classes,
        labels.palette,
    )
    for scores in changed:
        label = labels.read(scores['index'])
        a, b = (labels.prediction(scores['index'], result) for result in pair)
        image = read_image(Path(labels.entries[scores['index']][0]['img_path']))
        if image.shape[:2] != label.shape:
            image = cv2.resize(image, label.shape[::-1], interpolation=cv2.INTER_AREA)
        counted, grey = label != labels.ignore_index, _grey(image)
        only_a, only_b = (100 * ((x == label) & (y != label))[counted].mean() for x, y in ((a, b), (b, a)))

        def over(ids: np.ndarray, grey: np.ndarray = grey) -> np.ndarray:
            return overlay(grey, ids, labels.palette, _OPACITY)

        found.rows.append(
            [
                (image, scores['image']),
                (over(label), f'{100 * counted.mean():.0f}% labelled'),
                (over(a), f'mIoU {scores["a"]:.1f}, acc {scores["accuracy_a"]:.1f}'),
                (over(b), f'mIoU {scores["b"]:.1f}, acc {scores["accuracy_b"]:.1f}'),
                (
                    label_difference(image, label, a, b, labels.ignore_index),
                    f'only A {only_a:.1f}%, only B {only_b:.1f}%',
                ),
            ]
        )
        found.occurring.append(np.unique(np.concatenate([label[counted], a[counted], b[counted]])))
    return found


def object_rows(
    objects: 'Objects', detections: Sequence, matches: Sequence[dict], changed: Sequence[dict], kind: str
) -> Rows:
    """Pictures of detected objects of the images that changed; see :mod:`replk_mm.bench.compare.detection`."""
    rows = []
    masks = [api.annToMask if kind == 'segm' else None for api in (objects.api, *detections)]
    for scores in changed:
        image = read_image(objects.folder / scores['image'])
        image, scale = _fit(image, HEIGHT, cv2.INTER_CUBIC)
        size = image.shape[1::-1]
        a, b, pale = *(part[scores['id']] for part in matches), _pale(image)
        truth = [objects.api.anns[i] for i in sorted(a.found | a.missed)]

        def drawn(
            groups: Sequence,
            mask_of: Callable | None,
            pale: np.ndarray = pale,
            scale: float = scale,
            size: tuple[int, int] = size,
        ) -> np.ndarray:
            entries = [
                (entry, colour) for part, colour in groups for entry in sorted(part, key=lambda e: -e.get('score', 1))
            ]
            things = [
                {
                    **{key: entry[key] for key in ('score',) if key in entry},
                    'label': i,
                    'box': _corners(entry, scale),
                    **(
                        {'mask': cv2.resize(mask_of(entry), size, interpolation=cv2.INTER_NEAREST).astype(bool)}
                        if mask_of
                        else {}
                    ),
                }
                for i, (entry, _) in enumerate(entries)
            ]
            names = [objects.classes[entry['category_id']] for entry, _ in entries]
            return draw_instances(pale, things, names, [colour for _, colour in entries])

        rows.append(
            [
                (image, scores['image']),
                (drawn([(truth, TRUTH)], masks[0]), f'{len(truth)} objects'),
                (drawn([(a.right, A), (a.false, NEITHER)], masks[1]), _tally(scores, 'a')),
                (drawn([(b.right, B), (b.false, NEITHER)], masks[2]), _tally(scores, 'b')),
                (_object_difference(pale.copy(), truth, a, b, scale), f'F1 {scores["a"]:.2f} -> {scores["b"]:.2f}'),
            ]
        )
    return Rows(
        rows,
        [
            (TRUTH, 'object'),
            (A, 'A: found'),
            (B, 'B: found'),
            (NEITHER, 'A or B: false'),
            (A, 'differ: only A found'),
            (B, 'differ: only B found'),
            (BOTH, 'differ: both found'),
            (NEITHER, 'differ: both missed'),
            (A, 'crossed: false in A'),
            (B, 'crossed: false in B'),
        ],
    )


def _tally(scores: dict, letter: str) -> str:
    return f'{scores[f"found_{letter}"]} found, {scores[f"missed_{letter}"]} missed, {scores[f"false_{letter}"]} false'


def _corners(entry: dict, scale: float) -> list[float]:
    x, y, width, height = entry['bbox']
    return [scale * v for v in (x, y, x + width, y + height)]


def _object_difference(
    picture: np.ndarray, truth: Sequence[dict], a: 'Matches', b: 'Matches', scale: float
) -> np.ndarray:
    for entry in truth:
        in_a, in_b = entry['id'] in a.found, entry['id'] in b.found
        colour = BOTH if in_a and in_b else A if in_a else B if in_b else NEITHER
        left, top, right, bottom = (round(v) for v in _corners(entry, scale))
        cv2.rectangle(picture, (left, top), (right, bottom), colour[::-1], 2)
    for matches, colour in ((a, A), (b, B)):
        for entry in matches.false:
            left, top, right, bottom = (round(v) for v in _corners(entry, scale))
            cv2.rectangle(picture, (left, top), (right, bottom), colour[::-1], 1)
            middle = (left + right) // 2, (top + bottom) // 2
            cv2.drawMarker(picture, middle, colour[::-1], cv2.MARKER_TILTED_CROSS, 10)
    return picture


def _fit(picture: np.ndarray, height: int, enlarge: int) -> tuple[np.ndarray, float]:
    """A picture as large as fits into ``WIDTH`` x ``height``, and its scale."""
    scale = min(WIDTH / picture.shape[1], height / picture.shape[0])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else enlarge), scale


def _cell(picture: np.ndarray, caption: str, height: int) -> np.ndarray:
    picture, _ = _fit(picture, height, cv2.INTER_NEAREST)
    cell = np.full((height + _CAPTION, WIDTH, 3), 255, np.uint8)
    cell[: picture.shape[0], : picture.shape[1]] = picture
    draw_text(cell, caption if len(caption) <= 40 else f'...{caption[-37:]}', (2, height + 13), 0.38)
    return cell


def write_sheets(out: Path, found: Rows, titles: Sequence[str]) -> list[str]:
    """Write ``changed_1.png`` and so on, eight images each, with a legend.

    Args:
        out: Folder, which is there.
        found: What to show.
        titles: Of the five columns.

    Returns:
        The files' names.

    Raises:
        UserError: If a file cannot be written.
    """
    titles = [title if len(title) <= 30 else f'{title[:27]}...' for title in titles]
    names = []
    for start in range(0, len(found.rows), PER_SHEET):
        rows = found.rows[start : start + PER_SHEET]
        height = min(
            HEIGHT, max(round(picture.shape[0] * WIDTH / picture.shape[1]) for row in rows for picture, _ in row)
        )
        canvas = image_grid([[_cell(picture, caption, height) for picture, caption in row] for row in rows], titles)
        key = list(found.key)
        if found.palette:
            ids = np.unique(np.concatenate(found.occurring[start : start + PER_SHEET]))
            key += [(found.palette[i], found.classes[i]) for i in ids if i < len(found.classes)]
        panel = color_legend(key, max(canvas.shape[0], 20 * min(len(key), 20) + 10))
        below = panel.shape[0] - canvas.shape[0]
        canvas = cv2.copyMakeBorder(canvas, 0, below, 0, 0, cv2.BORDER_CONSTANT, value=NO_LABEL)
        names.append(f'changed_{start // PER_SHEET + 1}.png')
        write_picture(out / names[-1], np.hstack([canvas, panel]))
    return names
