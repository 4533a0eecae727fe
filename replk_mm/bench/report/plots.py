"""Plots of a report: SVG images by matplotlib, one for light and one for dark pages.

Markers and dashes distinguish rows as well as colours do.
"""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

#: In CSS pixels, which are matplotlib's points here.
WIDTH, HEIGHT = 360, 270
#: Styles before they repeat; a row keeps its number's in all plots.
_COLOURS = 6
_DASHES = ('-', (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (1, 2)))
_MARKERS = ('o', 's', '^', 'D', 'x', '+', 'v')
#: A logarithmic axis from this ratio of the largest value to the smallest.
_LOGARITHMIC = 8
#: Custom properties of the rows' colours.
_SERIES = tuple(f'c{i}' for i in range(1, _COLOURS + 1))
_NUMBERS = FuncFormatter(lambda value, _: f'{value:g}')


def _style(ink: str, faint: str, line: str, *rows: str) -> dict[Any, Any]:
    """Settings of matplotlib for a page with these colours of texts, axes, grids and rows."""
    return {
        'font.size': 12,
        'text.parse_math': False,
        'svg.fonttype': 'none',
        'figure.dpi': 72,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'axes.grid': True,
        'axes.axisbelow': True,
        'axes.xmargin': 0.1,
        'axes.ymargin': 0.12,
        'axes.labelpad': 5,
        'grid.linewidth': 0.6,
        'text.color': ink,
        'grid.color': line,
        'axes.prop_cycle': cycler(color=rows),
        **dict.fromkeys(('axes.edgecolor', 'axes.labelcolor', 'xtick.color', 'ytick.color'), faint),
    }


_LIGHT = _style('#1b1f24', '#59636e', '#d1d9e0', '#0063a3', '#b84700', '#00734f', '#a03a74', '#7a5c00', '#5a4fc0')
_DARK = _style('#e6e9ed', '#a4adb8', '#3b444f', '#6bb8f0', '#ff9a5c', '#45cfa0', '#f09cc8', '#e0c04c', '#b0a8ff')


@dataclass(frozen=True)
class Point:
    """A row in a scatter plot: number, label, place, ends of its interval in y, and whether it is on the front."""

    number: int
    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    front: bool = False


@dataclass(frozen=True)
class Line:
    """A row in a plot of curves: x and y, and the deviation over seeds at each where there are several."""

    number: int
    label: str
    points: Sequence[tuple[float, float, float | None]]


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str) -> Markup:
    """Rows as markers with their numbers, which the legend explains, and intervals as bars; the front as a line."""
    xs = [point.x for point in points]

    def draw() -> Figure:
        figure, axes = make_axes(x_title, y_title)
        use_logarithm(axes, xs)
        front = sorted((point.x, point.y) for point in points if point.front)
        if front:
            axes.step(*zip(*front, strict=True), where='post', color=axes.yaxis.label.get_color(), lw=1.2, zorder=1)
        for point in points:
            style: dict[str, Any] = dict(color=colour_of(point.number), ls='')
            if point.low is not None and point.high is not None:
                bar = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
                axes.errorbar(point.x, point.y, bar, elinewidth=1.8, capsize=4, capthick=1.8, **style)
            face = 'none' if front and not point.front else None
            axes.plot([point.x], [point.y], marker_of(point.number), ms=10, mew=1.8, mfc=face, clip_on=False, **style)
            axes.annotate(str(point.number), (point.x, point.y), (10, 0), textcoords='offset points', va='center')
        _limit(axes, min(p.y if p.low is None else p.low for p in points))
        if axes.get_xscale() == 'linear' and min(xs) >= 0:
            axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        return figure

    texts = [
        f'{p.label}: {x_title} {p.x:.4g}, {y_title} {p.y:.4g}'
        + (f' [{p.low:.4g}, {p.high:.4g}]' if p.low is not None and p.high is not None else '')
        + ', on the Pareto front' * p.front
        for p in points
    ]
    return _image(draw, '; '.join([f'{title}: {y_title} against {x_title}', *texts]))


