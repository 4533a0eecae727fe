"""What a report shows, as plain data: suites, their rows in groups of one protocol, the figures of every row.

Rows that were measured under different protocols are never ranked together. What was not measured is missing, never zero.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from replk_mm.bench import records
from replk_mm.bench.report.columns import (
    BY_KEY,
    COLUMNS,
    METRIC_TITLES,
    NOT_MEASURED,
    Column,
    Figure,
    compared,
    primary,
    unit,
    value_of,
)
from replk_mm.bench.report.markup import clean
from replk_mm.bench.report.protocol import Protocol, identity, name_protocols
from replk_mm.bench.report.ranking import leaders
from replk_mm.bench.report.state import asked_of, state_of
from replk_mm.errors import UserError

Record = dict[str, Any]

#: Longest label of a row, in characters.
LONGEST_LABEL = 100
#: Exit status of a report some of whose records were passed over.
SKIPPED_STATUS = 3


@dataclass
class Row:
    """A row of the table: seeds of one row of a suite under one protocol.

    Attributes:
        number: Counted through the suite; names the row in plots.
        name: As in the suite.
        label: As shown.
        records: All of it, done or failed.
        figures: By the key of their column.
        state: In words.
        problems: What failed or is left out, and why.
    """

    number: int
    name: str
    label: str
    records: list[Record]
    figures: dict[str, Figure] = field(default_factory=dict)
    state: str = ''
    problems: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something of it failed."""
        return any(record['status'] == 'failed' for record in self.records)

    def of(self, measurement: str) -> list[Record]:
        """Its records of a measurement that is done, by seed."""
        return sorted((r for r in self.records if r['measurement'] == measurement and r['status'] == 'done'),
                      key=lambda r: r['seed'])


@dataclass
class Group:
    """Rows that may be ranked by the metric.

    Attributes:
        protocol: Of the metric; None of rows without one.
        metric: Its name.
        unit: Its unit.
        rows: The best first, those without a metric last.
    """

    protocol: Protocol | None
    metric: str
    unit: str
    rows: list[Row]

    @property
    def title(self) -> str:
        """The metric's name and unit for a reader; '' of rows without one."""
        return METRIC_TITLES.get(self.metric, f'{self.metric}, {self.unit}'.strip(', '))


@dataclass
class Suite:
    """A suite's results.

    Attributes:
        name: As in its file.
        question: What it asks.
        groups: The largest first.
        protocols: Of every measurement, the most frequent first.
    """

    name: str
    question: str
    groups: list[Group]
    protocols: dict[str, list[Protocol]]

    @property
    def rows(self) -> list[Row]:
        """Of all groups."""
        return [row for group in self.groups for row in group.rows]


@dataclass
class Report:
    """Everything that is shown.

    Attributes:
        suites: In the order in which they were found.
        complaints: Records that were passed over, and why.
        folders: The work dir of a record, by ``id``.
        outside: Data sets that lie in no work dir and that pictures on the page are from.
    """

    suites: list[Suite]
    complaints: list[str]
    folders: dict[int, Path]
    outside: set[Path] = field(default_factory=set)


