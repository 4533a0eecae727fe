"""Load the data of a report: suites, their rows in groups of one protocol, and the figures of every row.

Rows that were measured under different protocols are never ranked together. What was not measured is missing, never
zero.
"""

import hashlib
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from replk_mm.analysis.statistics import BestGroup, best_group
from replk_mm.analysis.timing import MAX_LOAD, MAX_SPREAD
from replk_mm.bench import records, submission
from replk_mm.bench.costs import Costs, replace_costs
from replk_mm.bench.report.tables import (
    BY_KEY,
    COLUMNS,
    METRIC_TITLES,
    NOT_MEASURED,
    Column,
    Figure,
    Protocol,
    compare_with_published,
    format_value,
    name_protocols,
    number,
    primary_metric,
    protocol_key,
    timing_problem,
    value_of,
)
from replk_mm.bench.schema import MEASUREMENTS
from replk_mm.errors import UserError, command_line, format_list
from replk_mm.evaluation.per_image import PerImageScores
from replk_mm.text import clean, text_table

Record = records.StoredRecord

#: Names of the metrics of detection for ``load_report``.
METRICS = {'AP': 'coco/bbox_mAP', **{f'AP_{size}': f'coco/bbox_mAP_{size[0]}' for size in ('small', 'medium', 'large')}}
#: Longest label of a row, in characters.
LONGEST_LABEL = 100
#: Rows of a protocol that are compared, the first, as each pair of them is a comparison; and protocols of a suite.
MOST_COMPARED, MOST_GROUPS = 40, 24
#: Exit status of a report that skips some records.
SKIPPED_STATUS = 3
GROUP = (
    'A metric is the mean over seeds with its 95 % confidence interval. "Best group" marks the rows of a protocol that '
    'are not distinguishable from its best (Holm-adjusted p above 0.05), where others are. The method: '
    'docs/statistics.md.'
)
FRONT = (
    '"Front" marks the Pareto front of the metric against a cost: no row of the protocol has as high a metric for '
    'less. It compares the figures as they are, without their intervals.'
)
UNRELIABLE = (
    f'A time with "?" is not reliable and not ranked: other processes used more than {MAX_LOAD:.0%} of the CPUs, or '
    f'its quartiles, or mean plus and minus one standard deviation, are more than {MAX_SPREAD:.0%} apart.'
)
SEVERAL_SEEDS = 'With several seeds, figures without an interval are the mean ± the standard deviation of the sample.'


@dataclass
class ReportRow:
    """A row of the table: seeds of one row of a suite under one protocol.

    Attributes:
        name: Name in the suite.
        label: Label in the report.
        records: All its records, done or failed.
        number: Number within the suite, which names the row in plots.
        figures: By the key of their column.
        state: Text such as ``'done, 3 seeds'``.
        problems: Failures and missing records, with the reason.
        source: Its folders, and the seeds of each; '' if the report has one folder.
    """

    name: str
    label: str
    records: list[Record]
    number: int = 0
    figures: dict[str, Figure] = field(default_factory=dict)
    state: str = ''
    problems: list[str] = field(default_factory=list)
    source: str = ''

    @property
    def failed(self) -> bool:
        """Whether something of it failed."""
        return any(record['status'] == 'failed' for record in self.records)

    @property
    def schedule(self) -> str:
        """Length of its training: ``'120 iterations, 20 % of the schedule'``; ``''`` if unknown."""
        for record in self.of('train'):
            iterations, notes = number(record['values'], 'iterations'), record['facts'].get('notes')
            whole = re.search(r'schedule: \d+ iterations instead of (\d+) iterations', format_value(notes))
            if iterations:
                share = f', {100 * iterations / float(whole[1]):.0f} % of the schedule' if whole else ''
                return f'{iterations:,.0f} iterations{share}'
        return ''

    def of(self, measurement: str) -> list[Record]:
        """Its records of a measurement that is done, by seed."""
        return sorted(
            (r for r in self.records if r['measurement'] == measurement and r['status'] == 'done'),
            key=lambda r: r['seed'],
        )


