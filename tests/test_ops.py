"""The depthwise convolution against torch's own in float64, forwards and both gradients."""
import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from replk_mm.ops import DepthwiseConv2d, depthwise

# name: (batch, channels, height, width), then arguments of the convolution
CASES = {
    'kernel 9': ((2, 4, 12, 15), dict(kernel_size=9)),
    'kernel 13': ((2, 3, 16, 16), dict(kernel_size=13)),
    'kernel 31': ((1, 4, 40, 33), dict(kernel_size=31)),
    'kernel 31 over a map of 3x5': ((2, 3, 3, 5), dict(kernel_size=31)),
    'kernel 31 over a single pixel': ((2, 3, 1, 1), dict(kernel_size=31)),
    'no padding': ((2, 3, 20, 18), dict(kernel_size=11, padding=0)),
    'no padding, one output pixel': ((2, 3, 11, 11), dict(kernel_size=11, padding=0)),
    'padding of a kernel less one': ((2, 3, 10, 7), dict(kernel_size=9, padding=8)),
    'padding larger than the kernel': ((2, 3, 7, 6), dict(kernel_size=9, padding=14)),
    'stride 2': ((2, 3, 17, 20), dict(kernel_size=9, stride=2)),
    'batch 1': ((1, 5, 14, 14), dict(kernel_size=13)),
    'one channel': ((3, 1, 14, 15), dict(kernel_size=13)),
    'no bias': ((2, 4, 12, 12), dict(kernel_size=13, bias=False)),
    'kernel 3': ((2, 4, 9, 8), dict(kernel_size=3)),
}


def pair(kernel_size, channels, dtype=torch.float32, **kwargs):
    """Ours, and torch's with the same weights in float64."""
    ours = DepthwiseConv2d(channels, kernel_size, **kwargs).to(dtype)
    kwargs.setdefault('padding', kernel_size // 2)
    theirs = nn.Conv2d(channels, channels, kernel_size, groups=channels, **kwargs).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run(conv, x, grad, dtype):
    x = x.detach().to(dtype).requires_grad_()
    conv.zero_grad()
    out = conv(x)
    out.backward(grad.to(out.dtype))
    bias = [] if conv.bias is None else [conv.bias.grad]
    return [out, x.grad, conv.weight.grad, *bias]


def assert_close(found, expected, relative):
    for name, a, b in zip(('output', 'input', 'weight', 'bias'), found, expected, strict=False):
        assert a.shape == b.shape, name
        error = (a.double() - b).abs().max().item()
        assert error <= relative * b.abs().max().item(), f'{name}: off by {error}'
    assert len(found) == len(expected)


def data(shape, conv):
    x = torch.randn(shape, dtype=torch.float64)
    return x, torch.randn_like(conv(x)).detach()


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('dtype, relative', [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=str)
def test_equals_torch(case, dtype, relative):
    shape, kwargs = CASES[case]
    ours, theirs = pair(channels=shape[1], dtype=dtype, **kwargs)
    x, grad = data(shape, theirs)
    assert_close(run(ours, x, grad, dtype), run(theirs, x, grad, torch.float64), relative)


@pytest.mark.parametrize('case', CASES)
def test_large_stride_1_kernels_use_the_fft(case, monkeypatch):
    shape, kwargs = CASES[case]
    calls = []
    original = depthwise.weight_grad_fft
    monkeypatch.setattr(depthwise, 'weight_grad_fft', lambda *args: calls.append(1) or original(*args))
    ours, theirs = pair(channels=shape[1], **kwargs)
    x, grad = data(shape, theirs)
    run(ours, x, grad, torch.float32)
    assert len(calls) == (kwargs['kernel_size'] >= 9 and kwargs.get('stride', 1) == 1)


@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'sliced', 'expanded gradient'])
def test_memory_layouts(layout):
    ours, theirs = pair(13, 4)
    x, grad = data((2, 4, 14, 16), theirs)
    expected = run(theirs, x, grad, torch.float64)
    if layout == 'channels_last':
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    elif layout == 'transposed':
        x, grad = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, grad))
    elif layout == 'sliced':
        x = torch.stack((x, x), -1).flatten(-2)[..., ::2]
        assert not x.is_contiguous()
    else:
        grad = grad[:1, :1, :1, :1].expand_as(grad)
        expected = run(theirs, x, grad, torch.float64)
    assert_close(run(ours, x, grad, torch.float32), expected, 1e-5)


