"""The benchmark of the depthwise convolution: its arithmetic, its record, and the detection of wrong results."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.analysis import gpu
from replk_mm.analysis.benchmark import operator_benchmark, report
from replk_mm.analysis.benchmark.case import OURS, PLAIN, PLAIN_CHANNELS_LAST
from replk_mm.analysis.benchmark.operator_benchmark import COMPUTATIONS, LayerShape, benchmark_operator
from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d


@pytest.fixture(autouse=True)
def _no_roofline(monkeypatch) -> None:
    """A known speed of the matrix product and of a copy, whose measurements take a second."""
    monkeypatch.setattr(operator_benchmark, 'matmul_gflops', lambda dtype, device: 100.0)
    monkeypatch.setattr(operator_benchmark, 'copy_gbytes', lambda device: 10.0)


@pytest.fixture
def record(_no_roofline) -> dict:
    shapes = [LayerShape(kernel, size, 4, 1) for size in (8, 12) for kernel in ((3, 3), (3, 9))]
    found = benchmark_operator(shapes, implementations=['fft', 'padded'], repeats=3, warmup=0, seconds=0.0)
    return {**found, 'environment': report.describe_environment(False)}


@pytest.mark.parametrize(
    'shape', [LayerShape((5, 5), 12, 6, 2), LayerShape((7, 3), 11, 4, 1, 2), LayerShape((1, 9), 8, 5, 3)]
)
def test_gflop_equals_torchs_count(shape) -> None:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, requires_grad=True)
    weight = torch.randn(shape.channels, 1, *shape.kernel)
    with FlopCounterMode(display=False) as forward:
        out = F.conv2d(x, weight, None, shape.stride, [side // 2 for side in shape.kernel], 1, shape.channels)
    assert out.shape[-1] == shape.out_size
    assert 1e9 * shape.gflop('forward') == pytest.approx(forward.get_total_flops())
    assert shape.gflop('grad_weight') == shape.gflop('grad_input') == shape.gflop('forward')
    assert shape.gflop('step') == pytest.approx(3 * shape.gflop('forward'))
    if shape.stride == 1:
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert 1e9 * shape.gflop('grad_input') == pytest.approx(backward.get_total_flops())


def test_bytes_are_those_of_each_tensor_once() -> None:
    """4 bytes for each element of input (2x4x8x8), output (2x4x4x4) and weight (4x1x3x5)."""
    shape = LayerShape((3, 5), 8, 4, 2, stride=2)
    assert {shape.gbytes(name, 4) for name in ('forward', 'grad_input', 'grad_weight')} == {4 * (512 + 128 + 60) / 1e9}
    assert shape.gbytes('step', 2) == pytest.approx(3 * 2 * 700 / 1e9)


def test_record(record, tmp_path) -> None:
    assert len(record['points']) == 4 * len(COMPUTATIONS)
    for point in record['points']:
        names = [row['name'] for row in point['rows']]
        assert names[:2] == [PLAIN, OURS] and 'forward' in point['chosen']
        forced = [
            name for name in ('fft', 'padded') if name in IMPLEMENTATIONS.get(point['computation'], ('fft', 'padded'))
        ]
        assert names[2:] == [f'{OURS}, {name}' for name in forced]
        for row in point['rows']:
            assert len(row['samples']) == point['rounds'] == 3
            assert row['gflops'] == pytest.approx(1e3 * point['gflop'] / row['milliseconds']['median'])
            assert row['of_matrix_product'] == pytest.approx(row['gflops'] / 100)
            assert row['gbytes_per_second'] == pytest.approx(1e3 * point['gbytes'] / row['milliseconds']['median'])
            assert row['of_copy'] == pytest.approx(row['gbytes_per_second'] / 10)
            assert row['equal'] is (None if row['name'] == PLAIN else True)
    assert report.all_equal(record)
    report.write_record(record, tmp_path)
    assert json.loads((tmp_path / 'benchmark.json').read_text(), parse_constant=pytest.fail)['points']
    table = (tmp_path / 'table.txt').read_text()
    # One row for each implementation that was measured.
    assert table.count(f'  {OURS}') == sum(len(point['rows']) - 1 for point in record['points'])
    assert 'DIFFERENT' not in table and 'nan' not in table


def test_wrong_results_are_marked(monkeypatch) -> None:
    right = DepthwiseConv2d.forward
    monkeypatch.setattr(DepthwiseConv2d, 'forward', lambda self, x: right(self, x) * 1.01)
    found = benchmark_operator([LayerShape((3, 3), 8, 2, 1)], repeats=3, warmup=0, seconds=0.0)
    assert not report.all_equal(found)
    assert 'DIFFERENT' in report.format_record({**found, 'environment': report.describe_environment(True)})


def test_unreliable_times_are_marked_with_the_reason(record) -> None:
    for point in record['points']:
        for row in point['rows']:
            row['unreliable'] = ''
    assert '?' not in report.format_record(record)
    plain, ours, *_ = record['points'][0]['rows']
    ours['unreliable'] = 'the quartiles are wide'
    text = report.format_record(record)
    assert text.count(') ?') == 2 and '? not reliable' in text and 'the quartiles are wide' in text
    plain['unreliable'], ours['unreliable'] = 'busy', ''
    rows = len(record['points'][0]['rows']) - 1  # the ratios to an unreliable time, and that time
    assert report.format_record(record).count(') ?') == rows


def test_memory_layouts() -> None:
    """Plain torch gets torch's default layout and ours channels-last, whatever the layout of the input."""
    layers = dict(operator_benchmark._build_layers(LayerShape((3, 3), 8, 4, 2), 'float32', [], 'cpu'))
    x = torch.randn(2, 4, 8, 8)
    assert operator_benchmark._to_layout(x.contiguous(memory_format=torch.channels_last), PLAIN).is_contiguous()
    assert operator_benchmark._to_layout(x, OURS).is_contiguous(memory_format=torch.channels_last)
    assert type(layers[PLAIN]) is nn.Conv2d and layers[PLAIN].weight is layers[OURS].weight


