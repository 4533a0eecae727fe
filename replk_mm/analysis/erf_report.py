"""Tables and heat maps of effective receptive fields, alone and side by side."""

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from replk_mm.analysis.erf import Erf
from replk_mm.analysis.receptive_field import CENTER, SHARES, areas, paper_scale
from replk_mm.errors import UserError
from replk_mm.files import write_output
from replk_mm.text import markdown_text
from replk_mm.visualize import write_figure

#: Lower end of the heat map of the scores, relative to the largest score.
_FLOOR = 1e-4
_STYLES = dict(zip(SHARES, ('-', '--', '-.', ':'), strict=True))


def disambiguate(found: Sequence[Erf], paths: Sequence[Path]) -> list[Erf]:
    """Add the folder's name to backbones that share name, weights and stage, such as those whose kernels differ."""
    counts = Counter((erf.backbone, erf.weights, erf.stage) for erf in found)
    return [
        erf.model_copy(update=dict(backbone=f'{erf.backbone} ({path.resolve().parent.name})'))
        if counts[erf.backbone, erf.weights, erf.stage] > 1
        else erf
        for erf, path in zip(found, paths, strict=True)
    ]


def format_tables(found: Sequence[Erf]) -> str:
    """Markdown tables of the smallest centered squares in both scales, with their protocol."""
    head = f'| Backbone | Weights | Map | {" | ".join(f"{100 * share:g} %" for share in SHARES)} |'
    lines: list[str] = []
    for title, scale in (
        ('in the scale of the RepLKNet paper, log10(score + 1)', paper_scale),
        ('of the contribution scores themselves', lambda scores: scores),
    ):
        lines += [
            f'Smallest centered square that holds a share {title}: side in pixels, share of the image',
            '',
            head,
            f'|{" --- |" * (3 + len(SHARES))}',
        ]
        for erf in found:
            cells = [
                f'{area["side"]} ({100 * area["ratio"]:.1f} %)' if area['side'] else 'none'
                for area in areas(scale(erf.scores), erf.pixel).values()
            ]
            names = [markdown_text(text) for text in (erf.backbone, erf.weights)]
            place = '' if erf.position == CENTER else ', position {:g}, {:g}'.format(*erf.position)
            lines.append(
                f'| {names[0]} | {"" if erf.trained else "**untrained**: "}{names[1]} | output {erf.stage}, stride '
                f'{erf.stride:g}, {erf.channels} channels{place} | {" | ".join(cells)} |'
            )
        lines.append('')
    lines += [
        'Square with 50 % of the scores and its 95 % interval over images, and Gaussian fit: pixels',
        '',
        '| Backbone | Weights | 50 % | Widths | Angle | Residual |',
        f'|{" --- |" * 6}',
    ]
    for erf in found:
        fit, side = erf.gaussian, 'not stored'
        if erf.side:
            ends = 'no interval' if erf.side.low is None else f'{erf.side.low:.0f} to {erf.side.high:.0f}'
            side = f'{erf.side.value:.0f} ({ends})'
        cells = ['-'] * 3
        if fit:
            cells = [f'{fit.widths[0]:.1f}, {fit.widths[1]:.1f}', f'{fit.angle:.0f}°', f'{fit.residual:.2f}']
        names = [markdown_text(text) for text in (erf.backbone, erf.weights)]
        lines.append(f'| {" | ".join([*names, side, *cells])} |')
    lines.append('')
    offsets = (
        f'{markdown_text(erf.backbone)} {erf.offset[0]:+.1f}, {erf.offset[1]:+.1f}' for erf in found if erf.offset
    )
    lines += [
        f'Center of gravity of the scores, pixels below and right of the middle: {"; ".join(offsets) or "none"}.',
        '',
    ]
    sets = sorted({markdown_text(erf.image_set[:12]) for erf in found})
    lines.append(
        f'Images: {_image_count(found)} resized to {found[0].size} x {found[0].size} pixels; '
        f'SHA-256 of the set {" and ".join(sets)}.'
    )
    return '\n'.join(lines) + '\n'


def draw_lines(path: Path, x: str, y: str, lines: Mapping[str, Sequence[tuple]]) -> None:
    """Draw a line for each name through points ``(x, y)`` or ``(x, y, low, high)``, as PNG."""
    figure = Figure(figsize=(7, 4.4), layout='constrained')
    axes = figure.subplots()
    for name, points in lines.items():
        at, values, *ends = zip(*points, strict=True)
        (line,) = axes.plot(at, values, 'o-', label=name, markersize=4)
        if ends and None not in (*ends[0], *ends[1]):
            axes.vlines(at, *ends, color=line.get_color())
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    write_figure(path, figure)