def test_gradcheck():
    conv = DepthwiseConv2d(2, 9).double()
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)

    def of_weight(x, weight, bias):
        return torch.func.functional_call(conv, dict(weight=weight, bias=bias), (x,))

    assert torch.autograd.gradcheck(of_weight, (x, conv.weight, conv.bias), fast_mode=False)


def test_memory_blocks_change_nothing(monkeypatch):
    ours, theirs = pair(11, 7)
    x, grad = data((2, 7, 12, 12), theirs)
    expected = run(theirs, x, grad, torch.float64)
    largest = []
    rfft2 = torch.fft.rfft2
    monkeypatch.setattr(torch.fft, 'rfft2', lambda x, **kw: largest.append(x.shape[1]) or rfft2(x, **kw))
    run(ours, x, grad, torch.float32)
    assert max(largest) == 7
    # A block of three channels: two spectra, batch 2, 18x18 in half, complex64.
    for limit, widest in ((0, 1), (3 * 2 * 2 * 18 * 10 * 8, 3)):
        largest.clear()
        monkeypatch.setattr(depthwise, 'FFT_BLOCK_BYTES', limit)
        assert_close(run(ours, x, grad, torch.float32), expected, 1e-5)
        assert max(largest) == widest and sum(largest) == 2 * 7


def test_autocast_bfloat16():
    ours, theirs = pair(13, 4)
    x, grad = data((2, 4, 16, 16), theirs)
    with torch.autocast('cpu', torch.bfloat16):
        found = run(ours, x, grad, torch.float32)
    assert found[0].dtype == torch.bfloat16
    assert [t.dtype for t in found[1:]] == [torch.float32] * 3
    assert_close(found, run(theirs, x, grad, torch.float64), 2e-2)


def test_autocast_leaves_float64_alone():
    ours, theirs = pair(13, 4, torch.float64)
    x, grad = data((2, 4, 16, 16), theirs)
    with torch.autocast('cpu', torch.bfloat16):
        found = run(ours, x, grad, torch.float64)
    assert_close(found, run(theirs, x, grad, torch.float64), 1e-12)


def test_empty_batch():
    ours, _ = pair(13, 4)
    x = torch.zeros(0, 4, 16, 16, requires_grad=True)
    out = ours(x)
    assert out.shape == (0, 4, 16, 16)
    out.sum().backward()
    assert ours.weight.grad.abs().sum() == 0 and x.grad.shape == x.shape


def test_single_image_without_batch_axis():
    ours, theirs = pair(13, 4)
    x, grad = data((4, 16, 15), theirs)
    assert_close(run(ours, x, grad, torch.float32), run(theirs, x, grad, torch.float64), 1e-5)


def test_only_asked_gradients():
    ours, theirs = pair(13, 4)
    x, grad = data((2, 4, 16, 16), theirs)
    expected = run(theirs, x, grad, torch.float64)
    ours(x.float()).backward(grad.float())  # the input needs none
    assert_close([ours.weight.grad], [expected[2]], 1e-5)
    ours.requires_grad_(False)
    x = x.float().requires_grad_()
    ours(x).backward(grad.float())
    assert_close([x.grad], [expected[1]], 1e-5)


def test_same_state_dict_as_torch():
    ours, theirs = DepthwiseConv2d(6, 13), nn.Conv2d(6, 6, 13, padding=6, groups=6)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    assert 'bias' not in DepthwiseConv2d(6, 13, bias=False).state_dict()


def test_second_derivative_is_refused():
    ours, _ = pair(13, 2)
    x = torch.randn(1, 2, 14, 14, requires_grad=True)
    grad, = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


def test_under_checkpointing():
    ours, theirs = pair(13, 4)
    x, grad = data((2, 4, 14, 14), theirs)
    expected = run(theirs, x, grad, torch.float64)
    x = x.float().requires_grad_()
    out = checkpoint(ours, x, use_reentrant=False)
    out.backward(grad.float())
    assert_close([out, x.grad, ours.weight.grad, ours.bias.grad], expected, 1e-5)


@pytest.mark.parametrize('n, expected', [(1, 1), (7, 8), (11, 12), (31, 32), (45, 45), (91, 96), (241, 243)])
def test_good_size(n, expected):
    assert depthwise._good_size(n) == expected
