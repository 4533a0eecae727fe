"""UniRepLKNet: the contract of all backbones, and what is its own."""

import inspect
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from norms import randomize_norms
from torch import nn
from torch.nn import functional as F

from replk_mm.analysis.complexity import count_complexity
from replk_mm.backbones import UniRepLKNet
from replk_mm.backbones.unireplknet import UniRepLKNetBlock
from replk_mm.deploy.reparameterize import reparameterize

FACTS = Path(__file__).parents[1] / 'data' / 'facts'
TINY = dict(depths=[1, 1, 4, 1], channels=[8, 12, 16, 24], kernel_sizes=[3, 7, [9, 5], 13])


def halves(side: int) -> list[int]:
    """Sides of the feature maps: every halving rounds up."""
    sides = [-(-side // 4)]
    for _ in range(3):
        sides.append(-(-sides[-1] // 2))
    return sides


class TestUniRepLKNet(BackboneContract):
    cls = UniRepLKNet
    tiny = dict(arch=TINY)
    channels = TINY['channels']
    sides = staticmethod(halves)
    batch_norm = dict(type='BN')
    fixed_norms = r'downsample_layers\.|norm\d'
    frozen = {
        n: tuple(f'{part}.{i}.' for part in ('downsample_layers', 'stages') for i in range(n)) or ('-',)
        for n in range(5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    sharded = [{}, dict(with_cp=True), dict(deploy=True)]
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(frozen_stages=5),
        dict(drop_path_rate=1.0),
        dict(layer_scale_init_value=-1.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, layers=[1])),
        dict(arch=dict(TINY, kernel_sizes=[3, 13, 13])),
        dict(arch=dict(TINY, kernel_sizes=[3, 13, 12, 13])),
        dict(arch=dict(TINY, kernel_sizes=[3, 13, [], 13])),
        dict(arch=dict(TINY, kernel_sizes=[3, 13, [13, 19], 13])),
    ]
    others = dict(
        arch='atto',
        in_channels=4,
        drop_path_rate=0.2,
        layer_scale_init_value=0.0,
        dilated_branches=False,
        deploy=True,
        norm_cfg=dict(type='BN', eps=1e-2),
        out_indices=(0, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    @pytest.mark.parametrize('argument', inspect.signature(UniRepLKNet).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    @pytest.mark.parametrize('dilated_branches', [True, False])
    def test_merged(self, dilated_branches):
        model = self.build(dilated_branches=dilated_branches)
        assert any('dil_conv' in name for name, _ in model.named_parameters()) == dilated_branches
        merged, changes = reparameterize(model)
        assert changes.merged and changes.left == []
        self.assert_equal(merged(self.image()), model(self.image()), 1e-5)
        self.build(deploy=True).load_state_dict(merged.state_dict())

    def test_initial_weights(self):
        """Truncated normal weights, zero biases, and a response norm that starts as the identity."""
        torch.manual_seed(0)
        model = UniRepLKNet(dict(TINY, channels=[16, 32, 64, 128]))
        model.init_weights()
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                assert layer.weight.abs().max() <= 2 and (layer.bias is None or not layer.bias.any()), name
                if layer.weight.numel() > 2000:
                    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05), name
        parameters = dict(model.named_parameters())
        assert all((p == 1e-6).all() for n, p in parameters.items() if n.count('.') == 3 and n.endswith('.gamma'))
        assert not any(p.any() for n, p in parameters.items() if '.act.1.' in n)


#: Variants of the paper: depths, first width, kernels of the blocks of the third stage; and millions of parameters and
#: billions of multiply-accumulates at the side of the deployed classifier of 1000 classes, from the authors' own code.
VARIANTS = {
    'atto': ([2, 2, 6, 2], 40, [13], 4.44, 0.64, 224),
    'femto': ([2, 2, 6, 2], 48, [13], 6.24, 0.91, 224),
    'pico': ([2, 2, 6, 2], 64, [13], 10.74, 1.57, 224),
    'nano': ([2, 2, 8, 2], 80, [13], 18.32, 2.77, 224),
    'tiny': ([3, 3, 18, 3], 80, [13, 3], 31.04, 4.90, 224),
    'small': ([3, 3, 27, 3], 96, [13, 3, 3], 55.65, 26.72, 384),
    'base': ([3, 3, 27, 3], 128, [13, 3, 3], 98.01, 47.18, 384),
    'large': ([3, 3, 27, 3], 192, [13, 3, 3], 218.45, 105.42, 384),
    'xlarge': ([3, 3, 27, 3], 256, [13, 3, 3], 386.53, 186.77, 384),
}


@pytest.mark.parametrize('arch', VARIANTS)
def test_parameters_and_macs_of_the_deployed_form(arch):
    depths, first, pattern, millions, billions, side = VARIANTS[arch]
    widths = [first, 2 * first, 4 * first, 8 * first]
    assert list(VARIANTS) == list(UniRepLKNet.arch_settings)
    with torch.device('meta'):
        model = UniRepLKNet(arch, deploy=True)
    kernels = [[block.dwconv.weight.shape[-1] if isinstance(block.dwconv, nn.Conv2d) else 13 for block in stage]
               for stage in model.stages]  # fmt: skip
    assert kernels == [[3] * depths[0], [13] * depths[1], (pattern * depths[2])[: depths[2]], [13] * depths[3]]
    found = count_complexity(model, (side, side))
    # The classifier: its norm in place of the four of the features, and a linear layer.
    parameters = found.parameters - 2 * sum(widths) + 2 * widths[3] + 1001 * widths[3]
    assert parameters / 1e6 == pytest.approx(millions, abs=0.006)
    assert (found.macs + 1000 * widths[3]) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize(
    'name, arch, deploy',
    [
        ('a_official', 'atto', False),
        ('a_official_merged', 'atto', True),
        ('t_official', 'tiny', False),
        ('xl_official', 'xlarge', False),
    ],
)
def test_keys_and_shapes_of_the_authors(name, arch, deploy):
    with torch.device('meta'):
        model = UniRepLKNet(arch, deploy=deploy)
    lines = (FACTS / f'keys_unireplknet_{name}.txt').read_text().splitlines()
    assert [f'{key}\t{tuple(value.shape)}' for key, value in model.state_dict().items()] == lines


@pytest.mark.parametrize('arch, num_layers', [('atto', 5), ('tiny', 9), ('small', 12)])
def test_layer_ids_are_those_of_the_authors(arch, num_layers):
    with torch.device('meta'):
        model = UniRepLKNet(arch)
    blocks = model.depths[2]
    expected = {'downsample_layers.0.': 0, 'stages.0.': 1, 'downsample_layers.1.': 2, 'stages.1.': 2}
    expected |= {'downsample_layers.2.': 3, **{f'stages.2.{j}.': 3 + j // 3 for j in range(blocks)}}
    expected |= {'downsample_layers.3.': num_layers, 'stages.3.': num_layers, 'norm': num_layers + 1}
    for name, _ in model.named_parameters():
        (layer,) = (layer for prefix, layer in expected.items() if name.startswith(prefix))
        assert model.get_layer_depth(name) == (layer, num_layers + 2), name


@pytest.mark.parametrize(
    'side, branches',
    [
        (3, []),
        (5, []),
        (7, [(5, 1), (3, 2), (3, 3)]),
        (9, [(5, 1), (5, 2), (3, 3), (3, 4)]),
        (11, [(5, 1), (5, 2), (3, 3), (3, 4), (3, 5)]),
        (13, [(5, 1), (7, 2), (3, 3), (3, 4), (3, 5)]),
        (15, [(5, 1), (7, 2), (3, 3), (3, 5), (3, 7)]),
        (17, [(5, 1), (9, 2), (3, 4), (3, 5), (3, 7)]),
    ],
)
def test_block_by_hand(side, branches):
    """A block against the formulas of the paper, written with torch's functions only."""
    torch.manual_seed(0)
    block = randomize_norms(UniRepLKNetBlock(4, side, 0.0, False, dict(type='BN'), 0.5)).double().eval()
    for p in block.parameters():
        nn.init.normal_(p, 0.2, 0.5)
    x = torch.randn(2, 4, 19, 18, dtype=torch.float64)
    weights = block.state_dict()

    def bn(x, name):
        weight, bias, mean, var = (
            weights[f'{name}.{end}'] for end in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return F.batch_norm(x, mean, var, weight, bias, False, eps=1e-5)

    def depthwise(x, name, k, r=1):
        return F.conv2d(x, weights[f'{name}.weight'], padding=r * (k - 1) // 2, dilation=r, groups=4)

    with torch.no_grad():
        if branches:
            out = bn(depthwise(x, 'dwconv.lk_origin', side), 'dwconv.origin_bn')
            for k, r in branches:
                out = out + bn(depthwise(x, f'dwconv.dil_conv_k{k}_{r}', k, r), f'dwconv.dil_bn_k{k}_{r}')
        else:
            out = depthwise(x, 'dwconv', side)
        out = bn(out, 'norm')
        down, up = block.se.down, block.se.up
        squeezed = torch.einsum('nc,dc->nd', out.mean((2, 3)), down.weight[..., 0, 0]) + down.bias
        assert squeezed.shape[1] == 1  # a quarter of the channels
        excited = torch.einsum('nc,dc->nd', squeezed.relu(), up.weight[..., 0, 0]) + up.bias
        out = out * excited.sigmoid()[..., None, None]
        layer = block.pwconv1[1]
        out = torch.einsum('nchw,dc->ndhw', out, layer.weight) + layer.bias.view(-1, 1, 1)
        out = 0.5 * out * (1 + torch.erf(out / 2**0.5))
        energy = out.square().sum((2, 3), keepdim=True).sqrt()
        share = energy / (energy.mean(1, keepdim=True) + 1e-6)
        gamma, beta = (weights[f'act.1.{name}'].view(-1, 1, 1) for name in ('gamma', 'beta'))
        out = (gamma * share + 1) * out + beta
        out = bn(torch.einsum('nchw,dc->ndhw', out, block.pwconv2[0].weight), 'pwconv2.2')
        assert torch.allclose(block(x), x + block.gamma.view(-1, 1, 1) * out, rtol=0, atol=1e-10)
