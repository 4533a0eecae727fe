"""The plots and pictures of a suite as HTML."""
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from replk_mm.bench import records
from replk_mm.bench.report import label_examples, object_examples, svg
from replk_mm.bench.report.assemble import Group, Record, Report, Row, Suite
from replk_mm.bench.report.columns import BY_KEY, METRIC_TITLES, number
from replk_mm.bench.report.label_examples import Data, Example, Shown
from replk_mm.bench.report.markup import Markup, tag
from replk_mm.bench.report.pictures import Album, Picture, Unusable, inside, read_rgb
from replk_mm.bench.report.protocol import identity

_AGAINST = ('milliseconds', 'macs', 'parameters')
#: Points of a curve before neighbours are averaged.
_MOST_POINTS = 120
_HEAT_MAP_WIDTH = 520


def plots(suite: Suite) -> Iterator[Markup]:
    """The metric against time, MACs and parameters: a plot for each pair of protocols."""
    for group in suite.groups:
        for key in _AGAINST:
            column = BY_KEY[key]
            by_protocol: dict[str, list[Row]] = {}
            for row in group.rows:
                if group.protocol and row.figures['metric'].value is not None and row.figures[key].value is not None:
                    by_protocol.setdefault(row.figures[key].protocol, []).append(row)
            for name, rows in by_protocol.items():
                points = [svg.Point(row.number, row.label, x.value or 0., y.value or 0., y.deviation)
                          for row in rows for x, y in [(row.figures[key], row.figures['metric'])]]
                title = f'{group.title.partition(",")[0]} against {column.title if key == "macs" else column.title.lower()}'
                assert group.protocol is not None
                how = '; bars: ± one standard deviation over seeds' if any(point.deviation for point in points) else ''
                yield _figure(title, f'Protocol {group.protocol.name}, {name}{how}.', rows, False, svg.scatter(
                    points, f'{column.title}, {column.unit}', group.title, title))


def _figure(title: str, caption: str, rows: Sequence[Row], lines: bool, plot: Markup) -> Markup:
    return tag('figure', tag('figcaption', tag('strong', title), ' ', caption), plot,
               svg.key([(row.number, row.label) for row in rows], lines))


def curves(suite: Suite) -> Iterator[Markup]:
    """Loss and metric over the training, of each protocol, the mean over seeds with its deviation."""
    for group in suite.groups:
        kinds: dict[str, list[tuple[Row, list[Record]]]] = {}
        for row in group.rows:
            found = row.of('curve')
            for key in [identity(found[0]['protocol'])] if found else ():
                kinds.setdefault(key, []).append((row, [r for r in found if identity(r['protocol']) == key]))
        for rows in kinds.values():
            for what in ('loss', 'metric'):
                lines, chosen, names = [], [], []
                for row, of_row in rows:
                    points = _over_seeds([_points(r['values'].get(what)) for r in of_row])
                    if points:
                        lines.append(svg.Line(row.number, row.label, points))
                        chosen.append(row)
                        name = str(of_row[0]['values'].get('name') or 'metric')
                        names.append(METRIC_TITLES.get(name, name))
                if lines:
                    title = 'Training loss' if what == 'loss' else f'{names[0]} while training'
                    where = f'Protocol {group.protocol.name}. ' if group.protocol else ''
                    band = ', the band ± one standard deviation' if svg.has_bands(lines) else ''
                    yield _figure(title, f'{where}Mean over seeds{band}.', chosen, True,
                                  svg.curves(lines, 'iterations', 'loss' if what == 'loss' else names[0], title))


def _points(found: object) -> dict[float, float]:
    """Iterations with a finite value."""
    pairs = [pair for pair in found if isinstance(pair, list) and len(pair) == 2] if isinstance(found, list) else []
    numbers = [(number(dict(v=x), 'v'), number(dict(v=y), 'v')) for x, y in pairs]
    return dict(sorted((x, y) for x, y in numbers if x is not None and y is not None))


