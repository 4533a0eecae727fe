"""Plots as SVG within a page: they take its colours, and tell rows apart by markers and dashes as well."""
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from replk_mm.bench.report.labels import Box, place
from replk_mm.bench.report.markup import Markup, escape, join, tag

WIDTH, HEIGHT = 360, 264
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 42
#: Styles before they repeat; in step with the page's classes c0 to c5.
COLOURS, DASHES = 6, ('', '7 3', '2 3', '9 3 2 3', '1 2')
#: A logarithmic axis from this ratio of the largest value to the smallest.
_LOGARITHMIC = 8
_CHARACTER, _LINE = 7., 14
_LONGEST_LABEL, _LONGEST_DESCRIPTION = 26, 6000


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


@dataclass
class Axis:
    """A scale: values between ``low`` and ``high`` to pixels between ``start`` and ``end``, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    ticks: list[float] = field(default_factory=list)

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, may_be_logarithmic: bool = False) -> 'Axis':
        """Of at least one value, with some room at both ends."""
        low, high = min(values), max(values)
        if may_be_logarithmic and low > 0 and high / low >= _LOGARITHMIC:
            room = (high / low) ** 0.08
            axis = cls(low / room, high * room, start, end, True)
            decades = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
            ticks = [m * 10.**d for d in decades for m in (1, 2, 5)]
        else:
            room = (high - low) * 0.1 or abs(high) * 0.1 or 1.
            bottom = low - room if low < 0 or low - room > 0 else 0.
            axis = cls(bottom, high + room, start, end)
            step = _step((axis.high - axis.low) / 5)
            first = math.ceil(axis.low / step)
            ticks = [i * step for i in range(first, math.floor(axis.high / step) + 1)]
        inside = [tick for tick in ticks if axis.low <= tick <= axis.high]
        axis.ticks = inside[::math.ceil(len(inside) / 7)] if inside else [low]
        return axis

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.logarithmic else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _step(rough: float) -> float:
    """The next larger of 1, 2, 5 times a power of ten."""
    power = 10. ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def style(number: int) -> str:
    """The class of a row's colour."""
    return f'c{(number - 1) % COLOURS}'


def _dash(number: int) -> str | None:
    return DASHES[(number - 1) % len(DASHES)] or None


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str) -> Markup:
    """Rows as markers with their deviations as bars; each is named, no name lies on another or on a marker."""
    ends = [p.y + sign * (p.deviation or 0.) for p in points for sign in (-1, 1)]
    x, y = Axis.over([p.x for p in points], LEFT, WIDTH - RIGHT, True), Axis.over(ends, HEIGHT - BOTTOM, TOP)
    spots = [(x.at(p.x), y.at(p.y)) for p in points]
    bars = [(y.at(p.y + (p.deviation or 0.)), y.at(p.y - (p.deviation or 0.))) for p in points]
    taken = [Box(cx - 7, min(top, cy - 7), cx + 7, max(low, cy + 7)) for (cx, cy), (top, low) in zip(spots, bars, strict=True)]
    texts, boxes = _labels(points, spots, taken)
    marks = []
    for point, (cx, cy), (top, low), text, box in zip(points, spots, bars, texts, boxes, strict=True):
        spread = f' ± {point.deviation:.3g}' if point.deviation is not None else ''
        bar = tag('path', d=f'M{cx:.1f} {top:.1f}V{low:.1f}M{cx - 4:.1f} {top:.1f}h8M{cx - 4:.1f} {low:.1f}h8',
                  class_='bar') if point.deviation else ''
        leader = tag('path', d=_path([(cx, cy), box.near(cx, cy)]), class_='leader') if box.distance(cx, cy) > 12 else ''
        said = f'{point.number} {point.label}: {x_title} {point.x:.4g}, {y_title} {point.y:.4g}{spread}'
        marks.append(tag('g', tag('title', said), leader, bar, marker(point.number, cx, cy),
                         _name(text, box, cx),
                         class_=f'point {style(point.number)}', data_row=point.number))
    said = '; '.join(f'{p.label}: {p.x:.4g}, {p.y:.4g}' for p in points)
    return _svg(title, f'{y_title} against {x_title} of {len(points)} rows. {said}', x, y, x_title, y_title, marks)


def _labels(points: Sequence[Point], spots: Sequence[tuple[float, float]], taken: list[Box]) -> tuple[list[str], list[Box]]:
    """Names beside their markers if there is room for all, else numbers, which the legend explains."""
    area = Box(LEFT + 2, TOP, WIDTH - 2, HEIGHT - BOTTOM - 2)
    named = [p.label if len(p.label) <= _LONGEST_LABEL else f'{p.label[:_LONGEST_LABEL - 1]}…' for p in points]
    for texts, reach in ((named, 40.), ([str(p.number) for p in points], math.inf)):
        boxes = place(spots, [(len(text) * _CHARACTER + 2, _LINE) for text in texts], taken, area, reach)
        if boxes:
            return texts, boxes
    raise AssertionError('numbers are placed at any distance')


def _name(text: str, box: Box, cx: float) -> Markup:
    """A name in its place, set from its marker's side: how wide it becomes depends on the reader's fonts."""
    x, anchor = (box.right - 1, 'end') if box.right < cx else (box.left + 1, None)
    return tag('text', text, x=f'{x:.1f}', y=f'{box.top + 11:.1f}', class_='name', text_anchor=anchor)


