"""Energy of kernels against closed forms; cropped networks against slices of the kernels by hand."""

import json

import numpy as np
import pytest
import torch
import torch.nn as nn
from tiny import tiny, trained  # noqa: F401 (fixtures)

from replk_mm.analysis.kernel_energy import central_energy, crop_kernels, large_kernels, measure_kernels
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.config import build_model
from replk_mm.engine.inference import build_for_inference
from replk_mm.errors import UserError

# ruff: noqa: F811 (fixtures that come from another file)


def test_energy_of_planted_kernels():
    """Of equal weights the share of a square is its area; of weights q^|x| q^|y| it is a geometric sum, squared."""
    ones = torch.ones(4, 1, 31, 31)
    assert central_energy(ones) == pytest.approx((np.arange(1, 32, 2) / 31) ** 2)
    q, radius = 0.8, np.arange(16)
    axis = q ** (torch.arange(31) - 15).abs().double()
    kernel = torch.outer(axis, axis)[None, None] * torch.tensor([1.0, -3.0, 0.5])[:, None, None, None]
    within = 1 + 2 * q**2 * (1 - q ** (2 * radius)) / (1 - q**2)
    assert central_energy(kernel) == pytest.approx((within / within[-1]) ** 2, rel=1e-12)
    strip = central_energy(torch.ones(2, 1, 5, 31))  # from radius 3 on, a square has five rows of the strip
    assert strip[[0, 2, 3, 15]] == pytest.approx([1 / 155, 25 / 155, 35 / 155, 1])


@pytest.mark.parametrize(('shape', 'side'), [((9, 9), 5), ((9, 9), 11), ((3, 9), 5)])
def test_crop_keeps_the_center(shape, side):
    padding = tuple(k // 2 for k in shape)
    network = nn.Sequential(
        nn.Conv2d(4, 4, shape, padding=padding, groups=4), nn.Conv2d(4, 4, 9), nn.Conv2d(4, 4, 3, groups=4)
    )
    before = [p.clone() for p in network.parameters()]
    image = torch.randn(1, 4, 20, 20)
    assert list(large_kernels(network)) == ['0']
    crop_kernels(network, side)
    rows, columns = (min(side, k) for k in shape)
    top, left = (shape[0] - rows) // 2, (shape[1] - columns) // 2
    small = before[0][:, :, top : top + rows, left : left + columns]
    expected = nn.functional.conv2d(image, small, before[1], padding=(rows // 2, columns // 2), groups=4)
    assert torch.allclose(network[0](image), expected, atol=1e-6)
    assert all((a == b).all() for a, b in zip(list(network.parameters())[1:], before[1:], strict=True))


def test_cropped_checkpoint_of_a_network(tiny, tmp_path):
    """The file holds the merged network; cropping to the whole kernel changes nothing."""
    cfg = tiny.cfg()
    model = build_model(tiny.cfg())
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'x.pth')
    layers = measure_kernels(cfg, str(tmp_path / 'x.pth'), tmp_path, crop=3)
    assert layers == json.loads((tmp_path / 'kernels.json').read_text())['layers']
    assert [layer['kernel_size'] for layer in layers] == [[7, 7]] * 4 and [
        len(layer['energy']) for layer in layers
    ] == [4] * 4
    merged = reparameterize(model)[0]
    weights = merged.get_submodule(layers[0]['layer']).weight.detach().double()
    middle = weights[..., 2:5, 2:5].square().sum() / weights.square().sum()
    assert layers[0]['energy'][1] == pytest.approx(middle.item())
    loaded = build_for_inference(tiny.cfg(), str(tmp_path / 'cropped.pth'), packed=False).model
    kernel = loaded.get_submodule(layers[0]['layer']).weight
    assert torch.allclose(kernel[..., 2:5, 2:5], weights[..., 2:5, 2:5].float(), atol=1e-6)
    assert kernel.count_nonzero() == kernel[..., 2:5, 2:5].numel()
    with pytest.raises(UserError, match='--crop 4'):
        measure_kernels(cfg, str(tmp_path / 'x.pth'), tmp_path, crop=4)
