"""The report's figures, groups and marks, and what it does with damaged and odd records. All records are made up."""

import importlib
import re

import numpy as np
import pytest
from report_records import (
    PROTOCOL,
    SPEED,
    counted,
    facts,
    files_of,
    found,  # noqa: F401
    metric,
    page,  # noqa: F401
    record,
    scenes,
    speed,
    suite,  # noqa: F401
    write,
)

from replk_mm.bench.report.load import SKIPPED_STATUS, load_report
from replk_mm.bench.report.render import render_html, render_markdown, render_text
from replk_mm.bench.report.structures import ReportRow
from replk_mm.bench.report.tables import BY_KEY, number, protocol_differences
from replk_mm.errors import UserError
from replk_mm.files import sha256

# ruff: noqa: F811 (fixtures that come from another file)
CONFIG = 'configs/upernet_replk31b_ade20k.py'  # published: 49.9 of one scale, 50.6 of several


@pytest.fixture
def run(monkeypatch):
    """Calls tools/report.py with arguments; gives its exit status."""
    tool = importlib.import_module('replk_mm.commands.report')

    def call(*args) -> int:
        monkeypatch.setattr('sys.argv', ['report.py', *map(str, args)])
        return tool.main()

    return call


def rows_of(folder, records) -> dict[str, ReportRow]:
    """The rows of some records, by name."""
    suites = load_report([write(folder, records)]).suites
    return {row.name: row for one in suites for row in one.rows}


# -- figures and groups -----------------------------------------------------------------------------------------------
def test_protocols_are_groups_and_differences_are_listed(found) -> None:
    groups = found.suites[0].groups
    assert [[row.name for row in group.rows] for group in groups] == [
        ['replk-31', 'replk-13', 'convnext'],
        ['longer'],
        ['broken'],
    ]
    assert [group.protocol and group.protocol.name for group in groups] == ['A', 'B', None]
    assert groups[1].protocol.differences == ('iterations: 600 instead of 300', 'samples_seen: 4800 instead of 2400')
    assert [row.number for row in found.suites[0].rows] == [1, 2, 3, 4, 5]


def test_metrics_of_other_names_or_units_are_other_groups(tmp_path) -> None:
    acc = record('b', 0, 'metric', dict(metrics=dict(mAcc=90.0), primary='mAcc', unit='%'), protocol=PROTOCOL)
    share = record('c', 0, 'metric', dict(metrics=dict(mIoU=0.5), primary='mIoU', unit='of 1'), protocol=PROTOCOL)
    groups = load_report([write(tmp_path, [metric('a', 0, 50.0), acc, share])]).suites[0].groups
    assert [[row.name for row in group.rows] for group in groups] == [['a'], ['b'], ['c']]
    assert [group.protocol.differences for group in groups] == [
        (),
        ('metric: mAcc, % instead of mIoU, %',),
        ('metric: mIoU, of 1 instead of mIoU, %',),
    ]


def test_mean_and_deviation_over_seeds(tmp_path) -> None:
    values = [61.25, 58.5, 60.125]
    figure = rows_of(tmp_path, [metric('a', seed, value) for seed, value in enumerate(values)])['a'].figures['metric']
    assert figure.value == pytest.approx(np.mean(values)) and figure.deviation == pytest.approx(np.std(values, ddof=1))
    assert figure.count == 3


def test_unmeasured_values_are_missing(tmp_path) -> None:
    records = [metric('a', 0, 50.0), record('a', 0, 'memory', dict(inference_bytes=None), protocol=SPEED)]
    row = rows_of(tmp_path, records)['a']
    absent = {key: figure.why for key, figure in row.figures.items() if figure.value is None}
    assert set(row.figures) - set(absent) == {'metric'}
    assert absent['milliseconds'] == 'not measured' and absent['memory'] == 'the record holds no such figure'
    text = render_html(load_report([tmp_path]))
    cells = re.findall(r'<td[^>]*data-value="([^"]*)"[^>]*>(.*?)</td>', text)
    assert [value for value, _ in cells][:-1] == ['50.0', '']  # columns that nothing was requested for are left out
    assert all('–' in content and not re.search(r'\b0\b', content) for value, content in cells if not value)
    assert '| 1 a | 50.00 (n = 1) | – (1) |' in render_markdown(load_report([tmp_path]))