def test_precisions_memory_and_time(monkeypatch) -> None:
    """A shape that does not fit into memory gets a note, and none starts after the limit. The rest is measured."""
    measured, times = [], iter([0.0, 1.0, 2.0, 9.0])
    right = operator_benchmark._measure_layer

    def measure_layer(shape, dtype, *args):
        if shape.size == 9 and dtype == 'float32':
            raise torch.cuda.OutOfMemoryError('CUDA out of memory.')
        return right(shape, dtype, *args)

    monkeypatch.setattr(operator_benchmark, '_measure_layer', measure_layer)
    monkeypatch.setattr(operator_benchmark, 'time', SimpleNamespace(monotonic=lambda: next(times)))
    shapes = [LayerShape((3, 3), size, 4, 1) for size in (9, 8)]
    found = benchmark_operator(
        shapes,
        ['float32', 'bfloat16'],
        repeats=3,
        warmup=0,
        seconds=0.0,
        limit=5.0,
        save=lambda record: measured.append(len(record['points'])),
    )
    assert [(p['size'], p['dtype']) for p in found['points']] == [(9, 'bfloat16')] * 4 and measured == [0, 4]
    notes = ' '.join(found['notes'])
    assert 'on 1x4x9x9, float32: not measured: out of memory' in notes and '2 not measured for lack of time' in notes
    assert all(row['equal'] in (None, True) for point in found['points'] for row in point['rows'])


def test_tables_of_gpus(record) -> None:
    """2 ms, 1 MiB, 1 % of the product and half of the copy; clocks where nvidia-smi states them."""
    for row in (row for point in record['points'] for row in point['rows']):
        row.update(milliseconds=dict(median=2.0, low=1.5, high=2.5), memory_bytes=2**20, gflops=1200.0)
        row['unreliable'] = ''
        row.update(of_matrix_product=0.01, gbytes_per_second=50.0, of_copy=0.5, times_as_fast=dict(row['milliseconds']))
    state = dict(capability='9.0', memory_gib=139.8, cudnn=91300, cudnn_benchmark=False)
    stated = {**state, **dict.fromkeys(gpu._FIELDS, '77')}
    environment = {**record['environment'], 'gpu': 'NVIDIA H200', 'gpu_before': state, 'gpu_after': stated}
    gpu_record = {**record, 'device': 'cuda', 'environment': environment}
    text = report.format_record(gpu_record, markdown=True)
    cells = (
        '| 3x3 | 8 | forward | plain torch | 2.000 (1.500-2.500) | 1.20 | 1.0% | 50 | 50% | 1 | 2.00 (1.50-2.50) | ref'
    )
    assert cells in text and '\n\n| kernel |' in text and text.count(PLAIN + ' |') == len(record['points'])
    assert 'a copy at 10 GB/s' in text and 'NVIDIA H200' in text and 'compute capability 9.0' in text
    assert 'before: clocks and power not stated' in text and 'after: 77 of 77 MHz' in text
    lines = report.format_record(gpu_record).splitlines()
    assert any(line.split()[:5] == ['3x3', '8', 'forward', 'plain', 'torch'] for line in lines)


@pytest.mark.gpu
def test_gpu() -> None:
    shapes = [LayerShape((7, 7), 16, 32, 2), LayerShape((51, 5), 16, 32, 2)]
    found = benchmark_operator(shapes, list(gpu.DTYPES), device='cuda', repeats=3, warmup=1, seconds=0.1)
    assert len(found['points']) == len(shapes) * len(gpu.DTYPES) * len(COMPUTATIONS) and report.all_equal(found)
    for point in found['points']:
        assert [row['name'] for row in point['rows']] == [PLAIN, PLAIN_CHANNELS_LAST, OURS]
        assert all(row['memory_bytes'] > 0 and min(row['samples']) > 0 for row in point['rows'])
