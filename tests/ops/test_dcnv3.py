"""DCNv3 against its definition, pixel by pixel in float64."""

import math

import pytest
import torch

from replk_mm.ops.dcnv3 import dcnv3


def bilinear(image, x, y):
    """The value at x, y of an (H, W, C) image with zeros around it."""
    left, top = math.floor(x), math.floor(y)
    total = torch.zeros(image.shape[-1], dtype=image.dtype)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                total = total + image[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return total


def definition(value, offset, mask, scale):
    (n, h, w, c), groups = value.shape, mask.shape[-1] // 9
    out, width = torch.zeros(n, h, w, c, dtype=value.dtype), c // groups
    points = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]  # columns first
    for i in range(n):
        for row in range(h):
            for column in range(w):
                for g in range(groups):
                    part = slice(g * width, (g + 1) * width)
                    for k, (x, y) in enumerate(points):
                        dx, dy = offset[i, row, column, 2 * (9 * g + k) :][:2].tolist()
                        sample = bilinear(value[i, ..., part], column + scale * (x + dx), row + scale * (y + dy))
                        out[i, row, column, part] += mask[i, row, column, 9 * g + k] * sample
    return out


def arguments(n=2, h=4, w=5, groups=3, width=2, spread=2.0):
    torch.manual_seed(0)
    value = torch.randn(n, h, w, groups * width, dtype=torch.float64)
    offset = spread * torch.randn(n, h, w, groups * 18, dtype=torch.float64)  # many samples are outside
    return value, offset, torch.rand(n, h, w, groups * 9, dtype=torch.float64)


@pytest.mark.parametrize('scale', [1.0, 2.0])
def test_definition(scale):
    value, offset, mask = arguments()
    expected = definition(value, offset, mask, scale)
    assert (dcnv3(value, offset, mask, scale) - expected).abs().max() < 1e-12
    single = dcnv3(value.float(), offset.float(), mask.float(), scale)
    assert single.dtype == torch.float32 and (single - expected).abs().max() < 1e-5
    half = [t.bfloat16() for t in (value, offset, mask)]
    rounded = dcnv3(*(t.double() for t in half), scale)
    found = dcnv3(*half, scale)
    assert found.dtype == torch.bfloat16 and (found - rounded).abs().max() < 2**-8 * rounded.abs().max()


def test_gradients():
    value, offset, mask = (t.requires_grad_() for t in arguments(1, 3, 2, 2, 1, 0.7))
    assert torch.autograd.gradcheck(lambda *args: dcnv3(*args, 1.5), (value, offset, mask))
