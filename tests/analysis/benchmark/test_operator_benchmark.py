"""The benchmark of the depthwise convolution: its arithmetic, its record, and the detection of wrong results."""

import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.analysis.benchmark import operator_benchmark, report
from replk_mm.analysis.benchmark.case import OURS, PLAIN
from replk_mm.analysis.benchmark.operator_benchmark import COMPUTATIONS, LayerShape, benchmark_operator
from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d


@pytest.fixture(autouse=True)
def _no_roofline(monkeypatch) -> None:
    """A known speed of the matrix product, whose measurement takes a second."""
    monkeypatch.setattr(operator_benchmark, 'matmul_gflops', lambda dtype, device: 100.0)


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
