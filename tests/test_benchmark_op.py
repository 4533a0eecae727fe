"""The benchmark of the operator: what is counted and timed, in which layout, and whether it is right."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from benchmark_cases import operators  # noqa: F401 (a fixture)
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.analysis import benchmark_op, benchmark_report
from replk_mm.analysis.benchmark_op import Shape
from replk_mm.analysis.plain import OURS, PLAIN
from replk_mm.errors import UserError
from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d

# ruff: noqa: F811 (fixtures that come from another file)


@pytest.mark.parametrize('shape', [Shape(5, 12, 6, 2), Shape(7, 11, 4, 1, 2), Shape(3, 8, 5, 3)])
def test_arithmetic_is_what_torch_counts(shape) -> None:
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, requires_grad=True)
    weight = torch.randn(shape.channels, 1, shape.kernel, shape.kernel)
    with FlopCounterMode(display=False) as forward:
        out = F.conv2d(x, weight, None, shape.stride, shape.kernel // 2, 1, shape.channels)
    assert out.shape[-1] == shape.out
    assert 1e9 * shape.gflop('forward') == pytest.approx(forward.get_total_flops())
    assert shape.gflop('grad_weight') == shape.gflop('grad_input') == shape.gflop('forward')
    assert shape.gflop('step') == pytest.approx(3 * shape.gflop('forward'))
    if shape.stride == 1:
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        assert 1e9 * shape.gflop('grad_input') == pytest.approx(backward.get_total_flops())


def test_operator_record(operators) -> None:
    assert len(operators['points']) == 4 * len(benchmark_op.COMPUTATIONS)
    for point in operators['points']:
        names = [row['name'] for row in point['rows']]
        assert names[:2] == [PLAIN, OURS] and 'forward' in point['chosen']
        forced = [name for name in ('fft', 'padded')
                  if name in IMPLEMENTATIONS.get(point['computation'], ('fft', 'padded'))]
        assert names[2:] == [f'{OURS}, {name}' for name in forced]
        for row in point['rows']:
            assert len(row['samples']) == point['rounds'] == 3
            assert row['gflops'] == pytest.approx(1e3 * point['gflop'] / row['milliseconds']['median'])
            assert row['of_matrix_product'] == pytest.approx(row['gflops'] / operators['matrix_product_gflops'])
            assert row['equal'] is (None if row['name'] == PLAIN else True)
    assert benchmark_report.all_equal(operators)


def test_wrong_operator_is_found_out(monkeypatch) -> None:
    right = DepthwiseConv2d.forward
    monkeypatch.setattr(DepthwiseConv2d, 'forward', lambda self, x: right(self, x) * 1.01)
    record = benchmark_op.run([Shape(3, 8, 2, 1)], repeats=3, warmup=0, seconds=0.)
    assert not benchmark_report.all_equal(record)
    assert 'DIFFERENT' in benchmark_report.text({**record, 'environment': benchmark_report.environment(True)})


@pytest.mark.parametrize('shape, names, said', [
    (Shape(4, 8, 2, 1), [], '--kernels 4'), (Shape(3, 8, 2, 1), ['winograd'], 'Choose from channels_last')])
def test_operator_refusals(shape, names, said) -> None:
    with pytest.raises(UserError, match=said):
        benchmark_op.run([shape], implementations=names)


def test_layouts_that_are_timed() -> None:
    """Plain torch gets torch's default layout and ours channels-last, whatever came before."""
    layers = dict(benchmark_op._layers(Shape(3, 8, 4, 2), 'float32', [], 'cpu'))
    x = torch.randn(2, 4, 8, 8)
    assert benchmark_op._laid_out(x.contiguous(memory_format=torch.channels_last), PLAIN).is_contiguous()
    assert benchmark_op._laid_out(x, OURS).is_contiguous(memory_format=torch.channels_last)
    assert type(layers[PLAIN]) is nn.Conv2d and layers[PLAIN].weight is layers[OURS].weight
