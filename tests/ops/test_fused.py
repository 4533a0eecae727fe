"""Fused inference equals the sequence of its parts, in all modes."""

import copy

import pytest
import torch
import torch.nn as nn
from fused_cases import CONVOLUTIONS, apart, assert_close, build, image, truth  # noqa: F401 (a fixture)
from norms import randomize_norms
from ops_cases import LAYOUTS
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.backbones import RepLKNet
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.ops import DepthwiseConv2d, fused, fused_conv2d, prepack
from replk_mm.ops.cpu import direct

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.usefixtures('one_thread')
ACTIVATIONS = {
    'none': None,
    'relu': nn.ReLU(),
    'relu in place': nn.ReLU(inplace=True),
    'gelu': nn.GELU(),
    'gelu tanh': nn.GELU('tanh'),
    'silu': nn.SiLU(),
    'leaky': nn.LeakyReLU(0.1),
    'hardswish': nn.Hardswish(inplace=True),
    'identity': nn.Identity(),
}
#: Follow a convolution in one pass.
FUSED = {'none', 'relu', 'relu in place', 'gelu', 'gelu tanh'}


# values


@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
@pytest.mark.parametrize(
    'dtype, relative', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)], ids=str
)
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_equals_the_parts(name, dtype, relative, packed):
    conv = build(name, dtype)
    if packed:
        assert prepack(conv) == (name not in ("padding='same'", "padding='valid'", 'mirrored border'))
    for layout in LAYOUTS:
        x = image(conv.in_channels, dtype=dtype, layout=layout)
        kept = x.clone()
        with torch.no_grad():
            shortcut = torch.randn_like(conv(x))
            cases = [(ACTIVATIONS[a], None, a) for a in ACTIVATIONS] + [(None, shortcut, 'shortcut')]
            for activation, other, what in cases:
                before = None if other is None else other.clone()
                found = fused_conv2d(conv, x, activation, other)
                assert found.dtype == dtype
                assert_close(found, truth(conv, x, activation, other), relative, f'{what}, {layout}')
                assert other is None or torch.equal(other, before), 'the shortcut was written to'
            product, expected = fused_conv2d(conv, x, factor=shortcut), shortcut.double() * truth(conv, x)
            assert product.dtype == dtype and torch.equal(shortcut, before), 'the factor was written to'
            assert_close(product, expected, relative, f'factor, {layout}')
        assert torch.equal(x, kept), 'the input was written to'


def test_fused_operations(apart):
    with torch.no_grad():
        for name in CONVOLUTIONS:
            conv, whole = build(name), name in ("padding='same'", "padding='valid'", 'mirrored border')
            x = image(conv.in_channels)
            for activation in ACTIVATIONS:
                apart.clear()
                fused_conv2d(conv, x, ACTIVATIONS[activation])
                assert len(apart) == (whole or activation not in FUSED), (name, activation)
        apart.clear()
        for other, x in (
            (DepthwiseConv2d(8, 3), image()),
            (nn.ConvTranspose2d(8, 4, 2), image()),
            (build('3x3'), image(batch=0)),
            (build('3x3'), image()[0]),
            (build('3x3', torch.float64), image(dtype=torch.float64)),
        ):
            expected = truth(other, x, nn.ReLU())
            assert fused_conv2d(other, x, nn.ReLU()).shape == expected.shape
            if x.shape[0]:
                assert_close(fused_conv2d(other, x, nn.ReLU()), expected)
        assert len(apart) >= 3


