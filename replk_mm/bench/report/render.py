"""Render a report as one self-contained HTML page, and as Markdown."""

import base64
import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from replk_mm.bench.answer import Limits, answer
from replk_mm.bench.report import pictures, plots
from replk_mm.bench.report.gallery import open_gallery
from replk_mm.bench.report.pictures import MOST_ROWS, Album
from replk_mm.bench.report.structures import ProtocolGroup, Record, Report, ReportRow, SuiteReport
from replk_mm.bench.report.tables import (
    COLUMNS,
    FIGURE_NAMES,
    METRIC_TITLES,
    NOT_MEASURED,
    Column,
    Figure,
    format_value,
    leaves,
    number,
    protocol_key,
)
from replk_mm.text import clean, in_percent, markdown_text, text_table

_HERE = Path(__file__).parent
#: Points of a curve before neighbours are averaged; plots of a section, protocols with examples.
_MOST_POINTS, MOST_PLOTS = 120, 24
#: Classes of a table.
MOST_CLASSES = 1000


class Notes(dict[str, int]):
    """Numbered notes below a table; equal ones share a number."""

    def number(self, text: str) -> int:
        """The number of a note."""
        return self.setdefault(text, len(self) + 1)


def render_html(report: Report, data_roots: Iterable[str | Path] = (), limits: Limits | None = None) -> str:
    """The HTML page, with images of the data in work dirs and in ``data_roots``; fills ``report.outside``.

    The answer on top is restricted to rows within ``limits``.
    """
    album = Album(data_roots)
    style, script = (Markup((_HERE / name).read_text(encoding='utf-8')) for name in ('page.css', 'page.js'))
    text = (
        _environment(clean)
        .get_template('page.html.j2')
        .render(
            report=report,
            album=album,
            style=style,
            script=script,
            hash=_hash,
            answer=lambda suite: answer(suite, limits),
            plots=lambda suite, first: islice(_plots(suite, first), MOST_PLOTS),
            classes=_classes,
            MOST_ROWS=MOST_ROWS,
            curves=lambda suite: islice(_curves(suite), MOST_PLOTS),
            MOST_PLOTS=MOST_PLOTS,
            sample=plots.sample,
            heat_maps=_heat_maps,
            profiles=_profiles,
            open_gallery=open_gallery,
            distinct=_distinct,
            left_out=_left_out,
        )
    )
    report.outside |= album.outside
    return text


def render_markdown(report: Report, limits: Limits | None = None) -> str:
    """The text of the Markdown file: everything but plots and pictures."""
    return _markdown().get_template('report.md.j2').render(report=report, answer=lambda suite: answer(suite, limits))


def render_suite_tables(suite: SuiteReport) -> str:
    """The tables of a suite as Markdown: the columns that have figures, with notes on single figures."""
    module: Any = _markdown().get_template('report.md.j2').make_module()
    return str(module.tables(suite, suite.columns)).rstrip() + '\n'


def _markdown() -> Environment:
    return _environment(lambda value: Markup(markdown_text(value)))


def _environment(show: Callable[[object], str]) -> Environment:
    """``show`` formats every value, which is then escaped for HTML; ``Markup`` stays as it is."""
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else show(value),
    )
    environment.globals |= dict(NOT_MEASURED=NOT_MEASURED, Notes=Notes, markdown_cell=_markdown_cell)
    environment.filters |= dict(
        clean=clean,
        format_value=format_value,
        leaves=lambda node: list(leaves(node)),
        checkpoint=_checkpoint,
        commit=_commit,
        values=_values,
        origin=_origin,
    )
    return environment


def _markdown_cell(suite: SuiteReport, column: Column, figure: Figure, notes: Notes) -> Markup:
    source = column.key == 'published' and figure.value is not None
    mark = f' ({notes.number(figure.why)})' if figure.why and figure.why != NOT_MEASURED and not source else ''
    if figure.value is None:
        return Markup(f'–{mark}')
    text = column.shown(figure) + (f' (n = {figure.count})' if column.key == 'metric' else '')
    text = markdown_text(f'{text} {figure.protocol}' if suite.shows_protocol(column) else text)
    return Markup(f'**{text}**{mark}' if figure.mark else f'{text}{mark}')


def _hash(text: str) -> str:
    return f'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'