def test_measured_zero_is_a_figure(tmp_path) -> None:
    figure = rows_of(tmp_path, [metric('a', 0, 0.0)])['a'].figures['metric']
    assert (figure.value, figure.count) == (0.0, 1)


def test_a_failed_measurement_says_why(found, page) -> None:
    row = found.suites[0].rows[-1]
    assert row.state == 'failed, 1 of 1 seed' and row.problems == ['seed 0: train failed: loss is NaN at iteration 12']
    assert row.figures['metric'].why == 'training failed: loss is NaN at iteration 12'
    assert 'failed, 1 of 1 seed: seed 0: train failed: loss is NaN at iteration 12' in page


def test_requested_but_missing_measurements_are_unfinished(tmp_path) -> None:
    asked = ['train', 'metric', 'speed']
    rows = rows_of(
        tmp_path,
        [
            metric('union', 0, 50.0),
            speed('union', 0, 9.0),
            metric('union', 1, 51.0),  # does not tell what was asked for
            metric('told', 0, 50.0, asked=asked),
            speed('told', 0, 9.0, asked=asked),
            *(record('whole', 0, name, {}, asked=asked) for name in asked),
            metric('fewer', 0, 50.0, asked=['metric']),
            record('begun', 0, 'train', {}, asked=asked),
            record('bad', 0, 'train', {}, status='failed', reason='no', asked=asked),
        ],
    )
    assert {name: (row.state, row.problems) for name, row in rows.items()} == dict(
        union=('unfinished, 1 of 2 seeds', ['seed 1: not recorded yet: speed']),
        begun=('unfinished, 1 of 1 seed', ['seed 0: not recorded yet: metric, speed']),
        told=('unfinished, 1 of 1 seed', ['seed 0: not recorded yet: train']),
        whole=('done, 1 seed', []),
        fewer=('done, 1 seed', []),
        bad=('failed, 1 of 1 seed', ['seed 0: train failed: no']),
    )
    later = dict(started='2002-01-01T00:00:00+00:00', asked=['metric'])
    again = rows_of(tmp_path / 'again', [metric('a', 0, 50.0, asked=asked), metric('a', 1, 50.0, **later)])
    assert again['a'].state == 'done, 2 seeds', 'the latest record tells'
    missing = {name: row.figures['milliseconds'].why for name, row in rows.items() if name in ('begun', 'fewer', 'bad')}
    assert missing == dict(begun='not recorded yet', fewer='not measured', bad='training failed: no')


def test_figures_of_different_weights_and_seeds_of_the_same_are_marked(tmp_path) -> None:
    first, other = dict(sha256='e' * 64), dict(sha256='f' * 64)
    rows = rows_of(
        tmp_path,
        [
            metric('mixed', 0, 50.0, checkpoint=first),
            speed('mixed', 0, 9.0, checkpoint=other),
            record('mixed', 0, 'complexity', {}, checkpoint=None),
            metric('alike', 0, 50.0, checkpoint=first),
            metric('alike', 1, 51.0, checkpoint=other),
            *(metric('copied', seed, 50.0, checkpoint=first if seed else other) for seed in (2, 0, 1)),
        ],
    )
    assert rows['mixed'].problems == [
        f'seed 0: measured of different weights: metric of {"e" * 12}; speed of {"f" * 12}'
    ]
    assert rows['alike'].problems == []
    assert rows['copied'].problems == [
        f'seeds 1, 2: one training, with the weights {"e" * 12}: its interval is too narrow'
    ]


def test_seeds_of_two_protocols_are_two_rows(tmp_path) -> None:
    short = {**PROTOCOL, 'iterations': 100}
    records = [metric('a', 0, 50.0), metric('a', 1, 52.0), metric('a', 2, 20.0, protocol=short)]
    suites = load_report([write(tmp_path, records)]).suites
    assert [[(row.name, row.figures['metric'].value) for row in group.rows] for group in suites[0].groups] == [
        [('a', 51.0)],
        [('a', 20.0)],
    ]


def test_seeds_timed_on_other_machines_do_not_mix(tmp_path) -> None:
    other = {**SPEED, 'cpu': 'another'}
    row = rows_of(
        tmp_path,
        [metric('a', s, 50.0) for s in range(3)]
        + [speed('a', 0, 10.5), speed('a', 1, 11.5), speed('a', 2, 99.0, protocol=other)],
    )['a']
    assert row.figures['milliseconds'].value == 11.0
    assert row.figures['milliseconds'].why == 'seed 2 was measured under protocol S2 and is left out'


