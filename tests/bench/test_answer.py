"""The answer in plain language: planted winners and ties, limits, and what is not decided. All records are made up."""

from pathlib import Path

import numpy as np
import pytest
from report_records import PROTOCOL, SPEED, counted, metric, record, speed, write

from replk_mm.analysis.statistics import Plan
from replk_mm.bench.answer import Answer, Limits, answer
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.render import render_html, render_markdown
from replk_mm.bench.report.structures import SuiteReport

ROWS = ('a', 'b', 'c')


def answered(folder: Path, records: list[dict], **options) -> Answer:
    return answer(load_report([write(folder, records)]).suites[0], **options)


def simulated(folder: Path, winner: str | None) -> list[Answer]:
    """Answers of 20 tables: with a winner 0.1 ahead in the share of right pixels, or with three equal rows."""
    found = []
    for i in range(20):
        name = f'{winner}{i}'
        qualities = {row: 0.8 if row == winner else 0.7 for row in ROWS}
        # the same draws wherever the tests run
        spread = np.random.default_rng([i, len(name)]).normal(0, 0.01, (len(ROWS), 3))
        records = [
            counted(folder / name, row, 100 * i + seed, qualities[row] + spread[k, seed], 20)
            for k, row in enumerate(ROWS)
            for seed in range(3)
        ]
        found.append(answered(folder / name, [{**one, 'label': f'Row {one["row"]}'} for one in records]))
    return found


def test_planted_winners_are_named(tmp_path) -> None:
    found = simulated(tmp_path, 'c')
    assert [one.take for one in found] == ['c'] * 20
    assert all(one.verdict.startswith('Take Row c: mIoU ') for one in found)


def test_planted_ties_cannot_be_told_apart(tmp_path, monkeypatch) -> None:
    """A 95 % family-wise level allows one wrong winner in 20 tables of equal rows."""
    monkeypatch.setattr('replk_mm.bench.answer.plan', lambda scores, points: Plan(seeds=5, images=9, detectable=1.0))
    found = simulated(tmp_path, None)
    tied = [one for one in found if one.take is None and 'the 3 rows cannot be distinguished' in one.verdict]
    assert len(tied) >= 19 and all(set(one.candidates) == set(ROWS) for one in tied)


def priced(folder: Path, rows: dict[str, tuple[float, float]], seeds: int = 3, **changes) -> SuiteReport:
    """Rows with the share of right pixels, and a cost: ten times as many milliseconds, MiB and million parameters."""
    records = []
    for row, (quality, cost) in rows.items():
        records += [counted(folder, row, seed, quality, 20, **changes) for seed in range(seeds)]
        records += [
            speed(row, 0, 10 * cost),
            record(row, 0, 'memory', dict(inference_bytes=10 * cost * 2**20), protocol=SPEED),
            record(row, 0, 'complexity', dict(merged_parameters=10e6 * cost)),
        ]
    return load_report([write(folder, records)]).suites[0]


def test_one_seed_decides_nothing(tmp_path) -> None:
    found = answer(priced(tmp_path, dict(a=(0.9, 2), b=(0.5, 1)), seeds=1), command='run X')
    assert 'fastest b (10 ms instead of 20 ms)' in found.text
    assert found.take is None and found.candidates == ('a', 'b')
    assert found.verdict == 'Not decided: one seed, 20 test images, no pretraining.'
    assert 'a has the highest score, mIoU ' in found.text and 'at least 3 times: run X.' in found.text


def test_cheaper_rows_of_the_best_group(tmp_path) -> None:
    found = answer(priced(tmp_path, dict(a=(0.9, 3), b=(0.898, 2), c=(0.5, 1))), command='run X')
    assert found.take == found.candidates[0] and set(found.candidates) == {'a', 'b'}
    leader, other = found.candidates
    assert f'Not distinguishable from it: {other}; it scores more than every other row.' in found.text
    assert 'Choose by cost: fastest b (20 ms' in found.text and 'least memory b (20 MiB' in found.text
    assert 'smallest b (20 M parameters' in found.text and ' c (' not in found.text
    assert f'would distinguish {leader} from {other}' in found.text or 'would not suffice' in found.text


