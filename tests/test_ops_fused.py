"""Inference of convolutions with what follows them, and with weights kept in the backend's form: the values of the parts."""
import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
from conftest import randomize_norms
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from replk_mm.models import ConvNeXt, RepLKNet
from replk_mm.ops import DepthwiseConv2d, convolve, fused, implementation, pack
from replk_mm.reparam import reparameterize

pytestmark = pytest.mark.usefixtures('one_thread')
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
ACTIVATIONS = {
    'none': None, 'relu': nn.ReLU(), 'relu in place': nn.ReLU(inplace=True), 'gelu': nn.GELU(), 'gelu tanh': nn.GELU('tanh'),
    'silu': nn.SiLU(), 'leaky': nn.LeakyReLU(.1), 'hardswish': nn.Hardswish(inplace=True), 'identity': nn.Identity(),
}
LAYOUTS = {'default': torch.contiguous_format, 'channels_last': torch.channels_last}
#: Follow a convolution in one pass.
FUSED = {'none', 'relu', 'relu in place', 'gelu', 'gelu tanh'}


@pytest.fixture
def apart(monkeypatch):
    """Calls of torch's convolution layers: those that are not fused."""
    calls = []
    for kind in (nn.Conv2d, DepthwiseConv2d):
        monkeypatch.setattr(kind, 'forward', lambda self, x, forward=kind.forward: calls.append(self) or forward(self, x))
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


# values

@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
@pytest.mark.parametrize('dtype, relative', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)], ids=str)
@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_equals_the_parts(name, dtype, relative, packed):
    conv = build(name, dtype)
    if packed:
        assert pack(conv) == (name not in ("padding='same'", "padding='valid'", 'mirrored border'))
    for layout in LAYOUTS:
        x = image(conv.in_channels, dtype=dtype, layout=layout)
        kept = x.clone()
        with torch.no_grad():
            shortcut = torch.randn_like(conv(x))
            cases = [(ACTIVATIONS[a], None, a) for a in ACTIVATIONS] + [(None, shortcut, 'shortcut')]
            for activation, other, what in cases:
                before = None if other is None else other.clone()
                found = convolve(conv, x, activation, other)
                assert found.dtype == dtype
                assert_close(found, truth(conv, x, activation, other), relative, f'{what}, {layout}')
                assert other is None or torch.equal(other, before), 'the shortcut was written to'
        assert torch.equal(x, kept), 'the input was written to'


@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout_is_torchs(layout, packed):
    for name in CONVOLUTIONS:
        conv = build(name)
        if conv.out_channels == 1:  # every layout is both
            continue
        if packed:
            pack(conv)
        x = image(conv.in_channels, layout=layout)
        with torch.no_grad():
            plain = conv(x)
            for activation, shortcut in ((None, None), (nn.ReLU(), None), (None, torch.randn_like(plain))):
                assert convolve(conv, x, activation, shortcut).stride() == plain.stride(), name


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (17, 3), (33, 32)])
@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
def test_any_size_of_map(size, packed):
    conv = build('3x3')
    if packed:
        pack(conv)
        with torch.no_grad():
            convolve(conv, image())  # the weight is arranged for this size first
    for batch in (1, 3):
        x = image(size=size, batch=batch)
        with torch.no_grad():
            assert_close(convolve(conv, x, nn.GELU()), truth(conv, x, nn.GELU()))
            assert_close(convolve(conv, x, None, torch.ones_like(conv(x))), truth(conv, x) + 1)


def test_what_is_fused_and_what_is_not(apart):
    with torch.no_grad():
        for name in CONVOLUTIONS:
            conv, whole = build(name), name in ("padding='same'", "padding='valid'", 'mirrored border')
            x = image(conv.in_channels)
            for activation in ACTIVATIONS:
                apart.clear()
                convolve(conv, x, ACTIVATIONS[activation])
                assert len(apart) == (whole or activation not in FUSED), (name, activation)
        apart.clear()
        for other, x in (
                (DepthwiseConv2d(8, 3), image()), (nn.ConvTranspose2d(8, 4, 2), image()), (build('3x3'), image(batch=0)),
                (build('3x3'), image()[0]), (build('3x3', torch.float64), image(dtype=torch.float64))):
            expected = truth(other, x, nn.ReLU())
            assert convolve(other, x, nn.ReLU()).shape == expected.shape
            if x.shape[0]:
                assert_close(convolve(other, x, nn.ReLU()), expected)
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
        assert_close(convolve(conv, x, None, shortcut), truth(conv, x, None, shortcut))


def test_an_activation_or_a_shortcut():
    with pytest.raises(ValueError, match='an activation or a shortcut, not both'):
        convolve(build('1x1'), image(), nn.ReLU(), torch.zeros(2, 16, 9, 10))


