"""What VAN and MSCAN promise: the contract of all backbones, and what both have in common."""

import inspect
import itertools
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from mmcv.cnn.bricks import DropPath
from torch import nn

from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.deploy.equivalence import compare_networks
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError

FACTS = Path(__file__).parents[1] / 'data' / 'facts'
TINY = dict(depths=[1, 1, 4, 1], channels=[8, 12, 16, 24], mlp_ratios=[2, 2, 2, 1])


def halves(side: int) -> list[int]:
    """Sides of the feature maps: every halving rounds up."""
    sides = [-(-side // 4)]
    for _ in range(3):
        sides.append(-(-sides[-1] // 2))
    return sides


class VANContract(BackboneContract):
    """A family's test class sets ``cls``."""

    tiny = dict(arch=TINY, layer_scale_init_value=0.5)
    channels = TINY['channels']
    sides = staticmethod(halves)
    batch_norm = dict(type='BN')
    fixed_norms = r'norm\d'
    frozen = {
        n: tuple(f'{part}{i + 1}.' for part in ('patch_embed', 'block', 'norm') for i in range(n)) or ('-',)
        for n in range(5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(frozen_stages=-1),
        dict(frozen_stages=5),
        dict(drop_path_rate=1.0),
        dict(layer_scale_init_value=0.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, mlp_ratios=[8, 8])),
        dict(arch=dict(TINY, layers=[1])),
    ]
    others = dict(
        in_channels=4,
        drop_path_rate=0.2,
        layer_scale_init_value=0.2,
        norm_cfg=dict(type='BN', eps=1e-2),
        out_indices=(0, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    def test_every_argument_has_an_effect(self):
        arguments = set(inspect.signature(self.cls).parameters) - {'arch'}
        assert arguments == self.others.keys()
        for argument in arguments - {'with_cp', 'init_cfg', 'out_memory_format'}:  # these have tests of their own
            self.check_argument(argument, self.others[argument])

    def test_drop_path_keeps_the_mean(self):
        """Each half of a block is dropped for itself, or divided by the probability to keep it."""
        block = self.build(drop_path_rate=0.4).double().block3[-1]
        (keep,) = {1 - m.drop_prob for m in block.modules() if isinstance(m, DropPath)}
        x = self.image(1, TINY['channels'][2], 4, 4).double()
        outcomes = []
        with torch.no_grad():
            for first, second in itertools.product((0, 1 / keep), repeat=2):
                y = x + first * block.layer_scale_1.view(-1, 1, 1) * block.attn(block.norm1(x))
                outcomes.append(y + second * block.layer_scale_2.view(-1, 1, 1) * block.mlp(block.norm2(y)))
            block.drop_path.train()
            found = block(x.repeat(1000, 1, 1, 1))
        shares = [(found - y).flatten(1).abs().amax(1).lt(1e-9).double().mean().item() for y in outcomes]
        expected = [(1 - keep) ** 2, (1 - keep) * keep, keep * (1 - keep), keep**2]
        assert sum(shares) == 1 and shares == pytest.approx(expected, abs=0.065)  # four standard deviations

    def test_folded(self):
        """All norms but those whose output the shortcut of the attention takes, too."""
        model = self.build()
        folded, changes = reparameterize(model)
        assert all(difference.ok for difference in compare_networks(model, folded))
        left = [name for name, m in model.named_modules() if name.endswith('norm1') and 'block' in name]
        assert changes.merged == [] and changes.left == left and len(left) == 7
        assert len([n for n in changes.folded if n.endswith('norm2')]) == 7 and len(changes.folded) >= 11

    def test_initial_weights(self):
        """Normal with the variance 2 / fan_out of a group, and zero biases."""
        torch.manual_seed(0)
        model = self.cls(dict(depths=[1, 1], channels=[64, 128], mlp_ratios=[4, 4]), out_indices=(0, 1))
        model.init_weights()
        layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        for name, layer in layers:
            fan_out = layer.weight[0, 0].numel() * layer.out_channels / layer.groups
            expected = (2 / fan_out) ** 0.5
            error = 4 * (2 * layer.weight.numel()) ** -0.5  # four standard deviations
            assert layer.weight.std().item() == pytest.approx(expected, rel=error), name
            assert not layer.bias.any()
        scales = [value for name, value in model.named_parameters() if 'layer_scale' in name]
        assert len(scales) == 4 and all((value == 0.01).all() for value in scales)

    def test_norms_between_stages_are_required(self, monkeypatch):
        """Of other families, classification checkpoints lack them."""
        weights = {key: value for key, value in self.build().state_dict().items() if not key.startswith('norm2.')}
        monkeypatch.setattr('replk_mm.checkpoints.loading.read_checkpoint', lambda _: weights)
        with pytest.raises(UserError, match=r'norm2\.weight'):
            load_pretrained(self.build(), 'file')


def assert_keys(cls, arch: str, name: str) -> None:
    with torch.device('meta'):
        model = cls(arch)
    lines = [line for line in (FACTS / f'keys_{name}_official.txt').read_text().splitlines() if line[:4] != 'head']
    assert [f'{key}\t{tuple(value.shape)}' for key, value in model.state_dict().items()] == lines