def test_deployed_form_is_shown(tmp_path) -> None:
    form = dict(median_ms=30.0, low_ms=29.0, high_ms=31.0, throughput=33.0)
    figures = rows_of(
        tmp_path,
        [
            metric('a', 0, 50.0),
            record('a', 0, 'speed', dict(forms=dict(training=form), batch=1), protocol=SPEED),
            record(
                'a',
                0,
                'complexity',
                dict(
                    parameters=9_000_000,
                    inference_parameters=8_000_000,
                    macs=3e9,
                    merged_parameters=7_000_000,
                    merged_macs=2e9,
                ),
            ),
        ],
    )['a'].figures
    assert (figures['parameters'].value, figures['macs'].value, figures['milliseconds'].value) == (7.0, 2.0, 30.0)


def test_columns_show_their_own_figures(tmp_path) -> None:
    areas = {share: dict(side=side, ratio=0.5) for share, side in (('0.3', 11), ('0.5', 21), ('0.99', 81))}
    shape = dict(shape_bias=0.25, shape_decisions=1, texture_decisions=3, other=2)
    rows = rows_of(
        tmp_path,
        [
            metric('a', 0, 50.0),
            record('a', 0, 'memory', dict(inference_bytes=3 * 2**20, training_bytes=9 * 2**20), protocol=SPEED),
            record('a', 0, 'erf', dict(areas={}, areas_of_scores=areas)),
            record('a', 0, 'shape_bias', shape),
            record('a', 0, 'robustness', dict(relative=dict(value=61.5))),
        ],
    )
    shown = {key: figure.value for key, figure in rows['a'].figures.items() if figure.value is not None}
    assert shown == dict(metric=50, memory=3, erf50=21, erf99=81, shape_bias=0.25, robustness=61.5)


@pytest.mark.parametrize(
    ('key', 'value', 'text'),
    [
        ('metric', 1234.567, '1,234.57'),
        ('metric', 0.05, '0.05'),
        ('metric', 0.0456, '0.046'),
        ('metric', -0.0456, '-0.046'),
        ('metric', 0.0, '0.00'),
        ('difference', 1.0, '+1.00'),
        ('difference', -0.00123, '-0.0012'),
        ('erf50', 0.4, '0.4'),
    ],
)
def test_only_zero_reads_as_zero(key, value, text) -> None:
    assert BY_KEY[key].text(value) == text


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf'), 1e30, 10**400, True, '5', None, [5]])
def test_what_is_no_finite_number_is_none(value) -> None:
    assert number(dict(a=dict(b=value)), 'a', 'b') is None is number(value)
    assert number(dict(a=dict(b=-2)), 'a', 'b') == -2 and number(dict(a=3), 'a', 'b') is None


# -- intervals of metrics ---------------------------------------------------------------------------------------------
def test_rows_that_the_data_do_not_distinguish_share_the_mark(tmp_path) -> None:
    quality = dict(a=0.9, b=0.9, c=0.6)
    records = [counted(tmp_path, row, seed, of) for row, of in quality.items() for seed in (0, 1, 2)]
    report = load_report([write(tmp_path, records)])
    (group,) = report.suites[0].groups
    figures = {row.name: row.figures['metric'] for row in group.rows}
    assert {name for name, figure in figures.items() if figure.mark} == {'a', 'b'}
    for figure in figures.values():
        assert figure.value - 5 < figure.low < figure.value < figure.high < figure.value + 5 and not figure.images_only
    worst = figures['c']
    shown = f'{worst.value:.2f} [{worst.low:.2f}, {worst.high:.2f}]'
    page, text = render_html(report), render_markdown(report)
    assert shown.replace(', ', ',\u00a0') in page and page.count('>best group<') == 2
    assert f'{worst.value:.2f}' in text and 'Not distinguishable from the best: ' in text
    points, p = {row.name: (points, p) for row, points, _, p in group.differences}['c']
    leader = max(figures.values(), key=lambda figure: figure.value)
    assert points == f'{leader.value - worst.value:.2f}' and p == '< 0.001'
    assert shown in render_text(report.suites[0])