def test_a_faster_row_beyond_the_best_group_and_what_it_costs(tmp_path) -> None:
    suite = priced(tmp_path, dict(a=(0.9, 3), b=(0.8, 2.9), c=(0.7, 1)))
    found = answer(suite)
    lost = {d.second: d.value for d in suite.groups[0].comparison.differences}
    assert found.take == 'a' and f'b is next, {lost["b"]:.1f} [' in found.text
    assert f'Faster: c, 10 ms instead of 30 ms, for {lost["c"]:.1f} [' in found.text


@pytest.mark.parametrize(
    ('limits', 'take', 'said'),
    [
        (dict(max_latency=25.0), 'b', 'Beyond your limits: a (30 ms).'),
        (dict(max_memory=25.0), 'b', 'Beyond your limits: a (30 MiB).'),
        (dict(max_params=15.0), 'c', 'c: it is the only row within your limits (mIoU '),
        (dict(max_latency=1.0), None, 'No row is within your limits.'),
        (dict(max_latency=30.0, max_memory=30.0, max_params=30.0), 'a', 'Take a: mIoU '),
        (dict(max_latency=29.9), 'b', 'Beyond your limits: a (30 ms).'),
        (dict(max_memory=99.0, other_device=True), None, 'a (memory not measured on the other device)'),
        (dict(max_params=25.0, other_device=True), 'b', 'Beyond your limits: a (30 M parameters).'),
        ({}, 'a', 'Take a: mIoU '),
    ],
    ids=str,
)
def test_limits(limits, take, said, tmp_path) -> None:
    """Rows beyond the limits are left out before the others are compared."""
    found = answer(priced(tmp_path, dict(a=(0.9, 3), b=(0.8, 2), c=(0.7, 1))), Limits(**limits))
    assert found.take == take and said in found.text
    assert take is None or found.candidates == (take,)


def test_limits_apply_before_the_protocol_is_chosen(tmp_path) -> None:
    records = []
    for end, cost, protocol in (('', 1, dict(protocol='linear')), ('-finetuned', 3, {})):
        for row, quality in (('a', 0.9), ('b', 0.7)):
            name = row + end
            records.append(record(name, 0, 'complexity', dict(merged_parameters=1e6 * cost)))
            seeds = range(3)
            records += [counted(tmp_path, name, s, quality, 20, protocol={**PROTOCOL, **protocol}) for s in seeds]
    suite = load_report([write(tmp_path, records)]).suites[0]
    assert answer(suite).take == 'a-finetuned'
    found = answer(suite, Limits(max_params=2.0))
    assert found.take == 'a' and 'finetuned' not in found.text


def test_a_cost_is_compared_with_that_of_the_leader(tmp_path) -> None:
    found = answer(priced(tmp_path, dict(a=(0.9, 1), b=(0.8999, 0.95), c=(0.8, 2)), seeds=2))
    assert set(found.candidates) >= {'a', 'b'} and 'fastest' not in found.text


def test_a_cost_that_was_not_measured_is_beyond_a_limit(tmp_path) -> None:
    suite = load_report([write(tmp_path, [counted(tmp_path, 'a', seed, 0.9, 20) for seed in range(2)])]).suites[0]
    assert 'a (time not measured)' in answer(suite, Limits(max_latency=9.0)).text
    assert answer(suite).verdict.startswith('Not decided: only a has a score')


def test_whole_networks_count_before_probes_and_more_rows(tmp_path) -> None:
    """And the best rows of the other protocols are named."""
    records = [
        counted(tmp_path, f'{row}{end}', seed, quality, 20, protocol={**PROTOCOL, **protocol})
        for end, protocol in (('', {}), ('-probe', dict(protocol='linear')), ('-few', dict(fraction=10)))
        for row, quality in (('a', 0.9), ('b', 0.7), ('c', 0.6))[: 3 if end else 2]
        for seed in range(3)
    ]
    found = answer(load_report([write(tmp_path, records)]).suites[0])
    assert found.take == 'a' and found.candidates == ('a',)
    assert 'not compared with these: ' in found.text
    assert 'a-probe (the best of protocol ' in found.text and 'a-few (the best of protocol ' in found.text


