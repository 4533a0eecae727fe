"""A picture of data: how often each class occurs, and how large the images are beside the crop."""
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullFormatter

from replk_mm.data.checks.audit import Audit
from replk_mm.data.checks.dataset import DataSet
from replk_mm.errors import UserError, printable

# Colours of Okabe and Ito, which people who see fewer of them can tell apart; markers say the same again.
_STYLES = {'train': ('#0072B2', 'o'), 'val': ('#D55E00', '^'), 'test': ('#009E73', 's')}
_SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp', '.pdf', '.svg')
#: Names in a column that can still be read.
_ROWS = 50
_ROW = 0.155  # inches
_NAME = 26


def check_suffix(path: Path) -> None:
    """Refuse a file whose suffix is of no format that can be drawn.

    Raises:
        UserError: With the formats that can.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f'{path}: no picture can be written as {path.suffix or "a file without suffix"}\n'
                        f'Name a file that ends with {", ".join(_SUFFIXES)}.')


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
    totals: dict[str, dict[str, int]] = {}
    for one in sets:
        for name, count in one.class_counts().items():
            shares = totals.setdefault(name, {})
            shares[one.split] = shares.get(one.split, 0) + count
    occurring = {name: sum(shares.values()) for name, shares in totals.items() if any(shares.values())}
    ordered = sorted(occurring, key=lambda name: -occurring[name])
    columns = max(1, -(-len(ordered) // _ROWS))
    rows = min(_ROWS, -(-len(ordered) // columns)) if ordered else 0
    figure = Figure(figsize=(4.2 * columns + 5.2, max(4.6, _ROW * rows + 1.4)), layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, columns + 1, width_ratios=[4.2] * columns + [5.2])
    splits = [split for split in _STYLES if any(one.split == split for one in sets)]
    _frequencies(figure, grid, columns, rows, ordered, totals, splits, sets)
    figure.axes[0].set_title(f'{len(ordered)} of {len(totals)} classes occur', fontsize=9)
    _sizes(figure.add_subplot(grid[0, columns]), result, sets)
    what = 'every file' if result.full else 'a sample of the images'
    figure.suptitle(f'{printable(Path(result.config).stem)}: {what} inspected', fontsize=11)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: the picture cannot be written: {error}\nName another file.') from error
    return True


def _frequencies(figure: Figure, grid: Any, columns: int, rows: int, ordered: list[str],
                 totals: dict[str, dict[str, int]], splits: list[str], sets: list[DataSet]) -> None:
    """Classes from the most to the least frequent, down the columns, one log axis for all."""
    counts = [count for shares in totals.values() for count in shares.values() if count]
    low, high = (10 ** np.floor(np.log10(min(counts)) - 0.05), 2 * max(counts)) if counts else (0.1, 2)
    unit = ' and '.join(sorted({'objects' if one.objects is not None else 'pixels' for one in sets}))
    for column in range(columns):
        panel = figure.add_subplot(grid[0, column])
        names = ordered[column * rows:(column + 1) * rows]
        for split in splits:
            colour, marker = _STYLES[split]
            at = [i for i, name in enumerate(names) if totals[name].get(split)]
            values = [totals[names[i]][split] for i in at]
            panel.hlines(at, low, values, color=colour, linewidth=2.4 if split == splits[0] else 1.0, alpha=0.35)
            panel.plot(values, at, marker, color=colour, markersize=4, linestyle='none', label=split)
        panel.set_xscale('log')
        panel.set_xlim(low, high)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(max(rows, 1) - 0.4, -0.6)  # the same height of a row in every column
        panel.set_yticks(range(len(names)), [_name(name) for name in names], fontsize=7)
        panel.set_xlabel(f'{unit}, log scale', fontsize=8)
        panel.tick_params(axis='x', labelsize=7)
        panel.grid(True, axis='x', color='#dddddd', linewidth=0.6)
        panel.set_axisbelow(True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.axes[-1].legend(handles, labels, loc='lower right', fontsize=8)


def _name(name: str) -> str:
    shown = printable(name).strip()
    return (shown if len(shown) <= _NAME else f'{shown[:_NAME - 3]}...').replace('$', r'\$')


def _sizes(panel: Any, result: Audit, sets: list[DataSet]) -> None:
    """Width against height, areas of the marks as the number of images; the crop is the corner within the rectangle."""
    most = max((count for one in sets for count in one.sizes.values()), default=1)
    for one in sets:
        colour, marker = _STYLES[one.split]
        if one.sizes:
            widths, heights = zip(*one.sizes, strict=True)
            areas = [14 + 240 * count / most for count in one.sizes.values()]
            panel.scatter(widths, heights, s=areas, marker=marker, facecolor=colour, alpha=0.35, edgecolor=colour,
                          linewidth=0.6)
            panel.plot([], [], marker, color=colour, label=f'{one.split}: {sum(one.sizes.values()):,} images')
    if result.crop:
        height, width = result.crop
        panel.add_patch(Rectangle((0, 0), width, height, fill=False, edgecolor='#000000', linestyle='--', linewidth=1.2,
                                  label=f'crop {width}x{height}'))
    sides = [size for one in sets for size in one.sizes] + ([result.crop[::-1]] if result.crop else [])
    longest = 1.1 * max((side for size in sides for side in size), default=1)
    panel.set(xlim=(0, longest), ylim=(0, 1.2 * longest), aspect='equal', anchor='N')  # above: room for the legend
    panel.set_xlabel('width, pixels', fontsize=8)
    panel.set_ylabel('height, pixels', fontsize=8)
    panel.set_title('sizes of the images (larger marks: more of them)', fontsize=9)
    panel.tick_params(labelsize=7)
    panel.grid(True, color='#dddddd', linewidth=0.6)
    panel.set_axisbelow(True)
    panel.legend(loc='upper left', fontsize=8)