@pytest.mark.parametrize('old', [False, True])
def test_a_row_without_counts_is_not_called_worse(old, tmp_path) -> None:
    records = [counted(tmp_path, row, seed, of) for row, of in dict(a=0.9, b=0.6).items() for seed in (0, 1, 2)]
    records += [metric('old', 0, 99.0)] * old
    (group,) = load_report([write(tmp_path, records)]).suites[0].groups
    assert group.remarks[0] == f'a is better than every other row {"with an interval" if old else "here"}.'


def test_one_seed_says_nothing_about_other_trainings(tmp_path) -> None:
    """However far the rows are apart."""
    report = load_report([write(tmp_path, [counted(tmp_path, 'a', 0, 0.9), counted(tmp_path, 'b', 0, 0.5)])])
    (group,) = report.suites[0].groups
    assert all(row.figures['metric'].images_only and not row.figures['metric'].mark for row in group.rows)
    assert 'not about other trainings' in render_markdown(report) and 'interval of images only' in render_html(report)


def _old(folder, one) -> None:
    one.update(facts={}, files={})


def _changed(folder, one) -> None:
    (folder / one['files']['statistics']).write_bytes(b'other')


def _damaged(folder, one) -> None:
    _changed(folder, one)
    one['facts']['statistics']['mIoU']['sha256'] = sha256(folder / one['files']['statistics'])


def _outside(folder, one) -> None:
    (folder / one['files']['statistics']).rename(folder / 'statistics.npz')
    one['files']['statistics'] = 'statistics.npz'


def _other_value(folder, one) -> None:
    one['values']['metrics']['mIoU'] += 0.01


def _other_images(folder, one) -> None:
    one.update(counted(folder, 'c', 0, 0.3, images=7))


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        (_old, 'without counts per image'),
        (_changed, 'not the file that was recorded'),
        (_damaged, 'damaged'),
        (_outside, 'leads outside'),
        (_other_value, 'another mIoU than the record'),
        (_other_images, 'other images'),
    ],
)
def test_a_row_without_sound_counts_has_no_interval(change, why, tmp_path) -> None:
    records = [counted(tmp_path, row, 0, quality) for row, quality in (('a', 0.9), ('b', 0.8), ('c', 0.3))]
    change(tmp_path, records[2])
    report = load_report([write(tmp_path, records)])
    (group,) = report.suites[0].groups
    assert {row.name for row in group.rows if row.figures['metric'].low is not None} == {'a', 'b'}
    assert any('No interval for c: ' in text and why in text for text in group.remarks)
    assert why in render_html(report) and 'No interval for c' in render_markdown(report)


def test_few_rows_of_a_protocol_are_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('replk_mm.bench.report.comparison._MOST_COMPARED', 2)
    records = [counted(tmp_path, row, 0, quality) for row, quality in (('a', 0.9), ('b', 0.8), ('c', 0.3))]
    (group,) = load_report([write(tmp_path, records)]).suites[0].groups
    assert [row.figures['metric'].low is not None for row in group.rows] == [True, True, False]
    assert any('the first 2 of 3 rows' in text for text in group.remarks)


# -- marks ------------------------------------------------------------------------------------------------------------
def front_of(rows: dict[str, ReportRow], key: str) -> set[str]:
    return {name for name, row in rows.items() if row.figures[key].mark == 'front'}


@pytest.mark.parametrize('key', ['milliseconds', 'memory', 'training', 'parameters'])
def test_the_pareto_front_of_each_cost(key, tmp_path) -> None:
    """Against brute force over all pairs, with equal scores and equal costs among them."""
    points = dict(a=(50.0, 9), b=(50.0, 8), c=(60.0, 8), d=(60.0, 8), e=(70.0, 30), f=(65.0, 31), g=(10.0, 1))
    records = []
    for name, (miou, cost) in points.items():
        records += [metric(name, 0, miou), speed(name, 0, float(cost)), record(name, 0, 'train', dict(seconds=cost))]
        records.append(record(name, 0, 'memory', dict(inference_bytes=cost * 2**20), protocol=SPEED))
        records.append(record(name, 0, 'complexity', dict(merged_parameters=cost)))
    beaten = {
        one for one, (x, y) in points.items() for u, v in points.values() if u >= x and v <= y and (u, v) != (x, y)
    }
    assert front_of(rows_of(tmp_path, records), key) == set(points) - beaten == {'c', 'd', 'e', 'g'}
    page = render_html(load_report([tmp_path]))
    assert page.count(', on the Pareto front') == 4 * 4 and page.count('>front<') == 4 * 4


