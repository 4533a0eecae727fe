"""InternImage: the contract of all backbones, and what is its own."""

import inspect
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from torch import nn
from torch.nn import functional as F

from replk_mm.backbones import InternImage, build_backbone
from replk_mm.backbones.internimage import InternImageBlock
from replk_mm.ops.dcnv3 import dcnv3

FACTS = Path(__file__).parents[1] / 'data' / 'facts'
TINY = dict(depths=[1, 1, 4, 1], channels=[8, 16, 24, 32], groups=[1, 2, 3, 4], offset_scale=1.0, post_norm=False)
LN = dict(type='LN2d', eps=1e-6)


class TestInternImage(BackboneContract):
    cls = InternImage
    tiny = dict(arch=TINY)
    channels = TINY['channels']
    sides = staticmethod(lambda side: [-(-side // n) for n in (4, 8, 16, 32)])
    batch_norm = dict(type='BN')
    frozen = {0: ('-',)} | {
        n: (
            'patch_embed.',
            *(f'levels.{i}.{part}.' for i in range(n) for part in ('blocks', 'norm')),
            *(f'levels.{i}.downsample.' for i in range(n - 1)),
        )
        for n in range(1, 5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + 7 + 1  # stem, a layer for each block, the rest
    sharded = [{}, dict(with_cp=True), dict(arch=dict(TINY, post_norm=True))]
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(frozen_stages=5),
        dict(drop_path_rate=1.0),
        dict(layer_scale_init_value=0.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, layers=[1])),
        dict(arch=dict(TINY, groups=[1, 2, 3])),
        dict(arch=dict(TINY, groups=[1, 2, 3, 5])),
    ]
    others = dict(
        arch=dict(TINY, post_norm=True),
        in_channels=4,
        drop_path_rate=0.2,
        layer_scale_init_value=0.5,
        norm_cfg=dict(type='LN2d', eps=1e-2),
        out_indices=(0, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    def build(self, seed=0, **kwargs):
        """With offsets and masks that are not zero."""
        model = super().build(seed, **kwargs)
        for name, value in model.named_parameters():
            if '.dcn.offset.' in name or '.dcn.mask.' in name:
                nn.init.normal_(value, 0, 0.2)
        return model

    @pytest.mark.parametrize('argument', inspect.signature(InternImage).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format', 'norm_eval'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    def test_drop_path_keeps_the_mean(self):
        """A sample loses each of the two branches of a block, or has it divided by the probability to keep it."""
        keep, x = 0.7, torch.randn(1, 4, 3, 3, dtype=torch.float64)
        block = InternImageBlock(4, 2, 1.0, False, 1 - keep, LN, 1.0).double()
        with torch.no_grad():
            outcomes = {}
            for first in (0, 1):
                middle = x + first / keep * block.dcn(block.norm1(x))
                for second in (0, 1):
                    outcomes[first, second] = middle + second / keep * block._mlp(block.norm2(middle))
            found = block.train()(x.repeat(1000, 1, 1, 1))
            counts = {}
            for key, expected in outcomes.items():
                counts[key] = sum((found - expected).flatten(1).abs().amax(1) < 1e-12).item() / 1000
        assert sum(counts.values()) == 1
        for (first, second), share in counts.items():  # four standard deviations
            expected = (keep if first else 1 - keep) * (keep if second else 1 - keep)
            assert share == pytest.approx(expected, abs=0.07)

    def test_initial_weights(self):
        torch.manual_seed(0)
        model = InternImage(dict(TINY, channels=[32, 64, 128, 256], groups=[2, 4, 8, 16]))
        model.init_weights()
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear):
                assert not layer.bias.any()
                if name.endswith(('.offset', '.mask')):
                    assert not layer.weight.any()
                elif layer.weight.numel() > 2000:
                    std = 0.02 if '.mlp.' in name else layer.in_features**-0.5
                    assert layer.weight.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize('name, arch', [('t', 'tiny'), ('s', 'small')])
def test_keys_and_shapes_of_the_authors(name, arch):
    with torch.device('meta'):
        model = InternImage(arch)
    lines = (FACTS / f'keys_internimage_{name}_official.txt').read_text().splitlines()
    assert [f'{key}\t{tuple(value.shape)}' for key, value in model.state_dict().items()] == lines


#: Width, depths, groups, scale of the offsets and place of the norms; table 1 of the paper and the configurations.
VARIANTS = {
    'tiny': (64, [4, 4, 18, 4], [4, 8, 16, 32], 1.0, False),
    'small': (80, [4, 4, 21, 4], [5, 10, 20, 40], 1.0, True),
    'base': (112, [4, 4, 21, 4], [7, 14, 28, 56], 1.0, True),
    'large': (160, [5, 5, 22, 5], [10, 20, 40, 80], 2.0, True),
    'xlarge': (192, [5, 5, 24, 5], [12, 24, 48, 96], 2.0, True),
}


def test_variants():
    keys = ('channels', 'depths', 'groups', 'offset_scale', 'post_norm')
    found = {name: tuple(arch[key] for key in keys) for name, arch in InternImage.arch_settings.items()}
    assert found == {name: ([c, 2 * c, 4 * c, 8 * c], *rest) for name, (c, *rest) in VARIANTS.items()}


@pytest.mark.parametrize('arch, num_layers', [('tiny', 30), ('base', 33), ('large', 37), ('xlarge', 39)])
def test_layer_ids_are_those_of_the_recipes(arch, num_layers):
    with torch.device('meta'):
        model = InternImage(arch)
    expected, layer = {'patch_embed.': 0}, 1
    for i, depth in enumerate(model.depths):
        for j in range(depth):
            expected[f'levels.{i}.blocks.{j}.'], layer = layer, layer + 1
        expected |= {f'levels.{i}.norm.': layer, f'levels.{i}.downsample.': layer}
    for name, _ in model.named_parameters():
        (found,) = (layer for prefix, layer in expected.items() if name.startswith(prefix))
        assert model.get_layer_depth(name) == (found, num_layers + 2), name


@pytest.mark.parametrize('post_norm', [False, True])
def test_block_by_hand(post_norm):
    """A block against the text of the paper, written with torch's functions and the operator."""
    torch.manual_seed(0)
    block = InternImageBlock(6, 3, 2.0, post_norm, 0.0, LN, 1.0).double().eval()
    for p in block.parameters():
        nn.init.normal_(p, 0.2, 0.5)
    x = torch.randn(2, 7, 5, 6, dtype=torch.float64)  # (N, H, W, C)
    weights = block.state_dict()

    def linear(x, name):
        return x @ weights[f'{name}.weight'].T + weights[f'{name}.bias']

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f'{name}.weight'] + weights[f'{name}.bias']

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    def dcn(x):
        weight, bias = weights['dcn.dw_conv.0.weight'], weights['dcn.dw_conv.0.bias']
        hidden = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1, groups=6).permute(0, 2, 3, 1)
        hidden = gelu(norm(hidden, 'dcn.dw_conv.1.1'))
        mask = linear(hidden, 'dcn.mask').view(2, 7, 5, 3, 9).exp()
        mask = (mask / mask.sum(-1, keepdim=True)).reshape(2, 7, 5, 27)
        return linear(dcnv3(linear(x, 'dcn.input_proj'), linear(hidden, 'dcn.offset'), mask, 2.0), 'dcn.output_proj')

    def mlp(x):
        return linear(gelu(linear(x, 'mlp.fc1')), 'mlp.fc2')

    expected = x
    for i, layer in ((1, dcn), (2, mlp)):
        before = norm(layer(expected), f'norm{i}.0') if post_norm else layer(norm(expected, f'norm{i}.0'))
        expected = expected + weights[f'gamma{i}'] * before
    assert torch.allclose(block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), expected, rtol=0, atol=1e-10)


def test_bfloat16():
    """In bfloat16 altogether, unlike in the contract's test of autocast."""
    model = build_backbone('internimage-t').eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        found = model.bfloat16()(x.bfloat16())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16 and (a - b).abs().max() < 0.1 * b.abs().max()
