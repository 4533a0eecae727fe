"""A report as Markdown: its tables, what differs between protocols, and what is missing; plots and pictures are the page's."""
import re

from replk_mm.bench.report.assemble import Report, Row, Suite
from replk_mm.bench.report.columns import COLUMNS, NOT_MEASURED, Column, Figure
from replk_mm.bench.report.details import commit
from replk_mm.bench.report.markup import clean
from replk_mm.bench.report.table import Notes, about_columns, differing, group_title, heading, shown

# What Markdown or the HTML within it would take for its own.
_SPECIAL = re.compile(r'([\\`*_{}\[\]<>#|~&])')


def plain(text: object) -> str:
    """A text that Markdown shows as it is, in one line."""
    return _SPECIAL.sub(r'\\\1', ' '.join(clean(text).split()))


def page(report: Report) -> str:
    """The text of the file."""
    parts = ['# Report\n']
    if report.complaints:
        parts += [f'**{len(report.complaints)} passed over; not in the figures below:**\n',
                  '\n'.join(f'- {plain(text)}' for text in report.complaints) + '\n']
    parts += [f'## {plain(suite.name)}\n\n{plain(suite.question)}\n\n{tables(suite)}' for suite in report.suites]
    if not report.suites:
        parts.append('There are no records.\n')
    return '\n'.join(parts)


def tables(suite: Suite) -> str:
    """The tables of a suite, with what they rest on."""
    notes, parts = Notes(''), list[str]()
    for group in suite.groups:
        parts.append(f'**{plain(group_title(group))}**\n')
        if group.protocol and group.protocol.differences:
            first = suite.groups[0].protocol
            assert first is not None
            parts.append('\n'.join([f'Differs from {first.name}, and is not ranked with it:', '',
                                    *(f'- {plain(text)}' for text in group.protocol.differences)]) + '\n')
        titles = ['Row', *(plain(f'{heading(suite, c)}{f", {c.unit}" if c.unit else ""}') for c in COLUMNS), 'State']
        lines = [titles, ['---', *['---:'] * len(COLUMNS), '---'], *(_cells(suite, row, notes) for row in group.rows)]
        parts.append('\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n')
    parts.append('– is missing; without a number beside it nobody asked for it.\n')
    if notes.texts:
        parts.append('\n'.join(f'{i}. {plain(text)}' for i, text in enumerate(notes.texts, 1)) + '\n')
    parts.append('\n'.join(f'- {plain(text)}' for text in (*differing(suite), *about_columns())) + '\n')
    origins = '\n'.join(f'- {row.number} {plain(row.label)}: {_origin(row)}' for row in suite.rows)
    return '\n'.join([*parts, 'Where the figures are from:\n', f'{origins}\n'])


def _cells(suite: Suite, row: Row, notes: Notes) -> list[str]:
    state = row.state + (f': {"; ".join(row.problems)}' if row.problems else '')
    return [f'{row.number} {plain(row.label)}', *(_cell(suite, c, row.figures[c.key], notes) for c in COLUMNS), plain(state)]


def _cell(suite: Suite, column: Column, figure: Figure, notes: Notes) -> str:
    mark = '' if not figure.why or figure.why == NOT_MEASURED or (figure.value is not None and column.key == 'published') \
        else f' ({notes.number(figure.why)})'
    if figure.value is None:
        return f'–{mark}'
    text = shown(column, figure)
    if column.key == 'metric':
        text += f' (n = {figure.count})'
    if len(suite.protocols.get(column.measurement, ())) > 1 and column.measurement != 'metric':
        text += f' {figure.protocol}'
    return f'**{text}**{mark}' if figure.best else f'{text}{mark}'


def _origin(row: Row) -> str:
    """Config, checkpoints, code and dates of a row, in a line."""
    last = row.records[-1]
    hashes = dict.fromkeys(str((r['checkpoint'] or {}).get('sha256') or '')[:12] for r in row.records)
    dates = sorted(r['started'] for r in row.records)
    machine = ', '.join(str(last['environment'][key]) for key in ('cpu', 'gpu', 'torch') if last['environment'].get(key))
    return plain(f'config {last["config"].get("path")} ({str(last["config"].get("sha256"))[:12]}); checkpoints '
                 f'{", ".join(filter(None, hashes)) or "none"}; commit {commit(last)}; {machine}; {dates[0]} to {dates[-1]}')
