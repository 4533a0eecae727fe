"""A picture of objects whose shape and texture are of two classes, and of what a network took them for."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from replk_mm.data.conflict_files import ConflictObject
from replk_mm.errors import UserError
from replk_mm.visualize import overlay

_SIDE = 144
_COLUMNS = 4
# Colours of Okabe and Ito, which people who see fewer of them can tell apart; the words say the same again.
_COLOURS = {'shape': '#0072B2', 'texture': '#D55E00', 'other': '#555555'}


@dataclass(frozen=True)
class Shown:
    """An object in its image ``(H, W, 3)`` BGR, with the predicted class indices ``(H, W)``, the class it was decided for or
    None, and what that decision went by: 'shape', 'texture' or 'other'."""

    image: np.ndarray
    predicted: np.ndarray
    item: ConflictObject
    decided: str | None
    cue: str


def draw(shown: Sequence[Shown], values: Mapping[str, Any], known: Mapping[str, int], palette: Sequence[Sequence[int]],
         path: Path) -> None:
    """Write the picture: each object as it is and with its prediction, and above it what it was decided for.

    Args:
        shown: The objects, at least one.
        values: From :meth:`replk_mm.analysis.shape_bias.ShapeBias.values`.
        known: Index of each class of objects.
        palette: RGB of each class of the network.
        path: The file.

    Raises:
        UserError: If it cannot be written.
    """
    ordered = sorted(shown, key=lambda one: (one.item.shape, one.item.texture))
    columns = min(_COLUMNS, len(ordered))
    rows = -(-len(ordered) // columns)
    figure = Figure(figsize=(3.1 * columns + 0.3, 2.05 * rows + 1.3), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis('off')
    for panel, one in zip(panels, ordered, strict=False):
        # Only classes of objects are coloured: what else is predicted inside an object decides nothing.
        objects = np.where(np.isin(one.predicted, list(known.values())), one.predicted, 255)
        painted = overlay(one.image, objects, palette)
        panel.imshow(np.hstack([_cut(one.image, one.item), _cut(painted, one.item)])[:, :, ::-1])
        panel.set_title(f'shape {one.item.shape}, texture {one.item.texture}\n'
                        f'decided: {one.decided or "nothing"} ({one.cue})', fontsize=8.5, color=_COLOURS[one.cue])
    used = [name for name, index in known.items() if any((one.predicted == index).any() for one in ordered)]
    figure.legend(handles=[Patch(color=f'#{bytes(palette[known[name]]).hex()}', label=f'predicted {name}') for name in used],
                  loc='outside lower center', ncols=max(1, len(used)), frameon=False, fontsize=8.5)
    bias, agreeing = values['shape_bias'], values['agreeing_accuracy']
    figure.suptitle(f'shape bias {"-" if bias is None else f"{bias:.2f}"}: {values["shape_decisions"]} by shape, '
                    f'{values["texture_decisions"]} by texture, {values["other"]} other'
                    + ('' if agreeing is None else f'\ncues agree: {100 * agreeing:.0f} % right'), fontsize=10)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror})\nChoose another place with --out DIR.') from error


def _cut(image: np.ndarray, item: ConflictObject) -> np.ndarray:
    """A square about the object, its side :data:`_SIDE` pixels; what lies outside of the image is white."""
    left, top, right, bottom = item.box
    half = round(0.7 * max(right - left, bottom - top))
    x, y = (left + right) // 2, (top + bottom) // 2
    padded = cv2.copyMakeBorder(image, half, half, half, half, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    return cv2.resize(padded[y:y + 2 * half, x:x + 2 * half], (_SIDE, _SIDE), interpolation=cv2.INTER_NEAREST)
