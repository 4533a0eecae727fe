"""What tests of the depthwise convolution share: cases, all that can be forced, and the values by torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from replk_mm.ops import depthwise_conv2d
from replk_mm.ops.cpu import cost_model, fft

#: What can be forced: every implementation of every computation, and the ways in which spectra serve several of them.
SPECS = [
    'auto',
    'native',
    'channels_last,grad_weight=grad_kernel',
    'padded,grad_weight=grad_kernel_channels_last',
    'channels_last,grad_weight=grad_kernel_channels_last',
    'padded,grad_weight=grad_kernel',
    'fft',
    'forward=fft,grad_input=native,grad_weight=native',
    'forward=padded,grad_input=fft,grad_weight=grad_kernel',
    'forward=channels_last,grad_input=padded,grad_weight=fft',
    'forward=native,grad_input=fft,grad_weight=fft',
    'forward=fft,grad_input=channels_last,grad_weight=fft',
]
#: Largest error relative to the largest value.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}
LAYOUTS = {'default': torch.contiguous_format, 'channels_last': torch.channels_last}
CHANNELS_LAST = torch.channels_last

# name: (batch, channels, height, width), kernel, arguments of the convolution
CASES = {
    'kernel 1': ((2, 3, 6, 7), (1, 1), {}),
    'kernel 3': ((2, 4, 9, 8), (3, 3), {}),
    'kernel 9': ((2, 4, 12, 15), (9, 9), {}),
    'kernel 13': ((2, 3, 16, 16), (13, 13), {}),
    'kernel 31': ((1, 2, 36, 33), (31, 31), {}),
    'kernel 31 over a map of 3x5': ((2, 3, 3, 5), (31, 31), {}),
    'kernel 31 over a single pixel': ((2, 3, 1, 1), (31, 31), {}),
    'even kernel': ((2, 3, 11, 12), (8, 8), {}),
    'even kernel of the widened sizes': ((1, 3, 14, 13), (12, 14), dict(padding=(5, 6))),
    'wide kernel': ((2, 3, 11, 12), (3, 15), {}),
    'tall kernel': ((2, 3, 30, 4), (31, 2), {}),
    'vertical strip': ((2, 3, 28, 9), (51, 5), {}),
    'horizontal strip': ((1, 2, 9, 30), (5, 51), {}),
    'strip of a widened width': ((2, 3, 11, 16), (5, 13), {}),
    'strip of a widened height': ((2, 3, 16, 11), (13, 5), {}),
    'no padding': ((2, 3, 20, 18), (11, 11), dict(padding=0)),
    'no padding, one output pixel': ((2, 3, 11, 11), (11, 11), dict(padding=0)),
    'padding of a kernel less one': ((2, 3, 10, 7), (9, 9), dict(padding=8)),
    'padding larger than the kernel': ((2, 3, 7, 6), (9, 9), dict(padding=14)),
    'padding of one axis': ((2, 3, 7, 16), (3, 9), dict(padding=(12, 0))),
    'stride 2': ((2, 3, 17, 20), (9, 9), dict(stride=2)),
    'stride 2x3, rows the stride never reaches': ((2, 3, 18, 19), (4, 5), dict(stride=(2, 3), padding=1)),
    'stride larger than the kernel': ((2, 3, 11, 9), (2, 2), dict(stride=4, padding=0)),
    'dilation 2': ((2, 3, 17, 20), (5, 7), dict(dilation=2)),
    'dilation 3x1 and stride 2': ((2, 3, 17, 20), (5, 4), dict(dilation=(3, 1), stride=2)),
    'dilation 4': ((2, 3, 14, 15), (3, 3), dict(dilation=4)),
    'dilation 7, padding 7': ((2, 3, 16, 17), (3, 3), dict(dilation=7)),
    'batch 5': ((5, 2, 9, 9), (7, 7), {}),
    'one channel': ((3, 1, 14, 15), (13, 13), {}),
}


def reference(x, weight, bias, grad, stride=1, padding=None, dilation=1):
    """Output and gradients in float64, from torch; ``grad`` may be None for ones of the right shape."""
    if padding is None:
        dilations = dilation if isinstance(dilation, tuple) else (dilation, dilation)
        padding = tuple(k // 2 * d for k, d in zip(weight.shape[2:], dilations, strict=True))
    x, weight, bias = (
        None if t is None else t.detach().double().contiguous().requires_grad_() for t in (x, weight, bias)
    )
    out = F.conv2d(x, weight, bias, stride, padding, dilation, weight.shape[0])
    leaves = [t for t in (x, weight, bias) if t is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out) if grad is None else grad.double())]


def ours(x, weight, bias, grad, spec=None, **kwargs):
    """The same from the operator, in the dtype and layout of ``x``."""
    x, weight, bias = (None if t is None else t.detach().requires_grad_() for t in (x, weight, bias))
    out = depthwise_conv2d(x, weight, bias, implementation=spec, **kwargs)
    leaves = [t for t in (x, weight, bias) if t is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(found, expected, relative, scales=None, what=''):
    """Every tensor of ``found`` is off by at most ``relative`` of the largest value, or of that of ``scales``."""
    assert len(found) == len(expected)
    for name, a, b, scale in zip(
        ('output', 'input', 'weight', 'bias'), found, expected, scales or expected, strict=False
    ):
        assert a.shape == b.shape, (what, name)
        error, largest = (a.double() - b).abs().max().item(), scale.abs().max().item()
        assert error <= relative * largest, f'{what} {name}: off by {error} where the largest value is {largest}'


def draw(shape, kernel, dtype=torch.float32, layout='default', **kwargs):
    """Input, weight, bias and output gradient, in values that ``dtype`` can hold."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(shape[1], 1, *kernel).to(dtype), torch.randn(shape[1]).to(dtype)
    out = reference(x, weight, bias, None, **kwargs)[0]
    return x, weight, bias, torch.randn(out.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


@st.composite
def convolutions(draw, channels):
    """Sizes, kernels of both parities that may exceed them, and arguments of a convolution with an output."""
    kernel, size = (draw(st.tuples(st.integers(1, top), st.integers(1, top))) for top in (16, 14))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)) | st.just((1, 1)))
    dilation = draw(st.just((1, 1)) | st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding = []
    for k, d, s in zip(kernel, dilation, size, strict=True):
        reach = d * (k - 1)
        least = max(0, -(-(reach + 1 - s) // 2))
        padding.append(draw(st.integers(least, max(least, reach + 3)) | st.just(max(least, reach // 2))))
    return (
        (draw(st.integers(1, 3)), draw(channels), *size),
        kernel,
        dict(stride=stride, padding=tuple(padding), dilation=dilation),
    )


DRAWN = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture
def fresh(monkeypatch):
    """No decision known yet, nothing forced from outside, two threads."""
    monkeypatch.delenv(cost_model.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(cost_model, '_announced', set())
    caches = cost_model._plan, fft._blocks
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    [cache.cache_clear() for cache in caches]
    yield
    [cache.cache_clear() for cache in caches]
    torch.set_num_threads(before)