@pytest.mark.parametrize(
    ('records', 'said'),
    [
        ([record('a', 0, 'train', {}, status='failed', reason='NaN')], 'Not decided: no row has a score yet.'),
        ([metric(row, seed, 50.0) for row in 'ab' for seed in (0, 1)], 'Not decided: no confidence interval for a, b.'),
    ],
    ids=['failed', 'older records'],
)
def test_without_intervals_nothing_is_decided(records, said, tmp_path) -> None:
    found = answer(load_report([write(tmp_path, records)]).suites[0])
    assert found.take is None and found.verdict.startswith(said) and 'suite SUITE.yaml --resume' in found.text


def test_a_leader_without_interval_and_a_single_image_leave_it_open(tmp_path) -> None:
    records = [counted(tmp_path / 'a', row, seed, of, 20) for row, of in (('b', 0.9), ('c', 0.6)) for seed in (0, 1, 2)]
    found = answer(load_report([write(tmp_path / 'a', [*records, metric('a', 0, 95.0)])]).suites[0])
    assert (
        found.take is None
        and 'no confidence interval for a.' in found.verdict
        and 'a has the highest score' in found.text
    )
    records = [counted(tmp_path / 'b', row, seed, 0.7, 1) for row in 'ab' for seed in (0, 1)]
    found = answer(load_report([write(tmp_path / 'b', records)]).suites[0])
    assert found.take is None and 'test on more of them' in found.text


def test_the_answer_is_in_page_and_text_and_its_names_are_text(tmp_path) -> None:
    evil = [{**one, 'label': '<b>|x'} for one in (metric('a', 0, 50.0), metric('b', 0, 40.0))]
    evil.append({**record('a', 0, 'complexity', dict(merged_parameters=9e5)), 'label': '<b>|x'})
    report = load_report([write(tmp_path, evil)])
    page, text = render_html(report), render_markdown(report)
    assert page.index('class="verdict">Not decided: ') < page.index('class="results"') and '<b>' not in page
    assert '**Not decided: no confidence interval for' in text
    assert '&lt;b&gt;|x: it is the only row' in render_html(report, limits=Limits(max_params=1.0))


def plans(monkeypatch, by_points: dict[float, Plan]) -> list[float]:
    """Plans instead of computed ones, by the rounded difference to detect; returns the differences asked for."""
    asked = []

    def planned(scores, points: float) -> Plan:
        asked.append(points)
        return by_points[min(by_points, key=lambda known: abs(known - points))]

    monkeypatch.setattr('replk_mm.bench.answer.plan', planned)
    return asked


@pytest.mark.parametrize(
    ('plan', 'said'),
    [
        (Plan(seeds=20, images=None, detectable=3.0), 'About 20 seeds of each row would distinguish'),
        (Plan(seeds=21, images=400, detectable=3.0), 'About 400 test images would distinguish'),
        (Plan(seeds=None, images=400, detectable=3.0), 'About 400 test images would distinguish'),
        (Plan(seeds=21, images=401, detectable=3.0), 'distinguish rows from 3.0 points on; 20 seeds or 20 times'),
        (Plan(seeds=None, images=None, detectable=3.0), 'distinguish rows from 3.0 points on; 20 seeds or 20 times'),
    ],
)
def test_seeds_and_images_that_would_decide_are_bounded(plan, said, tmp_path, monkeypatch) -> None:
    """At most 20 seeds, or 20 times the 20 test images."""
    asked = plans(monkeypatch, {0.0: plan})
    found = answer(priced(tmp_path, dict(a=(0.70, 1), b=(0.698, 2)), seeds=2), command='run X')
    assert found.take is None and said in found.text and asked
    assert 'Smaller differences' not in found.text and 'those below it' not in found.text


