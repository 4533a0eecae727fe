"""A picture of data: how often each class occurs, and how large the images are beside the crop."""

from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from replk_mm.data.checks.audit import Audit
from replk_mm.data.checks.dataset import DataSet
from replk_mm.errors import UserError, printable

# Colours of Okabe and Ito, which people who see fewer of them can tell apart; markers say the same again.
_STYLES = {'train': ('#0072B2', 'o'), 'val': ('#D55E00', '^'), 'test': ('#009E73', 's')}
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.pdf', '.svg')


def check_suffix(path: Path) -> None:
    """Refuse a file whose suffix is of no format that can be drawn.

    Raises:
        UserError: With the formats that can.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(
            f'{path}: no picture can be written as {path.suffix or "a file without suffix"}\n'
            f'Name a file that ends with {", ".join(_SUFFIXES)}.'
        )


def draw(result: Audit, path: Path) -> bool:
    """Write the picture, if there is something to draw: no data set may have been read.

    Args:
        result: Of a whole check.
        path: The file; its suffix says the format.

    Returns:
        Whether it was written.

    Raises:
        UserError: If it cannot be written.
    """
    sets = [one for one in result.sets if one.class_counts() or one.sizes]
    if not sets:
        return False
    totals: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(_STYLES, 0))
    for one in sets:
        for name, count in one.class_counts().items():
            totals[name][one.split] += count
    names = sorted((name for name in totals if any(totals[name].values())), key=lambda name: sum(totals[name].values()))
    figure = Figure(figsize=(11, max(5, 1.5 + 0.16 * len(names))), layout='constrained')
    FigureCanvasAgg(figure)
    frequencies, sizes = figure.subplots(1, 2)
    for split in dict.fromkeys(one.split for one in sets):
        colour, marker = _STYLES[split]
        counts = [totals[name][split] or np.nan for name in names]
        frequencies.plot(counts, np.arange(len(names)), marker, color=colour, markersize=4, label=split)
    frequencies.set_yticks(
        range(len(names)), [printable(name).strip().replace('$', r'\$') for name in names], fontsize=7
    )
    unit = ' and '.join(sorted({'objects' if one.objects is not None else 'pixels' for one in sets}))
    frequencies.set(
        xscale='log',
        xlabel=f'{unit}, log scale',
        ylim=(-0.6, max(1, len(names)) - 0.4),
        title=f'{len(names)} of {len(totals)} classes occur',
    )
    _sizes(sizes, result, sets)
    for panel in (frequencies, sizes):
        panel.grid(True, color='#dddddd', linewidth=0.6)
        panel.legend(fontsize=8)
    what = 'every file' if result.full else 'a sample of the images'
    figure.suptitle(f'{printable(Path(result.config).stem)}: {what} inspected')
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: the picture cannot be written: {error}\nName another file.') from error
    return True


def _sizes(panel: Axes, result: Audit, sets: list[DataSet]) -> None:
    """Width against height, areas of the marks as the number of images; the crop is the corner within the rectangle."""
    most = max((count for one in sets for count in one.sizes.values()), default=1)
    for one in sets:
        colour, marker = _STYLES[one.split]
        if one.sizes:
            widths, heights = zip(*one.sizes, strict=True)
            panel.scatter(
                widths,
                heights,
                s=[14 + 240 * count / most for count in one.sizes.values()],
                marker=marker,
                color=colour,
                alpha=0.4,
                label=f'{one.split}: {sum(one.sizes.values()):,} images',
            )
    if result.crop:
        height, width = result.crop
        panel.add_patch(Rectangle((0, 0), width, height, fill=False, linestyle='--', label=f'crop {width}x{height}'))
    panel.set(
        xlim=(0, None),
        ylim=(0, None),
        xlabel='width, pixels',
        ylabel='height, pixels',
        title='sizes of the images (larger marks: more of them)',
        aspect='equal',
        anchor='N',
    )