def curves(lines: Sequence[Line], x_title: str, y_title: str, title: str) -> Markup:
    """Curves, with bands of plus and minus one deviation about a few, told apart by dashes and markers."""
    values = [point for line in lines for point in line.points]
    x = Axis.over([v[0] for v in values], LEFT, WIDTH - RIGHT)
    y = Axis.over([v[1] + sign * (v[2] or 0.) for v in values for sign in (-1, 1)], HEIGHT - BOTTOM, TOP)
    marks = [_curve(line, x, y, has_bands(lines)) for line in lines]
    said = '; '.join(f'{line.label}: first {line.points[0][1]:.4g} at {line.points[0][0]:g}, last {line.points[-1][1]:.4g} at '
                     f'{line.points[-1][0]:g}, lowest {min(v[1] for v in line.points):.4g}, '
                     f'highest {max(v[1] for v in line.points):.4g}' for line in lines)
    return _svg(title, f'{y_title} against {x_title} of {len(lines)} rows. {said}', x, y, x_title, y_title, marks)


def has_bands(lines: Sequence[Line]) -> bool:
    """Whether deviations are drawn: not about so many curves that the bands hide them."""
    return len(lines) <= COLOURS and any(deviation is not None for line in lines for _, _, deviation in line.points)


def _curve(line: Line, x: Axis, y: Axis, banded: bool) -> Markup:
    spots = [(x.at(v[0]), y.at(v[1])) for v in line.points]
    band = [(x.at(v[0]), y.at(v[1] + v[2]), y.at(v[1] - v[2])) for v in line.points if v[2] is not None]
    outline = [(cx, top) for cx, top, _ in band] + [(cx, low) for cx, _, low in reversed(band)]
    every = max(1, len(spots) // 6)
    shift = (line.number - 1) % every  # markers of lines that lie together do not
    return tag('g', tag('title', f'{line.number} {line.label}'),
               tag('path', d=Markup(f'{_path(outline)}Z'), class_='band') if banded and len(band) > 1 else '',
               tag('path', d=_path(spots), class_='line', stroke_dasharray=_dash(line.number)) if len(spots) > 1 else '',
               *(marker(line.number, cx, cy, 3.) for cx, cy in spots[shift::every]),
               class_=f'curve {style(line.number)}', data_row=line.number)


def _path(spots: Sequence[tuple[float, float]]) -> Markup:
    return Markup('M' + 'L'.join(f'{cx:.1f} {cy:.1f}' for cx, cy in spots))


def marker(number: int, cx: float, cy: float, size: float = 4.5) -> Markup:
    """The marker of a row: a shape of its own for each of seven rows in turn."""
    s = size
    shapes = (f'M{-s} 0a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0Z',               # disc
              f'M{-s} {-s}H{s}V{s}H{-s}Z',                                                # square
              f'M0 {-1.2 * s}L{1.2 * s} {s}H{-1.2 * s}Z',                                 # triangle
              f'M0 {-1.4 * s}L{1.4 * s} 0L0 {1.4 * s}L{-1.4 * s} 0Z',                     # diamond
              f'M{-s} {-s}L{s} {s}M{-s} {s}L{s} {-s}',                                    # cross
              f'M0 {-1.2 * s}V{1.2 * s}M{-1.2 * s} 0H{1.2 * s}',                          # plus
              f'M0 {1.2 * s}L{1.2 * s} {-s}H{-1.2 * s}Z')                                 # triangle upside down
    return tag('path', d=shapes[(number - 1) % len(shapes)], transform=f'translate({cx:.1f} {cy:.1f})', class_='marker')


def key(rows: Sequence[tuple[int, str]], lines: bool) -> Markup:
    """The legend of a plot: marker, dash if it has lines, number and label of every row."""
    def sample(n: int) -> Markup:
        line = tag('path', d='M1 8H33', class_='line', stroke_dasharray=_dash(n)) if lines else ''
        return tag('svg', line, marker(n, 17, 8, 4.), viewBox='0 0 34 16', width=34, height=16, aria_hidden='true',
                   class_=style(n))

    return tag('ul', *(tag('li', sample(n), f' {n} {label}') for n, label in rows), class_='key')


def _svg(title: str, description: str, x: Axis, y: Axis, x_title: str, y_title: str, marks: Sequence[Markup]) -> Markup:
    frame = tag('path', d=f'M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}', class_='frame')
    return tag('svg', tag('title', title), tag('desc', escape(description, _LONGEST_DESCRIPTION)), join(_ticks(x, y)), frame,
               tag('text', x_title, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_='axis', text_anchor='middle'),
               tag('text', y_title, x=-(TOP + HEIGHT - BOTTOM) / 2, y=13, class_='axis', text_anchor='middle',
                   transform='rotate(-90)'), *marks, viewBox=f'0 0 {WIDTH} {HEIGHT}', role='img', class_='plot')


def _ticks(x: Axis, y: Axis) -> Iterator[Markup]:
    for tick in x.ticks:
        yield tag('path', d=f'M{x.at(tick):.1f} {TOP}V{HEIGHT - BOTTOM}', class_='grid')
        yield tag('text', f'{tick:g}', x=f'{x.at(tick):.1f}', y=HEIGHT - BOTTOM + 15, text_anchor='middle', class_='tick')
    for tick in y.ticks:
        yield tag('path', d=f'M{LEFT} {y.at(tick):.1f}H{WIDTH - RIGHT}', class_='grid')
        yield tag('text', f'{tick:g}', x=LEFT - 6, y=f'{y.at(tick) + 4:.1f}', text_anchor='end', class_='tick')