# -- plots and pictures -----------------------------------------------------------------------------------------------
def _plots(suite: SuiteReport, first: ProtocolGroup | None) -> Iterator[dict[str, Any]]:
    """The metric against each cost, with the Pareto front: a plot for each pair of protocols; ``first`` comes first."""
    for group in sorted(suite.groups, key=lambda group: group is not first):
        for column in (c for c in COLUMNS if c.cost):
            by_protocol: dict[str, list[ReportRow]] = {}
            for row in group.rows if group.protocol else ():
                cost_figure = row.figures[column.key]
                if None not in (row.figures['metric'].value, cost_figure.value) and not cost_figure.unreliable:
                    by_protocol.setdefault(cost_figure.protocol, []).append(row)
            for name, rows in by_protocol.items():
                if len(rows) < 2:
                    continue
                shown = rows[:MOST_ROWS]
                points = [
                    plots.Point(row.number, row.label, x.value or 0.0, y.value or 0.0, y.low, y.high, bool(x.mark))
                    for row in shown
                    for x, y in [(row.figures[column.key], row.figures['metric'])]
                ]
                cost = column.title if column.key == 'macs' else column.title.lower()
                title = f'{group.title.partition(",")[0]} against {cost}'
                front = '; filled, on the line: Pareto front' if any(p.front for p in points) else ''
                how = '; bars: 95 % confidence intervals' if any(p.low is not None for p in points) else ''
                yield dict(
                    title=title,
                    rows=shown,
                    lines=False,
                    caption=f'Protocol {group.name}, {name}{front}{how}.{_left_out(rows)}',
                    svg=plots.scatter(points, f'{column.title}, {column.unit}', group.title, title),
                )


def _classes(group: ProtocolGroup) -> tuple[str, list[tuple[str, str, list[str]]]]:
    """The figure of classes, and of each class its name, its share of pixels or objects, and the figure of each row."""
    of_rows = [[r['values'].get('per_class') for r in row.of('metric')] for row in group.rows[:MOST_ROWS]]
    first = next((of for seeds in of_rows for of in seeds if isinstance(of, Mapping) and of), {})
    segmentation = any(number(of, 'IoU') is not None for of in first.values())
    figure, size = ('IoU', 'pixels') if segmentation else (group.metric.removeprefix('coco/'), 'instances')
    sizes = {name: number(of, size) or 0.0 for name, of in first.items()}
    found = []
    for name in sorted(sizes, key=lambda name: -sizes[name])[:MOST_CLASSES]:
        values = [[v for of in seeds if (v := number(of, name, figure)) is not None] for seeds in of_rows]
        texts = [f'{in_percent(figure, statistics.fmean(of)):.1f}' if of else '–' for of in values]
        found.append((name, f'{100 * sizes[name] / max(sum(sizes.values()), 1):.1f} %', texts))
    return METRIC_TITLES.get(group.metric, figure), found


def _curves(suite: SuiteReport) -> Iterator[dict[str, Any]]:
    """Loss and metric over the training, of each protocol, the mean over seeds with its deviation."""
    for group in suite.groups:
        kinds: dict[str, list[tuple[ReportRow, list[Record]]]] = {}
        for row in group.rows:
            found = row.of('curve')
            for key in [protocol_key(found[0]['protocol'])] if found else ():
                kinds.setdefault(key, []).append((row, [r for r in found if protocol_key(r['protocol']) == key]))
        for rows in kinds.values():
            for what in ('loss', 'metric'):
                lines = [
                    (row, plots.Line(row.number, row.label, points))
                    for row, of_row in rows[:MOST_ROWS]
                    if (points := _over_seeds([_points(r['values'].get(what)) for r in of_row]))
                ]
                if not any(len(line.points) > 1 for _, line in lines):
                    continue
                name = str(rows[0][1][0]['values'].get('name') or 'metric')
                name = 'loss' if what == 'loss' else METRIC_TITLES.get(name, name)
                title = 'Training loss' if what == 'loss' else f'{name} while training'
                where = f'Protocol {group.name}. ' if group.protocol else ''
                band = ', the band ± one standard deviation' if plots.has_bands([line for _, line in lines]) else ''
                yield dict(
                    title=title,
                    rows=[row for row, _ in lines],
                    lines=True,
                    caption=f'{where}Mean over seeds{band}.{_left_out(rows)}',
                    svg=plots.curves([line for _, line in lines], 'iterations', name, title),
                )


def _profiles(suite: SuiteReport, album: Album) -> Iterator[tuple[ReportRow, Record, str, pictures.Picture]]:
    """The metric by corruption, severity and test size of the first rows, of their first seeds."""
    for row in suite.rows[:MOST_ROWS]:
        for record in row.of('robustness')[:1]:
            share, images = (number(record['values'], *at) for at in (('relative', 'value'), ('images',)))
            words = f'{suite.protocol_name(record)}, {images or 0:.0f} images, {share or 0:.0f} % of the clean metric'
            shown = pictures.heat_map(record, words, album)
            if shown:
                yield row, record, words, shown


def _left_out(rows: Sequence[Any]) -> str:
    return f' The best {MOST_ROWS} of {len(rows):,} rows.' if len(rows) > MOST_ROWS else ''


