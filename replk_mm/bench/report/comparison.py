"""Compare the rows of a protocol: intervals and the best group of the metric, and the Pareto front of a cost."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from replk_mm.analysis.statistics import best_group
from replk_mm.bench import records
from replk_mm.bench.report.structures import ProtocolGroup, Record, ReportRow
from replk_mm.bench.report.tables import BY_KEY, Column, primary_metric, value_of
from replk_mm.errors import UserError, format_list
from replk_mm.evaluation.per_image import PerImageScores

#: Rows that are compared, the first, as each pair of them is a comparison.
_MOST_COMPARED = 40


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


def compare(group: ProtocolGroup) -> None:
    """Set the intervals, the best group and the differences of the metric of a group's first rows."""
    measured = [row for row in group.rows if row.figures['metric'].value is not None]
    scores = group.scores
    absent: dict[str, list[str]] = {}
    for row in measured[:_MOST_COMPARED]:
        try:
            of_row = [read_scores(record) for record in row.of('metric')]
            first = next(iter(scores.values()), of_row)[0]
            if any(sorted(one.images) != sorted(first.images) for one in of_row):
                raise ValueError('tested on other images than the rows above')
            scores[row.name] = of_row
        except (OSError, ValueError) as error:
            absent.setdefault(getattr(error, 'strerror', None) or str(error), []).append(row.label)
    group.remarks = [f'No interval for {format_list(labels, 5)}: {reason}.' for reason, labels in absent.items()]
    if len(measured) > _MOST_COMPARED:
        group.remarks.append(f'Only the first {_MOST_COMPARED} of {len(measured):,} rows have intervals.')
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