def test_the_front_of_times_is_of_one_machine(tmp_path) -> None:
    records = [metric(name, 0, 50.0) for name in 'abc']
    records += [speed('a', 0, 10.0), speed('b', 0, 20.0), speed('c', 0, 1.0, protocol={**SPEED, 'threads': 64})]
    for name, cpu in (('a', 'x'), ('b', 'x'), ('c', 'y')):
        records.append(record(name, 0, 'train', dict(seconds=ord(name)), environment=dict(cpu=cpu)))
    rows = rows_of(tmp_path, records)
    assert front_of(rows, 'milliseconds') == front_of(rows, 'training') == {'a'}  # c is alone
    assert rows['c'].figures['milliseconds'].protocol == 'S2' and rows['c'].figures['training'].protocol == 'T2'


@pytest.mark.parametrize(
    ('times', 'load', 'why'),
    [
        ([(10.0, 9.5, 10.5)], 0.0, ''),
        ([(10.0, 7.0, 10.5)], 0.0, 'seed 0: the quartiles are 35%'),
        ([(10.0, 9.9, 10.1)], 0.6, 'seed 0: other processes used 60%'),
        ([(10.0, 9.9, 10.1), (30.0, 29.9, 30.1)], 0.0, 'standard deviation of 71%'),
        ([(10.0, 9.9, 10.1), (12.0, 11.9, 12.1)], 0.0, 'standard deviation of 13%'),
    ],
    ids=['reliable', 'wide quartiles', 'loaded machine', 'seeds differ', 'twice the deviation'],
)
def test_unreliable_times_are_marked_and_not_ranked(times, load, why, tmp_path) -> None:
    """Such a time is neither on the front, nor does it keep another row from it; it is in no plot."""
    records = [metric(name, seed, 50.0 + seed) for name in 'abc' for seed in range(len(times))]
    records += [speed(name, seed, ms) for name, ms in (('b', 50.0), ('c', 90.0)) for seed in range(len(times))]
    for seed, (median, low, high) in enumerate(times):
        forms = dict(reparameterized=dict(median_ms=median, low_ms=low, high_ms=high, throughput=1000 / median))
        records.append(record('a', seed, 'speed', dict(forms=forms), protocol=SPEED, facts=dict(load=load)))
    rows = rows_of(tmp_path, records)
    for key in ('milliseconds', 'throughput'):
        figure = rows['a'].figures[key]
        assert why in figure.unreliable and bool(figure.unreliable) == bool(why) and figure.unreliable in figure.why
    assert front_of(rows, 'milliseconds') == ({'b'} if why else {'a'})
    found = load_report([tmp_path])
    text, page = render_markdown(found), render_html(found)
    assert (' ? (' in text) == (' ?</span>' in page) == (' ?' in render_text(found.suites[0])) == bool(why)
    points = page.partition('against time')[2].partition('</figure>')[0]
    assert ('1 a' in points) == (not why)


def test_a_block_of_a_page_has_the_columns_with_figures(run, tmp_path) -> None:
    page = tmp_path / 'page.md'
    page.write_text('<!-- made_up:begin -->\nold\n<!-- made_up:end -->\n')
    work = write(tmp_path / 'work', [metric('a', 0, 50.0), speed('a', 0, 9.0)])
    assert run(work, '--out', tmp_path / 'out', '--page', page) == 0
    block = page.read_text().partition('begin -->\n')[2]
    assert '| Row | mIoU, % | Time, ms | Speed, images/s | State |' in block and 'old' not in block
    assert 'Provenance' not in block and 'Provenance' in (tmp_path / 'out/report.md').read_text()


# -- published --------------------------------------------------------------------------------------------------------
def published(tmp_path, miou=48.9, images=2000, options=None, shown=True, **changes):
    stated = dict(miou_ss=49.9, miou_ms=50.6, params_m=112, source='arXiv:2203.06717')
    one = metric(
        'a',
        0,
        miou,
        published=stated,
        config=dict(path=CONFIG, sha256='0', options=options or {}),
        protocol={**PROTOCOL, 'iterations': 160000, 'crop': [512, 512], **changes},
    )
    one['values']['images'] = images
    figures = rows_of(tmp_path, [one])['a'].figures
    assert ('>Published<' in render_html(load_report([tmp_path]))) == shown
    return figures


