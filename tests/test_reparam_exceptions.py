"""What folding must leave alone, and what it must not."""
import pytest
import torch
from conftest import randomize_norms
from mmcv.cnn import ConvModule
from reparam_cases import BN, TINY, norms, randomized
from torch import nn
from torch.nn.utils import parametrize

from replk_mm.equivalence import compare
from replk_mm.models import ConvNeXt, RepLKNet
from replk_mm.models.replknet import ConvFFN
from replk_mm.ops import DepthwiseConv2d
from replk_mm.reparam import reparameterize


class WeightFlip(nn.Conv2d):
    """A convolution that computes something else with its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight.flip(-1), self.bias)


class DoubledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def conv(**kwargs):
    return nn.Conv2d(4, 4, 3, padding=1, **kwargs)


def parametrized():
    module = conv()
    parametrize.register_parametrization(module, 'weight', Double())
    return module


def hooked():
    module = conv()
    module.register_forward_hook(lambda *args: args[-1] * 2)
    return module


LEFT = {
    'another convolution class': lambda: nn.Sequential(WeightFlip(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    'weight standardization': lambda: ConvModule(4, 4, 3, padding=1, conv_cfg=dict(type='ConvAWS'), norm_cfg=BN),
    'parametrized weight': lambda: nn.Sequential(parametrized(), nn.BatchNorm2d(4)),
    'spectral norm': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, with_spectral_norm=True),
    'forward hook': lambda: nn.Sequential(hooked(), nn.BatchNorm2d(4)),
    'transposed convolution': lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)),
    'activation between': lambda: nn.Sequential(conv(), nn.ReLU(), nn.BatchNorm2d(4)),
    'norm in front of padding': lambda: nn.Sequential(nn.BatchNorm2d(4), conv()),
    'norm first': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('norm', 'conv', 'act')),
    'activation before norm': lambda: ConvModule(4, 4, 3, padding=1, norm_cfg=BN, order=('conv', 'act', 'norm')),
    'batch statistics': lambda: nn.Sequential(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
    'another norm class': lambda: nn.Sequential(conv(), DoubledNorm(4)),
    'the norm of something else': lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.PixelShuffle(2), nn.BatchNorm2d(1)),
}


@pytest.mark.parametrize('case', LEFT)
def test_left_alone(case):
    model = randomized(LEFT[case]())
    after, changes = reparameterize(model)
    assert changes.folded == [] and changes.left == norms(model) and len(changes.left) == 1
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(after(x), model.eval()(x))


FOLDED = {
    'Sequential': lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU()),
    'no affine': lambda: nn.Sequential(conv(bias=False), nn.BatchNorm2d(4, affine=False)),
    'groups': lambda: nn.Sequential(conv(groups=2), nn.BatchNorm2d(4)),
    'reflected padding': lambda: nn.Sequential(conv(padding_mode='reflect'), nn.BatchNorm2d(4)),
    'stride and dilation': lambda: nn.Sequential(nn.Conv2d(4, 6, 3, 2, dilation=2), nn.BatchNorm2d(6)),
    'ConvModule': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=BN),
    'ConvModule folded at run time': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=BN, efficient_conv_bn_eval=True),
    'ConvModule with circular padding': lambda: ConvModule(4, 6, 3, padding=1, padding_mode='reflect', norm_cfg=BN),
    'SyncBN': lambda: ConvModule(4, 6, 3, padding=1, norm_cfg=dict(type='SyncBN')),
    'depthwise': lambda: nn.Sequential(DepthwiseConv2d(4, 9, bias=False), nn.BatchNorm2d(4)),
    '1d': lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)),
}


@pytest.mark.parametrize('case', FOLDED)
def test_folded(case):
    model = randomize_norms(FOLDED[case]()).double().eval()
    after, changes = reparameterize(model)
    assert len(changes.folded) == 1 and changes.left == norms(after) == []
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert (after(x) - model(x)).abs().max() <= 1e-12 * model(x).abs().max()


def test_reverted_sync_bn_is_folded():
    from mmengine.model import revert_sync_batchnorm
    model = randomize_norms(revert_sync_batchnorm(RepLKNet(TINY, norm_cfg=dict(type='SyncBN'))))
    after, _ = reparameterize(model)
    assert norms(after) == [] and all(d.ok for d in compare(model, after))


def test_group_norm_stays():
    model = RepLKNet(TINY, norm_cfg=dict(type='GN', num_groups=2)).eval()
    after, changes = reparameterize(model)
    assert changes.merged == changes.folded == changes.left == []
    assert after.state_dict().keys() == model.state_dict().keys()


def test_norm_in_front_of_a_padded_convolution():
    """Behind the norm the border is zero; folded, it would be something else."""
    ffn = ConvFFN(4, 1, 0., BN)
    ffn.pw1.conv = conv(bias=False)
    randomize_norms(ffn).double().eval()
    after, changes = reparameterize(ffn)
    assert sorted(changes.folded) == ['pw1.bn', 'pw2.bn'] and changes.left == ['preffn_bn']
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    assert torch.allclose(after(x), ffn(x), rtol=0, atol=1e-12)


def test_shared_convolution_serves_all_its_norms():
    """As in heads that share convolutions between pyramid levels and keep a norm for each."""
    shared = conv()
    model = randomize_norms(nn.ModuleList([nn.Sequential(shared, nn.BatchNorm2d(4)) for _ in range(2)]))
    for i, branch in enumerate(model):
        randomize_norms(branch[1], seed=i)
    after, changes = reparameterize(model)
    assert changes.folded == [] and len(changes.left) == 2
    x = torch.randn(1, 4, 6, 6)
    assert all(torch.equal(a(x), b.eval()(x)) for a, b in zip(after, model, strict=True))


def test_convnext_has_nothing_to_fold():
    model = ConvNeXt(dict(depths=[1, 1, 1, 1], channels=[8, 8, 8, 8]))
    after, changes = reparameterize(model)
    assert changes.merged == changes.folded == changes.left == []
    assert all(d.relative == 0 for d in compare(model, after))
