"""Sheets with image, ground truth, predictions of A and B, and their differences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from replk_mm.bench.compare.segmentation import SegmentationImages
from replk_mm.data.files import read_image
from replk_mm.engine.predict import write_picture
from replk_mm.visualize import color_legend, draw_instances, draw_text, image_grid, overlay

if TYPE_CHECKING:
    from replk_mm.bench.compare.detection import DetectionImages, Matches  # needs pycocotools

#: Okabe and Ito's blue, orange and bluish green (RGB), distinguishable with any colour vision, and grays.
A, B, TRUTH = (0, 114, 178), (230, 159, 0), (0, 158, 115)
NEITHER, BOTH, NO_LABEL = (40, 40, 40), (150, 150, 150), (255, 255, 255)
#: Width of a picture, and its greatest height, in pixels.
WIDTH, HEIGHT = 280, 360
_CAPTION = 18
_OPACITY = 0.65
#: Images on one sheet.
PER_SHEET = 8


@dataclass
class Sheet:
    """Content of a sheet."""

    key: list[tuple[Sequence[int], str]]  #: meaning of the colours (RGB)
    classes: list[str] = field(default_factory=list)  #: class names
    #: RGB of each class; empty if colours do not stand for classes
    palette: list[list[int]] = field(default_factory=list)
    #: five pictures ``(H, W, 3)`` BGR for each image, with captions
    rows: list[list[tuple[np.ndarray, str]]] = field(default_factory=list)
    occurring: list[np.ndarray] = field(default_factory=list)  #: indices of the classes in each row


def _gray(image: np.ndarray) -> np.ndarray:
    """The image without colours, so that drawn colours stand out."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)


def _pale(image: np.ndarray) -> np.ndarray:
    return (0.45 * _gray(image) + 130).astype(np.uint8)


def draw_label_difference(
    image: np.ndarray, label: np.ndarray, a: np.ndarray, b: np.ndarray, ignored: int
) -> np.ndarray:
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


def draw_label_maps(images: SegmentationImages, changed: Sequence[dict]) -> Sheet:
    """Label maps of the images that changed."""
    sheet = Sheet(
        [
            (A, 'right in A only'),
            (B, 'right in B only'),
            (NEITHER, 'wrong in both'),
            (BOTH, 'right in both'),
            (NO_LABEL, 'no label'),
        ],
        images.classes,
        images.palette,
    )
    for scores in changed:
        label = images.label(scores['index'])
        a, b = (images.prediction(scores['index'], result) for result in images.pair)
        image = read_image(images.image_path(scores['index']))
        if image.shape[:2] != label.shape:
            image = cv2.resize(image, label.shape[::-1], interpolation=cv2.INTER_AREA)
        scored, gray = label != images.ignore_index, _gray(image)
        maps = [overlay(gray, ids, images.palette, _OPACITY) for ids in (label, a, b)]
        only_a, only_b = (100 * ((x == label) & (y != label))[scored].mean() for x, y in ((a, b), (b, a)))
        captions = [
            scores['image'],
            f'{100 * scored.mean():.0f}% labelled',
            *(f'mIoU {scores[x]:.1f}, acc {scores[f"accuracy_{x}"]:.1f}' for x in 'ab'),
            f'only A {only_a:.1f}%, only B {only_b:.1f}%',
        ]
        pictures = [image, *maps, draw_label_difference(image, label, a, b, images.ignore_index)]
        sheet.rows.append(list(zip(pictures, captions, strict=True)))
        sheet.occurring.append(np.unique(np.concatenate([label[scored], a[scored], b[scored]])))
    return sheet


def draw_objects(images: 'DetectionImages', changed: Sequence[dict]) -> Sheet:
    """Objects and detections of the images that changed."""
    sheet = Sheet(
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
        ]
    )
    apis = (images.objects.api, *images.detections)
    for scores in changed:
        image, scale = _fit(read_image(images.objects.folder / scores['image']), HEIGHT, cv2.INTER_CUBIC)
        a, b = (part[scores['id']] for part in images.matches)
        pale = _pale(image)
        truth = [images.objects.api.anns[i] for i in sorted(a.found | a.missed)]
        groups = [(truth, TRUTH)], [(a.right, A), (a.false, NEITHER)], [(b.right, B), (b.false, NEITHER)]
        drawn = [
            _draw_entries(pale, part, images.objects.classes, scale, api.annToMask if images.kind == 'segm' else None)
            for api, part in zip(apis, groups, strict=True)
        ]
        tallies = [', '.join(f'{scores[f"{name}_{x}"]} {name}' for name in ('found', 'missed', 'false')) for x in 'ab']
        captions = [scores['image'], f'{len(truth)} objects', *tallies, f'F1 {scores["a"]:.2f} -> {scores["b"]:.2f}']
        pictures = [image, *drawn, _draw_object_difference(pale.copy(), truth, a, b, scale)]
        sheet.rows.append(list(zip(pictures, captions, strict=True)))
    return sheet


def _draw_entries(
    picture: np.ndarray,
    groups: Sequence[tuple[Sequence[dict], Sequence[int]]],
    classes: dict[int, str],
    scale: float,
    mask_of: Callable[[dict], np.ndarray] | None,
) -> np.ndarray:
    """Draw groups of COCO entries, each in its colour; ``mask_of`` decodes masks, None draws boxes only."""
    objects: list[dict[str, Any]] = []
    names, colors = [], []
    for entries, color in groups:
        for entry in sorted(entries, key=lambda e: -e.get('score', 1)):
            thing = dict(label=len(objects), box=_corners(entry, scale))
            if 'score' in entry:
                thing['score'] = entry['score']
            if mask_of:
                mask = cv2.resize(mask_of(entry), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST)
                thing['mask'] = mask.astype(bool)
            objects.append(thing)
            names.append(classes[entry['category_id']])
            colors.append(color)
    return draw_instances(picture, objects, names, colors)


def _corners(entry: dict, scale: float) -> list[float]:
    x, y, width, height = entry['bbox']
    return [scale * v for v in (x, y, x + width, y + height)]


def _draw_object_difference(
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


def write_sheets(out: Path, sheet: Sheet, titles: Sequence[str]) -> list[str]:
    """Write ``changed_1.png`` and so on, eight images each, with a legend.

    Args:
        out: Folder, which is there.
        sheet: Pictures and their meaning.
        titles: Of the five columns.

    Returns:
        The files' names.

    Raises:
        UserError: If a file cannot be written.
    """
    titles = [title if len(title) <= 30 else f'{title[:27]}...' for title in titles]
    names = []
    for start in range(0, len(sheet.rows), PER_SHEET):
        rows = sheet.rows[start : start + PER_SHEET]
        height = min(
            HEIGHT, max(round(picture.shape[0] * WIDTH / picture.shape[1]) for row in rows for picture, _ in row)
        )
        canvas = image_grid([[_cell(picture, caption, height) for picture, caption in row] for row in rows], titles)
        key = list(sheet.key)
        if sheet.palette:
            ids = np.unique(np.concatenate(sheet.occurring[start : start + PER_SHEET]))
            key += [(sheet.palette[i], sheet.classes[i]) for i in ids if i < len(sheet.classes)]
        panel = color_legend(key, max(canvas.shape[0], 20 * min(len(key), 20) + 10))
        below = panel.shape[0] - canvas.shape[0]
        canvas = cv2.copyMakeBorder(canvas, 0, below, 0, 0, cv2.BORDER_CONSTANT, value=NO_LABEL)
        names.append(f'changed_{start // PER_SHEET + 1}.png')
        write_picture(out / names[-1], np.hstack([canvas, panel]))
    return names
