"""Where the figures of a row are from, as HTML: config, checkpoint, code, versions, hardware, protocol and date of each."""
from collections.abc import Mapping
from typing import Any

from replk_mm.bench.report.assemble import Record, Row, Suite
from replk_mm.bench.report.columns import number
from replk_mm.bench.report.markup import Markup, tag
from replk_mm.bench.report.protocol import identity, in_words
from replk_mm.bench.report.table import places

#: Of a record's values, what is shown elsewhere or too long.
_ELSEWHERE = ('per_class', 'loss', 'metric', 'parts')
_HASH = 12


def details(suite: Suite, row: Row, prefix: str) -> Markup:
    """Everything about a row, closed at first."""
    stated = next((r['published'] for r in reversed(row.records) if r['published']), None)
    parts = [
        tag('ul', *(tag('li', problem) for problem in row.problems), class_='failed' if row.failed else None)
        if row.problems else '',
        _section('Measurements', _records(suite, row)),
        *(_section('Config', places({key: value for key, value in config.items() if value}))
          for config in _distinct(r['config'] for r in row.records)),
        _section('Published, quoted', places(stated)) if stated else '',
        *(_section('Versions and hardware', places(environment))
          for environment in _distinct(r['environment'] for r in row.records)),
        *(_values(record) for record in row.records if record['status'] == 'done'),
    ]
    return tag('details', tag('summary', f'{row.number} {row.label}', tag('small', f' {row.name}: {row.state}')), *parts,
               id=f'{prefix}-row-{row.number}', class_='row')


def _section(title: str, content: Markup) -> Markup:
    return tag('div', tag('h4', title), content)


def _distinct(found: Any) -> list[Mapping[str, Any]]:
    return list({identity(one): one for one in found}.values())


def _records(suite: Suite, row: Row) -> Markup:
    names = {(measurement, identity(p.content)): p.name for measurement, protocols in suite.protocols.items()
             for p in protocols}
    titles = ('Measurement', 'Seed', 'Status', 'Protocol', 'Date (UTC)', 'Seconds', 'Config', 'Checkpoint', 'Commit')
    lines = [tag('tr', *(tag('td', text) for text in _line(r, names.get((r['measurement'], identity(r['protocol'])), ''))))
             for r in sorted(row.records, key=lambda r: (r['seed'], r['started']))]
    return tag('div', tag('table', tag('thead', tag('tr', *(tag('th', title, scope='col') for title in titles))),
                          tag('tbody', *lines)), class_='scroll', role='region', tabindex='0',
               aria_label=f'Measurements of {row.label}')


def _line(record: Record, protocol: str) -> tuple[object, ...]:
    seconds = number(record, 'seconds')
    return (record['measurement'].replace('_', ' '), record['seed'],
            record['status'] + (f': {record["reason"]}' if record['reason'] else ''), protocol,
            record['started'][:19].replace('T', ' '), '–' if seconds is None else f'{seconds:.1f}',
            str(record['config'].get('sha256') or 'not stated')[:_HASH], _checkpoint(record['checkpoint']), commit(record))


def _checkpoint(found: Mapping[str, Any] | None) -> str:
    if not found:
        return 'none'
    iteration = found.get('iteration')
    parts = [str(found.get('sha256') or 'hash not stated')[:_HASH], f'iteration {iteration}' if iteration is not None else '',
             '' if found.get('trained', True) else 'random weights']
    return ', '.join(filter(None, parts))


def commit(record: Record) -> str:
    """The code that measured, in words."""
    git = record['git']
    if not git:
        return 'not in a git checkout'
    return in_words(git.get('commit'))[:_HASH] + (', with changes' if git.get('dirty') else '')


def _values(record: Record) -> Markup:
    kept = {key: value for key, value in record['values'].items() if key not in _ELSEWHERE}
    if not kept and not record['facts']:
        return Markup()
    title = f'{record["measurement"].replace("_", " ").capitalize()}, seed {record["seed"]}'
    facts = {key: value for key, value in record['facts'].items() if key != 'data'}
    # That of others stands below the table, under its name.
    protocol = {'protocol': record['protocol']} if record['measurement'] in ('curve', 'train') else {}
    return tag('details', tag('summary', title), places({**kept, **facts, **protocol}), class_='values')
