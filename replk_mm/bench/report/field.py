"""The picture of the field: published mIoU and AP against recomputed size and measured latency, as one HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from replk_mm import published
from replk_mm.bench.report import plots
from replk_mm.errors import UserError
from replk_mm.published import PublishedResult

_HERE = Path(__file__).parent
METRICS = {'miou_ss': 'mIoU, single scale', 'miou_ms': 'mIoU, multi-scale', 'ap_box': 'box AP'}
#: Horizontal axes: attribute of a row, and title.
AXES = {'macs': 'MACs, G', 'parameters': 'parameters, M', 'milliseconds': 'latency of the backbone, ms'}
#: Words of a pretraining that do not make another facet.
_SAME = (' (300 epochs)', ' supervised')


@dataclass(frozen=True)
class FieldRow:
    """A published row with our figures; those that are not known are None."""

    number: int
    result: PublishedResult
    input: tuple[int, int]
    macs: float | None  #: deployed, in billions
    parameters: float | None  #: deployed, in millions
    milliseconds: float | None  #: of the backbone on the stated machine
    licence: str  #: of the weights, or of the code
    permissive: bool

    @property
    def facet(self) -> tuple[str, ...]:
        """What must be equal for rows to share a plot."""
        result, pretraining = self.result, self.result.pretraining
        for words in _SAME:
            pretraining = pretraining.removesuffix(words)
        crop = f'crop {result.crop}' if result.crop else ''
        return result.dataset, result.method, pretraining, crop, result.schedule


def read_rows(
    record: Mapping[str, Any], licences: Mapping[str, tuple[str, bool]], latencies: Mapping[str, float]
) -> list[FieldRow]:
    """Join the published rows with their recomputed figures.

    Args:
        record: Of ``complexity --published --json``.
        licences: Licence and whether it is permissive, by the papers' names.
        latencies: Milliseconds by the papers' names.

    Raises:
        UserError: If the record has other rows than the published ones.
    """
    results = [result for result in published.results() if result.task != 'classification']
    found = [row for row in record['rows'] if row['method'] != 'classification']
    keys = ('backbone', 'pretraining', 'dataset', 'method', 'schedule', 'crop')
    if [[row.get(key) for key in keys] for row in found] != [[getattr(r, k) for k in keys] for r in results]:
        raise UserError('the record of complexity has other rows than published.yaml\nCount again with --published.')
    return [
        FieldRow(
            number,
            result,
            (row['input'][0], row['input'][1]),
            row['counts'] and row['counts']['deployed']['macs'] / 1e9,
            row['counts'] and row['counts']['deployed']['parameters'] / 1e6,
            latencies.get(result.backbone),
            *licences.get(result.backbone, ('not known here', False)),
        )
        for number, (row, result) in enumerate(zip(found, results, strict=True), 1)
    ]


def facets_of(rows: Sequence[FieldRow]) -> list[tuple[tuple[str, ...], list[FieldRow]]]:
    """Rows that may be compared, the largest group of each data set first."""
    groups: dict[tuple[str, ...], list[FieldRow]] = {}
    for row in rows:
        groups.setdefault(row.facet, []).append(row)
    order = list(dict.fromkeys(row.result.dataset for row in rows))
    return sorted(groups.items(), key=lambda item: (order.index(item[0][0]), -len(item[1])))


def draw(rows: Sequence[FieldRow], metric: str, axis: str, numbers: Mapping[str, int]) -> Figure:
    """Published metric against an axis: a marker for each row, a line for each family, hollow if not permissive.

    Args:
        rows: Of one facet, with both values.
        metric: Of :data:`METRICS`.
        axis: Of :data:`AXES`.
        numbers: Style of each family. Markers and labels are links to ``#row-NUMBER``.
    """
    figure, axes = plots.make_axes(AXES[axis], METRICS[metric], (460, 340))
    for family, number in numbers.items():
        found = sorted(
            ((getattr(r, axis), r.result.metrics[metric], r) for r in rows if r.result.family == family),
            key=lambda point: point[:2],
        )
        colour = plots.colour_of(number)
        axes.plot([x for x, _, _ in found], [y for _, y, _ in found], color=colour, lw=1, alpha=0.45)
        for x, y, row in found:
            url = f'#row-{row.number}'
            face = colour if row.permissive else 'none'
            marker = plots.marker_of(number)
            axes.plot([x], [y], marker, color=colour, mfc=face, ms=8, mew=1.5, ls='', url=url)
            text = axes.annotate(row.result.backbone.partition('-')[2], (x, y), (6, 3), textcoords='offset points')
            text.set(fontsize=10, url=url)
    plots.use_logarithm(axes, [getattr(row, axis) for row in rows])
    return figure


def render_field(
    rows: Sequence[FieldRow],
    machine: str,
    command: str,
    answer: Sequence[str] = (),
    title: str = 'The field: backbones for dense prediction',
) -> str:
    """The page: plots of each facet with at least two rows, and a table of all rows.

    Args:
        rows: From :func:`read_rows`.
        machine: Where the latencies were measured; ``''`` if there are none.
        command: That writes the page.
        answer: Sentences for a box at the top.
        title: Of the page.
    """
    numbers = {family: i for i, family in enumerate(dict.fromkeys(row.result.family for row in rows), 1)}

    def plots_of(group: Sequence[FieldRow]) -> Iterator[Markup]:
        for metric in METRICS:
            for axis in AXES:
                known = [r for r in group if metric in r.result.metrics and getattr(r, axis) is not None]
                if len(known) > 1:
                    names = ', '.join(dict.fromkeys(row.result.family for row in known))
                    title = f'{METRICS[metric]} against {AXES[axis]}: {names}'
                    links = {f'#row-{row.number}': row.result.backbone for row in known}
                    yield plots.inline(partial(draw, known, metric, axis, numbers), title, links)

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [(facet, group, list(plots_of(group))) for facet, group in facets_of(rows)]
    return environment.get_template('field.html.j2').render(
        sections=sections,
        rows=rows,
        numbers=numbers,
        sample=plots.sample,
        style=Markup((_HERE / 'page.css').read_text(encoding='utf-8')),
        colours=plots.css_colours(),
        machine=machine,
        command=command,
        answer=answer,
        title=title,
    )
