"""The table of a suite as HTML: a body for every protocol, so that sorting never mixes what must not be ranked together."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from replk_mm.bench.report.assemble import Group, Row, Suite
from replk_mm.bench.report.columns import COLUMNS, NOT_MEASURED, Column, Figure
from replk_mm.bench.report.markup import Markup, clean, join, tag
from replk_mm.bench.report.protocol import Protocol, described, in_words
from replk_mm.bench.report.ranking import RANKING

#: What of a protocol its heading names; the rest stands below the table.
_SUMMARY = ('task', 'data', 'crop', 'mode', 'tta', 'iterations', 'batch', 'pretraining', 'precision')
_LONGEST_REASON = 140


@dataclass
class Notes:
    """Numbered notes below a table; equal ones share a number."""

    prefix: str
    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        """The number of a note."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1

    def mark(self, text: str) -> Markup:
        """A link to a note."""
        number = self.number(text)
        return tag('a', f'[{number}]', href=f'#{self.prefix}-note-{number}', aria_label=f'note {number}', class_='mark')

    def listed(self) -> Markup:
        """All notes."""
        return tag('ol', *(tag('li', text, id=f'{self.prefix}-note-{i}') for i, text in enumerate(self.texts, 1)),
                   class_='notes') if self.texts else Markup()


def table(suite: Suite, prefix: str) -> Markup:
    """The table with all that is to know about it.

    Args:
        suite: Whose rows it shows.
        prefix: Of the ids of its elements.
    """
    notes = Notes(prefix)
    head = tag('tr', _heading('Row', '', 'ascending', class_='label'),
               *(_heading(heading(suite, c), c.unit, _first(c), aria_sort='descending' if c.key == 'metric' else None)
                 for c in COLUMNS), _heading('State', '', 'ascending'))
    bodies = [_body(suite, group, prefix, notes) for group in suite.groups]
    return join((
        tag('p', 'The heading of a column sorts by it, within each protocol; what is missing comes last.', class_='hint'),
        tag('p', class_='sorted', role='status'),
        tag('div', tag('table', tag('caption', f'Results of {suite.name}', id=f'{prefix}-caption'), tag('thead', head),
                       *bodies, class_='results'),
            class_='scroll', role='region', tabindex='0', aria_labelledby=f'{prefix}-caption'),
        tag('p', '– is missing; without a number beside it nobody asked for it.'), notes.listed(),
        tag('ul', *(tag('li', text) for text in (*differing(suite), *about_columns())), class_='notes'), _protocols(suite)))


def differing(suite: Suite) -> list[str]:
    """What differs between the protocols of each measurement besides the metric's, whose groups say it."""
    return [f'{p.name} ({measurement.replace("_", " ")}) differs from {protocols[0].name} and is not ranked with it: '
            f'{clean("; ".join(p.differences))}'
            for measurement, protocols in suite.protocols.items() if measurement != 'metric' for p in protocols[1:]]


def about_columns() -> list[str]:
    """What is to know of the columns and the marks."""
    return [RANKING, *(column.note for column in COLUMNS if column.note),
            'With several seeds a figure is their mean ± the standard deviation of the sample.']


def heading(suite: Suite, column: Column) -> str:
    """The title of a column; the metric's is its name if all rows have the same."""
    names = {group.title for group in suite.groups if group.title}
    return names.pop() if column.key == 'metric' and len(names) == 1 else column.title


def _first(column: Column) -> str:
    """The direction in which a column is sorted first."""
    return 'descending' if column.better == 'higher' or column.key in ('published', 'difference') else 'ascending'


def _heading(title: str, unit: str, first: str, **attributes: str | None) -> Markup:
    return tag('th', tag('button', title, tag('small', unit) if unit else '', type='button', data_first=first), scope='col',
               **attributes)


def group_title(group: Group) -> str:
    """The heading of a group."""
    if group.protocol is None:
        return 'Rows without a metric: not ranked'
    return f'Protocol {group.protocol.name} ({group.title}): {summary(group.protocol.content)}'


