"""Receptive fields of any module: planted Gaussians, closed forms of linear networks, an environment of torch alone."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

from replk_mm.analysis.receptive_field import ImageShares, areas, contributions, effective_receptive_field, fit_gaussian
from replk_mm.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def plant(size, center, widths, angle):
    """A Gaussian with these widths along its long and short axis; the angle counts from the right, upwards."""
    y, x = np.mgrid[:size, :size].astype(float)
    t = np.radians(angle)
    along = (x - center[1]) * np.cos(t) - (y - center[0]) * np.sin(t)
    across = (x - center[1]) * np.sin(t) + (y - center[0]) * np.cos(t)
    return np.exp(-((along / widths[0]) ** 2 + (across / widths[1]) ** 2) / 2)


@pytest.mark.parametrize(
    ('size', 'center', 'widths', 'angle'),
    [
        (65, (32, 32), (8, 5), 30),
        (64, (20.5, 40), (12, 3), -70),
        (64, (32, 32), (60, 40), 45),  # most of it outside the image: the moments give 18 and 17
        (64, (2, 60), (25, 12), 0),
        (64, (31.7, 32.2), (1.2, 0.9), 90),
        (64, (32, 32), (9, 8.5), 10),
    ],
)
def test_planted_widths_are_recovered(size, center, widths, angle):
    rng = np.random.default_rng(0)
    planted = plant(size, center, widths, angle)
    found = fit_gaussian(3e-9 * planted)
    assert found.widths == pytest.approx(widths, rel=1e-4) and found.residual < 1e-4
    assert found.center == pytest.approx(center, abs=0.01)
    assert abs((found.angle - angle + 90) % 180 - 90) < 0.1
    if 4 < widths[1] < 40:  # noise as of an average over some images
        noisy = fit_gaussian(planted * rng.gamma(100, 0.01, planted.shape))
        assert noisy.widths == pytest.approx(widths, rel=0.02)
        assert noisy.residual == pytest.approx(0.1, rel=0.1), 'the noise has 10 % of each score'


def test_residual_of_something_else_is_the_unexplained_norm():
    """Of a cone in an image, the best isotropic Gaussian by brute force."""
    y, x = np.mgrid[:41, :41] - 20.0
    cone = np.maximum(0, 1 - np.hypot(y, x) / 15)

    def left(width):
        bell = np.exp(-(y**2 + x**2) / 2 / width**2)
        height = (bell * cone).sum() / (bell**2).sum()
        return np.linalg.norm(cone - height * bell) / np.linalg.norm(cone)

    best = min(np.arange(3, 10, 0.01), key=left)
    found = fit_gaussian(cone)
    assert found.widths == pytest.approx((best, best), abs=0.02) and found.residual == pytest.approx(left(best), 1e-3)
    assert found.residual > 0.05
    assert fit_gaussian(np.zeros((5, 5))) is None


def test_gaussian_network_has_gaussian_receptive_fields_at_all_positions():
    """Two convolutions with Gaussian kernels have the width sqrt(a^2 + b^2) = 2.5 around each position."""
    convs = [nn.Conv2d(1, 1, 15, padding=7, bias=False) for _ in range(2)]
    for conv, width in zip(convs, (1.5, 2.0), strict=True):
        conv.weight.data[0, 0] = torch.from_numpy(plant(15, (7, 7), (width, width), 0))
    network = nn.Sequential(*convs).double().eval()
    positions = ((0.5, 0.5), (0.25, 0.75))
    image = torch.ones(1, 1, 48, 40, dtype=torch.float64)
    both = contributions(copy.deepcopy(network), image, None, positions)[0]
    for position, pixel, scores in zip(positions, [(24, 20), (12, 30)], both.numpy(), strict=True):
        found = effective_receptive_field(network, [image, 0.5 * image], position=position)
        assert np.abs(found.scores - scores).max() < 1e-12 and found.map_shape == (1, 1, 48, 40)
        gaussian = fit_gaussian(found.scores)
        assert gaussian.widths == pytest.approx((2.5, 2.5), rel=0.01)
        assert gaussian.center == pytest.approx(pixel, abs=0.1)
        # A square of half side a holds erf(a / (2.5 sqrt 2))^2 of it: 50 % at a = 2.63, so 7 pixels around its pixel.
        assert areas(found.scores, pixel)['0.5']['side'] == 7
        assert ImageShares(('a', 'b'), found.profiles).score() == pytest.approx(2 * 2.63, rel=0.02)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())


def test_squares_around_any_pixel_by_summing():
    matrix = np.random.default_rng(0).random((12, 17)) ** 4
    row, column = 3, 13
    for share, area in areas(matrix, (row, column)).items():
        radius, inside = next(
            (i, inside)
            for i in range(17)
            if (inside := matrix[max(0, row - i) : row + i + 1, max(0, column - i) : column + i + 1]).sum()
            >= float(share) * matrix.sum() - 1e-12
        )
        assert area['ratio'] == pytest.approx(inside.size / (12 * 17))
        assert area['side'] == min(2 * radius + 1, 26), 'the left border is 13 pixels away'


def test_share_of_weighted_images():
    """Weights are as repeating images; between odd sides the contribution grows evenly."""
    profiles = np.array([[4.0, 0, 0, 0], [0, 0, 0, 4]])
    shares = ImageShares(('a', 'b'), profiles)
    weights = np.array([[1, 0], [0, 1], [3, 1], [1, 3], [0, 0]])
    # a holds half in half of its pixel; b in the middle of ring 3, between sides 5 and 7.
    assert shares.score(weights)[:4] == pytest.approx([0.5, 6, 8 / 12, 5 + 2 / 3])
    assert np.isnan(shares.score(weights)[4]) and shares.score().shape == (1,)
    repeated = ImageShares(('a', 'b', 'c', 'd'), profiles[[0, 1, 1, 1]])
    assert repeated.score() == pytest.approx(shares.score(np.array([[1, 3]])))


@pytest.mark.parametrize(
    ('network', 'error', 'fragment'),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout()), UserError, 'training mode'),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), UserError, 'before its pooling'),
        (nn.Threshold(1e9, float('inf')).eval(), None, ''),
    ],
)
def test_networks_that_cannot_be_measured(network, error, fragment):
    if error:
        with pytest.raises(error, match=fragment):
            effective_receptive_field(network, [torch.rand(1, 3, 8, 8)])
    else:
        assert effective_receptive_field(network, [torch.rand(1, 3, 8, 8)]).silent == 1
    with pytest.raises(UserError, match='no images'):
        effective_receptive_field(nn.Identity().eval(), [])


@pytest.mark.slow
def test_torch_and_numpy_are_enough():
    """A plain network in a process in which nothing else can be imported."""
    program = """
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in 'mmengine mmcv mmseg mmdet scipy pydantic PIL rich cv2 matplotlib'.split():
            raise ImportError(name)
sys.meta_path.insert(0, Only())
import torch
from torch import nn
from replk_mm.analysis.receptive_field import areas, effective_receptive_field, fit_gaussian
network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1)).eval()
found = effective_receptive_field(network, [torch.rand(1, 3, 32, 32)])
print(areas(found.scores)['0.99']['side'], fit_gaussian(found.scores).widths[0] > 0)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[1:] == ['True'], done.stderr
    assert int(done.stdout.split()[0]) <= 7, 'two 3x3 convolutions, the first of stride 2, see 7 pixels'
