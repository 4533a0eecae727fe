"""Draw label maps, detected objects, legends and grids of images."""

import colorsys
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from replk_mm.files import write_output

_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_text(picture: np.ndarray, text: str, position: tuple[int, int], scale: float = 0.45) -> None:
    """Draw dark text in place, with its lower left corner at ``position``, ``(x, y)`` in pixels."""
    cv2.putText(picture, text, position, _FONT, scale, (30, 30, 30), 1, cv2.LINE_AA)


def make_palette(count: int) -> list[tuple[int, int, int]]:
    """Return RGB colors of ``count`` classes; neighboring classes differ strongly in hue."""
    hues = ((0.12 + 0.618034 * i) % 1 for i in range(count))  # the golden ratio
    colors = [colorsys.hsv_to_rgb(hue, 0.65 + 0.3 * (i % 2), 0.95 - 0.25 * (i % 3 == 2)) for i, hue in enumerate(hues)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colors]


def colorize(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Convert a label map to colors.

    Args:
        labels: ``(H, W)`` class indices; values beyond the palette, such as ignored pixels, become black.
        palette: RGB of each class.

    Returns:
        ``(H, W, 3)`` uint8 in BGR.
    """
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = np.asarray(palette, np.uint8)[:256, ::-1]
    return table[labels.astype(np.uint8)]


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: Sequence[Sequence[int]], opacity: float = 0.55
) -> np.ndarray:
    """Blend a label map ``(H, W)`` over its image ``(H, W, 3)``; ignored pixels show only the image."""
    mixed = cv2.addWeighted(image, 1 - opacity, colorize(labels, palette), opacity, 0)
    return np.where((labels < len(palette))[..., None], mixed, image)


def class_legend(
    labels: np.ndarray, classes: Sequence[str], palette: Sequence[Sequence[int]], height: int, shares: bool = True
) -> np.ndarray:
    """Draw a legend of the classes in ``labels``, most frequent first.

    Args:
        labels: Class indices, of any shape.
        classes: Class names.
        palette: RGB of each class.
        height: Height in pixels. The last line counts the classes that do not fit.
        shares: Show each class's share of the pixels. Defaults to True.
    """
    ids, counts = np.unique(labels[labels < len(classes)], return_counts=True)
    order = np.argsort(-counts, kind='stable')
    return color_legend(
        [
            (palette[ids[i]], classes[ids[i]] + (f' {100 * counts[i] / labels.size:.0f}%' if shares else ''))
            for i in order
        ],
        height,
    )


def color_legend(entries: Sequence[tuple[Sequence[int], str]], height: int) -> np.ndarray:
    """Draw RGB colors with their texts as ``(height, 210, 3)`` BGR. The last line counts what does not fit."""
    rows = max(1, (height - 10) // 20)
    panel = np.full((height, 210, 3), 255, np.uint8)
    for row, (color, text) in enumerate(entries[:rows]):
        y = 8 + 20 * row
        if row == rows - 1 and len(entries) > rows:
            draw_text(panel, f'and {len(entries) - row} more', (10, y + 12))
            break
        cv2.rectangle(panel, (10, y), (24, y + 14), [int(c) for c in color[::-1]], -1)
        cv2.rectangle(panel, (10, y), (24, y + 14), (120, 120, 120), 1)
        draw_text(panel, text, (32, y + 12))
    return panel


def draw_instances(
    image: np.ndarray, objects: Sequence[dict], classes: Sequence[str], palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Draw masks, boxes, and above each box its class with the score in percent.

    Args:
        image: ``(H, W, 3)`` BGR.
        objects: From :func:`replk_mm.engine.predict.select_instances`, highest score first.
        classes: Class names.
        palette: RGB of each class.
    """
    picture, line = image.copy(), min(3, 1 + max(image.shape) // 400)
    for instance in reversed(objects):  # highest score on top
        color = [int(c) for c in palette[instance['label']][::-1]]
        if 'mask' in instance:
            inside = instance['mask']
            picture[inside] = (0.55 * picture[inside] + 0.45 * np.asarray(color)).astype(np.uint8)
        left, top, right, bottom = (round(v) for v in instance['box'])
        cv2.rectangle(picture, (left, top), (right, bottom), color, line)
    for instance in reversed(objects):  # labels above all boxes
        left, top = max(round(instance['box'][0]), 0), round(instance['box'][1])
        text = classes[instance['label']] + (f' {100 * instance["score"]:.0f}%' if 'score' in instance else '')
        width = cv2.getTextSize(text, _FONT, 0.35, 1)[0][0] + 4
        left, top = max(0, min(left, image.shape[1] - width)), max(top, 12)
        cv2.rectangle(picture, (left, top - 12), (left + width, top), (255, 255, 255), -1)
        draw_text(picture, text, (left + 2, top - 3), 0.35)
    return picture


def image_grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], gap: int = 6) -> np.ndarray:
    """Arrange images of one size in a grid with a title above each column.

    Args:
        rows: Rows of ``(H, W, 3)`` BGR images.
        titles: Title of each column.
        gap: White space between images in pixels.
    """
    height, width = rows[0][0].shape[:2]
    top = 26
    canvas = np.full((top + len(rows) * (height + gap), len(titles) * (width + gap) + gap, 3), 255, np.uint8)
    for column, title in enumerate(titles):
        draw_text(canvas, title, (gap + column * (width + gap), 17), 0.5)
    for r, row in enumerate(rows):
        for column, picture in enumerate(row):
            y, x = top + r * (height + gap), gap + column * (width + gap)
            canvas[y : y + height, x : x + width] = picture
    return canvas


def write_figure(path: Path, figure: Any, dpi: int = 110) -> None:
    """Write a figure of matplotlib; the suffix sets the format.

    Raises:
        UserError: If the file cannot be written.
    """
    figure.savefig(picture := io.BytesIO(), dpi=dpi, format=path.suffix[1:])
    write_output(path, picture.getvalue())