def test_difference_from_published(tmp_path) -> None:
    figures = published(tmp_path)
    assert figures['published'].value == 49.9 and figures['difference'].value == pytest.approx(-1.0)
    assert figures['difference'].why == ''
    augmented = published(tmp_path / 'tta', tta=True)
    assert augmented['published'].value == 50.6 and augmented['difference'].value == pytest.approx(48.9 - 50.6)


def test_other_data_have_no_difference(tmp_path) -> None:
    figures = published(tmp_path, images=80, shown=False)
    assert figures['published'].value == 49.9 and figures['difference'].value is None
    assert figures['difference'].why == (
        'the published figure is of ADE20K (2,000 images), the measured one of scenes (80 images)'
    )


def test_difference_lists_other_differing_conditions(tmp_path) -> None:
    figures = published(tmp_path, iterations=300, crop=[96, 96], options={'model.backbone.arch': '3'})
    assert figures['difference'].why == (
        'trained for 300 iterations, published after 160k iterations; config with options: {"model.backbone.arch": '
        '"3"}; crop 96 x 96, published with 512'
    )


def test_a_crop_is_the_published_one_if_both_sides_are(tmp_path) -> None:
    why = published(tmp_path, crop=[512, 1024])['difference'].why
    assert why == 'crop 512 x 1024, published with 512'
    assert not any(published(tmp_path / str(crop), crop=crop)['difference'].why for crop in (None, 512, [512, 512]))


def test_published_tables_of_a_suite(tmp_path) -> None:
    """Also of records whose table is not known here."""
    folder = write(tmp_path, [metric('a', 0, 50.0, quotes=['guidelines.shortcut', 'of another version'])])
    markdown, page = render_markdown(load_report([folder])), render_html(load_report([folder]))
    title = 'MobileNetV2 on ImageNet-1K, RepLKNet paper (arXiv:2203.06717), guideline 2'
    block = markdown.partition(title)[2].split('\n\n')[1]
    assert block.splitlines() == [
        '| Kernel | Shortcut | Top-1, % |',
        '| ---: | ---: | ---: |',
        '| 3 | yes | 71.76 |',
        '| 3 | no | 68.67 |',
        '| 13 | yes | 72.53 |',
        '| 13 | no | 53.98 |',
    ]
    assert f'<caption>{title}</caption>' in page and '<td>53.98</td>' in page
    assert 'Published, not measured here' not in render_html(
        load_report([write(tmp_path / 'b', [metric('a', 0, 5.0)])])
    )


def test_nothing_published(found) -> None:
    assert found.suites[0].rows[0].figures['published'].why == 'nothing is published for this config'


# -- protocols --------------------------------------------------------------------------------------------------------
def test_differences_name_the_place() -> None:
    one = dict(data=dict(root='a', images=2), steps=[dict(scale=[1, 2]), dict(flip=True)], only=1)
    other = dict(data=dict(root='a', images=3), steps=[dict(scale=[1, 3]), dict(flip=True)])
    assert protocol_differences(one, other) == [
        'data.images: 2 instead of 3',
        'steps.0.scale: 1 x 2 instead of 1 x 3',
        'only: 1 instead of not stated',
    ]
    assert protocol_differences(one, dict(reversed(one.items()))) == []
    assert protocol_differences(dict(a=True), dict(a=1)) == ['a: yes instead of 1']
    few = ['protocol: head instead of finetune', 'fraction: 10 instead of 100']
    assert protocol_differences(dict(protocol='head', fraction=10), {}) == few
    long = protocol_differences(dict(a='x' * 500 + 'left'), dict(a='x' * 500 + 'right'))[0]
    assert 'left' in long and 'right' in long and len(long) < 300


