"""ConvNeXt: the contract of all backbones, and what is its own."""

import inspect

import pytest
import torch
from backbone_contract import BackboneContract
from torch import nn

from replk_mm.backbones import ConvNeXt
from replk_mm.backbones.convnext import ConvNeXtBlock
from replk_mm.backbones.layers import LayerNorm2d, build_norm

TINY = dict(depths=[1, 1, 4, 1], channels=[8, 12, 16, 24])


def patches(side: int) -> list[int]:
    """Sides of the feature maps: patches that do not fit are cut off."""
    return [side // 4, side // 4 // 2, side // 4 // 2 // 2, side // 4 // 2 // 2 // 2]


class TestConvNeXt(BackboneContract):
    cls = ConvNeXt
    tiny = dict(arch=TINY, out_indices=(0, 1, 2, 3), gap_before_final_norm=False, layer_scale_init_value=0.5)
    channels = TINY['channels']
    sides = staticmethod(patches)
    batch_norm = dict(type='BN')
    frozen = {
        n: tuple(f'{part}.{i}.' for part in ('downsample_layers', 'stages') for i in range(n)) or ('-',)
        for n in range(5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(out_indices=(0, 0)),
        dict(out_indices=()),
        dict(out_indices=-5),
        dict(frozen_stages=-1),
        dict(frozen_stages=5),
        dict(kernel_size=6),
        dict(kernel_size=[7, 7, 7]),
        dict(kernel_size=[7, 7, 7, 4]),
        dict(kernel_size=-1),
        dict(drop_path_rate=1.0),
        dict(layer_scale_init_value=-1.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, layers=[1])),
        dict(arch=dict(depths=[1, 1, 1, 1])),
    ]
    others = dict(
        arch='atto',
        kernel_size=9,
        in_channels=4,
        stem_patch_size=2,
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='ReLU'),
        linear_pw_conv=False,
        use_grn=True,
        drop_path_rate=0.2,
        layer_scale_init_value=0.0,
        out_indices=(0, 3),
        frozen_stages=1,
        gap_before_final_norm=True,
        with_cp=True,
        norm_eval=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    @pytest.mark.parametrize('argument', inspect.signature(ConvNeXt).parameters)
    def test_every_argument_has_an_effect(self, argument):
        # Recomputing, initial weights and the mode of BatchNorm (the default has none) have tests of their own.
        if argument not in ('with_cp', 'init_cfg', 'norm_eval', 'out_memory_format'):
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    def test_activations(self):
        model = self.build(act_cfg=dict(type='SiLU'))
        assert sum(isinstance(m, nn.SiLU) for m in model.modules()) == 7
        assert not any(isinstance(m, nn.GELU) for m in model.modules())

    @pytest.mark.parametrize('grn', [False, True])
    def test_linear_and_convolution_are_the_same(self, grn):
        linear, conv = (self.build(linear_pw_conv=flag, use_grn=grn) for flag in (True, False))
        own = conv.state_dict()
        conv.load_state_dict({k: v.reshape(own[k].shape) for k, v in linear.state_dict().items()})
        x = self.image()
        self.assert_equal(conv(x), linear(x), 1e-5)

    def test_pooled_features(self):
        pooled, maps = self.build(gap_before_final_norm=True), self.build()
        x = self.image()
        outs = pooled(x)
        assert [tuple(o.shape) for o in outs] == [(2, c) for c in self.channels]
        raw = {}
        for i in range(4):
            getattr(maps, f'norm{i}').register_forward_pre_hook(lambda _, args, i=i: raw.__setitem__(i, args[0]))
        maps(x)
        for i, out in enumerate(outs):
            norm = getattr(maps, f'norm{i}')
            expected = nn.functional.layer_norm(raw[i].mean((2, 3)), (self.channels[i],), norm.weight, norm.bias, 1e-6)
            assert torch.allclose(out, expected, atol=1e-5)


def count(channels, depths, kernels, scale=True, grn=False, outputs=(3,)):
    """Parameters in closed form: every layer has a bias, every norm two numbers a channel."""
    total = channels[0] * 3 * 16 + channels[0] + 2 * channels[0]
    for a, b in zip(channels, channels[1:], strict=False):
        total += 2 * a + a * b * 4 + b
    for c, n, k in zip(channels, depths, kernels, strict=True):
        total += n * (c * k * k + c + 2 * c + 8 * c * c + 5 * c + (c if scale else 0) + (8 * c if grn else 0))
    return total + sum(2 * channels[i] for i in outputs)


def widths(first):
    return [first, 2 * first, 4 * first, 8 * first]


#: name: (channels, depths), and millions of parameters of the published classifier of 1000 classes, where there is one.
PAPER = {
    'atto': (widths(40), [2, 2, 6, 2], 3.7),
    'femto': (widths(48), [2, 2, 6, 2], 5.2),
    'pico': (widths(64), [2, 2, 6, 2], 9.1),
    'nano': (widths(80), [2, 2, 8, 2], 15.6),
    'tiny': (widths(96), [3, 3, 9, 3], 28.6),
    'small': (widths(96), [3, 3, 27, 3], 50.2),
    'base': (widths(128), [3, 3, 27, 3], 88.6),
    'large': (widths(192), [3, 3, 27, 3], 197.8),
    'xlarge': (widths(256), [3, 3, 27, 3], 350.2),
    'huge': (widths(352), [3, 3, 27, 3], 660.3),
}


@pytest.mark.parametrize('arch', PAPER)
def test_parameters(arch):
    channels, depths, published = PAPER[arch]
    for kernel, kernels in ((7, [7] * 4), ([31, 29, 27, 13], [31, 29, 27, 13])):
        for v2 in (False, True):
            with torch.device('meta'):
                model = ConvNeXt(
                    arch,
                    kernel_size=kernel,
                    use_grn=v2,
                    layer_scale_init_value=0.0 if v2 else 1e-6,
                    out_indices=(0, 1, 2, 3),
                )
            found = sum(p.numel() for p in model.parameters())
            assert found == count(channels, depths, kernels, not v2, v2, (0, 1, 2, 3))
    # atto to nano and huge are version 2 only: global response norm instead of the layer scale
    new = arch in ('atto', 'femto', 'pico', 'nano', 'huge')
    classifier = channels[3] * 1000 + 1000
    assert (count(channels, depths, [7] * 4, not new, new) + classifier) / 1e6 == pytest.approx(published, abs=0.06)


def test_defaults_are_those_of_mmpretrain():
    """Its configs leave these out."""
    defaults = {k: p.default for k, p in inspect.signature(ConvNeXt).parameters.items()}
    expected = dict(
        arch='tiny',
        in_channels=3,
        stem_patch_size=4,
        norm_cfg=dict(type='LN2d', eps=1e-6),
        act_cfg=dict(type='GELU'),
        linear_pw_conv=True,
        use_grn=False,
        drop_path_rate=0.0,
        layer_scale_init_value=1e-6,
        out_indices=-1,
        frozen_stages=0,
        gap_before_final_norm=True,
        with_cp=False,
    )
    assert {k: defaults[k] for k in expected} == expected


def test_layer_norm_by_hand():
    """Where the variance is not far above eps, which is 1e-6 by default."""
    x = torch.tensor([1e-3, -1e-3], dtype=torch.float64).view(1, 2, 1, 1)
    for eps, norm in ((1e-6, LayerNorm2d(2)), (1e-4, LayerNorm2d(2, 1e-4)), (1e-5, build_norm(dict(type='LN2d'), 2))):
        expected = 1e-3 / (1e-6 + eps) ** 0.5
        assert norm.double()(x).flatten().tolist() == pytest.approx([expected, -expected], rel=1e-12)


def test_block_by_hand():
    torch.manual_seed(0)
    block = ConvNeXtBlock(4, 7, 4, dict(type='LN2d', eps=1e-6), dict(type='GELU'), True, True, 0.0, 0.5).double().eval()
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(0.2, 0.5)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    conv, norm, grn = block.depthwise_conv, block.norm, block.grn
    with torch.no_grad():
        out = nn.functional.conv2d(x, conv.weight, conv.bias, padding=3, groups=4)
        mean, var = out.mean(1, keepdim=True), out.var(1, keepdim=True, unbiased=False)
        out = (out - mean) / (var + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        layer = block.pointwise_conv1
        out = torch.einsum('nchw,dc->ndhw', out, layer.weight) + layer.bias.view(-1, 1, 1)
        out = 0.5 * out * (1 + torch.erf(out / 2**0.5))
        energy = out.square().sum((2, 3), keepdim=True).sqrt()
        share = energy / (energy.mean(1, keepdim=True) + 1e-6)
        out = grn.gamma.view(-1, 1, 1) * out * share + grn.beta.view(-1, 1, 1) + out
        layer = block.pointwise_conv2
        out = torch.einsum('nchw,dc->ndhw', out, layer.weight) + layer.bias.view(-1, 1, 1)
        assert torch.allclose(block(x), x + block.gamma.view(-1, 1, 1) * out, rtol=0, atol=1e-12)