def test_errors_are_torchs():
    conv = build('3x3')
    with torch.no_grad():
        for activation in (nn.ReLU(), nn.SiLU()):
            with pytest.raises(RuntimeError, match='to have 8 channels, but got 5 channels instead'):
                convolve(conv, image(5), activation)
            with pytest.raises(RuntimeError, match="[Kk]ernel size can't be greater than actual input size"):
                convolve(nn.Conv2d(8, 4, 5), image(size=(3, 3)), activation)
            with pytest.raises(RuntimeError, match='should be the same'):
                convolve(conv, image(dtype=torch.bfloat16), activation)
        for shape in (2, 16, 9, 7), (2, 16, 3, 3), (2, 16, 10, 9), (2, 8, 9, 10), (3, 16, 9, 10):
            for layout in LAYOUTS:
                with pytest.raises(RuntimeError, match='must match the size'):
                    convolve(conv, image(layout=layout), None, torch.zeros(shape))


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
        for module, image_, added in ((conv, x.clone(), other), (twin, x.double(), None if other is None else other.double())):
            module.requires_grad_(False).zero_grad()
            added = None if added is None else added.clone()
            leaf = dict(weight=module.weight, bias=module.bias, input=image_, shortcut=added)[trains].requires_grad_()
            if module is conv:
                out = convolve(module, image_, activation, added)
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
                assert_close(convolve(conv, x, activation), expected)
                handle.remove()
                assert seen.pop() is module and not seen
            assert_close(convolve(conv, x, activation), expected)
            assert not seen
        with conv.register_forward_hook(lambda module, args, out: 2 * out):
            assert_close(convolve(conv, x, activation), 2 * expected)
        with register_module_forward_hook(lambda module, args, out: seen.append(module)):
            convolve(conv, x, activation)
        assert seen == [conv, activation]


def test_changed_weights_behind_the_layer(apart):
    """A parametrization computes the weight anew; the fused form does not go around it."""
    conv, x = build('1x1'), image()
    conv = parametrizations.weight_norm(conv)
    with torch.no_grad():
        expected = convolve(conv, x, nn.ReLU()).clone()
        conv.parametrizations.weight.original0.mul_(2)
        found = convolve(conv, x, nn.ReLU())
        assert not torch.equal(found, expected)
        assert torch.equal(found, torch.relu(conv(x)))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('packed', [False, True], ids=['', 'packed'])
def test_autocast_equals_the_parts(dtype, packed):
    conv, x = build('3x3'), image()
    if packed:
        pack(conv)
    plain = copy.deepcopy(conv)
    for shortcut_dtype in (torch.float32, dtype):
        with torch.no_grad(), torch.autocast('cpu', dtype):
            shortcut = torch.randn_like(plain(x)).to(shortcut_dtype)
            for name in ('relu', 'gelu', 'silu'):
                found, expected = convolve(conv, x, ACTIVATIONS[name]), ACTIVATIONS[name](plain(x))
                assert found.dtype == expected.dtype
                assert_close(found, truth(conv, x, ACTIVATIONS[name]), 2e-2)
            found, expected = convolve(conv, x, None, shortcut), shortcut + plain(x)
            assert found.dtype == expected.dtype, 'torch adds in the wider of both precisions'
            assert_close(found, truth(conv, x, None, shortcut), 2e-2)
    with torch.no_grad():
        assert_close(convolve(conv, x, nn.GELU()), truth(conv, x, nn.GELU()))  # float32 again, from a weight kept for bfloat16


def test_inference_mode():
    conv, x = build('3x3'), image()
    pack(conv)
    for _ in range(2):
        with torch.inference_mode():
            found = convolve(conv, x, nn.ReLU())
            assert found.is_inference()
            assert_close(found, truth(conv, x, nn.ReLU()))
            assert_close(convolve(conv, image() * 1, nn.ReLU()).sum() * 0, torch.zeros((), dtype=torch.float64))
        with torch.no_grad():
            assert_close(convolve(conv, x, nn.ReLU()), truth(conv, x, nn.ReLU()))
    with torch.inference_mode():  # a network that is made and lives there has no versions to follow
        inner = nn.Sequential(build('3x3'), DepthwiseConv2d(16, 5, implementation='fft'))
        pack(inner)
        inner[0].weight.mul_(2)
        assert_close(convolve(inner[0], x, nn.ReLU()), truth(inner[0], x, nn.ReLU()))
        assert inner(x).shape == (2, 16, 9, 10)


