"""Pictures of label maps and of detected objects, and sheets of pictures side by side."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np

_FONT = cv2.FONT_HERSHEY_SIMPLEX


def put_text(picture: np.ndarray, text: str, at: tuple[int, int], scale: float = 0.45) -> None:
    """Write dark text with its lower left corner at ``(x, y)`` pixels."""
    cv2.putText(picture, text, at, _FONT, scale, (30, 30, 30), 1, cv2.LINE_AA)


def spread_palette(count: int) -> list[tuple[int, int, int]]:
    """RGB of ``count`` classes, neighbours far apart in hue."""
    hues = ((0.12 + 0.618034 * i) % 1 for i in range(count))  # the golden ratio
    colours = [colorsys.hsv_to_rgb(hue, 0.65 + 0.3 * (i % 2), 0.95 - 0.25 * (i % 3 == 2)) for i, hue in enumerate(hues)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours]


def colorize(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colours of a label map.

    Args:
        labels: ``(H, W)`` class indices; values beyond the palette (ignored pixels) become black.
        palette: RGB of each class.

    Returns:
        ``(H, W, 3)`` uint8, BGR as OpenCV has it.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)[:256, ::-1]
    return table[labels.astype(np.uint8)]


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.55
) -> np.ndarray:
    """A label map over its image, both ``(H, W)``; ignored pixels show the image alone."""
    mixed = cv2.addWeighted(image, 1 - opacity, colorize(labels, palette), opacity, 0)
    return np.where((labels < len(palette))[..., None], mixed, image)


def legend(
    labels: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]], height: int, shares: bool = True
) -> np.ndarray:
    """A panel that names the classes in ``labels`` with their share of the pixels, largest first.

    Args:
        labels: ``(H, W)`` class indices.
        classes: Names.
        palette: RGB of each class.
        height: Of the panel in pixels; classes that do not fit are counted in its last line.
        shares: Whether to give each class's share. Defaults to True.
    """
    ids, counts = np.unique(labels[labels < len(classes)], return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return swatches(
        [
            (palette[ids[i]], classes[ids[i]] + (f' {100 * counts[i] / labels.size:.0f}%' if shares else ''))
            for i in order
        ],
        height,
    )


def swatches(entries: Sequence[tuple[Sequence[int], str]], height: int) -> np.ndarray:
    """A panel ``(height, 210, 3)`` BGR of colours (RGB) with their texts; those that do not fit are counted."""
    rows = max(1, (height - 10) // 20)
    panel = np.full((height, 210, 3), 255, np.uint8)
    for row, (colour, text) in enumerate(entries[:rows]):
        y = 8 + 20 * row
        if row == rows - 1 and len(entries) > rows:
            put_text(panel, f'and {len(entries) - row} more', (10, y + 12))
            break
        cv2.rectangle(panel, (10, y), (24, y + 14), [int(c) for c in colour[::-1]], -1)
        cv2.rectangle(panel, (10, y), (24, y + 14), (120, 120, 120), 1)
        put_text(panel, text, (32, y + 12))
    return panel


def draw_instances(
    image: np.ndarray,
    objects: Sequence[dict],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    opacity: float = 0.45,
) -> np.ndarray:
    """Objects in their image: masks, boxes, and over each box its class with the score in percent.

    Args:
        image: ``(H, W, 3)`` BGR.
        objects: From :func:`replk_mm.engine.predict.instances`, the surest first.
        classes: Names.
        palette: RGB of each class.
        opacity: Of the masks.
    """
    picture = image.copy()
    for thing in reversed(objects):  # the surest on top
        colour = [int(c) for c in palette[thing['label']][::-1]]
        if 'mask' in thing:
            inside = thing['mask']
            picture[inside] = ((1 - opacity) * picture[inside] + opacity * np.asarray(colour)).astype(np.uint8)
        left, top, right, bottom = (round(v) for v in thing['box'])
        cv2.rectangle(picture, (left, top), (right, bottom), colour, 1)
    for thing in reversed(objects):  # no box runs through a name
        left, top = max(round(thing['box'][0]), 0), round(thing['box'][1])
        text = classes[thing['label']] + (f' {100 * thing["score"]:.0f}%' if 'score' in thing else '')
        width = cv2.getTextSize(text, _FONT, 0.35, 1)[0][0] + 4
        left, top = max(0, min(left, image.shape[1] - width)), max(top, 12)
        cv2.rectangle(picture, (left, top - 12), (left + width, top), (255, 255, 255), -1)
        put_text(picture, text, (left + 2, top - 3), 0.35)
    return picture


def sheet(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], gap: int = 6) -> np.ndarray:
    """Pictures of one size in a grid, a title over each column.

    Args:
        rows: Rows of ``(H, W, 3)`` BGR pictures.
        titles: One for each column.
        gap: White space between pictures in pixels.
    """
    height, width = rows[0][0].shape[:2]
    top = 26
    canvas = np.full((top + len(rows) * (height + gap), len(titles) * (width + gap) + gap, 3), 255, np.uint8)
    for column, title in enumerate(titles):
        put_text(canvas, title, (gap + column * (width + gap), 17), 0.5)
    for r, row in enumerate(rows):
        for column, picture in enumerate(row):
            y, x = top + r * (height + gap), gap + column * (width + gap)
            canvas[y : y + height, x : x + width] = picture
    return canvas
