"""What tests of fused convolutions share: layers, images, and the values of the parts in float64."""

import copy

import pytest
import torch
import torch.nn as nn
from ops_cases import LAYOUTS

from replk_mm.ops import DepthwiseConv2d

#: (inputs, outputs), arguments of the convolution
CONVOLUTIONS = {
    '1x1': ((8, 16), dict(kernel_size=1)),
    '1x1 without bias': ((8, 16), dict(kernel_size=1, bias=False)),
    '1x1 to one channel': ((8, 1), dict(kernel_size=1)),
    '3x3': ((8, 16), dict(kernel_size=3, padding=1)),
    '3x3, stride 2': ((8, 16), dict(kernel_size=3, padding=1, stride=2)),
    'image, stride 2': ((3, 16), dict(kernel_size=3, padding=1, stride=2, bias=False)),
    'groups': ((8, 16), dict(kernel_size=3, padding=1, groups=4)),
    'depthwise': ((8, 8), dict(kernel_size=3, padding=1, groups=8)),
    'our depthwise, 7x7': (DepthwiseConv2d, dict(channels=24, kernel_size=7)),
    'our depthwise, 13x13': (DepthwiseConv2d, dict(channels=24, kernel_size=13)),
    'our depthwise, 17x17': (DepthwiseConv2d, dict(channels=24, kernel_size=17)),
    'our depthwise, stride 2': (DepthwiseConv2d, dict(channels=24, kernel_size=3, stride=2, bias=False)),
    'dilated, uneven': ((8, 16), dict(kernel_size=(3, 2), padding=(2, 1), dilation=(2, 1), stride=(1, 2))),
    "padding='same'": ((8, 16), dict(kernel_size=3, padding='same')),
    "padding='valid'": ((8, 16), dict(kernel_size=3, padding='valid')),
    'mirrored border': ((8, 16), dict(kernel_size=3, padding=1, padding_mode='reflect')),
}


@pytest.fixture
def apart(monkeypatch):
    """Calls of torch's convolution layers: those that are not fused."""
    calls = []
    for kind in (nn.Conv2d, DepthwiseConv2d):
        forward = kind.forward
        monkeypatch.setattr(kind, 'forward', lambda self, x, f=forward: calls.append(self) or f(self, x))
    return calls


def build(name: str, dtype=torch.float32) -> nn.Conv2d:
    channels, kwargs = CONVOLUTIONS[name]
    conv = (nn.Conv2d(*channels, **kwargs) if isinstance(channels, tuple) else channels(**kwargs)).to(dtype).eval()
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    return conv


def image(channels=8, size=(9, 10), dtype=torch.float32, layout='channels_last', batch=2):
    return torch.randn(batch, channels, *size).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def truth(conv, x, activation=None, shortcut=None):
    """In float64 and in the plain order."""
    conv = copy.deepcopy(conv).double()
    forward = nn.Conv2d._conv_forward
    y = forward(conv, x.double(), conv.weight, conv.bias) if type(conv) is DepthwiseConv2d else conv(x.double())
    y = y if activation is None else copy.deepcopy(activation)(y)
    return y.detach() if shortcut is None else shortcut.detach().double() + y.detach()


def assert_close(found, expected, relative=1e-5, what=''):
    assert found.shape == expected.shape, what
    error, largest = (found.double() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= relative * largest, f'{what}: off by {error} where the largest value is {largest}'