@dataclass
class ProtocolGroup:
    """Rows that may be ranked by the metric.

    Attributes:
        protocol: Of the metric; None of rows without one.
        metric: Its name.
        unit: Its unit.
        rows: The best first, those without a metric last.
        comparison: Of the metrics of its rows, by their names; None if fewer than two have counts per image.
        remarks: What the intervals do not cover, and which rows have none.
        scores: Per image, of each seed, by the names of the rows that have them.
    """

    protocol: Protocol | None
    metric: str
    unit: str
    rows: list[ReportRow]
    comparison: BestGroup | None = None
    remarks: list[str] = field(default_factory=list)
    scores: dict[str, list[PerImageScores]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The metric's name and unit for a reader; '' of rows without one."""
        return METRIC_TITLES.get(self.metric, f'{self.metric}, {self.unit}'.strip(', '))

    @property
    def name(self) -> str:
        """The protocol's name; '' of rows without a metric."""
        return self.protocol.name if self.protocol else ''

    @property
    def heading(self) -> str:
        """The group's heading in the table."""
        if self.protocol is None:
            return 'Rows without a metric: not ranked'
        return f'Protocol {self.name} ({self.title}): {self.protocol.summary}'

    @property
    def conditions(self) -> str:
        """How its rows were trained, such as ``'linear probe, 120 iterations, no pretraining'``."""
        content = self.protocol.content if self.protocol else {}
        share, pretraining = content.get('fraction', 100), content.get('pretraining')
        parts = [
            dict(linear='linear probe', head='fixed backbone').get(str(content.get('protocol')), ''),
            f'{share} % of the training images' if share != 100 else '',
            next((row.schedule for row in self.rows if row.schedule), ''),
            'no pretraining' if pretraining in (None, 'none') else f'pretraining {pretraining}',
        ]
        return clean(', '.join(filter(None, parts)), 200)

    @property
    def recipe(self) -> str:
        """The recipe of its rows; ``''`` if it is not stated."""
        found = self.protocol.content.get('recipe') if self.protocol else None
        if isinstance(found, Mapping):
            found = f'{found.get("origin")} recipe, learning rate {found.get("lr")}'
        return clean(found or '', 80)

    @property
    def differences(self) -> list[tuple[ReportRow, str, str, str]]:
        """Rows with what they lack to the leader: points, their interval, and the adjusted p-value."""
        rows, metric = {row.name: row for row in self.rows}, BY_KEY['metric']
        return [
            (
                rows[d.second],
                metric.text(d.value),
                '–' if d.low is None or d.high is None else f'[{metric.text(d.low)}, {metric.text(d.high)}]',
                '–' if d.p_adjusted is None else f'{d.p_adjusted:.3f}' if d.p_adjusted >= 0.001 else '< 0.001',
            )
            for d in (self.comparison.differences if self.comparison else ())
        ]


@dataclass
class SuiteReport:
    """A suite's results.

    Attributes:
        name: Name in the suite file.
        question: What it asks.
        groups: The largest first.
        protocols: Of every measurement, the most frequent first.
    """

    name: str
    question: str
    groups: list[ProtocolGroup]
    protocols: dict[str, list[Protocol]]

    @property
    def rows(self) -> list[ReportRow]:
        """Of all groups."""
        return [row for group in self.groups for row in group.rows]

    @property
    def columns(self) -> list[Column]:
        """The columns that have figures, or reasons why a requested measurement has none."""
        found = {c: [row.figures[c.key] for row in self.rows] for c in COLUMNS}
        filled = {c.key: c.measurement for c, of in found.items() if any(f.value is not None for f in of)}
        if 'difference' not in filled:
            filled.pop('published', None)
        return [
            c
            for c, figures in found.items()
            if c.key in filled
            or c.measurement not in ('', *filled.values())
            and any(f.why not in ('', NOT_MEASURED) for f in figures)
        ]

    @property
    def notes(self) -> list[str]:
        """Remarks on the columns and the marks."""
        columns = self.columns
        ranked = [FRONT] * any(c.cost for c in columns)
        timed = [UNRELIABLE] * any(c.measurement == 'speed' for c in columns)
        return [GROUP, *ranked, *timed, *(c.note for c in columns if c.note), SEVERAL_SEEDS]

    @property
    def differing(self) -> list[str]:
        """Differences between the protocols of each measurement, except those of the metric, which the groups state."""
        return [
            f'{p.name} ({measurement.replace("_", " ")}) differs from {protocols[0].name} and is not ranked '
            f'with it: {clean("; ".join(p.differences))}'
            for measurement, protocols in self.protocols.items()
            if measurement != 'metric'
            for p in protocols[1:]
        ]

    def heading(self, column: Column) -> str:
        """The title of a column; the metric's is its name if all rows have the same."""
        names = {group.title for group in self.groups if group.title}
        return names.pop() if column.key == 'metric' and len(names) == 1 else column.title

    def shows_protocol(self, column: Column) -> bool:
        """Whether the figures of a column carry the names of their protocols."""
        return column.measurement != 'metric' and len(self.protocols.get(column.measurement, ())) > 1

    def protocol_name(self, record: Record) -> str:
        """Of a record; '' if it has none."""
        return self._protocol_names.get((record['measurement'], protocol_key(protocol_of(record))), '')

    @cached_property
    def _protocol_names(self) -> dict[tuple[str, str], str]:
        return {(name, protocol_key(p.content)): p.name for name, found in self.protocols.items() for p in found}


@dataclass
class Report:
    """The content of a report.

    Attributes:
        suites: In the order in which they were found.
        complaints: Skipped records, with the reason.
        outside: Data sets outside of the work dirs, of which the page shows no images; filled by ``render_html``.
    """

    suites: list[SuiteReport]
    complaints: list[str]
    outside: set[Path] = field(default_factory=set)

    def data_roots(self) -> list[str]:
        """Data sets of its records that are outside of their work dirs."""
        stated = (r['facts'].get('data') for suite in self.suites for row in suite.rows for r in row.of('metric'))
        return sorted({d['root'] for d in stated if isinstance(d, Mapping) and str(d.get('root')).startswith('/')})


def protocol_of(record: Record) -> Mapping[str, Any]:
    """A record's protocol, with the metric's name and unit; of the time of a training, the machine."""
    if record['measurement'] == 'metric' and record['status'] == 'done':
        return {**record['protocol'], 'metric': ', '.join(filter(None, primary_metric(record)))}
    if record['measurement'] == 'train':
        return {key: record['environment'].get(key) for key in ('cpu', 'gpu', 'threads')}
    return record['protocol']


def load_report(paths: Sequence[str | Path], costs: Costs | None = None, metric: str | None = None) -> Report:
    """Read and arrange results.

    Args:
        paths: Work dirs of suites, folders of results, or files.
        costs: On another device, which replace speed and memory of the rows with these networks.
        metric: That ranks rows: a class, for its IoU or AP, or one of :data:`METRICS`. Defaults to the recorded one.

    Raises:
        UserError: If there are none.
    """
    found, complaints = read_results(paths)
    found, unused = replace_costs(found, costs or {})
    found = [rank_by(record, metric) if metric else record for record in found]
    by_suite: dict[str, list[Record]] = {}
    for record in found:
        by_suite.setdefault(record['suite'], []).append(record)
    suites = [_suite(name, part) for name, part in by_suite.items()]
    if len({record.folder for record in found}) > 1:
        for row in (row for suite in suites for row in suite.rows):
            row.source = _source(row.records)
    return Report(suites, complaints + unused)


def rank_by(record: Record, metric: str) -> Record:
    """A record of the metric with another one in the first place; see :func:`load_report`. Others are unchanged."""
    values, name = record['values'], METRICS.get(metric, metric)
    if record['measurement'] != 'metric' or record['status'] != 'done' or values.get('primary') == name:
        return record
    of_class = values['per_class'].get(metric, {})
    value = of_class.get('IoU', of_class.get('bbox_mAP')) if of_class else values['metrics'].get(name)
    counts = (record['facts'].get('statistics') or {}).get(values['primary']) if of_class else None
    stated = {metric: {**counts, 'only': metric}} if counts else {}
    new = {**values, 'primary': metric, 'metrics': {**values['metrics'], metric: value}}
    return Record({**record, 'values': new, 'facts': {**record['facts'], 'statistics': stated}}, record.folder)


def read_results(paths: Sequence[str | Path]) -> tuple[list[Record], list[str]]:
    """The records that count and the skipped ones, see :func:`replk_mm.bench.records.read_records`.

    Raises:
        UserError: If there are none.
    """
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(
                f'{path}: no such results\nName work dirs of suites (work_dirs/suites/NAME), or .jsonl files.'
            )
        if not records.record_files([path]):
            raise UserError(
                f'{path}: no results in it (*.jsonl, or results/*.jsonl)\n'
                f'Run the suite first: {command_line("suite", "SUITE")}'
            )
    files = records.record_files(paths)
    found, complaints = records.read_records(files)
    if not found:
        raise UserError(
            f'{format_list(paths)}: no record in {len(files)} file{"s" * (len(files) != 1)}'
            + (f'; {len(complaints):,} lines skipped, the first: {complaints[0]}' if complaints else '')
            + f'\nName files that a suite has written: {command_line("suite", "SUITE")}'
        )
    return found, complaints


def _source(found: Sequence[Record]) -> str:
    """The folder of a row's records; the seeds of each if there are several."""
    seeds: dict[str, set[int]] = {}
    for record in found:
        archive = unquote(record.folder.name) if record.folder.suffix == submission.SUFFIX else None
        seeds.setdefault(archive or os.path.relpath(record.folder), set()).add(record['seed'])
    return '; '.join(f'seed{"s" * (len(s) > 1)} {format_list(sorted(s))} from {folder}' for folder, s in seeds.items())


def _suite(name: str, found: Sequence[Record]) -> SuiteReport:
    entries = _rows(found)
    metrics = [next(iter(row.of('metric')), None) for row in entries]
    names = name_protocols('metric', [protocol_of(record) for record in metrics if record])
    protocols = {'metric': names}
    for measurement in dict.fromkeys(c.measurement for c in COLUMNS if c.measurement not in ('', 'metric')):
        of_rows = name_protocols(measurement, [protocol_of(r) for row in entries for r in row.of(measurement)])
        if of_rows:
            protocols[measurement] = of_rows
    groups = [ProtocolGroup(protocol, '', '', []) for protocol in [*names.values(), None]]
    by_identity = dict(zip([*names, None], groups, strict=True))
    for row, record in zip(entries, metrics, strict=True):
        group = by_identity[protocol_key(protocol_of(record)) if record else None]
        group.metric, group.unit = primary_metric(record) if record else ('', '')
        group.rows.append(row)
        row.state, row.problems = _state(row.records)
        row.figures = {c.key: _figure(c, row, protocols.get(c.measurement, {})) for c in COLUMNS}
        row.figures['published'], row.figures['difference'] = compare_with_published(
            record or row.records[0], row.figures['metric']
        )
    groups = [group for group in groups if group.rows]
    for group in groups:
        group.rows.sort(key=lambda row: (row.figures['metric'].value is None, -(row.figures['metric'].value or 0.0)))
        for column in COLUMNS:
            for row in pareto_front(column, group.rows) if column.cost else ():
                row.figures[column.key] = replace(row.figures[column.key], mark='front')
    for group in groups[:MOST_GROUPS]:
        _compare(group)
    suite = SuiteReport(
        name, found[-1]['question'], groups, {key: list(part.values()) for key, part in protocols.items()}
    )
    for i, row in enumerate(suite.rows, 1):
        row.number = i
    return suite


def _rows(found: Iterable[Record]) -> list[ReportRow]:
    """Rows; one whose seeds have several protocols of the metric is there once for each."""
    by_row: dict[str, list[Record]] = {}
    for record in found:
        by_row.setdefault(record['row'], []).append(record)
    entries = []
    for name, of_row in by_row.items():
        done = [r for r in of_row if r['measurement'] == 'metric' and r['status'] == 'done']
        protocol_by_seed = {r['seed']: protocol_key(protocol_of(r)) for r in done}
        kinds = list(dict.fromkeys(protocol_by_seed.values())) or ['']
        for kind in kinds:  # a seed without a metric goes with the first
            mine = [r for r in of_row if protocol_by_seed.get(r['seed'], kinds[0]) == kind]
            entries.append(ReportRow(name, clean(mine[-1]['label'] or name, LONGEST_LABEL), mine))
    return entries


def _figure(column: Column, row: ReportRow, protocols: Mapping[str, Protocol]) -> Figure:
    """The mean over the seeds that were measured under the most frequent protocol; the others are named."""
    kinds: dict[str, list[tuple[Record, float]]] = {}
    for record in row.of(column.measurement):
        found = value_of(column, record)
        if found is not None:
            kinds.setdefault(protocol_key(protocol_of(record)), []).append((record, found))
    if not kinds:
        return Figure(why=_absence(column, row))
    key = max(kinds, key=lambda k: len(kinds[k]))
    numbers = [value for _, value in kinds[key]]
    mean, deviation = statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
    why = [
        f'seed {r["seed"]} was measured under protocol {protocols[kind].name} and is left out'
        for kind, part in kinds.items()
        if kind != key
        for r, _ in part
    ]
    problems = [
        f'seed {record["seed"]}: {problem}' for record, _ in kinds[key] if (problem := timing_problem(column, record))
    ]
    if column.measurement == 'speed' and deviation and 2 * deviation > MAX_SPREAD * mean:
        problems.append(f'the seeds have a standard deviation of {deviation / mean:.0%}')
    unreliable = f'not ranked: {"; ".join(problems)}' if problems else ''
    why += [unreliable] if unreliable else []
    return Figure(mean, deviation, len(numbers), '; '.join(why), protocols[key].name, unreliable=unreliable)


def _absence(column: Column, row: ReportRow) -> str:
    failed = {r['measurement']: r['reason'] for r in reversed(row.records) if r['status'] == 'failed'}
    if column.measurement in failed:
        return f'failed: {failed[column.measurement]}'
    if any(r['measurement'] == column.measurement for r in row.records):
        return 'the record holds no such figure'
    if 'train' in failed:
        return f'training failed: {failed["train"]}'
    return 'not recorded yet' if column.measurement in _requested(row.records) else NOT_MEASURED


def pareto_front(column: Column, rows: Sequence[ReportRow]) -> list[ReportRow]:
    """The rows of each protocol of a cost that no other row beats in metric and cost; none of a single row."""
    by_protocol: dict[str, list[tuple[float, float, ReportRow]]] = {}
    for row in rows:
        metric, cost = row.figures['metric'].value, row.figures[column.key]
        if metric is not None and cost.value is not None and not cost.unreliable:
            by_protocol.setdefault(cost.protocol, []).append((-metric, cost.value, row))
    return [
        row
        for members in by_protocol.values()
        for loss, cost, row in members
        if len(members) > 1 and not any(x <= loss and y <= cost and (x, y) != (loss, cost) for x, y, _ in members)
    ]


def _compare(group: ProtocolGroup) -> None:
    """Set the intervals, the best group and the differences of the metric of a group's first rows."""
    measured = [row for row in group.rows if row.figures['metric'].value is not None]
    scores = group.scores
    absent: dict[str, list[str]] = {}
    for row in measured[:MOST_COMPARED]:
        try:
            of_row = [read_scores(record) for record in row.of('metric')]
            first = next(iter(scores.values()), of_row)[0]
            if any(sorted(one.images) != sorted(first.images) for one in of_row):
                raise ValueError('tested on other images than the rows above')
            scores[row.name] = of_row
        except (OSError, ValueError) as error:
            absent.setdefault(getattr(error, 'strerror', None) or str(error), []).append(row.label)
    group.remarks = [f'No interval for {format_list(labels, 5)}: {reason}.' for reason, labels in absent.items()]
    if len(measured) > MOST_COMPARED:
        group.remarks.append(f'Only the first {MOST_COMPARED} of {len(measured):,} rows have intervals.')
    if not scores:
        return
    compared = best_group(scores)
    distinguished = len(compared.members) < len(scores)
    for row in (row for row in measured if row.name in scores):
        found = compared.intervals[row.name]
        row.figures['metric'] = replace(
            row.figures['metric'],
            low=found.low,
            high=found.high,
            mark='best group' if distinguished and row.name in compared.members else '',
            images_only=not found.covers_seeds,
        )
    if len(scores) > 1:
        group.comparison = compared
    if not all(found.covers_seeds for found in compared.intervals.values()):
        group.remarks.append(
            'One seed per row: intervals and p-values are about these checkpoints on other test images, not about '
            'other trainings, so that no row is called better.'
        )
    elif group.comparison:
        members = [row.label for row in measured if row.name in compared.members]
        which = f'Not distinguishable from the best: {format_list(members, len(members))}.'
        others = 'here' if len(scores) == len(measured) else 'with an interval'
        group.remarks.insert(0, which if len(members) > 1 else f'{members[0]} is better than every other row {others}.')


def read_scores(record: Record) -> PerImageScores:
    """The counts per image of a record of the metric.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the record has none, or they are not what was recorded.
    """
    name, stated = primary_metric(record)[0], record['facts'].get('statistics')
    path, of_metric = record['files'].get('statistics'), stated.get(name) if isinstance(stated, Mapping) else None
    if not isinstance(path, str) or not isinstance(of_metric, Mapping):
        raise ValueError('recorded without counts per image; run its metric again')
    content = records.read_inside(record.folder / path, record.folder / 'runs')
    if hashlib.sha256(content).hexdigest() != of_metric.get('sha256'):
        raise ValueError(f'{path} is not the file that was recorded')
    try:
        found = PerImageScores.load(content)
        found = found.only(str(of_metric['only'])) if 'only' in of_metric else found
    except UserError as error:
        raise ValueError(f'{path} is damaged') from error
    if not abs(found.score()[0] - (value_of(BY_KEY['metric'], record) or 0.0)) < 1e-6:
        raise ValueError(f'{path} has another {name} than the record')
    return found


def _state(found: Sequence[Record]) -> tuple[str, list[str]]:
    """The state of a row, and by seed: failures, missing records, and records of different weights."""
    seeds = sorted({record['seed'] for record in found})
    failures = [record for record in found if record['status'] == 'failed']
    problems = [f'seed {record["seed"]}: {record["measurement"]} failed: {record["reason"]}' for record in failures]
    asked, bad, lacking = _requested(found), {record['seed'] for record in failures}, 0
    for seed in seeds:
        have = {record['measurement'] for record in found if record['seed'] == seed}
        missing = [name for name in MEASUREMENTS if name in asked and name not in have]
        if missing and seed not in bad:
            problems.append(f'seed {seed}: not recorded yet: {", ".join(missing)}')
            lacking += 1
    for seed in seeds:
        weights: dict[str, list[str]] = {}
        for record in found:
            digest = (record['checkpoint'] or {}).get('sha256')
            if record['seed'] == seed and record['status'] == 'done' and digest:
                weights.setdefault(str(digest)[:12], []).append(record['measurement'])
        if len(weights) > 1:
            parts = '; '.join(f'{", ".join(names)} of {digest}' for digest, names in weights.items())
            problems.append(f'seed {seed}: measured of different weights: {parts}')
    counted = f'{len(seeds)} seed{"s" * (len(seeds) != 1)}'
    if bad:
        return f'failed, {len(bad)} of {counted}', problems
    return f'unfinished, {lacking} of {counted}' if lacking else f'done, {counted}', problems


def _requested(found: Sequence[Record]) -> list[Any]:
    """The measurements that the suite requests of a row, by its latest record."""
    # Early records do not state them: then all seeds should have the measurements that one seed has.
    latest = max(found, key=lambda record: record['started'])
    return latest.get('asked') or [record['measurement'] for record in found]


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
