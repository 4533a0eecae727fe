"""Weights kept in the backend's form: they follow every change of the layer, and are forgotten with it."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn
from fused_cases import assert_close, build, image, truth
from ops_cases import LAYOUTS

from replk_mm.ops import DepthwiseConv2d, force_implementation, fused_conv2d, prepack
from replk_mm.ops.cpu import cost_model

pytestmark = pytest.mark.usefixtures('one_thread')


def _forget(conv):
    torch.manual_seed(1)
    conv.load_state_dict({k: torch.randn_like(v) for k, v in conv.state_dict().items()})


def _step(conv):
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.5)
    with torch.enable_grad():
        conv.requires_grad_()(image()).square().mean().backward()
    optimizer.step()
    conv.requires_grad_(False).zero_grad()


def _replaced(conv):
    del conv.weight  # so that the new one may get the memory of the old one
    conv.weight = nn.Parameter(
        torch.randn(conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size), False
    )


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
KEEPING = {'plain': lambda: build('3x3'), 'spectra': lambda: DepthwiseConv2d(8, 7, implementation='fft').eval()}


@pytest.mark.parametrize('kind', KEEPING)
@pytest.mark.parametrize('change', CHANGES)
def test_kept_weights_follow_changes(kind, change):
    conv, x = KEEPING[kind]().requires_grad_(False), image()
    assert prepack(conv) == 1
    activation = nn.GELU()
    with torch.no_grad():
        for _ in range(12):  # memory is handed out again sooner or later
            nn.init.normal_(conv.weight)
            before = fused_conv2d(conv, x, activation)
            assert_close(before, truth(conv, x, activation))
            CHANGES[change](conv)
            assert_close(fused_conv2d(conv, x, activation), truth(conv, x, activation), what=change)
        assert_close(fused_conv2d(conv, x[:1], activation), truth(conv, x[:1], activation))


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_in_another_precision(kind):
    conv, x = KEEPING[kind]().requires_grad_(False), image()
    prepack(conv)
    with torch.no_grad():
        for _ in range(2):
            assert_close(fused_conv2d(conv, x), truth(conv, x))
            with torch.autocast('cpu', torch.bfloat16):
                assert_close(fused_conv2d(conv, x), truth(conv, x), 2e-2)
        expected = truth(conv, x)
        conv.to(torch.bfloat16)
        assert_close(fused_conv2d(conv, x.bfloat16()), expected, 2e-2)
        conv.to(torch.float64)
        assert_close(fused_conv2d(conv, x.double()), truth(conv, x), 1e-12)


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_on_maps_of_changing_sizes(kind):
    conv = KEEPING[kind]().requires_grad_(False)
    prepack(conv)
    with torch.no_grad():
        for size in ((9, 10), (3, 4), (30, 17), (9, 10), (1, 1)):
            for layout in LAYOUTS:
                for batch in (1, 4):
                    x = image(size=size, layout=layout, batch=batch)
                    assert_close(fused_conv2d(conv, x), truth(conv, x), what=f'{size} {layout}')


@pytest.mark.parametrize('kind', KEEPING)
def test_kept_weights_and_copies(kind):
    conv, x = KEEPING[kind]().requires_grad_(False), image()
    prepack(conv)
    with torch.no_grad():
        expected = fused_conv2d(conv, x)
        twins = copy.deepcopy(conv), pickle.loads(pickle.dumps(conv))
        for twin in twins:
            assert list(twin.state_dict()) == ['weight', 'bias']
            assert_close(fused_conv2d(twin, x), expected.double())
            twin.weight.mul_(2)
            assert_close(fused_conv2d(twin, x), truth(twin, x))
        assert torch.equal(fused_conv2d(conv, x), expected)
    conv.requires_grad_().train()
    fused_conv2d(conv, x).sum().backward()
    assert_close(conv.bias.grad, torch.full((conv.out_channels,), 2.0 * 9 * 10, dtype=torch.float64))


@pytest.mark.parametrize('name', ['1x1', 'our depthwise, 7x7', 'our depthwise, 17x17'])
@pytest.mark.parametrize('spec', ['auto', 'fft'])
def test_training_makes_packed_weights_be_forgotten(name, spec):
    """Fused optimizers change weights without counting their versions."""
    conv = build(name)
    optimizer = torch.optim.AdamW(conv.parameters(), lr=0.1, fused=True)
    x = image(conv.in_channels)
    prepack(conv)
    with force_implementation(spec):
        for _ in range(2):
            with torch.no_grad():
                assert_close(fused_conv2d(conv, x, nn.ReLU()), truth(conv, x, nn.ReLU()))
            fused_conv2d(conv, x, nn.ReLU()).sum().backward()
            optimizer.step()


def test_kept_spectra_count_only_where_they_are_used(monkeypatch):
    """Training computes them anew, so that FFTs are not as fast as in inference."""
    conv, seen, choose = DepthwiseConv2d(8, 7), [], cost_model.choose_plan
    monkeypatch.setattr(cost_model, 'choose_plan', lambda *args: seen.append(args[2]) or choose(*args))
    for change in (lambda: None, lambda: prepack(conv)):
        change()
        conv(image())
        with torch.no_grad():
            conv(image())
    assert seen == [False, False, False, True]


def test_packed_weights_know_the_arguments_they_are_for():
    conv, x = build('3x3'), image()
    prepack(conv)
    with torch.no_grad():
        for padding, dilation, stride in ((1, 1, 1), (2, 2, 1), (1, 1, 2)):
            conv.padding, conv.dilation, conv.stride = (padding,) * 2, (dilation,) * 2, (stride,) * 2
            assert_close(fused_conv2d(conv, x), truth(conv, x))