def test_the_closest_row_for_which_something_decides_is_named(tmp_path, monkeypatch) -> None:
    suite = priced(
        tmp_path, {name: (quality, 1) for name, quality in zip('abcd', (0.7, 0.69, 0.68, 0.67), strict=True)}, 2
    )
    first, *others = suite.groups[0].rows
    behind = [first.figures['metric'].value - row.figures['metric'].value for row in others]
    never, soon = Plan(seeds=None, images=None, detectable=1.0), Plan(seeds=7, images=None, detectable=1.0)
    for place, words in enumerate(('', ' and those below it', '')):
        plans(monkeypatch, {value: soon if i >= place else never for i, value in enumerate(behind)})
        text = answer(suite, command='run X').text
        assert (
            f'About 7 seeds of each row would distinguish {first.label} from {others[place].label}{words}: run X.'
            in text
        )
        assert ('Smaller differences would need more.' in text) == (place > 0)


def test_a_row_without_interval_is_named_beside_the_others(tmp_path) -> None:
    records = [counted(tmp_path, row, seed, of, 20) for row, of in (('b', 0.9), ('c', 0.6)) for seed in (0, 1, 2)]
    found = answer(load_report([write(tmp_path, [*records, metric('a', 0, 1.0)])]).suites[0])
    assert found.take == 'b' and found.candidates == ('b',)
    assert 'Without an interval, and not compared: a.' in found.text
    assert 'more than every other row with an interval.' in found.verdict


@pytest.mark.parametrize(
    ('counts', 'said'),
    [(dict(a=3, b=2), 'with 2 to 3 seeds, 20 test images'), (dict(a=2, b=1), '1 to 2 seeds, 20 test')],
)
def test_seeds_that_differ_by_row_are_counted(counts, said, tmp_path) -> None:
    records = [counted(tmp_path, row, seed, 0.7, 20) for row, many in counts.items() for seed in range(many)]
    assert said in answer(load_report([write(tmp_path, records)]).suites[0]).verdict


def test_a_larger_group_of_probes_counts_before_one_whole_network(tmp_path) -> None:
    records = [counted(tmp_path, 'alone', seed, 0.9, 20) for seed in range(2)]
    probe = {**PROTOCOL, 'protocol': 'linear'}
    records += [
        counted(tmp_path, row, seed, of, 20, protocol=probe) for row, of in (('a', 0.9), ('b', 0.6)) for seed in (0, 1)
    ]
    assert answer(load_report([write(tmp_path, records)]).suites[0]).candidates == ('a',)


@pytest.mark.parametrize('where', ['missing', 'busy machine', 'other conditions'])
@pytest.mark.parametrize('row', ['a', 'b'])
def test_costs_that_cannot_be_compared_are_not(where, row, tmp_path) -> None:
    """Of the leader, or of the other row."""
    records = []
    for name, ms in (('a', 20.0), ('b', 10.0)):
        records += [counted(tmp_path, name, seed, 0.7, 20) for seed in range(2)]
        changes = {}
        if name == row:
            changes = {
                'busy machine': dict(facts=dict(load=0.9)),
                'other conditions': dict(protocol={**SPEED, 'threads': 1}),
            }
        if name != row or where != 'missing':
            records.append(speed(name, 0, ms, **changes.get(where, {})))
    found = answer(load_report([write(tmp_path, records)]).suites[0])
    assert set(found.candidates) == {'a', 'b'} and 'fastest' not in found.text


def test_a_time_of_a_busy_machine_is_no_reason_for_a_faster_row(tmp_path) -> None:
    records = [counted(tmp_path, row, seed, of, 20) for row, of in (('a', 0.9), ('b', 0.6)) for seed in range(2)]
    records += [speed('a', 0, 20.0, facts=dict(load=0.9)), speed('b', 0, 10.0)]
    found = answer(load_report([write(tmp_path, records)]).suites[0])
    assert found.take == 'a' and 'Faster' not in found.text
