"""MogaNet: the contract of all backbones, and what is its own."""

import inspect
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from norms import randomize_norms
from torch import nn
from torch.nn import functional as F

from replk_mm.backbones import MogaNet
from replk_mm.backbones.moganet import MogaBlock
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError

FACTS = Path(__file__).parents[1] / 'data' / 'facts'
TINY = dict(depths=[1, 1, 4, 1], channels=[8, 16, 24, 40], ffn_ratios=[2, 2, 1, 1])


def halves(side: int) -> list[int]:
    """Sides of the feature maps: every halving rounds up."""
    return [-(-side // 2**i) for i in range(2, 6)]


class TestMogaNet(BackboneContract):
    cls = MogaNet
    tiny = dict(arch=TINY, layer_scale_init_value=0.5)
    channels = TINY['channels']
    sides = staticmethod(halves)
    batch_norm = dict(type='BN')
    frozen = {
        n: tuple(f'{part}{i + 1}.' for part in ('patch_embed', 'blocks', 'norm') for i in range(n)) or ('-',)
        for n in range(5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(drop_path_rate=1.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, ffn_ratios=[1, 1, 1])),
        dict(arch=dict(TINY, layers=[1])),
    ]
    others = dict(
        arch='xtiny',
        in_channels=4,
        drop_path_rate=0.2,
        layer_scale_init_value=0.0,
        norm_cfg=dict(type='BN', eps=1e-2),
        out_indices=(0, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    def build(self, seed=0, **kwargs):
        model = super().build(seed, **kwargs)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith('sigma.scale'):  # 1e-5 would hide the decomposition
                    value.normal_(0.5, 0.1)
        return model

    @pytest.mark.parametrize('argument', inspect.signature(MogaNet).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    def test_drop_path_keeps_the_mean(self):
        """A sample loses each of both branches of a block, or has it divided by the probability to keep it."""
        block = self.build(drop_path_rate=0.2).double().blocks4[0]
        x, keep = torch.randn(1, 40, 3, 4, dtype=torch.float64), 1 - block.drop_path.drop_prob
        with torch.no_grad():
            branch = block.layer_scale_1 * block.attn(block.norm1(x)) / keep
            firsts = torch.cat((x, x + branch))
            seconds = firsts + block.layer_scale_2 * block.mlp(block.norm2(firsts)) / keep
            block.drop_path.train()
            found = block(x.repeat(1000, 1, 1, 1))
        outcomes = torch.stack((*firsts, *seconds))
        same = (found[:, None] - outcomes).flatten(2).abs().amax(2) < 1e-9
        assert (same.sum(1) == 1).all()
        expected = torch.tensor([0.04, 0.16, 0.16, 0.64])
        torch.testing.assert_close(same.float().mean(0), expected, rtol=0, atol=0.06)  # four standard deviations

    def test_layer_depth(self):
        """The ids of the authors' detection code, which it states for 22 blocks in the third stage."""
        with torch.device('meta'):
            model = MogaNet('base')
        expected = {'patch_embed1.': 0, 'blocks1.': 2, 'blocks2.': 3, 'patch_embed2.': 3, 'patch_embed3.': 4}
        expected |= {f'blocks3.{j}.': min(3 + j // 2, 11) for j in range(22)}
        expected |= {'patch_embed4.': 12, 'blocks4.': 12, 'norm': 13}
        for name, _ in model.named_parameters():
            (layer,) = (layer for start, layer in expected.items() if name.startswith(start))
            assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (layer, 14), name
        assert model.get_layer_depth('decode_head.conv_seg.weight', 'backbone.') == (13, 14)
        with pytest.raises(ValueError, match='no parameter'):
            model.get_layer_depth('blocks5.0.norm1.weight')

    def test_initial_weights(self):
        model = self.cls('xtiny')
        model.init_weights()
        for name in ('patch_embed2.projection', 'blocks3.0.mlp.fc1', 'blocks2.0.mlp.dwconv', 'blocks4.1.attn.proj_1'):
            conv = model.get_submodule(name)
            fan_out = conv.weight.shape[2] * conv.weight.shape[3] * (1 if conv.groups > 1 else conv.weight.shape[0])
            assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05), name
            assert not conv.bias.any()
        block = model.blocks1[0]
        for scale in (block.layer_scale_1, block.layer_scale_2, block.attn.sigma.scale, block.mlp.sigma.scale):
            assert (scale == 1e-5).all()

    def test_folded(self):
        """All norms but those whose output is used twice: the first of a block, and the one after a stage."""
        model = self.build()
        folded, changes = reparameterize(model)
        norms = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
        left = {name for name in norms if name.endswith('norm1') or name.count('.') == 0}
        assert set(changes.left) == left and set(changes.folded) == set(norms) - left
        assert all(difference.ok for difference in compare_networks(model, folded))


def test_block_by_hand():
    """A block against the formulas of the paper, written with torch's functions only."""
    torch.manual_seed(0)
    block = randomize_norms(MogaBlock(8, 2, 0.0, dict(type='BN'), 0.5)).double().eval()
    for name, p in block.named_parameters():
        if not name.startswith('norm'):
            nn.init.normal_(p, 0.2, 0.5)
    x = torch.randn(2, 8, 23, 11, dtype=torch.float64)
    w = block.state_dict()

    def conv(x, name, dilation=1):
        weight = w[f'{name}.weight']
        groups = weight.shape[0] if weight.shape[1] == 1 and weight.shape[0] > 1 else 1
        return F.conv2d(x, weight, w[f'{name}.bias'], 1, dilation * (weight.shape[2] // 2), dilation, groups)

    def bn(x, name):
        mean, var, scale, shift = (w[f'{name}.{e}'] for e in ('running_mean', 'running_var', 'weight', 'bias'))
        return F.batch_norm(x, mean, var, scale, shift, False, eps=1e-5)

    def silu(x):
        return x / (1 + (-x).exp())

    def gelu(x):
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))

    with torch.no_grad():
        z = bn(x, 'norm1')
        u = conv(z, 'attn.proj_1')
        u = silu(u + w['attn.sigma.scale'] * (u - u.mean((2, 3), keepdim=True)))
        v = conv(u, 'attn.value.DW_conv0')
        parts = v[:, :1], conv(v[:, 1:4], 'attn.value.DW_conv1', 2), conv(v[:, 4:], 'attn.value.DW_conv2', 3)
        v = conv(torch.cat(parts, 1), 'attn.value.PW_conv')
        out = conv(silu(conv(u, 'attn.gate')) * silu(v), 'attn.proj_2') + z
        x1 = x + w['layer_scale_1'] * out
        y = gelu(conv(conv(bn(x1, 'norm2'), 'mlp.fc1'), 'mlp.dwconv'))
        y = y + w['mlp.sigma.scale'] * (y - gelu(conv(y, 'mlp.decompose')))
        expected = x1 + w['layer_scale_2'] * conv(y, 'mlp.fc2')
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(block(image), expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize('arch', ['xtiny', 'base', 'xlarge'])
def test_keys_and_shapes_of_the_authors(arch):
    with torch.device('meta'):
        model = MogaNet(arch)
    lines = (FACTS / f'keys_moganet_{arch}_official.txt').read_text().splitlines()
    assert [f'{key}\t{tuple(value.shape)}' for key, value in model.state_dict().items()] == lines


def test_a_file_without_the_norms_of_the_trunk_is_rejected(tmp_path):
    """They are not norms of the outputs, which the classifiers of other families lack."""
    model = MogaNet(TINY)
    weights = model.state_dict()
    torch.save({'state_dict': weights}, tmp_path / 'whole.pth')
    assert load_pretrained(model, tmp_path / 'whole.pth').missing == []
    torch.save({key: v for key, v in weights.items() if not key.startswith('norm2.')}, tmp_path / 'part.pth')
    with pytest.raises(UserError, match='norm2.weight'):
        load_pretrained(model, tmp_path / 'part.pth')