@pytest.mark.parametrize('memory', ['other layout', 'broadcast', 'three axes', 'expanded', 'transposed'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_any_memory_of_the_shortcut(memory, layout):
    conv, x = build('3x3'), image(layout=layout)
    shortcut = torch.randn_like(truth(conv, x)).float()
    if memory == 'other layout':
        other = 'default' if layout == 'channels_last' else 'channels_last'
        shortcut = shortcut.contiguous(memory_format=LAYOUTS[other])
    elif memory == 'broadcast':
        shortcut = shortcut[:1, :, :1, :1]
    elif memory == 'three axes':
        shortcut = shortcut[0]
    elif memory == 'expanded':
        shortcut = shortcut[:1, :, :1, :1].expand(shortcut.shape)
    else:
        shortcut = shortcut.transpose(2, 3).contiguous().transpose(2, 3)
    x = x.transpose(2, 3).contiguous().transpose(2, 3) if memory == 'transposed' else x
    with torch.no_grad():
        assert_close(fused_conv2d(conv, x, None, shortcut), truth(conv, x, None, shortcut))


def test_one_operation_after_a_convolution():
    other = torch.zeros(2, 16, 9, 10)
    for parts in ((nn.ReLU(), other), (None, other, other), (nn.ReLU(), None, other)):
        with pytest.raises(ValueError, match='pass one of activation, shortcut and factor'):
            fused_conv2d(build('1x1'), image(), *parts)


@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
def test_what_torch_rejects_is_rejected(packed):
    conv = build('3x3')
    if packed:
        prepack(conv)
    with torch.no_grad(), pytest.raises(RuntimeError, match='expected input.* to have 8 channels'):
        fused_conv2d(conv, image(channels=4))


def test_a_layer_with_its_own_forward_runs_it():
    conv, x = build('1x1'), image()
    conv.forward = lambda x: x[:, :4]
    with torch.no_grad():
        assert torch.equal(fused_conv2d(conv, x, nn.ReLU()), x[:, :4].relu())


# gradients, hooks, modes


@pytest.mark.parametrize('trains', ['weight', 'bias', 'input', 'shortcut'])
@pytest.mark.parametrize('name', ['1x1', '3x3, stride 2'])
def test_gradients(name, trains):
    """Of whatever one thing trains, be everything else frozen."""
    conv = build(name)
    x = image()
    shortcut = torch.randn_like(conv(x).detach())
    for activation, other in ((nn.GELU(), None), (None, shortcut)):
        if trains == 'shortcut' and other is None:
            continue
        twin = copy.deepcopy(conv).double()
        leaves = []
        for module, image_, added in (
            (conv, x.clone(), other),
            (twin, x.double(), None if other is None else other.double()),
        ):
            module.requires_grad_(False).zero_grad()
            added = None if added is None else added.clone()
            leaf = dict(weight=module.weight, bias=module.bias, input=image_, shortcut=added)[trains].requires_grad_()
            if module is conv:
                out = fused_conv2d(module, image_, activation, added)
            else:
                out = module(image_) if added is None else added + module(image_)
                out = out if activation is None else activation(out)
            assert out.requires_grad
            out.square().sum().backward()
            leaves.append(leaf)
            leaf.requires_grad_(False)
        assert_close(leaves[0].grad, leaves[1].grad)
        conv.zero_grad()


def test_hooks_fire():
    conv, activation, x = build('1x1'), nn.ReLU(), image()
    seen = []
    with torch.no_grad():
        expected = truth(conv, x, activation)
        for module in (conv, activation):
            for register in (module.register_forward_hook, module.register_forward_pre_hook):
                handle = register(lambda *args: seen.append(args[0]))
                assert_close(fused_conv2d(conv, x, activation), expected)
                handle.remove()
                assert seen.pop() is module and not seen
            assert_close(fused_conv2d(conv, x, activation), expected)
            assert not seen
        with conv.register_forward_hook(lambda module, args, out: 2 * out):
            assert_close(fused_conv2d(conv, x, activation), 2 * expected)
        with register_module_forward_hook(lambda module, args, out: seen.append(module)):
            fused_conv2d(conv, x, activation)
        assert seen == [conv, activation]


def test_changed_weights_behind_the_layer(apart):
    """A parametrization computes the weight anew; the fused form does not go around it."""
    conv, x = build('1x1'), image()
    conv = parametrizations.weight_norm(conv)
    with torch.no_grad():
        expected = fused_conv2d(conv, x, nn.ReLU()).clone()
        conv.parametrizations.weight.original0.mul_(2)
        found = fused_conv2d(conv, x, nn.ReLU())
        assert not torch.equal(found, expected)
        assert torch.equal(found, torch.relu(conv(x)))


@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
@pytest.mark.parametrize('activation', ['none', 'relu', 'gelu', 'shortcut'])
def test_bfloat16_without_instructions_is_float32_rounded_once(activation, packed, monkeypatch):
    warned = []
    monkeypatch.setattr(direct, 'has_bfloat16_instructions', lambda: False)
    monkeypatch.setattr(direct, 'print_log', lambda message, *_: warned.append(message))
    direct.warn_float32.cache_clear()
    conv, x = build('1x1', torch.bfloat16), image(dtype=torch.bfloat16)
    if packed:
        prepack(conv)
    exact = copy.deepcopy(conv).double()
    with torch.no_grad():
        shortcut = torch.randn_like(exact(x.double())).bfloat16() if activation == 'shortcut' else None
        found = fused_conv2d(conv, x, ACTIVATIONS.get(activation), shortcut)
        expected = truth(
            exact, x.double(), ACTIVATIONS.get(activation), None if shortcut is None else shortcut.double()
        )
        with torch.autocast('cpu', torch.bfloat16):
            cast = fused_conv2d(conv.float(), x.float(), ACTIVATIONS.get(activation), shortcut)
    assert found.dtype == cast.dtype == torch.bfloat16
    assert warned == [direct.FLOAT32_INSTEAD]
    # One rounding to eight bits: half a unit in the last place.
    assert ((found.double() - expected).abs() <= expected.abs() * 2**-8 + 1e-6).all()
    assert torch.equal(found, cast)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
def test_autocast_equals_the_parts(dtype, packed):
    conv, x = build('3x3'), image()
    if packed:
        prepack(conv)
    plain = copy.deepcopy(conv)
    for shortcut_dtype in (torch.float32, dtype):
        with torch.no_grad(), torch.autocast('cpu', dtype):
            shortcut = torch.randn_like(plain(x)).to(shortcut_dtype)
            for name in ('relu', 'gelu', 'silu'):
                found, expected = fused_conv2d(conv, x, ACTIVATIONS[name]), ACTIVATIONS[name](plain(x))
                assert found.dtype == expected.dtype
                assert_close(found, truth(conv, x, ACTIVATIONS[name]), 2e-2)
            found, expected = fused_conv2d(conv, x, None, shortcut), shortcut + plain(x)
            assert found.dtype == expected.dtype, 'torch adds in the wider of both precisions'
            assert_close(found, truth(conv, x, None, shortcut), 2e-2)
    with torch.no_grad():
        # float32 again, from a weight kept for bfloat16
        assert_close(fused_conv2d(conv, x, nn.GELU()), truth(conv, x, nn.GELU()))


def test_inference_mode():
    conv, x = build('3x3'), image()
    prepack(conv)
    for _ in range(2):
        with torch.inference_mode():
            found = fused_conv2d(conv, x, nn.ReLU())
            assert found.is_inference()
            assert_close(found, truth(conv, x, nn.ReLU()))
            assert_close(fused_conv2d(conv, image() * 1, nn.ReLU()).sum() * 0, torch.zeros((), dtype=torch.float64))
        with torch.no_grad():
            assert_close(fused_conv2d(conv, x, nn.ReLU()), truth(conv, x, nn.ReLU()))
    with torch.inference_mode():  # a network that is made and lives there has no versions to follow
        inner = nn.Sequential(build('3x3'), DepthwiseConv2d(16, 5, implementation='fft'))
        prepack(inner)
        inner[0].weight.mul_(2)
        assert_close(fused_conv2d(inner[0], x, nn.ReLU()), truth(inner[0], x, nn.ReLU()))
        assert inner(x).shape == (2, 16, 9, 10)


def test_tracers_see_plain_operators():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = build('1x1'), nn.ReLU()

        def forward(self, x):
            return fused_conv2d(self.conv, x, self.act)

    network, x = Network().eval().requires_grad_(False), image()
    prepack(network)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() == 2 * 2 * 8 * 16 * 9 * 10
    graph = torch.export.export(network, (x,)).graph
    called = [node.target for node in graph.nodes if node.op == 'call_function']
    assert called == [torch.ops.aten.conv2d.default, torch.ops.aten.relu.default]
    traced = torch.jit.trace(network, x)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert [kind for kind in kinds if kind.startswith('aten')] == ['aten::_convolution', 'aten::relu']


# networks


def folded(kind=RepLKNet, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return reparameterize(randomize_norms(kind('nano', **kwargs)).eval())[0]


@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_network_fused_and_apart(layout, packed, monkeypatch, apart):
    network, x = folded(), torch.randn(1, 3, 64, 96)
    network.channels_last = layout == 'channels_last'
    # 1x1 convolutions: two in each of 20 blocks, one before each of three transitions; in the stem one and the image's.
    plain = sum(type(m) is nn.Conv2d for m in network.modules())
    assert plain == 2 * 20 + 3 + 2
    if packed:
        assert prepack(network) == sum(isinstance(m, nn.Conv2d) for m in network.modules())
    with torch.no_grad():
        found = network(x)
        together = plain - sum(type(conv) is nn.Conv2d for conv in apart)
        assert together == plain or layout == 'default'
        exact = copy.deepcopy(network).double()(x.double())
        with monkeypatch.context() as patch:
            patch.setattr(fused, '_can_fuse', lambda *args: False)
            apart.clear()
            separate = network(x)
        assert sum(type(conv) is nn.Conv2d for conv in apart) == plain
    for a, b, c in zip(found, separate, exact, strict=True):
        assert a.stride() == b.stride()
        assert_close(a, b.double(), 1e-5)
        assert_close(a, c, 1e-5)


def gradients(network, x, seed=0):
    network.zero_grad()
    torch.manual_seed(seed)
    outs = network(x)
    sum(out.square().mean() for out in outs).backward()
    return [*outs, *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize('fold', [False, True], ids=['', 'folded'])
def test_training_is_unaffected(fold, monkeypatch):
    """Bit by bit, with drop path."""
    x = torch.randn(2, 3, 64, 64)
    network = (folded(drop_path_rate=0.5) if fold else randomize_norms(RepLKNet('nano', drop_path_rate=0.5))).train()
    state = copy.deepcopy(network.state_dict())
    found = [t.detach().clone() for t in gradients(network, x)]
    network.load_state_dict(state)
    monkeypatch.setattr(fused, '_can_fuse', lambda *args: False)
    expected = gradients(network, x)
    assert len(found) == len(expected) > 100 and all(map(torch.equal, found, expected))
    others = gradients(network, x, seed=1)
    assert not all(map(torch.equal, found, others)), 'nothing was dropped'
