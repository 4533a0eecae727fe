"""The depthwise convolution against torch's own in float64: output and gradients of every implementation, and its manners.

In bfloat16 torch's convolution of channels-last memory never returns for some shapes of up to 16 channels; what could run into
that runs in processes of its own (test_ops_choice.py), and bfloat16 has more channels here.
"""
import copy
import io
import itertools
import math
import pickle
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d, choice, depthwise_conv2d
from replk_mm.ops import implementation as forced

# Maps as small as these are not worth two threads; the drawn shapes have both.
pytestmark = pytest.mark.usefixtures('one_thread')
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
    'batch 5': ((5, 2, 9, 9), (7, 7), {}),
    'one channel': ((3, 1, 14, 15), (13, 13), {}),
}


def reference(x, weight, bias, grad, stride=1, padding=None, dilation=1):
    """Output and gradients in float64, from torch; ``grad`` may be None for ones of the right shape."""
    if padding is None:
        dilations = dilation if isinstance(dilation, tuple) else (dilation, dilation)
        padding = tuple(k // 2 * d for k, d in zip(weight.shape[2:], dilations, strict=True))
    x, weight, bias = (None if t is None else t.detach().double().contiguous().requires_grad_() for t in (x, weight, bias))
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
    for name, a, b, scale in zip(('output', 'input', 'weight', 'bias'), found, expected, scales or expected, strict=False):
        assert a.shape == b.shape, (what, name)
        error, largest = (a.double() - b).abs().max().item(), scale.abs().max().item()
        assert error <= relative * largest, f'{what} {name}: off by {error} where the largest value is {largest}'


def draw(shape, kernel, dtype=torch.float32, layout='default', **kwargs):
    """Input, weight, bias and output gradient, in values that ``dtype`` can hold."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = torch.randn(shape[1], 1, *kernel).to(dtype), torch.randn(shape[1]).to(dtype)
    out = reference(x, weight, bias, None, **kwargs)[0]
    return x, weight, bias, torch.randn(out.shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def assert_same_layout(out, x):
    """``out`` is in the layout of ``x``, if ``x`` is in only one."""
    layouts = [layout for layout in LAYOUTS.values() if x.is_contiguous(memory_format=layout)]
    assert len(layouts) > 1 or out.is_contiguous(memory_format=layouts[0])


def test_every_implementation_is_forced_here():
    for computation, names in IMPLEMENTATIONS.items():
        assert {choice._parse(spec).get(computation) for spec in SPECS} == {*names, None}, computation


# values

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('case', CASES)
def test_equals_torch(case, layout):
    shape, kernel, kwargs = CASES[case]
    for dtype in (torch.float32, torch.float64):
        tensors = draw(shape, kernel, dtype, layout, **kwargs)
        expected = reference(*tensors, **kwargs)
        for spec in SPECS:
            found = ours(*tensors, spec, **kwargs)
            assert [t.dtype for t in found] == [dtype] * 4
            assert_same_layout(found[0], tensors[0])
            assert_close(found, expected, TOLERANCE[dtype], what=f'{spec} {dtype}')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_equals_torch_in_bfloat16(layout):
    for shape, kernel, kwargs in (
            ((2, 24, 13, 10), (9, 9), {}), ((2, 17, 16, 16), (13, 13), {}), ((1, 20, 20, 9), (31, 5), {}),
            ((2, 18, 12, 12), (3, 3), dict(stride=2)), ((3, 17, 12, 11), (3, 4), dict(dilation=2)),
            ((1, 24, 41, 40), (3, 3), dict(dilation=2))):
        tensors = draw(shape, kernel, torch.bfloat16, layout, **kwargs)
        expected = reference(*tensors, **kwargs)
        for spec in SPECS:
            found = ours(*tensors, spec, **kwargs)
            assert [t.dtype for t in found] == [torch.bfloat16] * 4
            assert_same_layout(found[0], tensors[0])
            assert_close(found, expected, TOLERANCE[torch.bfloat16], what=f'{spec} {kernel} {kwargs}')


@st.composite
def convolutions(draw, channels):
    """Sizes, kernels of both parities that may exceed them, steps, dilations and paddings of a convolution with an output."""
    kernel, size = (draw(st.tuples(st.integers(1, top), st.integers(1, top))) for top in (16, 14))
    stride = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)) | st.just((1, 1)))
    dilation = draw(st.just((1, 1)) | st.tuples(st.integers(1, 2), st.integers(1, 3)))
    padding = []
    for k, d, s in zip(kernel, dilation, size, strict=True):
        reach = d * (k - 1)
        least = max(0, -(-(reach + 1 - s) // 2))
        padding.append(draw(st.integers(least, max(least, reach + 3)) | st.just(max(least, reach // 2))))
    return ((draw(st.integers(1, 3)), draw(channels), *size), kernel,
            dict(stride=stride, padding=tuple(padding), dilation=dilation))


def _scales(x, weight, bias, grad, kwargs):
    """Expected sizes of the values for random signs: the few values of a drawn case may all happen to be near zero."""
    return [t.sqrt() for t in reference(*(t.double() ** 2 for t in (x, weight, bias, grad)), **kwargs)]


DRAWN = settings(deadline=None, derandomize=True, database=None,
                 phases=[Phase.generate, Phase.shrink], suppress_health_check=[HealthCheck.too_slow])


def _compare(problem, spec, layout, dtype, threads):
    shape, kernel, kwargs = problem
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tensors = draw(shape, kernel, dtype, layout, **kwargs)
    found = ours(*tensors, spec, **kwargs)
    assert_same_layout(found[0], tensors[0])
    assert_close(found, reference(*tensors, **kwargs), TOLERANCE[dtype], _scales(*tensors, kwargs))


@settings(DRAWN, max_examples=120)
@given(convolutions(st.integers(1, 4)), st.sampled_from(SPECS), st.sampled_from([*LAYOUTS]),
       st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 1, 1, 2]))
def test_equals_torch_on_drawn_shapes(problem, spec, layout, dtype, threads):
    _compare(problem, spec, layout, dtype, threads)


@settings(DRAWN, max_examples=50)
@given(convolutions(st.integers(17, 20)), st.sampled_from(SPECS), st.sampled_from([*LAYOUTS]), st.sampled_from([1, 1, 1, 2]))
def test_equals_torch_on_drawn_shapes_in_bfloat16(problem, spec, layout, threads):
    _compare(problem, spec, layout, torch.bfloat16, threads)


@pytest.mark.parametrize('spec', SPECS)
def test_without_bias_and_with_some_gradients_only(spec):
    x, weight, bias, grad = draw((2, 3, 10, 11), (7, 7))
    assert_close(ours(x, weight, None, grad, spec), reference(x, weight, None, grad), 1e-5)
    expected = reference(x, weight, bias, grad)
    for asked in itertools.product((False, True), repeat=3):
        leaves = [t.clone().requires_grad_(a) for t, a in zip((x, weight, bias), asked, strict=True)]
        out = depthwise_conv2d(*leaves, implementation=spec)
        assert out.requires_grad == any(asked)
        if any(asked):
            out.backward(grad)
        for leaf, wanted, b in zip(leaves, asked, expected[1:], strict=True):
            assert (leaf.grad is not None) == wanted
            if wanted:
                assert_close([leaf.grad], [b], 1e-5)


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('memory', ['transposed', 'sliced', 'reversed batch', 'expanded', 'gradient in the other layout',
                                    'expanded gradient', 'permuted weight'])
def test_any_memory(memory, spec):
    x, weight, bias, grad = draw((2, 4, 14, 16), (9, 9))
    expected = reference(x, weight, bias, grad)
    if memory == 'transposed':
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif memory == 'sliced':
        x = torch.stack((x, x), -1).flatten(-2)[..., ::2]
    elif memory == 'reversed batch':
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif memory == 'expanded':
        x = x[:1, :1].expand(2, 4, 14, 16)
        expected = reference(x, weight, bias, grad)
    elif memory == 'gradient in the other layout':
        grad = grad.contiguous(memory_format=CHANNELS_LAST)
    elif memory == 'expanded gradient':
        grad = grad[:1, :1, :1, :1].expand_as(grad)
        expected = reference(x, weight, bias, grad)
    else:
        weight = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert sum(t.is_contiguous() for t in (x, weight, grad)) == 2
    assert_close(ours(x, weight, bias, grad, spec), expected, 1e-5)


@pytest.mark.parametrize('spec', SPECS)
def test_gradcheck(spec):
    for layout in LAYOUTS:
        x, weight, bias, _ = draw((2, 2, 4, 3), (5, 4), torch.float64, layout)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        assert torch.autograd.gradcheck(lambda *t: depthwise_conv2d(*t, implementation=spec), leaves)


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_gradients_of_gradients(spec, layout):
    def twice(x, weight, bias, convolve):
        out = convolve(x, weight, bias)
        first = torch.autograd.grad(out.square().sum(), (x, weight, bias), create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), (x, weight, bias))

    tensors = draw((2, 3, 7, 6), (5, 5), layout=layout)[:3]
    found = twice(*(t.clone().requires_grad_() for t in tensors),
                  lambda *t: depthwise_conv2d(*t, implementation=spec))
    expected = twice(*(t.double().requires_grad_() for t in tensors), lambda *t: F.conv2d(*t, padding=2, groups=3))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_gradgradcheck():
    leaves = [t.requires_grad_() for t in draw((1, 2, 3, 4), (3, 3), torch.float64)[:3]]
    assert torch.autograd.gradgradcheck(lambda *t: depthwise_conv2d(*t, implementation='fft'), leaves)


def test_backward_twice_through_kept_spectra():
    x, weight, bias, grad = draw((2, 3, 12, 12), (9, 9))
    x.requires_grad_(), weight.requires_grad_()
    out = depthwise_conv2d(x, weight, bias, implementation='fft')
    first = torch.autograd.grad(out, (x, weight), grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, (x, weight), grad)))


@pytest.mark.parametrize('spec', SPECS)
def test_forward_mode_derivative(spec):
    import torch.autograd.forward_ad as forward_ad
    x, weight, _, _ = draw((1, 2, 8, 8), (5, 5))
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        out = depthwise_conv2d(forward_ad.make_dual(x, direction), weight.requires_grad_(), implementation=spec)
        found = forward_ad.unpack_dual(out).tangent
    assert_close([found], reference(direction, weight, None, None)[:1], 1e-5)


def test_function_transforms():
    x, weight, _, _ = draw((3, 2, 8, 8), (5, 5))
    each = torch.vmap(lambda image, kernels: depthwise_conv2d(image[None], kernels)[0], in_dims=(0, None))(x, weight)
    assert_close([each], reference(x, weight, None, None)[:1], 1e-5)


# batch, axes, dtypes

@pytest.mark.parametrize('spec', SPECS)
def test_empty_batch(spec):
    for layout in LAYOUTS:
        x = torch.empty(0, 4, 16, 15).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
        conv = DepthwiseConv2d(4, 13, stride=2, implementation=spec)
        out = conv(x)
        assert out.shape == (0, 4, 8, 8)
        out.sum().backward()
        assert x.grad.shape == x.shape
        assert conv.weight.grad.shape == conv.weight.shape
        assert conv.weight.grad.abs().sum() == conv.bias.grad.abs().sum() == 0
        with torch.no_grad():
            assert conv(x).shape == (0, 4, 8, 8)


@pytest.mark.parametrize('spec', SPECS)
def test_single_image_without_batch_axis(spec):
    x, weight, bias, grad = draw((1, 4, 16, 15), (13, 13))
    found = ours(x[0], weight, bias, grad[0], spec)
    assert found[0].shape == found[1].shape == (4, 16, 15)
    assert_close([found[0][None], found[1][None], *found[2:]], reference(x, weight, bias, grad), 1e-5)


@pytest.mark.parametrize('spec', SPECS)
def test_other_dtypes_are_torchs_business(spec):
    """What the spectra do not hold (integers, imaginary parts) and what torch refuses (mixtures) is the same for each."""
    x, weight = torch.randint(-5, 5, (1, 2, 9, 9)), torch.randint(-5, 5, (2, 1, 7, 7))
    assert depthwise_conv2d(x, weight, implementation=spec).equal(F.conv2d(x, weight, padding=3, groups=2))
    x, weight = torch.randn(1, 2, 9, 9, dtype=torch.complex64), torch.randn(2, 1, 7, 7, dtype=torch.complex64)
    found, expected = depthwise_conv2d(x, weight, implementation=spec), F.conv2d(x, weight, padding=3, groups=2)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for dtypes in itertools.permutations((torch.float32, torch.float32, torch.float64)):
        with pytest.raises(RuntimeError, match='should be the same'):
            depthwise_conv2d(torch.randn(1, 2, 9, 9).to(dtypes[0]), torch.randn(2, 1, 7, 7).to(dtypes[1]),
                             torch.randn(2).to(dtypes[2]), implementation=spec)


# refusals

@pytest.mark.parametrize('x, weight, kwargs, message', [
    ((2, 3, 0, 8), (3, 1, 3, 3), {}, r'map is empty or smaller than the kernel.*\(2, 3, 0, 8\)'),
    ((2, 3, 8, 0), (3, 1, 3, 3), dict(padding=9), r'map is empty or smaller.*\(2, 3, 8, 0\).*padding=\(9, 9\)'),
    ((0, 3, 8, 0), (3, 1, 3, 3), {}, 'map is empty'),
    ((2, 3, 8, 8), (3, 1, 9, 3), dict(padding=0), r'smaller than the kernel.*\(3, 1, 9, 3\), padding=\(0, 0\)'),
    ((2, 3, 8, 8), (3, 1, 3, 5), dict(padding=1, dilation=3), r'smaller than the kernel.*dilation=\(3, 3\)'),
    ((2, 4, 8, 8), (3, 1, 3, 3), {}, r'differ in channels.*\(2, 4, 8, 8\), weight \(3, 1, 3, 3\)'),
    ((2, 3, 8, 8), (3, 1, 3, 3), dict(bias=torch.zeros(4)), r'differ in channels.*bias \(4,\)'),
    ((2, 3, 8, 8), (3, 3, 3, 3), {}, r'weight must be \(C, 1, kh, kw\); found \(3, 3, 3, 3\)'),
    ((2, 3, 8, 8), (3, 3, 3), {}, r'weight must be \(C, 1, kh, kw\); found \(3, 3, 3\)'),
    ((8, 8), (3, 1, 3, 3), {}, r'input must be \(N, C, H, W\) or \(C, H, W\); found input \(8, 8\)'),
    ((1, 2, 3, 8, 8), (3, 1, 3, 3), {}, r'input must be \(N, C, H, W\)'),
    ((2, 3, 8, 8), (3, 1, 3, 3), dict(stride=0), r'stride=\(0, 0\).*at least 1'),
    ((2, 3, 8, 8), (3, 1, 3, 3), dict(stride=(1, -1)), r'stride=\(1, -1\).*at least 1'),
    ((2, 3, 8, 8), (3, 1, 3, 3), dict(dilation=0), r'dilation=\(0, 0\).*at least 1'),
    ((2, 3, 8, 8), (3, 1, 3, 3), dict(padding=-1), r'padding=\(-1, -1\).*at\s+least 0'),
    ((2, 3, 8, 8), (3, 1, 3, 3), dict(implementation='fastest'), "'fastest' names nothing that exists.*forward: native"),
])
def test_refusals(x, weight, kwargs, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.zeros(x), torch.zeros(weight), **kwargs)


def test_no_channels_are_refused():
    with pytest.raises((ValueError, RuntimeError), match='channels|groups'):
        depthwise_conv2d(torch.zeros(2, 0, 8, 8), torch.zeros(0, 1, 3, 3))


# modes of torch

@pytest.mark.parametrize('spec', SPECS)
def test_autocast_equals_torchs(spec):
    x, weight, bias, grad = draw((2, 20, 12, 12), (7, 7))
    plain = nn.Conv2d(20, 20, 7, padding=3, groups=20)
    plain.load_state_dict(dict(weight=weight, bias=bias))
    with torch.autocast('cpu', torch.bfloat16):
        found = ours(x, weight, bias, grad.bfloat16(), spec)
        expected = plain(x)
    assert found[0].dtype == expected.dtype == torch.bfloat16
    assert [t.dtype for t in found[1:]] == [torch.float32] * 3
    assert_close(found[:1], [expected], 2e-2)
    assert_close(found, reference(x, weight, bias, grad), 2e-2)


@pytest.mark.parametrize('spec', SPECS)
def test_autocast_leaves_float64_alone(spec):
    tensors = draw((2, 4, 12, 12), (7, 7), torch.float64)
    with torch.autocast('cpu', torch.bfloat16):
        assert_close(ours(*tensors, spec), reference(*tensors), 1e-12)


@pytest.mark.parametrize('spec', SPECS)
def test_backward_within_autocast_is_as_accurate_as_without(spec):
    tensors = draw((2, 5, 20, 20), (13, 13), torch.float32, 'channels_last')
    expected = reference(*tensors)
    x, weight, bias = (t.clone().requires_grad_() for t in tensors[:3])
    out = depthwise_conv2d(x, weight, bias, implementation=spec)
    with torch.autocast('cpu', torch.bfloat16):
        found = torch.autograd.grad(out, (x, weight, bias), tensors[3])
    assert_close([out.detach(), *found], expected, TOLERANCE[torch.float32], what=spec)


@pytest.mark.parametrize('spec', SPECS)
def test_layout_of_the_weight_changes_nothing(spec):
    x, weight, bias, grad = draw((2, 6, 12, 11), (5, 5))
    expected = ours(x, weight, bias, grad, spec)
    found = ours(x, weight.contiguous(memory_format=CHANNELS_LAST), bias, grad, spec)
    assert found[0].stride() == expected[0].stride()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize('spec', SPECS)
def test_inference_mode(spec):
    x, weight, bias, grad = draw((2, 4, 12, 12), (7, 7))
    expected = reference(x, weight, bias, grad)
    with torch.inference_mode():
        out = depthwise_conv2d(x, weight, bias, implementation=spec)
        assert out.is_inference()
        assert_close([depthwise_conv2d(x * 1, weight, bias, implementation=spec)], expected[:1], 1e-5)
    assert_close([out], expected[:1], 1e-5)
    assert not ours(x, weight, bias, grad, spec)[0].is_inference()


@pytest.mark.parametrize('spec', SPECS)
def test_bit_equal_each_time(spec):
    tensors = draw((3, 5, 20, 19), (13, 13))
    first = ours(*tensors, spec)
    for _ in range(3):
        assert all(map(torch.equal, first, ours(*tensors, spec)))


@pytest.mark.parametrize('spec', SPECS)
def test_under_checkpointing(spec):
    x, weight, bias, grad = draw((2, 4, 14, 14), (13, 13))
    expected = reference(x, weight, bias, grad)
    conv = DepthwiseConv2d(4, 13, implementation=spec)
    conv.load_state_dict(dict(weight=weight, bias=bias))
    for reentrant in (False, True):
        conv.zero_grad()
        x = x.detach().requires_grad_()
        out = checkpoint(conv, x, use_reentrant=reentrant)
        out.backward(grad)
        assert_close([out, x.grad, conv.weight.grad, conv.bias.grad], expected, 1e-5)


def test_deterministic_algorithms():
    """torch then fills uninitialized memory with NaN."""
    tensors = draw((2, 3, 12, 12), (9, 9))
    torch.use_deterministic_algorithms(True)
    try:
        for spec in SPECS:
            assert_close(ours(*tensors, spec), reference(*tensors), 1e-5, what=spec)
    finally:
        torch.use_deterministic_algorithms(False)


# what looks at the operation sees torch's

def _network(kernel=31, spec='fft'):
    return nn.Sequential(DepthwiseConv2d(4, kernel, implementation=spec), nn.ReLU()).eval()


def test_torch_export():
    network, x = _network(), torch.randn(2, 4, 40, 40)
    sizes = {0: torch.export.Dim('n', min=2, max=64), 2: torch.export.Dim('h', min=8, max=512)}
    program = torch.export.export(network, (x,), dynamic_shapes=(sizes,))
    called = [node.target for node in program.graph.nodes if node.op == 'call_function']
    assert called == [torch.ops.aten.conv2d.default, torch.ops.aten.relu.default]
    other = torch.randn(3, 4, 21, 40)
    assert_close([program.module()(other)], [network(other)], 1e-5)


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_jit_trace():
    network, x = _network(), torch.randn(2, 4, 40, 40)
    traced = torch.jit.trace(network, x)
    traced_kinds = [node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith('aten::')]
    assert traced_kinds == ['aten::_convolution', 'aten::relu']
    other = torch.randn(1, 4, 21, 37)
    assert_close([traced(other)], [network(other)], 1e-5)


def _fields(message):
    """Number and value of each field of a protocol buffer."""
    position = 0

    def varint():
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        tag = varint()
        size = {0: None, 1: 8, 2: -1, 5: 4}[tag & 7]
        if size is None:
            yield tag >> 3, varint()
            continue
        size = varint() if size < 0 else size
        yield tag >> 3, message[position:position + size]
        position += size


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_onnx_export_gives_a_plain_convolution(monkeypatch):
    # The exporter asks the onnx package only to look for functions of other domains, of which there are none.
    empty = SimpleNamespace(graph=SimpleNamespace(node=[]))
    monkeypatch.setitem(sys.modules, 'onnx', SimpleNamespace(load_model_from_string=lambda _: empty))
    file = io.BytesIO()
    torch.onnx.export(_network(), (torch.randn(2, 4, 40, 40),), file, dynamo=False)
    graph = next(value for number, value in _fields(file.getvalue()) if number == 7)
    nodes = [dict(_fields(value)) for number, value in _fields(graph) if number == 1]
    assert [node[4].decode() for node in nodes] == ['Conv', 'Relu']


def test_counted_as_torchs_convolution():
    counts = []
    for conv in (DepthwiseConv2d(4, 9, implementation='fft'), nn.Conv2d(4, 4, 9, padding=4, groups=4)):
        x = torch.randn(2, 4, 14, 12, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            out = conv(x)
        with FlopCounterMode(display=False) as both:
            conv(x).sum().backward()
        counts.append((forward.get_total_flops(), both.get_total_flops()))
        assert out.shape == x.shape
    assert counts[0][0] == 2 * (2 * 4 * 14 * 12) * 81  # two operations for each output and tap
    assert counts[0] == counts[1]


def test_other_devices():
    conv = DepthwiseConv2d(4, 9, stride=2).to('meta')
    assert conv(torch.empty(2, 4, 30, 31, device='meta')).shape == (2, 4, 15, 16)


# the module

@pytest.mark.parametrize('arguments', [dict(), dict(bias=False), dict(stride=2), dict(dilation=(2, 1)), dict(padding=0)])
@pytest.mark.parametrize('kernel', [13, (5, 8)])
def test_module_is_torchs_with_other_arithmetic(kernel, arguments):
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dilation = arguments.get('dilation', (1, 1))
    torch.manual_seed(3)
    mine = DepthwiseConv2d(6, kernel, **arguments)
    torch.manual_seed(3)
    plain = nn.Conv2d(6, 6, kernel, groups=6, **{
        'padding': tuple(k // 2 * d for k, d in zip(sides, dilation, strict=True)), **arguments})
    assert isinstance(mine, nn.Conv2d) and mine.padding == plain.padding
    state, expected = mine.state_dict(), plain.state_dict()
    assert list(state) == list(expected) and all(torch.equal(state[k], expected[k]) for k in state)
    torch.nn.init.normal_(plain.weight)
    mine.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 17, 16)
    with torch.no_grad():
        assert_close([mine(x)], [plain.double()(x.double())], 1e-5)
    plain.load_state_dict(mine.state_dict())


def test_copies_of_a_module(tmp_path):
    conv, x = DepthwiseConv2d(4, 9, stride=2, implementation='fft'), torch.randn(2, 4, 20, 20)
    torch.save(conv, tmp_path / 'conv.pth')
    conv(x).sum().backward()
    for twin in (copy.deepcopy(conv), pickle.loads(pickle.dumps(conv)), torch.load(tmp_path / 'conv.pth', weights_only=False)):
        assert torch.equal(twin(x), conv(x)) and twin.implementation == 'fft' and twin.stride == (2, 2)


def test_training_takes_the_same_way_whatever_is_forced():
    """Ten steps of an optimizer, in float64, where rounding stays small."""
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    target = torch.randn_like(x)

    def losses(conv, spec):
        torch.manual_seed(1)
        conv.reset_parameters()
        conv.double()
        optimizer, found = torch.optim.SGD(conv.parameters(), lr=.3, momentum=.9), []
        with forced(spec):
            for _ in range(10):
                loss = (conv(x) - target).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    expected = losses(nn.Conv2d(3, 3, 7, padding=3, groups=3), None)
    assert expected[-1] < expected[0] and not math.isnan(expected[-1])
    for spec in SPECS:
        assert losses(DepthwiseConv2d(3, 7), spec) == pytest.approx(expected, rel=1e-10), spec
