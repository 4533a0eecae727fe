"""The depthwise convolution against torch's own in float64: output and gradients of every implementation.

In bfloat16 torch's convolution of channels-last memory never returns for some shapes of up to 16 channels; what could
run into that runs in processes of its own (test_ops_processes.py), and bfloat16 has more channels here.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_cases import (
    CASES,
    CHANNELS_LAST,
    DRAWN,
    LAYOUTS,
    SPECS,
    TOLERANCE,
    assert_close,
    convolutions,
    draw,
    ours,
    reference,
)

from replk_mm.ops import IMPLEMENTATIONS, DepthwiseConv2d, depthwise_conv2d, fused_conv2d, prepack
from replk_mm.ops.cpu import cost_model, direct

# Maps as small as these are not worth two threads; the drawn shapes have both.
pytestmark = pytest.mark.usefixtures('one_thread')


def assert_same_layout(out, x):
    """``out`` is in the layout of ``x``, if ``x`` is in only one."""
    layouts = [layout for layout in LAYOUTS.values() if x.is_contiguous(memory_format=layout)]
    assert len(layouts) > 1 or out.is_contiguous(memory_format=layouts[0])


def test_every_implementation_is_forced_here():
    for computation, names in IMPLEMENTATIONS.items():
        assert {cost_model._parse(spec).get(computation) for spec in SPECS} == {*names, None}, computation


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
        ((2, 24, 13, 10), (9, 9), {}),
        ((2, 17, 16, 16), (13, 13), {}),
        ((1, 20, 20, 9), (31, 5), {}),
        ((2, 18, 12, 12), (3, 3), dict(stride=2)),
        ((3, 17, 12, 11), (3, 4), dict(dilation=2)),
        ((1, 24, 41, 40), (3, 3), dict(dilation=2)),
    ):
        tensors = draw(shape, kernel, torch.bfloat16, layout, **kwargs)
        expected = reference(*tensors, **kwargs)
        for spec in SPECS:
            found = ours(*tensors, spec, **kwargs)
            assert [t.dtype for t in found] == [torch.bfloat16] * 4
            assert_same_layout(found[0], tensors[0])
            assert_close(found, expected, TOLERANCE[torch.bfloat16], what=f'{spec} {kernel} {kwargs}')


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('spec', SPECS)
def test_bfloat16_without_instructions_is_float32_rounded_once(spec, layout, monkeypatch):
    monkeypatch.setattr(direct, 'has_bfloat16_instructions', lambda: False)
    x, weight, bias, grad = draw((2, 20, 13, 10), (9, 9), torch.bfloat16, layout)
    expected = [t.bfloat16() for t in ours(x.float(), weight.float(), bias.float(), grad.float(), spec)]
    assert all(map(torch.equal, ours(x, weight, bias, grad, spec), expected))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(depthwise_conv2d(x.float(), weight.float(), bias.float(), implementation=spec), expected[0])
    conv = DepthwiseConv2d(20, 9, implementation=spec).bfloat16()
    conv.load_state_dict(dict(weight=weight, bias=bias))
    assert prepack(conv) == 1
    with torch.no_grad():
        for _ in range(2):  # packed, then with what was packed
            assert torch.equal(fused_conv2d(conv, x), expected[0])


def _scales(x, weight, bias, grad, kwargs):
    """Expected sizes of the values for random signs: the few values of a drawn case may all happen to be near zero."""
    return [t.sqrt() for t in reference(*(t.double() ** 2 for t in (x, weight, bias, grad)), **kwargs)]


def _compare(problem, spec, layout, dtype, threads):
    shape, kernel, kwargs = problem
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    tensors = draw(shape, kernel, dtype, layout, **kwargs)
    found = ours(*tensors, spec, **kwargs)
    assert_same_layout(found[0], tensors[0])
    assert_close(found, reference(*tensors, **kwargs), TOLERANCE[dtype], _scales(*tensors, kwargs))


@settings(DRAWN, max_examples=120)
@given(
    convolutions(st.integers(1, 4)),
    st.sampled_from(SPECS),
    st.sampled_from([*LAYOUTS]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1, 1, 1, 2]),
)
def test_equals_torch_on_drawn_shapes(problem, spec, layout, dtype, threads):
    _compare(problem, spec, layout, dtype, threads)


@settings(DRAWN, max_examples=50)
@given(
    convolutions(st.integers(17, 20)),
    st.sampled_from(SPECS),
    st.sampled_from([*LAYOUTS]),
    st.sampled_from([1, 1, 1, 2]),
)
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
@pytest.mark.parametrize(
    'memory',
    [
        'transposed',
        'sliced',
        'reversed batch',
        'expanded',
        'gradient in the other layout',
        'expanded gradient',
        'permuted weight',
    ],
)
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
    found = twice(*(t.clone().requires_grad_() for t in tensors), lambda *t: depthwise_conv2d(*t, implementation=spec))
    expected = twice(*(t.double().requires_grad_() for t in tensors), lambda *t: F.conv2d(*t, padding=2, groups=3))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


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
    """What spectra do not hold (integers, imaginary parts) and what torch refuses (mixtures)."""
    x, weight = torch.randint(-5, 5, (1, 2, 9, 9)), torch.randint(-5, 5, (2, 1, 7, 7))
    assert depthwise_conv2d(x, weight, implementation=spec).equal(F.conv2d(x, weight, padding=3, groups=2))
    x, weight = torch.randn(1, 2, 9, 9, dtype=torch.complex64), torch.randn(2, 1, 7, 7, dtype=torch.complex64)
    found, expected = depthwise_conv2d(x, weight, implementation=spec), F.conv2d(x, weight, padding=3, groups=2)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for dtypes in itertools.permutations((torch.float32, torch.float32, torch.float64)):
        with pytest.raises(RuntimeError, match='should be the same'):
            depthwise_conv2d(
                torch.randn(1, 2, 9, 9).to(dtypes[0]),
                torch.randn(2, 1, 7, 7).to(dtypes[1]),
                torch.randn(2).to(dtypes[2]),
                implementation=spec,
            )


# refusals


@pytest.mark.parametrize(
    'x, weight, kwargs, message',
    [
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
        ((2, 3, 8, 8), (3, 1, 3, 3), dict(implementation='fastest'), "'fastest' .*forward: native"),
    ],
)
def test_rejections(x, weight, kwargs, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(torch.zeros(x), torch.zeros(weight), **kwargs)


def test_a_part_of_the_channels_keeps_the_layout():
    """A slice of a channels-last map, as of networks that split channels, is contiguous in neither layout."""
    x, weight = torch.randn(2, 64, 9, 10).contiguous(memory_format=torch.channels_last), torch.randn(32, 1, 5, 5)
    part = x[:, 16:48]
    out = depthwise_conv2d(part, weight)
    assert_close([out], [F.conv2d(part.double(), weight.double(), padding=2, groups=32)], TOLERANCE[torch.float32])
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()
