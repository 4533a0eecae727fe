"""Plots as SVG within a page, drawn by matplotlib, in the page's colours; markers and dashes distinguish rows as well.

The page's security policy allows no style within elements, and light and dark need colours that change, so that
matplotlib's SVG is reduced to plain paths and texts whose colours are the page's CSS variables.
"""

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

#: In CSS pixels, which are matplotlib's points here.
WIDTH, HEIGHT = 360, 270
#: Styles before they repeat; a row keeps its number's in all plots.
COLOURS = ('#0063a3', '#b84700', '#00734f', '#a03a74', '#7a5c00', '#5a4fc0')
DASHES = ('-', (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (1, 2)))
MARKERS = ('o', 's', '^', 'D', 'x', '+', 'v')
_INK, _FAINT, _LINE = '#1b1f24', '#59636e', '#d1d9e0'
_VARIABLES = {
    **{colour: f'var(--c{i})' for i, colour in enumerate(COLOURS)},
    _INK: 'var(--ink)',
    _FAINT: 'var(--faint)',
    _LINE: 'var(--line)',
}
#: A logarithmic axis from this ratio of the largest value to the smallest.
_LOGARITHMIC = 8
_STYLE: Any = {
    'font.size': 12,
    'text.parse_math': False,
    'svg.fonttype': 'none',
    'figure.dpi': 72,
    'axes.edgecolor': _FAINT,
    'axes.labelcolor': _FAINT,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.xmargin': 0.1,
    'axes.ymargin': 0.12,
    'axes.labelpad': 5,
    'xtick.color': _FAINT,
    'ytick.color': _FAINT,
    'grid.color': _LINE,
    'grid.linewidth': 0.6,
}
#: Attributes that an element of the page's SVG keeps, from its own or from its style.
_KEPT = {
    'd',
    'transform',
    'x',
    'y',
    'viewBox',
    'fill',
    'fill-opacity',
    'stroke',
    'stroke-width',
    'stroke-dasharray',
    'stroke-opacity',
    'opacity',
    'stroke-linejoin',
    'stroke-linecap',
    'text-anchor',
}
_NUMBERS = FuncFormatter(lambda value, _: f'{value:g}')
_CLASSES = {'row', 'name'}


@dataclass(frozen=True)
class Point:
    """A row in a scatter plot: its number and label, where it is, and its deviation in y."""

    number: int
    label: str
    x: float
    y: float
    deviation: float | None = None


