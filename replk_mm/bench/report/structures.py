"""The content of a report: suites, their rows in groups of one protocol, and the figures of every row."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from replk_mm import published
from replk_mm.analysis.statistics import BestGroup
from replk_mm.analysis.timing import MAX_LOAD, MAX_SPREAD
from replk_mm.bench import records
from replk_mm.bench.report.tables import (
    BY_KEY,
    COLUMNS,
    METRIC_TITLES,
    NOT_MEASURED,
    Column,
    Figure,
    Protocol,
    format_value,
    number,
    primary_metric,
    protocol_key,
)
from replk_mm.evaluation.per_image import PerImageScores
from replk_mm.text import clean

Record = records.StoredRecord
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
    def quotes(self) -> list[published.Quote]:
        """The published tables that the suite names."""
        names = dict.fromkeys(name for row in self.rows for record in row.records for name in record.get('quotes', ()))
        return [published.quote(name) for name in names if name in published.table('quotes')]

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