def read(paths: Sequence[str | Path]) -> Report:
    """Read and arrange results.

    Args:
        paths: Work dirs of suites, folders of results, or files.

    Raises:
        UserError: If there are none.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f'{path}: no such results\nName work dirs of suites (work_dirs/suites/NAME), or .jsonl files.')
        if not records.files_in([path]):
            raise UserError(f'{path}: no results in it (*.jsonl, or results/*.jsonl)\n'
                            'Run the suite first: python tools/suite.py SUITE')
    files = records.files_in(paths)
    found, complaints = records.read(files)
    for record in found:
        if record['measurement'] == 'metric' and record['status'] == 'done':
            # Figures of two names or units are not ranked together.
            record['protocol'] = {**record['protocol'], 'metric': f'{primary(record)}, {unit(record)}'.strip(', ')}
    places = {}
    for file in files:
        for record in records.read([file])[0]:
            places[record['key'], record['started'], record['status']] = file.absolute().parent.parent
    folders = {id(r): places.get((r['key'], r['started'], r['status']), Path()) for r in found}
    return Report([_suite(name, part) for name, part in records.by_suite(found).items()], complaints, folders)


def _suite(name: str, found: Sequence[Record]) -> Suite:
    entries = _entries(found)
    metrics = [_first(row, 'metric') for row in entries]
    by_protocol = name_protocols('metric', [record['protocol'] for record in metrics if record])
    protocols = {'metric': list(by_protocol.values())}
    groups = []
    for key, protocol in by_protocol.items():
        members = [(row, r) for row, r in zip(entries, metrics, strict=True) if r and identity(r['protocol']) == key]
        record = members[0][1]
        groups.append(Group(protocol, primary(record), unit(record), [row for row, _ in members]))
    without = [row for row, record in zip(entries, metrics, strict=True) if not record]
    if without:
        groups.append(Group(None, '', '', without))
    for measurement in dict.fromkeys(column.measurement for column in COLUMNS if column.measurement != 'metric'):
        of_rows = [r['protocol'] for row in entries for r in row.of(measurement)] if measurement else []
        names = name_protocols(measurement, of_rows)
        protocols.update({measurement: list(names.values())} if names else {})
        for row in entries:
            row.figures.update({c.key: _figure(c, row, names) for c in COLUMNS if c.measurement == measurement})
    for group in groups:
        _fill(group, by_protocol)
    for number, row in enumerate((row for group in groups for row in group.rows), 1):
        row.number = number
    return Suite(name, found[-1]['question'], groups, protocols)


def _entries(found: Sequence[Record]) -> list[Row]:
    """Rows; one whose seeds have several protocols of the metric is there once for each."""
    by_row: dict[str, list[Record]] = {}
    for record in found:
        by_row.setdefault(record['row'], []).append(record)
    entries = []
    for name, of_row in by_row.items():
        done = [r for r in of_row if r['measurement'] == 'metric' and r['status'] == 'done']
        protocol_of = {r['seed']: identity(r['protocol']) for r in done}
        kinds = list(dict.fromkeys(protocol_of.values())) or ['']
        for kind in kinds:  # a seed without a metric goes with the first
            mine = [r for r in of_row if protocol_of.get(r['seed'], kinds[0]) == kind]
            entries.append(Row(0, name, clean(mine[-1]['label'] or name, LONGEST_LABEL), mine))
    return entries


def _first(row: Row, measurement: str) -> Record | None:
    return next(iter(row.of(measurement)), None)


def _fill(group: Group, by_protocol: Mapping[str, Protocol]) -> None:
    """Metrics, differences, states, order and marks of a group's rows."""
    for row in group.rows:
        row.figures['metric'] = _figure(BY_KEY['metric'], row, by_protocol)
        metric = _first(row, 'metric') or row.records[0]
        row.figures['published'], row.figures['difference'] = compared(metric, row.figures['metric'])
        row.state, more = state_of(row.records)
        row.problems += more
    group.rows.sort(key=lambda row: _order(row.figures['metric'].value))
    for column in COLUMNS:
        for i in leaders(column, [row.figures[column.key] for row in group.rows]):
            group.rows[i].figures[column.key] = replace(group.rows[i].figures[column.key], best=True)


def _order(value: float | None) -> tuple[bool, float]:
    return value is None, -(value or 0.)


def _figure(column: Column, row: Row, protocols: Mapping[str, Protocol]) -> Figure:
    """The mean over the seeds that were measured alike; the others are said."""
    kinds: dict[str, list[tuple[Record, tuple]]] = {}
    for record in row.of(column.measurement):
        found = value_of(column, record)
        if found[0] is not None:
            kinds.setdefault(identity(record['protocol']), []).append((record, found))
    if not kinds:
        return Figure(why=_absence(column, row))
    key = max(kinds, key=lambda k: len(kinds[k]))
    values = [found for _, found in kinds[key]]
    seeds = records.spread([value for value, _, _ in values])
    low, high = values[0][1:] if len(values) == 1 else (None, None)
    if seeds.deviation is not None:
        low, high = seeds.mean - seeds.deviation, seeds.mean + seeds.deviation
    why = [f'seed {r["seed"]} was measured under protocol {protocols[identity(r["protocol"])].name} and is left out'
           for kind, part in kinds.items() if kind != key for r, _ in part]
    return Figure(seeds.mean, seeds.deviation, seeds.count, '; '.join(why), protocols[key].name, low, high)


def _absence(column: Column, row: Row) -> str:
    of_it = [r for r in row.records if r['measurement'] == column.measurement]
    reasons = [r['reason'] for r in of_it if r['status'] == 'failed']
    trainings = [r['reason'] for r in row.records if r['measurement'] == 'train' and r['status'] == 'failed']
    if reasons:
        return f'failed: {reasons[0]}'
    if of_it:
        return 'the record holds no such figure'
    if trainings:
        return f'training failed: {trainings[0]}'
    return 'not recorded yet' if column.measurement in asked_of(row.records) else NOT_MEASURED