def test_what_looks_at_operators_sees_the_parts():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = build('1x1'), nn.ReLU()

        def forward(self, x):
            return convolve(self.conv, x, self.act)

    network, x = Network().eval().requires_grad_(False), image()
    pack(network)
    with FlopCounterMode(display=False) as counter:
        network(x)
    assert counter.get_total_flops() == 2 * 2 * 8 * 16 * 9 * 10
    graph = torch.export.export(network, (x,)).graph
    called = [node.target for node in graph.nodes if node.op == 'call_function']
    assert called == [torch.ops.aten.conv2d.default, torch.ops.aten.relu.default]
    traced = torch.jit.trace(network, x)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert [kind for kind in kinds if kind.startswith('aten')] == ['aten::_convolution', 'aten::relu']


def test_other_devices():
    conv = build('3x3').to('meta')
    with torch.no_grad():
        assert pack(conv) == 0
        assert convolve(conv, image().to('meta'), nn.ReLU()).shape == (2, 16, 9, 10)


# kept weights

def _forget(conv):
    torch.manual_seed(1)
    conv.load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()})


def _step(conv):
    optimizer = torch.optim.Adam(conv.parameters(), lr=.5)
    with torch.enable_grad():
        conv.requires_grad_()(image()).square().mean().backward()
    optimizer.step()
    conv.requires_grad_(False).zero_grad()


def _replaced(conv):
    del conv.weight  # so that the new one may get the memory of the old one
    conv.weight = nn.Parameter(torch.randn(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size), False)


def _assigned(conv):
    for _ in range(3):
        conv.load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()}, assign=True)
    conv.requires_grad_(False)


CHANGES = {
    'load_state_dict': _forget,
    'optimizer': _step,
    'in place': lambda conv: conv.weight.mul_(2),
    'initialized': lambda conv: nn.init.normal_(conv.weight),
    'replaced': _replaced,
    'assigned': _assigned,
    'through bfloat16': lambda conv: conv.bfloat16().float(),
    'bias': lambda conv: conv.bias.add_(3),
    'data replaced': lambda conv: setattr(conv.weight, 'data', torch.randn_like(conv.weight)),
}
KEEPING = {
    'plain': lambda: build('3x3'),
    'spectra': lambda: DepthwiseConv2d(8, 7, implementation='fft').eval(),
}


@pytest.mark.parametrize('kind', KEEPING)
@pytest.mark.parametrize('change', CHANGES)
def test_kept_weights_follow_changes(kind, change):
    conv, x = KEEPING[kind]().requires_grad_(False), image()
    assert pack(conv) == 1
    activation = nn.GELU()
    with torch.no_grad():
        for _ in range(12):  # memory is handed out again sooner or later
            nn.init.normal_(conv.weight)
            before = convolve(conv, x, activation)
            assert_close(before, truth(conv, x, activation))
            CHANGES[change](conv)
            assert_close(convolve(conv, x, activation), truth(conv, x, activation), what=change)
        assert_close(convolve(conv, x[:1], activation), truth(conv, x[:1], activation))


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_in_another_precision(kind):
    conv, x = KEEPING[kind]().requires_grad_(False), image()
    pack(conv)
    with torch.no_grad():
        for _ in range(2):
            assert_close(convolve(conv, x), truth(conv, x))
            with torch.autocast('cpu', torch.bfloat16):
                assert_close(convolve(conv, x), truth(conv, x), 2e-2)
        expected = truth(conv, x)
        conv.to(torch.bfloat16)
        assert_close(convolve(conv, x.bfloat16()), expected, 2e-2)
        conv.to(torch.float64)
        assert_close(convolve(conv, x.double()), truth(conv, x), 1e-12)


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_on_maps_of_changing_sizes(kind):
    conv = KEEPING[kind]().requires_grad_(False)
    pack(conv)
    with torch.no_grad():
        for size in ((9, 10), (3, 4), (30, 17), (9, 10), (1, 1)):
            for layout in LAYOUTS:
                for batch in (1, 4):
                    x = image(size=size, layout=layout, batch=batch)
                    assert_close(convolve(conv, x), truth(conv, x), what=f'{size} {layout}')


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_and_copies(kind):
    conv, x = KEEPING[kind]().requires_grad_(False), image()
    pack(conv)
    with torch.no_grad():
        expected = convolve(conv, x)
        twins = copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))
        for twin in twins:
            assert list(twin.state_dict()) == ['weight', 'bias']
            assert_close(convolve(twin, x), expected.double())
            twin.weight.mul_(2)
            assert_close(convolve(twin, x), truth(twin, x))
        assert torch.equal(convolve(conv, x), expected)
    conv.requires_grad_().train()
    convolve(conv, x).sum().backward()
    assert_close(conv.bias.grad, torch.full((conv.out_channels,), 2. * 9 * 10, dtype=torch.float64))


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_in_threads(kind):
    conv = KEEPING[kind]().requires_grad_(False)
    images = [image(size=size) for size in ((9, 10), (12, 5), (7, 7), (20, 21))]
    expected = [truth(conv, x) for x in images]
    pack(conv)

    def work(first):
        with torch.no_grad():
            for _ in range(5):
                for i in range(len(images)):
                    at = (first + i) % len(images)
                    assert_close(convolve(conv, images[at]), expected[at])
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8), timeout=100))


