"""RepLKNet: the contract of all backbones, and what is its own."""

import inspect

import pytest
import torch
from backbone_contract import BackboneContract
from norms import randomize_norms
from torch import nn

from replk_mm.backbones import RepLKNet
from replk_mm.backbones.replknet import ConvFFN, ReparamLargeKernelConv, RepLKBlock

TINY = dict(
    large_kernel_sizes=[13, 11, 9, 7], small_kernel=5, layers=[1, 1, 2, 1], channels=[8, 12, 16, 24], dw_ratio=1
)


def halves(side: int) -> list[int]:
    """Sides of the feature maps: every halving rounds up."""
    sides = []
    for steps in (2, 1, 1, 1):
        for _ in range(steps):
            side = (side + 1) // 2
        sides.append(side)
    return sides


class TestRepLKNet(BackboneContract):
    cls = RepLKNet
    tiny = dict(arch=TINY)
    channels = TINY['channels']
    sides = staticmethod(halves)
    batch_norm = dict(type='BN')
    frozen = {
        -1: ('-',),
        0: ('stem.',),
        1: ('stem.', 'stages.0.'),
        2: ('stem.', 'stages.0.', 'stages.1.', 'transitions.0.'),
        3: ('stem.', 'stages.0.', 'stages.1.', 'stages.2.', 'transitions.0.', 'transitions.1.'),
        4: ('stem.', 'stages.', 'transitions.'),
    }
    # Five pairs of blocks; a feed-forward block has the rate of the large-kernel block before it.
    drop_paths = [0, 0, 0.075, 0.075, 0.15, 0.15, 0.225, 0.225, 0.3, 0.3]
    sharded = [{}, dict(with_cp=True), dict(norm_intermediate_features=True)]
    num_layers = 1 + (1 + 1 + 1 + 1) + 1  # the two blocks of the third stage are one layer
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(out_indices=(0, 0)),
        dict(out_indices=()),
        dict(out_indices=-5),
        dict(out_indices=(0, -4)),
        dict(frozen_stages=-2),
        dict(frozen_stages=5),
        dict(drop_path_rate=-0.1),
        dict(drop_path_rate=1.0),
        dict(arch=None),
        dict(arch=31),
        dict(arch=dict(TINY, large_kernel_sizes=[13, 10, 9, 7])),
        dict(arch=dict(TINY, small_kernel=4)),
        dict(arch=dict(TINY, small_kernel=9)),
        dict(arch=dict(TINY, layers=[1, 1, 1])),
        dict(arch=dict(TINY, widths=[1])),
        dict(arch=dict(TINY, dilation=2)),
        dict(arch=dict(TINY, shortcut='no')),
        dict(arch=dict(TINY, small_kernel=None, dilation=1.5)),
        dict(arch=dict(TINY, small_kernel=None, dilation=0)),
        dict(arch=dict(TINY, shortcut=False), drop_path_rate=0.1),
        dict(arch={k: v for k, v in TINY.items() if k != 'dw_ratio'}),
    ]

    others = dict(
        arch='nano',
        in_channels=4,
        drop_path_rate=0.2,
        small_kernel_merged=True,
        norm_cfg=dict(type='BN', eps=1e-2),
        act_cfg=dict(type='SiLU'),
        out_indices=(0, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        norm_intermediate_features=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    @pytest.mark.parametrize('argument', inspect.signature(RepLKNet).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    def test_activations(self):
        model = self.build(act_cfg=dict(type='SiLU'))
        assert not any(isinstance(m, nn.ReLU) for m in model.modules())
        silu = {n for n, m in model.named_modules() if isinstance(m, nn.SiLU)}
        expected = {f'stem.{i}.nonlinear' for i in range(4)}
        expected |= {f'transitions.{i}.{j}.nonlinear' for i in range(3) for j in range(2)}
        for stage, blocks in enumerate(TINY['layers']):
            for block in range(0, 2 * blocks, 2):
                expected |= {f'stages.{stage}.blocks.{block}.{part}' for part in ('pw1.nonlinear', 'lk_nonlinear')}
        assert silu == expected
        gelu = [n for n, m in model.named_modules() if isinstance(m, nn.GELU)]
        assert len(gelu) == 5 and all(n.endswith('nonlinear') for n in gelu)


# Independent count of parameters: every convolution is without bias and followed by a norm of two numbers a channel.
def count(channels, layers, kernels, small, dw_ratio, merged=False, output_norms=False, ffn=4):
    def pw(a, b):
        return a * b + 2 * b

    def dw(c, k):
        return c * k * k + 2 * c

    total = pw(3 * 9, channels[0]) + dw(channels[0], 3) + pw(channels[0], channels[0]) + dw(channels[0], 3)
    for i, (c, n, k) in enumerate(zip(channels, layers, kernels, strict=True)):
        w = int(c * dw_ratio)
        large = w * k * k + w if merged else dw(w, k) + (dw(w, small) if small else 0)
        total += n * (2 * c + pw(c, w) + large + pw(w, c))  # RepLK block
        total += n * (2 * c + pw(c, ffn * c) + pw(ffn * c, c))  # feed-forward block
        total += 2 * c if output_norms else 0
        if i + 1 < len(channels):
            total += pw(c, channels[i + 1]) + dw(channels[i + 1], 3)
    return total


BASE = [128, 256, 512, 1024]
#: name: (channels, layers, kernels, small kernel, dw_ratio), and millions of parameters of the published classifier.
PAPER = {
    '31B': (BASE, [2, 2, 18, 2], [31, 29, 27, 13], 5, 1),
    '31L': ([192, 384, 768, 1536], [2, 2, 18, 2], [31, 29, 27, 13], 5, 1),
    'XL': ([256, 512, 1024, 2048], [2, 2, 18, 2], [27, 27, 27, 13], None, 1.5),
    '3': (BASE, [2, 2, 18, 2], [3, 3, 3, 3], None, 1),
    '7': (BASE, [2, 2, 18, 2], [7, 7, 7, 7], 5, 1),
    '13': (BASE, [2, 2, 18, 2], [13, 13, 13, 13], 5, 1),
    '25': (BASE, [2, 2, 18, 2], [25, 25, 25, 13], 5, 1),
    'nano': ([32, 64, 128, 256], [2, 2, 4, 2], [31, 29, 27, 13], 5, 1),
}


@pytest.mark.parametrize('arch', PAPER)
def test_parameters(arch):
    for merged in (False, True):
        for norms in (False, True):
            with torch.device('meta'):
                model = RepLKNet(arch, small_kernel_merged=merged, norm_intermediate_features=norms)
            assert sum(p.numel() for p in model.parameters()) == count(*PAPER[arch], merged, norms)


@pytest.mark.parametrize('arch, millions', [('31B', 79), ('31L', 172), ('XL', 335)])
def test_published_parameters(arch, millions):
    """With the classifier of 1000 classes and its norm; the paper's table of ImageNet results cuts digits off."""
    width = PAPER[arch][0][-1]
    assert int((count(*PAPER[arch], merged=True) + 1000 * width + 1000 + 2 * width) / 1e6) == millions


def test_ffn_ratio():
    model = RepLKNet(dict(TINY, ffn_ratio=2))
    expected = count(TINY['channels'], TINY['layers'], TINY['large_kernel_sizes'], 5, 1, ffn=2)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_blocks_by_hand():
    """Both blocks against the formulas of the paper, written with torch's functions only."""
    torch.manual_seed(0)
    relu, norm = dict(type='ReLU'), dict(type='BN')
    block = randomize_norms(RepLKBlock(4, 9, 3, 1, 1.5, True, 0.0, False, norm, relu)).double().eval()
    ffn = randomize_norms(ConvFFN(4, 4, 0.0, norm), 1).double().eval()
    x = torch.randn(2, 4, 10, 11, dtype=torch.float64)

    def bn(x, layer):
        return nn.functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False, eps=1e-5
        )

    def conv_bn(x, layer, groups=1):
        w = layer.conv.weight
        return bn(nn.functional.conv2d(x, w, padding=w.shape[-1] // 2, groups=groups), layer.bn)

    with torch.no_grad():
        inner = conv_bn(bn(x, block.prelkb_bn), block.pw1).relu()
        assert inner.shape[1] == 6
        large = conv_bn(inner, block.large_kernel.lkb_origin, 6) + conv_bn(inner, block.large_kernel.small_conv, 6)
        assert torch.allclose(block(x), x + conv_bn(large.relu(), block.pw2), rtol=0, atol=1e-12)
        inner = nn.functional.gelu(conv_bn(bn(x, ffn.preffn_bn), ffn.pw1))
        assert torch.allclose(ffn(x), x + conv_bn(inner, ffn.pw2), rtol=0, atol=1e-12)


def test_no_shortcut_by_hand():
    torch.manual_seed(0)
    settings = 4, 5, None, 1, 1
    with_it = (
        randomize_norms(RepLKBlock(*settings, True, 0.0, False, dict(type='BN'), dict(type='ReLU'))).double().eval()
    )
    without = RepLKBlock(*settings, False, 0.0, False, dict(type='BN'), dict(type='ReLU')).double().eval()
    without.load_state_dict(with_it.state_dict())
    x = torch.randn(2, 4, 10, 11, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(with_it(x), x + without(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize('merged', [False, True])
def test_dilated_kernel_is_a_large_one_with_holes(merged):
    """A dense kernel whose taps between the dilated one's are zero gives the same map."""
    torch.manual_seed(0)
    norm = dict(type='BN')
    dilated = randomize_norms(ReparamLargeKernelConv(3, 3, None, 4, merged, norm)).double().eval()
    dense = ReparamLargeKernelConv(3, 9, None, 1, merged, norm).double().eval()
    weights = dilated.state_dict()
    key = 'lkb_reparam.weight' if merged else 'lkb_origin.conv.weight'
    spread = torch.zeros(3, 1, 9, 9, dtype=torch.float64)
    spread[..., ::4, ::4] = weights[key]
    dense.load_state_dict(weights | {key: spread})
    x = torch.randn(2, 3, 14, 13, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(dilated(x), dense(x), rtol=0, atol=1e-12)


def test_intermediate_norms_touch_only_the_outputs():
    model = RepLKNet(TINY, norm_intermediate_features=True, out_indices=(1, 3)).eval()
    plain = RepLKNet(TINY, out_indices=(1, 3)).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.norm.' not in k})
    assert [k for k in model.state_dict() if k.startswith('stages.0.norm') or k.startswith('stages.2.norm')] == []
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.stages[1].norm.weight.fill_(2.0)
        model.stages[3].norm.bias.fill_(1.0)
        outs, raw = model(x), plain(x)
    scale = (1 + 1e-5) ** -0.5
    assert torch.allclose(outs[0], raw[0] * 2 * scale, atol=1e-5)
    assert torch.allclose(outs[1], raw[1] * scale + 1, atol=1e-5)