def _over_seeds(seeds: Sequence[Mapping[float, float]]) -> list[tuple[float, float, float | None]]:
    """Mean and deviation at iterations that all seeds have; neighbours are averaged where there are too many."""
    seeds = [seed for seed in seeds if seed]
    common = sorted(set.intersection(*map(set, seeds))) if seeds else []
    size = -(-len(common) // _MOST_POINTS) or 1
    found = []
    for start in range(0, len(common), size):
        part = common[start:start + size]
        spread = records.spread([records.spread([seed[x] for x in part]).mean for seed in seeds])
        found.append((records.spread(part).mean, spread.mean, spread.deviation))
    return found


def heat_maps(suite: Suite, report: Report, album: Album) -> Iterator[Markup]:
    """The receptive field of every row, of its first seed."""
    for row in suite.rows:
        for record in row.of('erf')[:1]:
            name = record['files'].get('heat_map')
            if not name:
                continue
            sides = [f'{share}: {side:g} px' for share, at in (('50 %', '0.5'), ('99 %', '0.99'))
                     if (side := number(record['values'], 'areas_of_scores', at, 'side')) is not None]
            words = ', '.join(sides) + ('' if record['values'].get('trained', True) else '; random weights')
            try:
                picture = album.add(read_rgb(inside(report.folders[id(record)], name)), _HEAT_MAP_WIDTH, 'drawing', str(name))
            except Unusable as error:
                album.problems.append(str(error))
                picture = None
            text = f'{row.number} {row.label}, seed {record["seed"]}'
            yield tag('figure', _image(Shown(picture, words), f'Receptive field of {row.label}: {words}'),
                      tag('figcaption', tag('strong', text), ' ', words))


def _image(shown: Shown, text: str) -> Markup:
    if shown.picture is None:
        return tag('p', 'missing', class_='missing')
    picture: Picture = shown.picture
    return tag('img', src=Markup(picture.source), alt=text, width=picture.width, height=picture.height)


def examples(suite: Suite, report: Report, album: Album) -> Iterator[Markup]:
    """The same images for every row of a protocol, side by side."""
    for group in suite.groups:
        rows, data = _with_predictions(group, report, album)
        if not rows or data is None:
            continue
        triples = [(row.number, row.label, folder) for row, folder in rows]
        try:
            objects = bool(data.annotations and not data.labels)
            found = (object_examples.of_objects if objects else label_examples.of_label_maps)(triples, data, album)
        except Unusable as error:
            album.problems.append(str(error))
            continue
        if found:
            if not any(data.root.resolve().is_relative_to(folder.resolve()) for folder in report.folders.values()):
                report.outside.add(data.root)
            yield _sheet(group, [row for row, _ in rows], found, objects)
            if not objects:
                yield _legend(data)


def _with_predictions(group: Group, report: Report, album: Album) -> tuple[list[tuple[Row, Path]], Data | None]:
    rows, data = [], None
    for row in group.rows:
        for record in row.of('metric'):
            try:
                folder = label_examples.folder_of(record, report.folders[id(record)])
                if folder:
                    data = data or Data.of(record, report.folders[id(record)])
                    rows.append((row, folder))
                    break
            except Unusable as error:
                album.problems.append(f'{row.label}, seed {record["seed"]}: {error}')
    return rows, data


def _sheet(group: Group, rows: Sequence[Row], found: Sequence[Example], objects: bool) -> Markup:
    titles = ('Image', 'Ground truth', *(f'{row.number} {row.label}' for row in rows))
    lines = []
    for example in found:
        missing = Shown(None, 'missing')
        cells = [(f'Image {example.name}', example.image), (f'Ground truth of {example.name}', example.truth),
                 *((f'{row.label}, {example.name}', example.predictions.get(row.number, missing)) for row in rows)]
        lines.append(tag('tr', *(
            tag('td', _image(shown, f'{what}: {shown.words}'), tag('p', shown.words) if shown.picture else '')
            for what, shown in cells)))
    name = f'Example predictions, protocol {group.protocol.name}' if group.protocol else 'Example predictions'
    how = f' Objects with a score of {object_examples.LEAST_SCORE:g} or more.' if objects else ''
    head = tag('thead', tag('tr', *(tag('th', title, scope='col') for title in titles)))
    table = tag('table', tag('caption', f'{name}.{how}'), head, tag('tbody', *lines),
                class_='examples objects' if objects else 'examples')
    return tag('div', table, class_='scroll', role='region', tabindex='0', aria_label=name)


def _legend(data: Data, most: int = 40) -> Markup:
    """Colours of the classes; of very many the first ones."""
    named = list(zip(data.classes, data.palette, strict=False))
    more = f'and {len(named) - most} more classes' if len(named) > most else ''
    squares = [tag('svg', tag('rect', width=14, height=14, fill=f'rgb({r},{g},{b})'), viewBox='0 0 14 14', width=14, height=14,
                   aria_hidden='true') for _, (r, g, b) in named[:most]]
    return tag('ul', *(tag('li', square, f' {name}') for square, (name, _) in zip(squares, named, strict=False)),
               tag('li', more) if more else '', class_='key')
