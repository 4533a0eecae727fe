"""Load the data of a report: suites, their rows in groups of one protocol, and the figures of every row.

Rows that were measured under different protocols are never ranked together. What was not measured is missing, never
zero.
"""

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from replk_mm.analysis.timing import MAX_SPREAD
from replk_mm.bench import records, submission
from replk_mm.bench.costs import Costs, replace_costs
from replk_mm.bench.report.comparison import compare, pareto_front
from replk_mm.bench.report.structures import ProtocolGroup, Record, Report, ReportRow, SuiteReport, protocol_of
from replk_mm.bench.report.tables import (
    COLUMNS,
    NOT_MEASURED,
    Column,
    Figure,
    Protocol,
    compare_with_published,
    name_protocols,
    primary_metric,
    protocol_key,
    timing_problem,
    value_of,
)
from replk_mm.bench.schema import MEASUREMENTS
from replk_mm.errors import UserError, command_line, format_list
from replk_mm.text import clean

#: Names of the metrics of detection for ``load_report``.
METRICS = {'AP': 'coco/bbox_mAP', **{f'AP_{size}': f'coco/bbox_mAP_{size[0]}' for size in ('small', 'medium', 'large')}}
#: Longest label of a row, in characters.
LONGEST_LABEL = 100
#: Protocols of a suite whose rows are compared.
MOST_GROUPS = 24
#: Exit status of a report that skips some records.
SKIPPED_STATUS = 3


def load_report(paths: Sequence[str | Path], costs: Costs | None = None, metric: str | None = None) -> Report:
    """Read and arrange results.

    Args:
        paths: Work dirs of suites, folders of results, or files.
        costs: On another device, which replace speed and memory of the rows with these networks.
        metric: That ranks rows: a class, for its IoU or AP, or one of :data:`METRICS`. Defaults to the recorded one.

    Raises:
        UserError: If there are none, or none has the metric.
    """
    found, complaints = read_results(paths)
    found, unused = replace_costs(found, costs or {})
    if metric:
        tested = [r['values'] for r in found if r['measurement'] == 'metric' and r['status'] == 'done']
        known = dict.fromkeys(name for values in tested for name in (*values['per_class'], *values['metrics']))
        if tested and METRICS.get(metric, metric) not in known:
            known |= dict.fromkeys(name for name, key in METRICS.items() if key in known)
            raise UserError(f'no result has the metric {metric!r}\nKnown: {format_list(known, 40)}.')
        found = [rank_by(record, metric) for record in found]
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
        compare(group)
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
    trained: dict[str, list[int]] = {}
    for record in found:
        digest = (record['checkpoint'] or {}).get('sha256')
        if record['measurement'] == 'metric' and record['status'] == 'done' and digest:
            trained.setdefault(str(digest), []).append(record['seed'])
    problems += [
        f'seeds {format_list(sorted(same))}: one training, with the weights {digest[:12]}: its interval is too narrow'
        for digest, same in trained.items()
        if len(same) > 1
    ]
    counted = f'{len(seeds)} seed{"s" * (len(seeds) != 1)}'
    if bad:
        return f'failed, {len(bad)} of {counted}', problems
    return f'unfinished, {lacking} of {counted}' if lacking else f'done, {counted}', problems


def _requested(found: Sequence[Record]) -> list[Any]:
    """The measurements that the suite requests of a row, by its latest record."""
    # Early records do not state them: then all seeds should have the measurements that one seed has.
    latest = max(found, key=lambda record: record['started'])
    return latest.get('asked') or [record['measurement'] for record in found]
