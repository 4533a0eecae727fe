"""Whole networks with fused convolutions: the values of the parts, and training as without."""
import copy

import pytest
import torch
import torch.nn as nn
from conftest import randomize_norms
from fused_cases import apart, assert_close  # noqa: F401 (a fixture)
from ops_cases import LAYOUTS

from replk_mm.models import ConvNeXt, RepLKNet
from replk_mm.ops import fused, pack
from replk_mm.reparam import reparameterize

# ruff: noqa: F811 (fixtures that come from another file)
pytestmark = pytest.mark.usefixtures('one_thread')


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