def summary(protocol: Mapping[str, Any]) -> str:
    """What a reader wants to know of a metric's protocol first."""
    parts = []
    for name in _SUMMARY:
        value = protocol.get(name)
        if name == 'data' and isinstance(value, Mapping):
            images = value.get('images')
            value = f'{in_words(value.get("root") or value.get("name"))}' + (f' ({images} images)' if images else '')
        if value not in (None, '', [], {}):
            parts.append(f'{name} {clean(in_words(value), 80)}')
    return ', '.join(parts) or 'not stated'


def _body(suite: Suite, group: Group, prefix: str, notes: Notes) -> Markup:
    width = len(COLUMNS) + 2
    differs = group.protocol.differences if group.protocol else ()
    title = tag('span', tag('strong', group_title(group)),
                *((tag('br'), f'Differs from {suite.groups[0].protocol.name}: {clean("; ".join(differs))}')
                  if differs and suite.groups[0].protocol else ()))
    head = tag('tr', tag('th', title, colspan=width, scope='rowgroup'), class_='group')
    return tag('tbody', head, *(_row(suite, row, prefix, notes) for row in group.rows),
               data_protocol=group.protocol.name if group.protocol else '')


def _row(suite: Suite, row: Row, prefix: str, notes: Notes) -> Markup:
    state = [row.state]
    if row.problems:
        state.append(f': {clean(row.problems[0], _LONGEST_REASON)}')
        if len(row.problems) > 1:
            state.append(f' (and {len(row.problems) - 1} more)')
    name = tag('a', f'{row.number} {row.label}', href=f'#{prefix}-row-{row.number}')
    failed = tag('small', 'failed', class_='failed') if row.failed else ''
    return tag('tr', tag('th', name, failed, scope='row', class_='label', data_value=row.label),
               *(_cell(suite, column, row.figures[column.key], notes) for column in COLUMNS),
               tag('td', *state, class_='failed state' if row.failed else 'state', data_value=row.state),
               data_row=row.number)


def _cell(suite: Suite, column: Column, figure: Figure, notes: Notes) -> Markup:
    if figure.value is None:
        return tag('td', tag('span', '–', aria_hidden='true'), tag('span', f'missing: {figure.why}', class_='hidden'),
                   '' if figure.why == NOT_MEASURED else notes.mark(figure.why), class_='missing', data_value='')
    parts: list[object] = [tag('span', shown(column, figure), class_='figure')]
    several = len(suite.protocols.get(column.measurement, ())) > 1 and column.measurement != 'metric'
    if several:
        parts.append(tag('span', figure.protocol, class_='tag'))
    if figure.best:
        parts.append(tag('span', 'best', class_='best'))
    if column.key == 'metric':
        parts.append(tag('small', f'{figure.count} seed{"s" * (figure.count != 1)}'))
    if figure.why and column.key != 'published':
        parts.append(notes.mark(figure.why))
    return tag('td', *parts, data_value=repr(figure.value), data_order=figure.protocol if several else None)


def shown(column: Column, figure: Figure) -> str:
    """A figure's text: the value, and its deviation if it has one that is not zero by nature."""
    assert figure.value is not None
    text = column.text(figure.value)
    if figure.deviation is None or column.measurement == 'complexity' or column.key == 'difference':
        return text
    return f'{text} ± {column.text(figure.deviation)}'


def _protocols(suite: Suite) -> Markup:
    """Every protocol in full."""
    parts = []
    for measurement, protocols in suite.protocols.items():
        for protocol in protocols:
            parts += [tag('h4', f'{protocol.name}: {measurement.replace("_", " ")}'), _difference(protocols[0], protocol),
                      places(protocol.content)]
    return tag('details', tag('summary', 'The protocols in full'), *parts, class_='protocols') if parts else Markup()


def _difference(first: Protocol, protocol: Protocol) -> Markup:
    if not protocol.differences:
        return Markup()
    return tag('div', tag('p', f'Differs from {first.name}:'), tag('ul', *(tag('li', text) for text in protocol.differences)))


def places(content: Mapping[str, Any], most: int = 80) -> Markup:
    """Every place of nested plain data with its value."""
    found = described(content)
    more = f'and {len(found) - most} more in the record' if len(found) > most else ''
    return tag('dl', *(part for place, value in found[:most] for part in (tag('dt', place), tag('dd', value))),
               tag('dt', more) if more else '')
