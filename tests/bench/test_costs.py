"""Costs on another device in the place of those measured here."""

import json
from pathlib import Path

import pytest
from report_records import SPEED, metric, record, speed, write

from replk_mm.bench.costs import read_costs
from replk_mm.bench.report.load import load_report
from replk_mm.bench.report.structures import Report, ReportRow
from replk_mm.errors import UserError


def benchmark(path: Path, backbone: str = 'convnext-atto', ms: float = 50.0, **changes) -> Path:
    """A made-up output of tools/benchmark.py."""
    times = dict(median=ms, low=0.9 * ms, high=1.1 * ms)
    rows = [
        dict(name='plain torch', dtype='float32', milliseconds=dict(median=1.0, low=1.0, high=1.0), memory_bytes=1),
        dict(name='ours', dtype='float32', milliseconds=times, memory_bytes=3 * 2**20, joules=0.25),
    ]
    content = dict(
        what='model',
        config='configs/upernet_replk-nano_demo.py',
        cfg_options=dict(backbone=backbone),
        points=[
            dict(mode='inference', form='reparameterized', batch=2, height=96, width=128, load=0.01, rows=rows),
            dict(mode='train', form='training', batch=2, height=96, width=128, rows=rows),
        ],
        environment=dict(cpu='A phone', threads=4, torch='2.0'),
    )
    path.write_text(json.dumps({**content, **changes}))
    return path


def results(folder: Path) -> Path:
    """Two backbones, two seeds each."""
    found = []
    for row in ('convnext-atto', 'van-b0'):
        config = dict(path='replk_mm::upernet_replk-nano_demo.py', sha256='c' * 64, options=dict(backbone=row))
        asked = dict(asked=['metric', 'speed', 'memory'], config=config)
        for seed in (0, 1):
            memory = record(row, seed, 'memory', dict(inference_bytes=9 * 2**20), protocol=SPEED, **asked)
            found += [metric(row, seed, 50.0 + seed, **asked), speed(row, seed, 10.0, **asked), memory]
    return write(folder, found)


def rows_of(report: Report) -> dict[str, ReportRow]:
    return {row.name: row for row in report.suites[0].rows}


def test_costs_replace_speed_and_memory_of_their_row(tmp_path) -> None:
    report = load_report([results(tmp_path)], read_costs([benchmark(tmp_path / 'a.json')]))
    rows = {name: row.figures for name, row in rows_of(report).items()}
    of_device = {key: rows['convnext-atto'][key] for key in ('milliseconds', 'throughput', 'memory', 'energy')}
    assert {key: figure.value for key, figure in of_device.items()} == dict(
        milliseconds=50.0, throughput=2 / 0.05, memory=3.0, energy=0.25
    )
    times = rows_of(report)['convnext-atto'].of('speed')[0]['values']['forms']['reparameterized']
    assert (times['low_ms'], times['high_ms']) == (45.0, pytest.approx(55.0))
    assert rows['van-b0']['milliseconds'].value == 10.0 and rows['van-b0']['memory'].value == 9.0
    # measured under other conditions, and so not ranked together
    names = {row: rows[row]['milliseconds'].protocol for row in rows}
    assert names['convnext-atto'] != names['van-b0']
    [differing] = {p.name: p for p in report.suites[0].protocols['speed']}.keys() - {names['van-b0']}
    found = {p.name: p.content for p in report.suites[0].protocols['speed']}[differing]
    expected = dict(device='cpu', cpu='A phone', threads=4, torch='2.0', shape=[96, 128], batch=2, precision='float32')
    assert found == expected | dict(timed='model of upernet_replk-nano_demo.py')
    assert [row.state for row in report.suites[0].rows] == ['done, 2 seeds'] * 2
    # a device measures a network, not its seeds
    assert len(rows_of(report)['convnext-atto'].of('speed')) == len(rows_of(report)['convnext-atto'].of('memory')) == 1


def test_conditions_of_a_gpu_and_of_a_backbone_alone(tmp_path) -> None:
    environment = dict(cpu='A board', gpu='A small GPU', threads=4, torch='2.0')
    [cost] = read_costs([benchmark(tmp_path / 'a.json', what='backbone', environment=environment)]).values()
    assert cost['memory']['protocol']['device'] == 'A small GPU'
    assert cost['speed']['protocol']['timed'] == 'backbone alone'


@pytest.mark.parametrize('load', [0.01, 0.9])
def test_times_of_a_busy_device_are_not_reliable(load, tmp_path) -> None:
    path = benchmark(tmp_path / 'a.json')
    content = json.loads(path.read_text())
    content['points'][0]['load'] = load
    content['points'][0]['rows'][1]['milliseconds'] = dict(median=50.0, low=49.5, high=50.5)
    path.write_text(json.dumps(content))
    figures = rows_of(load_report([results(tmp_path)], read_costs([path])))['convnext-atto'].figures
    assert bool(figures['milliseconds'].unreliable) == (load > 0.5) and not figures['memory'].unreliable


def changed(path: Path, place: list, value: object) -> Path:
    content = json.loads(benchmark(path).read_text())
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ('place', 'value', 'fragment'),
    [
        (['what'], 'op', 'what: '),
        (['points', 0, 'rows', 1, 'milliseconds', 'median'], 0, 'points.0.rows.1.milliseconds.median: '),
        (['points', 0, 'rows', 1, 'milliseconds'], dict(median=1.0), 'points.0.rows.1.milliseconds: '),
        (['points', 0, 'rows', 1, 'milliseconds', 'median'], float('inf'), 'points.0.rows.1.milliseconds.median: '),
        (['points', 0, 'rows', 1, 'joules'], -1, 'points.0.rows.1.joules: '),
        (['points', 0, 'mode'], 'train', 'points: expected one of inference with'),
        (['points', 1, 'mode'], 'inference', 'found 2 x 96 x 128, 2 x 96 x 128'),
        (['points', 0, 'rows'], [], "one of inference with a row 'ours'"),
        (['environment'], None, 'environment: '),
    ],
)
def test_a_bad_file_is_named_with_the_key(place, value, fragment, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        read_costs([changed(tmp_path / 'bad.json', place, value)])
    assert str(error.value).startswith(f'{tmp_path}/bad.json: ') and fragment in str(error.value).splitlines()[0]


def test_a_network_twice_and_a_missing_file_are_rejected(tmp_path) -> None:
    with pytest.raises(UserError, match='b.json: convnext-atto is also in .*a.json'):
        read_costs([benchmark(tmp_path / 'a.json'), benchmark(tmp_path / 'b.json')])
    with pytest.raises(UserError, match='missing.json: cannot be read'):
        read_costs([tmp_path / 'missing.json'])


@pytest.mark.parametrize('options', [dict(backbone='swin-tiny'), {'model.backbone.kernel_size': 31}])
def test_costs_of_no_row_are_listed(options, tmp_path) -> None:
    """Another kernel is another network; the report is written all the same."""
    options = dict(backbone='convnext-atto') | options
    costs = read_costs([benchmark(tmp_path / 'b.json', cfg_options=options)])
    report = load_report([results(tmp_path)], costs)
    assert [row.figures['milliseconds'].value for row in report.suites[0].rows] == [10.0, 10.0]
    assert report.complaints == [f'{tmp_path}/b.json: no row has its network, {options["backbone"]}']
