"""The joint convolution of a pyramid against resizing, concatenating and convolving, in float64."""
import pytest
import torch
import torch.nn.functional as F

from replk_mm.ops import pyramid
from replk_mm.ops.pyramid import conv_of_resized

# Sizes of the maps.
SIZES = {
    'halved': [(16, 24), (8, 12), (4, 6), (2, 3)],
    'odd': [(17, 23), (9, 12), (5, 6), (3, 3)],
    'pooled': [(6, 8), (1, 1), (2, 2), (3, 3), (6, 6)],
    'all of one size': [(5, 7), (5, 7)],
    'larger than the first': [(4, 4), (2, 2), (8, 8)],
    'one pixel': [(1, 1), (1, 1)],
    'one row': [(1, 20), (1, 5)],
    'one map': [(6, 5)],
}


def reference(maps, weight, bias, align_corners):
    size = maps[0].shape[2:]
    resized = [F.interpolate(x, size, mode='bilinear', align_corners=align_corners) for x in maps[1:]]
    return F.conv2d(torch.cat([maps[0], *resized], 1), weight, bias, padding=1)


@pytest.mark.parametrize('min_macs', [0, 10 ** 9], ids=['taken apart', 'as it is'])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['default', 'channels-last'])
@pytest.mark.parametrize('case', SIZES)
def test_output_and_gradients(case, layout, align_corners, min_macs, monkeypatch):
    monkeypatch.setattr(pyramid, 'MIN_MACS', min_macs)
    calls, real = [], pyramid._share
    monkeypatch.setattr(pyramid, '_share', lambda *args: (calls.append(args), real(*args))[1])
    maps = [torch.randn(2, 3 + i, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
            for i, size in enumerate(SIZES[case])]
    weight = torch.randn(5, sum(x.shape[1] for x in maps), 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected, found = (conv(maps, weight, bias, align_corners) for conv in (reference, conv_of_resized))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, [*maps, weight, bias], grad) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    height, width = SIZES[case][0]
    small = sum(2 * h * w <= height * width for h, w in SIZES[case][1:])
    assert len(calls) == (small if min_macs == 0 else 0)


def test_second_derivative_is_refused_not_wrong(monkeypatch):
    monkeypatch.setattr(pyramid, 'MIN_MACS', 0)
    maps = [torch.randn(1, 2, s, s, dtype=torch.float64, requires_grad=True) for s in (8, 4)]
    weight = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    grad, = torch.autograd.grad(conv_of_resized(maps, weight).square().sum(), maps[1], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match='3x3'):
        conv_of_resized([torch.randn(1, 2, 4, 4)], torch.randn(2, 2, 5, 5))
