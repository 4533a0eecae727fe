"""The joint convolution of a pyramid against resizing, concatenating and convolving, in float64."""

import pytest
import torch
import torch.nn.functional as F

from replk_mm.heads import pyramid
from replk_mm.heads.pyramid import pyramid_conv2d

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


@pytest.mark.parametrize('min_macs', [0, 10**9], ids=['taken apart', 'as it is'])
@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['default', 'channels-last'])
@pytest.mark.parametrize('case', SIZES)
def test_output_and_gradients(case, layout, align_corners, min_macs, monkeypatch):
    monkeypatch.setattr(pyramid, 'MIN_MACS', min_macs)
    calls, real = [], pyramid._conv_resized
    monkeypatch.setattr(pyramid, '_conv_resized', lambda *args: (calls.append(args), real(*args))[1])
    maps = [
        torch.randn(2, 3 + i, *size, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
        for i, size in enumerate(SIZES[case])
    ]
    weight = torch.randn(5, sum(x.shape[1] for x in maps), 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    expected, found = (conv(maps, weight, bias, align_corners) for conv in (reference, pyramid_conv2d))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, [*maps, weight, bias], grad) for out in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    height, width = SIZES[case][0]
    small = sum(2 * h * w <= height * width for h, w in SIZES[case][1:])
    assert len(calls) == (small if min_macs == 0 else 0)


@pytest.mark.parametrize('how', ['autocast', 'bfloat16'])
def test_bfloat16_is_no_less_accurate_than_torchs(how, monkeypatch):
    """Output and gradients beside float64; torch resizes, concatenates and convolves in bfloat16."""
    monkeypatch.setattr(pyramid, 'MIN_MACS', 0)
    dtype = torch.bfloat16 if how == 'bfloat16' else torch.float32
    tensors = [torch.randn(2, 24, s, s).contiguous(memory_format=torch.channels_last).to(dtype) for s in (24, 12, 6, 3)]
    tensors.append((0.1 * torch.randn(20, 96, 3, 3)).to(dtype))
    grad = torch.randn(2, 20, 24, 24)

    def run(conv, precision):
        *maps, weight = leaves = [t.to(precision).requires_grad_() for t in tensors]
        with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast' and precision != torch.float64):
            out = conv(maps, weight, None, False)
        assert out.dtype == (torch.float64 if precision == torch.float64 else torch.bfloat16)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact, theirs, ours = run(reference, torch.float64), run(reference, dtype), run(pyramid_conv2d, dtype)
    for e, t, o in zip(exact, theirs, ours, strict=True):
        off, usual = ((x.double() - e).square().mean().sqrt() for x in (o, t))
        assert 0 < off <= 1.3 * usual < 0.02 * e.square().mean().sqrt()


def test_second_derivative_is_rejected(monkeypatch):
    monkeypatch.setattr(pyramid, 'MIN_MACS', 0)
    maps = [torch.randn(1, 2, s, s, dtype=torch.float64, requires_grad=True) for s in (8, 4)]
    weight = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(pyramid_conv2d(maps, weight).square().sum(), maps[1], create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_other_kernels_are_rejected():
    with pytest.raises(ValueError, match='3x3'):
        pyramid_conv2d([torch.randn(1, 2, 4, 4)], torch.randn(2, 2, 5, 5))
