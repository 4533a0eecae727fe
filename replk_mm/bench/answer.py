"""Answer in plain language which backbone to take, from the statistics of a suite's report and from nothing else."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from replk_mm.analysis.statistics import BestGroup, best_group, plan
from replk_mm.bench.report.structures import ProtocolGroup, ReportRow, SuiteReport
from replk_mm.bench.report.tables import BY_KEY
from replk_mm.errors import command_line, format_list

#: Costs of a row, and the words for the row with the least.
_COSTS = dict(milliseconds='fastest', memory='least memory', parameters='smallest')
#: A cost is lower if it is at most this share of the other.
_CLEARLY = 0.9
#: Seeds that are asked for: at least, and at most; and at most this many times the test images.
_LEAST_SEEDS, _MOST_SEEDS, _MOST_TIMES = 3, 20, 20


@dataclass(frozen=True)
class Limits:
    """What the user can afford; None is no limit.

    Attributes:
        max_latency: Of one batch, in milliseconds.
        max_memory: Of inference, in MiB.
        max_params: In millions.
        other_device: Whether the limits are of the device of ``--costs``: figures of this machine do not count then.
    """

    max_latency: float | None = None
    max_memory: float | None = None
    max_params: float | None = None
    other_device: bool = False

    def problem(self, row: ReportRow) -> str:
        """Why a row is left out; ``''`` if it is not. A cost that was not measured exceeds every limit."""
        limits = dict(milliseconds=self.max_latency, memory=self.max_memory, parameters=self.max_params)
        for key, limit in limits.items():
            if limit is None:
                continue
            value, column = row.figures[key].value, BY_KEY[key]
            if value is None:
                return f'{column.title.lower()} not measured'
            there = any('costs' in record['facts'] for record in row.of(column.measurement))
            if self.other_device and key != 'parameters' and not there:
                return f'{column.title.lower()} not measured on the other device'
            if value > limit:
                return _cost(row, key)
        return ''


@dataclass(frozen=True)
class Answer:
    """Which backbone to take.

    Attributes:
        verdict: One sentence.
        sentences: What to take and why; what cannot be distinguished from it; what is cheaper; what would change the
            answer, with the command that would decide.
        take: Name of the row to take; None if nothing is decided.
        candidates: Names of the rows that may be the best, by falling score; empty if no row has a score.
        group: The rows that were compared; None if no row has a score.
    """

    verdict: str
    sentences: tuple[str, ...]
    take: str | None = None
    candidates: tuple[str, ...] = ()
    group: ProtocolGroup | None = None

    @property
    def text(self) -> str:
        """All sentences, as a paragraph."""
        return ' '.join([self.verdict, *self.sentences])


def answer(suite: SuiteReport, limits: Limits | None = None, command: str = '') -> Answer:
    """The answer of a suite.

    Args:
        suite: Loaded results. Of several protocols, whole networks count before fixed backbones, then all training
            images before a share, then the larger group.
        limits: Rows beyond them are left out before the rows are compared.
        command: That measures more seeds or rows. Defaults to resuming the suite.
    """
    limits = limits or Limits()
    command = command or f'set seeds in the suite file and run {command_line("suite", "SUITE.yaml", "--resume")}'
    groups = [(g, [r for r in g.rows if r.figures['metric'].value is not None]) for g in suite.groups if g.protocol]
    measured = [(group, rows) for group, rows in groups if rows]
    if not measured:
        return Answer('Not decided: no row has a score yet.', (f'To decide: {command}.',))
    within = [(group, [row for row in rows if not limits.problem(row)]) for group, rows in measured]
    (group, rows), (_, all_rows) = max(zip(within, measured, strict=True), key=lambda found: _weight(*found[0]))
    left_out = [f'{row.label} ({problem})' for row in all_rows if (problem := limits.problem(row))]
    remarks = []
    if left_out:
        remarks.append(f'Beyond your limits: {format_list(left_out)}.')
    others = [_summary(other, part) for other, part in within if other is not group and part]
    if others:
        remarks.append(f'Under other protocols, and not compared with these: {"; ".join(others)}.')
    if not rows:
        return Answer('No row is within your limits.', tuple(remarks), None, (), group)
    if len(rows) == 1:
        only, score = rows[0], _score(group, rows[0])
        if left_out:
            verdict = f'Take {only.label}: it is the only row within your limits ({score}).'
            return Answer(verdict, tuple(remarks), only.name, (only.name,), group)
        verdict = f'Not decided: only {only.label} has a score ({score}).'
        return Answer(verdict, (*remarks, f'To compare it, {command}.'), None, (only.name,), group)
    return _compare(group, rows, tuple(remarks), command)


def _weight(group: ProtocolGroup, rows: list[ReportRow]) -> tuple[bool, bool, float, int]:
    """What a group counts: see :func:`answer`."""
    content = group.protocol.content if group.protocol else {}
    share = content.get('fraction', 100)
    fixed = content.get('protocol') in ('linear', 'head')
    return len(rows) > 1, not fixed, share if isinstance(share, (int, float)) else 0, len(rows)


def _summary(group: ProtocolGroup, rows: list[ReportRow]) -> str:
    """A protocol and its best group."""
    members = [row.label for row in rows if row.figures['metric'].mark]
    which = f'the best of protocol {group.name}' if members else f'protocol {group.name}, not decided'
    return f'{format_list(members or [row.label for row in rows], 3)} ({which})'


def _compare(group: ProtocolGroup, rows: list[ReportRow], remarks: tuple[str, ...], command: str) -> Answer:
    scores = {row.name: group.scores[row.name] for row in rows if row.name in group.scores}
    by_name = {row.name: row for row in rows}
    first, names = rows[0], tuple(row.name for row in rows)
    top = f'{first.label} has the highest score, {_score(group, first)}'
    lacking = [row.label for row in rows if row.name not in scores]
    if len(scores) < 2 or first.name not in scores:
        again = f'Measure their metric again: {command}.'
        verdict = f'Not decided: no confidence interval for {format_list(lacking)}.'
        if group.metric.startswith('AP_'):
            again = 'The AP of a size has no interval: rank by AP or by a class.'
        return Answer(verdict, (f'{top}.', *remarks, again), None, names, group)
    if lacking:
        remarks += (f'Without an interval, and not compared: {format_list(lacking)}.',)
    found = best_group(scores)
    leader, *ties = (by_name[name] for name in found.members)
    beaten = [by_name[d.second] for d in found.differences if d.second not in found.members]
    counts = [len(row) for row in scores.values()]
    least, most = min(counts), max(counts)
    seeds = f'{least} to {most} seeds' if least < most else 'one seed' if most == 1 else f'{most} seeds'
    images = len(next(iter(scores.values()))[0].images)
    conditions = f'{seeds}, {images:,} test images, {group.conditions}'
    needed = _needed(found, group, by_name, command)
    if not all(one.covers_seeds for one in found.intervals.values()):
        verdict = f'Not decided: {conditions}.'
        why = 'One training of each row cannot say which is better.'
        return Answer(verdict, (f'{top}. {why}', *_cheapest(rows), *remarks, needed), None, found.members, group)
    best = f'{leader.label}: {_score(group, leader)}'
    every = 'every other row with an interval' if lacking else 'every other row'
    if not beaten:
        verdict = f'Not decided: the {len(ties) + 1} rows cannot be distinguished with {conditions}.'
        cheaper = _cheapest([leader, *ties])
        return Answer(verdict, (f'{top}.', *cheaper, *remarks, needed), None, found.members, group)
    if ties:
        verdict = f'Take {best}, or one of {len(ties)} that cannot be distinguished from it.'
        same = (
            f'Not distinguishable from it: {format_list([row.label for row in ties], 6)}; it scores more than {every}.'
        )
        cheaper = [*_cheapest([leader, *ties]), *_trades(leader, beaten, found)]
        sentences = (same, *cheaper, *remarks, needed)
    else:
        verdict = f'Take {best}, more than {every}.'
        behind = next(d for d in found.differences if d.second == beaten[0].name)
        lead = f'{beaten[0].label} is next, {_points(behind.value, behind.low, behind.high)} behind.'
        sentences = (lead, *_trades(leader, beaten, found), *remarks)
    valid = f'Measured with {conditions}; other data or a longer training may change it.'
    return Answer(verdict, (*sentences, valid), leader.name, found.members, group)


def _needed(found: BestGroup, group: ProtocolGroup, rows: Mapping[str, ReportRow], command: str) -> str:
    """What would decide between the leader and the closest row for which something does, with the command."""
    if not all(one.covers_seeds for one in found.intervals.values()):
        return f'To decide, train each row at least {_LEAST_SEEDS} times: {command}.'
    if any(one.low is None for one in found.intervals.values()):
        return 'The test images allow no interval: test on more of them.'
    leader, scores = rows[found.leader].label, {name: group.scores[name] for name in found.intervals}
    ties = [d for d in found.differences if d.second in found.members]
    for i, tie in enumerate(ties):
        planned = plan(scores, tie.value) if tie.value > 0 else None
        which = rows[tie.second].label + (' and those below it' if i and i < len(ties) - 1 else '')
        if planned and planned.seeds and planned.seeds <= _MOST_SEEDS:
            text = f'About {planned.seeds} seeds of each row would distinguish {leader} from {which}: {command}.'
        elif planned and planned.images and planned.images <= _MOST_TIMES * tie.images:
            text = f'About {planned.images:,} test images would distinguish {leader} from {which}; now {tie.images:,}.'
        else:
            continue
        return text + ' Smaller differences would need more.' * (i > 0)
    detectable = plan(scores, 1.0).detectable
    return (
        f'These seeds and images distinguish rows from {_points(detectable)} on; {_MOST_SEEDS} seeds or '
        f'{_MOST_TIMES} times as many images would not suffice either. To decide, train longer or on more images.'
    )


def _cheapest(rows: list[ReportRow]) -> list[str]:
    """Of rows that cannot be distinguished, the leader first, those with the lowest costs, where the costs differ."""
    leader, found = rows[0], []
    for key, word in _COSTS.items():
        known = sorted(_comparable(leader, rows, key), key=lambda row: row.figures[key].value or 0.0)
        if len(known) < 2:
            continue
        rival = known[1] if known[0] is leader else leader
        if (known[0].figures[key].value or 0.0) <= _CLEARLY * (rival.figures[key].value or 0.0):
            more = '' if known[0] is leader else f' instead of {_cost(leader, key)}'
            found.append(f'{word} {known[0].label} ({_cost(known[0], key)}{more})')
    return [f'Choose by cost: {", ".join(found)}.'] if found else []


def _trades(leader: ReportRow, beaten: list[ReportRow], found: BestGroup) -> list[str]:
    """The best row that is clearly faster, or else smaller, than the leader, and what it scores less."""
    less = {d.second: d for d in found.differences}
    for key, word in dict(milliseconds='Faster', parameters='Smaller').items():
        for row in _comparable(leader, beaten, key):
            if (row.figures[key].value or 0.0) <= _CLEARLY * (leader.figures[key].value or 0.0):
                d = less[row.name]
                points = _points(d.value, d.low, d.high)
                return [f'{word}: {row.label}, {_cost(row, key)} instead of {_cost(leader, key)}, for {points} less.']
    return []


def _comparable(like: ReportRow, rows: Iterable[ReportRow], key: str) -> list[ReportRow]:
    """The rows with a reliable cost, measured as that of the row ``like``."""
    figure = like.figures[key]
    if figure.value is None or figure.unreliable:
        return []
    costs = ((row, row.figures[key]) for row in rows)
    return [r for r, c in costs if c.value is not None and not c.unreliable and c.protocol == figure.protocol]


def _score(group: ProtocolGroup, row: ReportRow) -> str:
    name, _, unit = group.title.partition(', ')
    figure = row.figures['metric']
    interval = '' if figure.low is None or figure.high is None else f' [{figure.low:.1f}, {figure.high:.1f}]'
    return f'{name} {figure.value or 0.0:.1f}{f" {unit}" if unit else ""}{interval}'


def _cost(row: ReportRow, key: str) -> str:
    column = BY_KEY[key]
    value = f'{row.figures[key].value:.3g} {column.unit}'
    return f'{value} parameters' if key == 'parameters' else value


def _points(value: float, low: float | None = None, high: float | None = None) -> str:
    interval = '' if low is None or high is None else f' [{low:.1f}, {high:.1f}]'
    return f'{value:.1f}{interval} points'
