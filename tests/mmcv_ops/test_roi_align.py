"""RoIAlign against its definition in float64, sample by sample."""

import itertools
import math

import numpy as np
import pytest
import torch

from replk_mm.mmcv_ops.roi_align import roi_align_backward, roi_align_forward


def bilinear(y: float, x: float, height: int, width: int) -> np.ndarray:
    """Weights of the cells at a position: a hat function around each cell; 0 beyond a cell off the map."""
    weights = np.zeros((height, width))
    if -1 <= y <= height and -1 <= x <= width:
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        for i, j in itertools.product(range(height), range(width)):
            weights[i, j] = max(0, 1 - abs(y - i)) * max(0, 1 - abs(x - j))
    return weights


def definition(features, rois, grad, bins, scale, ratio, mode, aligned):
    """Pooled regions, and the gradient of the features for one of the regions."""
    out, grad_in = np.zeros((len(rois), features.shape[1], *bins)), np.zeros(features.shape)
    height, width = features.shape[2:]
    for n, (index, *corners) in enumerate(rois):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in corners)
        h, w = (y2 - y1, x2 - x1) if aligned else (max(y2 - y1, 1), max(x2 - x1, 1))
        h, w = h / bins[0], w / bins[1]
        ny, nx = (ratio, ratio) if ratio else (math.ceil(h), math.ceil(w))
        for p, q in itertools.product(range(bins[0]), range(bins[1])):
            samples = [
                bilinear(y1 + (p + (a + 0.5) / ny) * h, x1 + (q + (b + 0.5) / nx) * w, height, width)
                for a, b in itertools.product(range(ny), range(nx))
            ]
            if not samples:
                continue
            for c in range(features.shape[1]):
                values = [(s * features[int(index), c]).sum() for s in samples]
                weights = sum(samples) / len(samples) if mode else samples[int(np.argmax(values))]
                out[n, c, p, q] = (weights * features[int(index), c]).sum()
                grad_in[int(index), c] += weights * grad[n, c, p, q]
    return out, grad_in


ROIS = torch.tensor(
    [
        [1.0, 3.0, 2.0, 40.0, 30.0],
        [0.0, -30.0, -20.0, 33.0, 70.0],  # reaches beyond the map on three sides
        [1.0, 12.0, 7.0, 15.0, 9.0],  # smaller than a cell
        [0.0, 0.0, 0.0, 55.0, 47.0],
        [0.0, 8.0, 8.0, 8.0, 8.0],  # without extent
        [1.0, 500.0, 500.0, 600.0, 530.0],  # off the map
    ]
)


def run(features, rois, grad, bins, scale, ratio, mode, aligned):
    arguments = dict(
        aligned_height=bins[0],
        aligned_width=bins[1],
        spatial_scale=scale,
        sampling_ratio=ratio,
        pool_mode=mode,
        aligned=aligned,
    )
    out = features.new_zeros(len(rois), features.shape[1], *bins)
    positions = [out.new_zeros(out.shape if mode == 0 else 0) for _ in range(2)]
    roi_align_forward(features, rois, out, *positions, **arguments)
    grad_in = torch.zeros_like(features)
    roi_align_backward(grad, rois, *positions, grad_in, **arguments)
    return out, grad_in


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('mode', [1, 0], ids=['avg', 'max'])
@pytest.mark.parametrize('ratio', [0, 1, 2])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(ratio, mode, aligned, layout, monkeypatch):
    monkeypatch.setattr('replk_mm.mmcv_ops.roi_align.MAX_SAMPLES', 100)  # max pooling in several parts
    features = torch.randn(2, 3, 6, 7).contiguous(memory_format=layout)
    grad = torch.randn(len(ROIS), 3, 2, 3).contiguous(memory_format=layout)
    results = run(features, ROIS, grad, (2, 3), 1 / 8, ratio, mode, aligned)
    as_double = (features.double().numpy(), ROIS.double().numpy(), grad.double().numpy())
    for result, truth in zip(results, definition(*as_double, (2, 3), 1 / 8, ratio, mode, aligned), strict=True):
        assert np.abs(truth).max() > 0.5
        np.testing.assert_allclose(result, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_other_types(dtype, tolerance):
    features, grad = torch.randn(2, 3, 6, 7).to(dtype), torch.randn(4, 3, 3, 3).to(dtype)
    rois = ROIS[:4].to(dtype)
    truth = definition(
        features.double().numpy(), rois.double().numpy(), grad.double().numpy(), (3, 3), 1 / 8, 3, 1, True
    )
    for result, expected in zip(run(features, rois, grad, (3, 3), 1 / 8, 3, 1, True), truth, strict=True):
        assert result.dtype == dtype
        np.testing.assert_allclose(result.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('mode', [1, 0])
def test_no_region_and_invalid_regions(mode):
    features = torch.randn(1, 2, 4, 4)
    out, grad_in = run(features, ROIS[:0], torch.zeros(0, 2, 2, 2), (2, 2), 1.0, 0, mode, True)
    assert out.shape == (0, 2, 2, 2) and not grad_in.any()
    rois = torch.tensor([[0.0, 1.0, 1.0, torch.nan, 3.0], [0.0, 1.0, 1.0, torch.inf, 3.0], [0.0, 3.0, 3.0, 1.0, 1.0]])
    out, grad_in = run(features, rois, torch.ones(3, 2, 2, 2), (2, 2), 1.0, 0, mode, True)
    assert not out.any() and not grad_in.any()
