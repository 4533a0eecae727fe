"""SLaK: the contract of all backbones, and what is its own."""

import inspect

import pytest
import torch
from backbone_contract import BackboneContract
from norms import randomize_norms
from torch import nn

from replk_mm.analysis.complexity import count_complexity, count_parameters
from replk_mm.backbones import SLaK
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import reparameterize

TINY = dict(depths=[1, 1, 4, 1], channels=[8, 12, 16, 24])


def patches(side: int) -> list[int]:
    """Sides of the feature maps: patches that do not fit are cut off."""
    return [side // 4, side // 4 // 2, side // 4 // 2 // 2, side // 4 // 2 // 2 // 2]


class TestSLaK(BackboneContract):
    cls = SLaK
    tiny = dict(arch=TINY, kernel_size=[13, 11, 9, 7], layer_scale_init_value=0.5)
    channels = TINY['channels']
    sides = staticmethod(patches)
    batch_norm = dict(type='BN')
    fixed_norms = r'(?!.*large_kernel)'
    frozen = {
        n: tuple(f'{part}.{i}.' for part in ('downsample_layers', 'stages') for i in range(n)) or ('-',)
        for n in range(5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    bad = [
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(kernel_size=50),
        dict(kernel_size=[51, 49, 47]),
        dict(small_kernel=4),
        dict(small_kernel=7),
        dict(small_kernel=-1),
        dict(drop_path_rate=1.0),
        dict(layer_scale_init_value=0.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(depths=[1, 1, 1, 1])),
    ]
    others = dict(
        arch='tiny',
        kernel_size=9,
        small_kernel=3,
        decomposed=False,
        square=False,
        small_kernel_merged=True,
        in_channels=4,
        norm_cfg=dict(type='BN', eps=1e-2),
        drop_path_rate=0.2,
        layer_scale_init_value=0.0,
        out_indices=(0, 3),
        frozen_stages=1,
        with_cp=True,
        norm_eval=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    @pytest.mark.parametrize('argument', inspect.signature(SLaK).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    @pytest.mark.parametrize('square', [True, False])
    @pytest.mark.parametrize('decomposed', [True, False])
    @pytest.mark.parametrize('fold', [True, False])
    def test_merged(self, decomposed, square, fold):
        model = self.build(decomposed=decomposed, square=square)
        sides = {p.shape[2:] for name, p in model.named_parameters() if 'small_conv.conv' in name}
        assert sides == ({(5, 5)} if square else set())
        merged, changes = reparameterize(model, fold=fold)
        assert len(changes.merged) == 7 and changes.left == []
        assert all(difference.ok for difference in compare_networks(model, merged))
        names = ('lkb_reparam.LoRA1', 'lkb_reparam.LoRA2') if decomposed else ('lkb_reparam',)
        convolutions = {name for name, m in merged.named_modules() if type(m).__name__ == 'DepthwiseConv2d'}
        assert convolutions == {f'{block}.{name}' for block in changes.merged for name in names}
        self.build(decomposed=decomposed, small_kernel_merged=True).load_state_dict(merged.state_dict())

    @pytest.mark.parametrize('norm', [dict(type='GN', num_groups=2), dict(type='LN2d')], ids=str)
    def test_other_norms_are_not_merged(self, norm):
        assert reparameterize(self.build(norm_cfg=norm))[1].merged == []


def test_block_by_hand():
    """The formulas of the paper, written with torch's functions only."""
    model = SLaK(dict(depths=[1], channels=[4]), 9, 3, layer_scale_init_value=0.5, out_indices=0)
    block = randomize_norms(model).double().eval().stages[0][0]
    large = block.large_kernel
    assert large.LoRA1.conv.weight.shape[2:] == (9, 3) and large.LoRA2.conv.weight.shape[2:] == (3, 9)
    x = torch.randn(2, 4, 10, 11, dtype=torch.float64)

    def conv_bn(x, layer):
        w, bn = layer.conv.weight, layer.bn
        x = nn.functional.conv2d(x, w, padding=(w.shape[2] // 2, w.shape[3] // 2), groups=4)
        return nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, eps=1e-5)

    with torch.no_grad():
        out = conv_bn(x, large.LoRA1) + conv_bn(x, large.LoRA2) + conv_bn(x, large.small_conv)
        mean, var = out.mean(1, keepdim=True), out.var(1, keepdim=True, unbiased=False)
        out = (out - mean) / (var + 1e-6).sqrt() * block.norm.weight.view(-1, 1, 1) + block.norm.bias.view(-1, 1, 1)
        out = torch.einsum('nchw,dc->ndhw', out, block.pwconv1.weight) + block.pwconv1.bias.view(-1, 1, 1)
        out = 0.5 * out * (1 + torch.erf(out / 2**0.5))
        out = torch.einsum('nchw,dc->ndhw', out, block.pwconv2.weight) + block.pwconv2.bias.view(-1, 1, 1)
        assert torch.allclose(block(x), x + 0.5 * out, rtol=0, atol=1e-12)


#: Millions of parameters and 10^9 multiply-accumulates at 224x224 of the authors' classifiers of 1000 classes, dense,
#: counted from their code. The paper's figures count 40 % of the weights as zero.
COUNTED = {'tiny': (50.70, 8.70), 'small': (91.13, 16.60), 'base': (157.95, 28.51)}


@pytest.mark.parametrize('arch', COUNTED)
def test_parameters_and_macs(arch):
    with torch.device('meta'):
        model = SLaK(arch, out_indices=-1)
    width = model.feature_info[-1]['num_chs']
    parameters = count_parameters(model) + 1000 * width + 1000
    macs = count_complexity(model, (224, 224)).macs + 1000 * width
    assert (parameters / 1e6, macs / 1e9) == pytest.approx(COUNTED[arch], rel=1e-3)