def _points(found: object) -> dict[float, float]:
    """Iterations with a finite value."""
    pairs = [pair for pair in found if isinstance(pair, list) and len(pair) == 2] if isinstance(found, list) else []
    numbers = [(number(x), number(y)) for x, y in pairs]
    return dict(sorted((x, y) for x, y in numbers if x is not None and y is not None))


def _over_seeds(seeds: Sequence[Mapping[float, float]]) -> list[tuple[float, float, float | None]]:
    """Mean and deviation at iterations that all seeds have; neighbours are averaged where there are too many."""
    seeds = [seed for seed in seeds if seed]
    common = sorted(set.intersection(*map(set, seeds))) if seeds else []
    size = -(-len(common) // _MOST_POINTS) or 1
    points = []
    for start in range(0, len(common), size):
        part = common[start : start + size]
        values = [statistics.fmean(seed[x] for x in part) for seed in seeds]
        deviation = statistics.stdev(values) if len(values) > 1 else None
        points.append((statistics.fmean(part), statistics.fmean(values), deviation))
    return points


def _heat_maps(suite: SuiteReport, album: Album) -> Iterator[tuple[ReportRow, Record, str, pictures.Picture]]:
    """The receptive fields of the first rows, of their first seeds."""
    for row in suite.rows[:MOST_ROWS]:
        for record in row.of('erf')[:1]:
            sides = [
                f'{share}: {side:g} px'
                for share, at in (('50 %', '0.5'), ('99 %', '0.99'))
                if (side := number(record['values'], 'areas_of_scores', at, 'side')) is not None
            ]
            words = ', '.join(sides) + ('' if record['values'].get('trained', True) else '; random weights')
            shown = pictures.heat_map(record, words, album)
            if shown:
                yield row, record, words, shown


# -- origins ----------------------------------------------------------------------------------------------------------
def _distinct(row: ReportRow, name: str) -> list[Mapping[str, Any]]:
    """The different values of a field of a row's records, without empty entries."""
    return list(
        {
            protocol_key(r[name]): {k: v for k, v in r[name].items() if v or name != 'config'} for r in row.records
        }.values()
    )


def _checkpoint(record: Record) -> str:
    found = record['checkpoint']
    if not found:
        return 'none'
    iteration = found.get('iteration')
    parts = [
        str(found.get('sha256') or 'hash not stated')[:12],
        f'iteration {iteration}' if iteration is not None else '',
        '' if found.get('trained', True) else 'random weights',
    ]
    return ', '.join(filter(None, parts))


def _commit(record: Record) -> str:
    """The code that measured."""
    git = record['git']
    if not git:
        return 'not in a git checkout'
    return format_value(git.get('commit'))[:12] + (', with changes' if git.get('dirty') else '')


def _values(record: Record) -> dict[str, Any]:
    """A record's values and facts that are neither shown elsewhere nor too long."""
    found = {FIGURE_NAMES.get(key, key): value for key, value in {**record['values'], **record['facts']}.items()}
    for key in ('per_class', 'loss', 'metric', 'parts', 'data'):
        found.pop(key, None)
    if record['measurement'] == 'speed' and isinstance(forms := found.pop('forms', None), Mapping):
        found |= {FIGURE_NAMES.get(form, form): times for form, times in forms.items()}
    # The protocols of other measurements stand below the table.
    return found | ({'protocol': record['protocol']} if found and record['measurement'] in ('curve', 'train') else {})


def _origin(row: ReportRow) -> str:
    """Config, checkpoints, code and dates of a row, in a line."""
    last = row.records[-1]
    hashes = dict.fromkeys(str((r['checkpoint'] or {}).get('sha256') or '')[:12] for r in row.records)
    dates = sorted(r['started'] for r in row.records)
    machine = ', '.join(
        str(last['environment'][key]) for key in ('cpu', 'gpu', 'torch') if last['environment'].get(key)
    )
    return (
        f'config {last["config"].get("path")} ({str(last["config"].get("sha256"))[:12]}); checkpoints '
        f'{", ".join(filter(None, hashes)) or "none"}; commit {_commit(last)}; {machine}; {dates[0]} to '
        f'{dates[-1]}'
    )


def render_text(suite: SuiteReport) -> str:
    """The tables of a suite for a terminal: the columns that have figures, without remarks."""
    columns, tables = suite.columns, []
    for group in suite.groups:
        head = ['row', *(f'{suite.heading(c)}{f", {c.unit}" if c.unit else ""}' for c in columns), 'state']
        rows = []
        for row in group.rows:
            figures = [(c, row.figures[c.key]) for c in columns]
            state = '; '.join(filter(None, (row.state, row.source)))
            rows.append([row.label, *('-' if f.value is None else c.shown(f) for c, f in figures), state])
        heading = [group.heading] if len(suite.groups) > 1 else []
        tables.append('\n'.join([*heading, text_table([head, *rows], left=(0, len(columns) + 1)), *group.remarks]))
    return '\n\n'.join(tables)