def curves(lines: Sequence[Line], x_title: str, y_title: str, title: str) -> Markup:
    """Curves, with bands of plus and minus one deviation, distinguished by dashes and markers."""

    def draw() -> Figure:
        figure, axes = make_axes(x_title, y_title)
        for line in lines:
            x, y, deviations = zip(*line.points, strict=True)
            every = max(1, len(x) // 6)
            axes.plot(
                x,
                y,
                marker=marker_of(line.number),
                ls=_dash(line.number),
                lw=1.8,
                ms=7,
                color=colour_of(line.number),
                markevery=((line.number - 1) % every, every),
                clip_on=False,
            )
            if has_bands(lines) and None not in deviations:
                low, high = ([v + sign * d for v, d in zip(y, deviations, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=colour_of(line.number), alpha=0.14, lw=0)
        _limit(axes, min(v[1] - (v[2] or 0.0) for line in lines for v in line.points))
        return figure

    texts = [
        f'{line.label}: first {line.points[0][1]:.4g} at {line.points[0][0]:g}, last {line.points[-1][1]:.4g} at '
        f'{line.points[-1][0]:g}, lowest {min(v[1] for v in line.points):.4g}, highest '
        f'{max(v[1] for v in line.points):.4g}'
        for line in lines
    ]
    return _image(draw, '; '.join([f'{title}: {y_title} against {x_title}', *texts]))


def has_bands(lines: Sequence[Line]) -> bool:
    """Whether deviations are drawn: not about so many curves that the bands hide them."""
    return len(lines) <= _COLOURS and any(deviation for line in lines for _, _, deviation in line.points)


@lru_cache
def sample(number: int, line: bool) -> Markup:
    """The marker of a row for a legend, on a piece of its line if it has one."""

    def draw() -> Figure:
        figure = Figure(figsize=(34 / 72, 16 / 72))
        style: dict[str, Any] = dict(color=colour_of(number), lw=1.8, transform=figure.transFigure)
        if line:
            figure.add_artist(Line2D([0.03, 0.97], [0.5, 0.5], ls=_dash(number), **style))
        figure.add_artist(Line2D([0.5], [0.5], marker=marker_of(number), ms=8, mew=1.8, **style))
        return figure

    return _image(draw, '')


def use_logarithm(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis if the values differ much."""
    if min(values) > 0 and max(values) / min(values) >= _LOGARITHMIC:
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.xaxis.set_major_formatter(_NUMBERS)
        axes.xaxis.set_minor_locator(NullLocator())


def colour_of(number: int) -> str:
    return f'C{(number - 1) % _COLOURS}'


def marker_of(number: int) -> str:
    return _MARKERS[(number - 1) % len(_MARKERS)]


def _dash(number: int) -> Any:
    return _DASHES[(number - 1) % len(_DASHES)]


def make_axes(x_title: str, y_title: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> tuple[Figure, Axes]:
    """A figure of this width and height with empty axes."""
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout='constrained')
    axes = figure.add_subplot(xlabel=_short(x_title, 44), ylabel=_short(y_title, 34))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10)))
        axis.set_major_formatter(_NUMBERS)
    axes.tick_params(length=0)
    return figure, axes


def _limit(axes: Axes, lowest: float) -> None:
    """Let the axis start at 0 rather than below, if nothing is below."""
    if lowest >= 0:
        axes.set_ylim(bottom=max(0.0, axes.get_ylim()[0]))


def _short(text: str, longest: int) -> str:
    return text if len(text) <= longest else f'{text[: longest - 1]}…'


def _image(draw: Callable[[], Figure], text: str) -> Markup:
    """A figure as an element of the page; without a text, as a decoration of the text beside it."""
    sources = []
    for style in (_LIGHT, _DARK):
        memory = io.BytesIO()
        with matplotlib.rc_context(style), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            draw().savefig(memory, format='svg', transparent=True, metadata={'Date': None})
        sources.append(f'data:image/svg+xml;base64,{base64.b64encode(memory.getvalue()).decode()}')
    return Markup(
        '<picture><source media="screen and (prefers-color-scheme: dark)" srcset="{}">'
        '<img class="{}" src="{}" alt="{}"></picture>'
    ).format(sources[1], 'plot' if text else 'sample', sources[0], text)


def inline(draw: Callable[[], Figure], text: str, titles: Mapping[str, str]) -> Markup:
    """A figure as SVG inside the page; its colours are those of :func:`css_colours`.

    Args:
        draw: Draws the figure.
        text: Describes it.
        titles: Titles of links, by their addresses.
    """
    names = {f'#0000{i:02x}': name for i, name in enumerate(('ink', 'faint', 'line', *_SERIES), 1)}
    memory = io.StringIO()
    with matplotlib.rc_context({**_style(*names), 'svg.hashsalt': text}), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        draw().savefig(memory, format='svg', transparent=True, metadata={'Date': None})
    svg = memory.getvalue()
    svg = svg[svg.index('<svg') :]
    for colour, name in names.items():
        svg = svg.replace(colour, f'var(--{name})')
    for url, title in titles.items():
        link = f'<a xlink:href="{url}"'
        svg = svg.replace(f'{link} target="_blank">', f'{link}><title>{escape(title)}</title>')
    return Markup(svg.replace('<svg', f'<svg role="group" aria-label="{escape(text)}"', 1))


def css_colours() -> Markup:
    """Colours of the rows for light and dark pages, as custom properties."""
    light, dark = (
        ''.join(f'--{name}: {c}; ' for name, c in zip(_SERIES, style['axes.prop_cycle'].by_key()['color'], strict=True))
        for style in (_LIGHT, _DARK)
    )
    return Markup(f':root {{ {light}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n')
