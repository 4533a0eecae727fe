"""Effective receptive fields as pictures, alone and side by side."""
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from replk_mm.analysis.erf_result import SHARES, Erf, areas, paper_scale
from replk_mm.errors import UserError

_MAP = 'viridis'
#: The scale-free heat map ends at this part of the largest score.
_FLOOR = 1e-4
_STYLES = dict(zip(SHARES, ('-', '--', '-.', ':'), strict=True))


def draw(found: Sequence[Erf], path: Path) -> None:
    """Write the heat maps of receptive fields, a column each: above in the paper's scale, below the scores over their largest.

    Squares hold 20, 30, 50 and 99 % of what each heat map shows.

    Raises:
        UserError: If the file cannot be written.
    """
    figure = Figure(figsize=(1.1 + 3.5 * len(found), 8.2), layout='constrained')
    panels = figure.subplots(2, len(found), squeeze=False)
    rows: tuple[tuple[str, Callable[[np.ndarray], np.ndarray], Normalize], ...] = (
        ('log10(score + 1) over its largest value', paper_scale, Normalize(0, 1)),
        ('score over the largest score', _scale_free, LogNorm(_FLOOR, 1)))
    for row, (title, scale, norm) in zip(panels, rows, strict=True):
        for panel, erf in zip(row, found, strict=True):
            matrix = scale(erf.scores)
            shown = panel.imshow(np.maximum(matrix, norm.vmin or 0), cmap=_MAP, norm=norm)
            for share, area in areas(matrix).items():
                if area['side']:
                    corner = erf.size // 2 - area['side'] // 2 - 0.5
                    panel.add_patch(Rectangle((corner, corner), area['side'], area['side'], fill=False, edgecolor='white',
                                              linewidth=0.9, linestyle=_STYLES[float(share)]))
            panel.set_xticks([0, erf.size // 2, erf.size - 1])
            panel.set_yticks([0, erf.size // 2, erf.size - 1])
            panel.tick_params(labelsize=7)
            panel.set_title(f'{erf.backbone}\n{"" if erf.trained else "UNTRAINED: "}{_short(erf.weights)}', fontsize=8)
        figure.colorbar(shown, ax=list(row), label=title, shrink=0.85)
    figure.suptitle(f'Effective receptive field, {found[0].size} x {found[0].size} pixels, {image_count(found)}', fontsize=10)
    squares = [Rectangle((0, 0), 1, 1, fill=False, edgecolor='black', linestyle=style) for style in _STYLES.values()]
    figure.legend(squares, [f'holds {100 * share:g} %' for share in _STYLES], loc='outside lower center', ncols=4,
                  frameon=False, fontsize=8)
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    try:
        # A palette takes a third of the room of full colour, in which these noisy maps hardly compress.
        Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB').quantize(256).save(path, optimize=True)
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror})\nChoose another place with --out DIR.') from error


def _scale_free(scores: np.ndarray) -> np.ndarray:
    return scores / max(scores.max(), np.finfo(float).tiny)


def _short(text: str) -> str:
    """The end of a text that a title has no room for."""
    return text if len(text) <= 44 else f'...{text[-41:]}'


def image_count(found: Sequence[Erf]) -> str:
    """The number of images in words; several numbers if they differ."""
    counts = sorted({erf.images for erf in found})
    return f'{" or ".join(map(str, counts))} image{"s" if counts != [1] else ""}'