def test_packed_modules_are_forgotten_with_their_network():
    gc.collect()
    before = len(fused._packed)
    network = nn.Sequential(build('1x1'), build('3x3'), DepthwiseConv2d(8, 3))
    assert pack(network) == 3 and len(fused._packed) == before + 3
    with torch.no_grad():
        convolve(network[0], image())
    del network
    gc.collect()
    assert len(fused._packed) == before


@pytest.mark.parametrize('name', ['1x1', 'our depthwise, 7x7', 'our depthwise, 17x17'])
@pytest.mark.parametrize('spec', ['auto', 'fft'])
def test_training_makes_packed_weights_be_forgotten(name, spec):
    """Fused optimizers change weights without counting their versions."""
    conv = build(name)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
    x = image(conv.in_channels)
    pack(conv)
    with implementation(spec):
        for _ in range(2):
            with torch.no_grad():
                assert_close(convolve(conv, x, nn.ReLU()), truth(conv, x, nn.ReLU()))
            convolve(conv, x, nn.ReLU()).sum().backward()
            optimizer.step()


def test_packed_weights_know_the_arguments_they_are_for():
    conv, x = build('3x3'), image()
    pack(conv)
    with torch.no_grad():
        for padding, dilation, stride in ((1, 1, 1), (2, 2, 1), (1, 1, 2)):
            conv.padding, conv.dilation, conv.stride = (padding,) * 2, (dilation,) * 2, (stride,) * 2
            assert_close(convolve(conv, x), truth(conv, x))


def test_a_forward_that_was_replaced_is_called():
    conv = build('1x1')
    conv.forward = lambda x: torch.zeros(1)
    with torch.no_grad():
        assert convolve(conv, image()).shape == (1,)


# whole networks

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
        assert pack(network) == sum(isinstance(m, nn.Conv2d) for m in network.modules())
    with torch.no_grad():
        found = network(x)
        together = plain - sum(type(conv) is nn.Conv2d for conv in apart)
        assert together == plain or layout == 'default'
        exact = copy.deepcopy(network).double()(x.double())
        with monkeypatch.context() as patch:
            patch.setattr(fused, '_fuses', lambda *args: False)
            apart.clear()
            separate = network(x)
        assert sum(type(conv) is nn.Conv2d for conv in apart) == plain
    for a, b, c in zip(found, separate, exact, strict=True):
        assert a.stride() == b.stride()
        assert_close(a, b.double(), 1e-5)
        assert_close(a, c, 1e-5)


def test_network_in_autocast(monkeypatch):
    network, x = folded(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = [out.double() for out in network(x)]
        with torch.autocast('cpu', torch.bfloat16):
            found = network(x)
            monkeypatch.setattr(fused, '_fuses', lambda *args: False)
            separate = network(x)
    for a, b, c in zip(found, separate, exact, strict=True):
        assert a.dtype == b.dtype
        error = (b.double() - c).abs().max() / c.abs().max()
        assert_close(a, c, 1.5 * error.item() + 1e-3)  # not less accurate than the parts


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
    network = (folded(drop_path_rate=.5) if fold else randomize_norms(RepLKNet('nano', drop_path_rate=.5))).train()
    state = copy.deepcopy(network.state_dict())
    found = [t.detach().clone() for t in gradients(network, x)]
    network.load_state_dict(state)
    monkeypatch.setattr(fused, '_fuses', lambda *args: False)
    expected = gradients(network, x)
    assert len(found) == len(expected) > 100 and all(map(torch.equal, found, expected))
    assert any(not torch.equal(a, b) for a, b in zip(found, gradients(network, x, seed=1), strict=True)), 'nothing was dropped'


def test_packed_convnext():
    network, x = folded(ConvNeXt, out_indices=(0, 3), gap_before_final_norm=False), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        exact = copy.deepcopy(network).double()(x.double())
        assert pack(network) > 10
        for a, b in zip(network(x), exact, strict=True):
            assert_close(a, b, 1e-5)


@pytest.mark.slow
def test_strict_export():
    network, x = folded(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = network(x)
        found = torch.export.export(network, (x,), strict=True).module()(x)
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b.double(), 1e-4)