@dataclass(frozen=True)
class Line:
    """A row in a plot of curves: x and y, and the deviation over seeds at each where there are several."""

    number: int
    label: str
    points: Sequence[tuple[float, float, float | None]]


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str) -> Markup:
    """Rows as markers with their numbers, which the legend explains, and their deviations as bars."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(x_title, y_title)
        xs = [point.x for point in points]
        if min(xs) > 0 and max(xs) / min(xs) >= _LOGARITHMIC:
            axes.set_xscale('log')
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.xaxis.set_major_formatter(_NUMBERS)
            axes.xaxis.set_minor_locator(NullLocator())
        for point in points:
            colour = _colour(point.number)
            if point.deviation:
                axes.errorbar(
                    point.x, point.y, point.deviation, fmt='none', color=colour, elinewidth=1.8, capsize=4, capthick=1.8
                )
            axes.plot(
                [point.x], [point.y], _marker(point.number), color=colour, ms=10, mew=1.8, clip_on=False, gid='row'
            )
            axes.annotate(
                str(point.number),
                (point.x, point.y),
                (10, 0),
                textcoords='offset points',
                color=_INK,
                va='center',
                gid='name',
            )
        _limit(axes, min(p.y - (p.deviation or 0.0) for p in points))
        if axes.get_xscale() == 'linear' and min(xs) >= 0:
            axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))
        texts = [
            f'{p.label}: {x_title} {p.x:.4g}, {y_title} {p.y:.4g}' + (f' ± {p.deviation:.3g}' if p.deviation else '')
            for p in points
        ]
        return _svg(figure, title, f'{y_title} against {x_title} of {len(points)} rows', texts)


def curves(lines: Sequence[Line], x_title: str, y_title: str, title: str) -> Markup:
    """Curves, with bands of plus and minus one deviation, distinguished by dashes and markers."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(x_title, y_title)
        for line in lines:
            x, y, deviations = zip(*line.points, strict=True)
            every = max(1, len(x) // 6)
            axes.plot(
                x,
                y,
                marker=_marker(line.number),
                ls=DASHES[(line.number - 1) % len(DASHES)],
                lw=1.8,
                ms=7,
                color=_colour(line.number),
                markevery=((line.number - 1) % every, every),
                clip_on=False,
                gid='row',
            )
            if has_bands(lines) and None not in deviations:
                low, high = ([v + sign * d for v, d in zip(y, deviations, strict=True)] for sign in (-1, 1))
                axes.fill_between(x, low, high, color=_colour(line.number), alpha=0.14, lw=0)
        _limit(axes, min(v[1] - (v[2] or 0.0) for line in lines for v in line.points))
        texts = [
            f'{line.label}: first {line.points[0][1]:.4g} at {line.points[0][0]:g}, '
            f'last {line.points[-1][1]:.4g} at {line.points[-1][0]:g}, lowest '
            f'{min(v[1] for v in line.points):.4g}, highest {max(v[1] for v in line.points):.4g}'
            for line in lines
        ]
        return _svg(figure, title, f'{y_title} against {x_title} of {len(lines)} rows', texts)


def has_bands(lines: Sequence[Line]) -> bool:
    """Whether deviations are drawn: not about so many curves that the bands hide them."""
    return len(lines) <= len(COLOURS) and any(deviation for line in lines for _, _, deviation in line.points)


@lru_cache
def sample(number: int, line: bool) -> Markup:
    """The marker of a row for a legend, on a piece of its line if it has one."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(34 / 72, 16 / 72))
        common: dict[str, Any] = dict(color=_colour(number), lw=1.8, transform=figure.transFigure)
        if line:
            figure.add_artist(Line2D([0.03, 0.97], [0.5, 0.5], ls=DASHES[(number - 1) % len(DASHES)], **common))
        figure.add_artist(Line2D([0.5], [0.5], marker=_marker(number), ms=8, mew=1.8, **common))
        return _svg(figure)


def _colour(number: int) -> str:
    return COLOURS[(number - 1) % len(COLOURS)]


def _marker(number: int) -> str:
    return MARKERS[(number - 1) % len(MARKERS)]


def _axes(x_title: str, y_title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout='constrained')
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


def _svg(figure: Figure, title: str = '', description: str = '', rows: Sequence[str] = ()) -> Markup:
    """A figure as an element of the page; without a title, as a decoration of the text beside it.

    Args:
        figure: What to show.
        title: For a screen reader.
        description: Likewise.
        rows: What each point or curve shows, in words: shown when the pointer is on it, and part of the description.
    """
    memory = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        figure.savefig(memory, format='svg', transparent=True)
    root = ElementTree.fromstring(memory.getvalue())
    found = _plain(root, {f'#{element.get("id")}': element for element in root.iter() if element.get('id')})
    assert found is not None
    if title:
        found.attrib.update({'class': 'plot', 'role': 'img'})
        for element, text in zip(found.findall('.//g[@class="row"]'), rows, strict=True):
            _insert(element, 0, 'title', text)
        _insert(found, 0, 'title', title)
        _insert(found, 1, 'desc', f'{description}. {"; ".join(rows)}')
    else:
        found.attrib.update({'width': '34', 'height': '16', 'aria-hidden': 'true'})
    return Markup(ElementTree.tostring(found, encoding='unicode'))


def _insert(parent: ElementTree.Element, position: int, name: str, text: str) -> None:
    element = ElementTree.Element(name)
    element.text = text
    parent.insert(position, element)


def _plain(element: ElementTree.Element, shapes: dict[str, ElementTree.Element]) -> ElementTree.Element | None:
    """An element of matplotlib's without ids, references and styles."""
    name = element.tag.rpartition('}')[2]
    if name in ('metadata', 'defs', 'style', 'clipPath'):
        return None
    given = _attributes(element)
    if name == 'use':
        given = {**_attributes(shapes[element.attrib['{http://www.w3.org/1999/xlink}href']]), **given}
        given['transform'] = f'translate({given.pop("x", 0)} {given.pop("y", 0)})'
        name = 'path'
    found = ElementTree.Element(name, given)
    if element.get('id') in _CLASSES:
        found.set('class', element.attrib['id'])
    found.text = element.text if name == 'text' else None
    found.extend(part for child in element if (part := _plain(child, shapes)) is not None)
    return None if name == 'g' and not len(found) else found


def _attributes(element: ElementTree.Element) -> dict[str, str]:
    declarations = re.findall(r'([\w-]+):\s*([^;]+)', element.get('style', ''))
    given = {**element.attrib, **dict(declarations)}
    return {key: _VARIABLES.get(value, value) for key, value in given.items() if key in _KEPT}