def draw_training(found: Sequence[Erf], path: Path) -> None:
    """Draw the side of the square with 50 %, and the widths of the Gaussian, against the iteration of checkpoints."""
    lines: dict[str, list[tuple]] = defaultdict(list)
    for erf in sorted(found, key=lambda erf: erf.iteration or 0):
        if erf.iteration and erf.side and erf.gaussian:
            sides = erf.iteration, erf.side.value, erf.side.low, erf.side.high
            lines[f'{erf.config}: square with 50 %, 95 % interval'].append(sides)
            for axis, width in zip(('long', 'short'), erf.gaussian.widths, strict=True):
                lines[f'{erf.config}: Gaussian, {axis} axis'].append((erf.iteration, width))
    draw_lines(path, 'iteration', 'pixels', lines)


def comparison_warnings(found: Sequence[Erf]) -> list[str]:
    """Limits of a comparison of receptive fields, one line each.

    Raises:
        UserError: If their images differ in size.
    """
    if len({erf.size for erf in found}) > 1:
        sizes = ', '.join(f'{erf.backbone} ({erf.config}) {erf.size}' for erf in found)
        raise UserError(
            f'--compare: the images differ in size: {sizes} pixels\n'
            f'Areas are comparable at one size only. Measure all with the same --size.'
        )
    lines = []
    untrained = [erf.backbone for erf in found if not erf.trained]
    if untrained:
        lines.append(
            'warning: untrained weights: '
            + ('all' if len(untrained) == len(found) else f'{", ".join(untrained)}; the others are trained')
        )
    if len({erf.image_set for erf in found}) > 1:
        lines.append('warning: the images are not the same')
    if len({erf.stride for erf in found}) > 1:
        lines.append('strides of the maps differ: ' + ', '.join(f'{erf.backbone} {erf.stride:g}' for erf in found))
    return lines


def draw_heat_maps(found: Sequence[Erf], path: Path) -> None:
    """Draw the heat maps of receptive fields as PNG, one column each.

    The upper row shows the paper's scale, the lower row scores relative to the largest. Squares hold 20, 30, 50 and
    99 % of the sum of each heat map.

    Raises:
        UserError: If the file cannot be written.
    """
    figure = Figure(figsize=(1.1 + 3.5 * len(found), 8.2), layout='constrained')
    panels = figure.subplots(2, len(found), squeeze=False)
    rows: tuple[tuple[str, Callable[[np.ndarray], np.ndarray], Normalize], ...] = (
        ('log10(score + 1) over its largest value', paper_scale, Normalize(0, 1)),
        (
            'score over the largest score',
            lambda scores: scores / max(scores.max(), np.finfo(float).tiny),
            LogNorm(_FLOOR, 1),
        ),
    )
    for row, (title, scale, norm) in zip(panels, rows, strict=True):
        for panel, erf in zip(row, found, strict=True):
            matrix = scale(erf.scores)
            shown = panel.imshow(np.maximum(matrix, norm.vmin or 0), cmap='viridis', norm=norm)
            for share, area in areas(matrix, erf.pixel).items():
                if area['side']:
                    top, left = (at - area['side'] // 2 - 0.5 for at in erf.pixel)
                    panel.add_patch(
                        Rectangle(
                            (left, top),
                            area['side'],
                            area['side'],
                            fill=False,
                            edgecolor='white',
                            linewidth=0.9,
                            linestyle=_STYLES[float(share)],
                        )
                    )
            ticks = [0, erf.size // 2, erf.size - 1]
            panel.set(xticks=ticks, yticks=ticks)
            panel.tick_params(labelsize=7)
            weights = erf.weights if len(erf.weights) <= 44 else f'...{erf.weights[-41:]}'
            panel.set_title(f'{erf.backbone}\n{"" if erf.trained else "UNTRAINED: "}{weights}', fontsize=8)
        figure.colorbar(shown, ax=list(row), label=title, shrink=0.85)
    figure.suptitle(
        f'Effective receptive field, {found[0].size} x {found[0].size} pixels, {_image_count(found)}', fontsize=10
    )
    squares = [Rectangle((0, 0), 1, 1, fill=False, edgecolor='black', linestyle=style) for style in _STYLES.values()]
    figure.legend(
        squares,
        [f'holds {100 * share:g} %' for share in _STYLES],
        loc='outside lower center',
        ncols=4,
        frameon=False,
        fontsize=8,
    )
    figure.set_dpi(110)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A palette needs a third of the space of full color, because noisy maps hardly compress.
    png = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB').quantize(256).save(png, 'PNG', optimize=True)
    write_output(path, png.getvalue())


def _image_count(found: Sequence[Erf]) -> str:
    counts = sorted({erf.images for erf in found})
    return f'{" or ".join(map(str, counts))} image{"s" if counts != [1] else ""}'