# -- damaged, odd and hostile records ---------------------------------------------------------------------------------
def test_damaged_files_are_named_and_the_page_is_written(run, tmp_path, capsys) -> None:
    folder = write(tmp_path / 'work', [metric('a', 0, 50.0)])
    good = (folder / 'results/a.0.jsonl').read_text()
    nan = good.replace('50.0', 'NaN')
    assert nan != good
    for name, text in (
        ('cut', good[: len(good) // 2]),
        ('newer', good.replace('"version": 1', '"version": 99')),
        ('nan', nan),
        ('binary', '\xff\xfe'),
        ('list', '[1]\n'),
        ('asked', good.replace('{"version"', '{"asked": 5, "version"')),
        ('deep', good.replace('"facts": {', '"facts": {"x": ' + '[' * 5000 + ']' * 5000)),
    ):
        (folder / f'results/{name}.jsonl').write_text(text, encoding='latin-1')
    assert run(folder, '--out', tmp_path / 'out') == SKIPPED_STATUS == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('skipped: ')]
    for name, why in (
        ('cut', 'not JSON'),
        ('newer', 'version 99'),
        ('nan', 'values.metrics.mIoU is not a finite number'),
        ('binary', 'not JSON'),
        ('list', 'list instead of an object'),
        ('asked', 'asked: Input should be a valid list'),
        ('deep', 'not JSON'),
    ):
        assert [line for line in lines if f'{name}.jsonl:1: ' in line and why in line], (name, lines)
    text = (tmp_path / 'out/index.html').read_text()
    assert '7 skipped' in text and 'nan.jsonl:1: values.metrics.mIoU is not a finite number' in text
    assert 'data-value="50.0"' in text and 'nan' not in re.findall(r'data-value="([^"]*)"', text)
    assert 'version 99' in (tmp_path / 'out/report.md').read_text()


def test_the_command(run, suite, tmp_path, capsys) -> None:
    assert run(suite, '--out', tmp_path / 'out') == 0
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'index.html', 'report.md'}
    assert run(tmp_path / 'no', '--out', tmp_path / 'out') == 2
    (tmp_path / 'file').touch()
    assert run(suite, '--out', tmp_path / 'file') == 2
    (tmp_path / 'taken' / 'index.html').mkdir(parents=True)
    capsys.readouterr()
    assert run(suite, '--out', tmp_path / 'taken') == 2
    assert f'error: {tmp_path / "taken" / "index.html"}: is not a regular file' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('--help')
    assert re.search(r'^ +3 +as 0, .*skipped', capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize('name, said', [('no', 'no such results'), ('empty', 'no results in it')])
def test_no_results(name, said, tmp_path) -> None:
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=said):
        load_report([tmp_path / name])


@pytest.mark.parametrize('content', ['{\n', 'a\nb\n', '', '{"version": 99}\n'])
def test_files_without_a_record_end_in_one_sentence(content, run, tmp_path, capsys) -> None:
    (tmp_path / 'x.jsonl').write_text(content)
    assert run(tmp_path / 'x.jsonl', '--out', tmp_path / 'out') == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2 and 'x.jsonl: no record' in error and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'values',
    [
        {},
        dict(metrics=None),
        dict(metrics=dict(mIoU='50')),
        dict(metrics=dict(mIoU=10**400)),
        dict(metrics=dict(mIoU=True)),
        dict(metrics=dict(mIoU=1e308)),
        dict(metrics=[], primary=[], unit=3),
    ],
)
def test_values_of_odd_kinds_are_missing(values, tmp_path) -> None:
    row = rows_of(
        tmp_path,
        [
            record('a', 0, 'metric', values, protocol=PROTOCOL),
            record('a', 0, 'curve', dict(loss=[[1], 'x', [1, None], [2, 'y']], metric=7), protocol=PROTOCOL),
        ],
    )['a']
    assert row.figures['metric'].value is None
    found = load_report([tmp_path])
    assert 'missing: the record holds no such figure' in render_html(found) and '– (1)' in render_markdown(found)


def test_results_of_several_machines_merge(tmp_path) -> None:
    folders = []
    for seed, name in enumerate(('one', 'other')):
        files = files_of(tmp_path / name, 'a', seed)
        data = scenes(tmp_path / name / 'data')
        folders.append(
            write(
                tmp_path / name,
                [
                    metric('a', seed, 50.0 + seed, files=files, facts=facts(data)),
                    record('a', seed, 'erf', dict(areas_of_scores={}), files=files, protocol=dict(size=9)),
                ],
            )
        )
    found = load_report([folders[0], folders[1] / 'results/a.1.jsonl'])
    row = found.suites[0].rows[0]
    assert row.figures['metric'].value == 50.5 and row.state == 'done, 2 seeds'
    assert [r.folder for r in row.of('metric')] == folders
    assert 'Receptive field of a' in render_html(found)
