"""The depthwise convolution in torch's modes: autocast, inference, export and others find torch's own; the module."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from ops_cases import SPECS, TOLERANCE, assert_close, draw, ours, reference
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.ops import DepthwiseConv2d, depthwise_conv2d

# Maps as small as these are not worth two threads.
pytestmark = pytest.mark.usefixtures('one_thread')


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


@pytest.mark.parametrize(
    'arguments', [dict(), dict(bias=False), dict(stride=2), dict(dilation=(2, 1)), dict(padding=0)]
)
@pytest.mark.parametrize('kernel', [13, (5, 8)])
def test_module_is_torchs_with_other_arithmetic(kernel, arguments):
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    dilation = arguments.get('dilation', (1, 1))
    torch.manual_seed(3)
    mine = DepthwiseConv2d(6, kernel, **arguments)
    torch.manual_seed(3)
    plain = nn.Conv2d(
        6,
        6,
        kernel,
        groups=6,
        **{'padding': tuple(k // 2 * d for k, d in zip(sides, dilation, strict=True)), **arguments},
    )
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
    for twin in (
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
        torch.load(tmp_path / 'conv.pth', weights_only=False),
    ):
        assert torch.equal(twin(x), conv(x)) and twin.implementation == 'fft' and twin.stride == (2, 2)
