"""RDNet: the contract of all backbones, and what is its own."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from torch import nn
from torch.nn import functional as F

from replk_mm.backbones import RDNet
from replk_mm.checkpoints.loading import load_pretrained

FACTS = Path(__file__).parents[1] / 'data' / 'facts'
TINY = dict(stem_channels=16, growth_rates=[[8], [12], [8, 16], [24]])


class TestRDNet(BackboneContract):
    cls = RDNet
    tiny = dict(arch=TINY)
    # 16 + 24; half of it in eights, 16 + 36; 24 + 24, then 24 + 48; 32 + 72
    channels = [40, 52, 72, 104]
    sides = staticmethod(lambda side: [side // 4, side // 8, side // 16, side // 32])
    batch_norm = dict(type='BN')
    frozen = {
        0: ('-',),
        1: ('stem.', 'dense_stages.0.'),
        2: ('stem.', 'dense_stages.0.', 'dense_stages.1.'),
        3: ('stem.', *(f'dense_stages.{i}.' for i in range(4))),
        4: ('stem.', 'dense_stages.'),
    }
    drop_paths = torch.linspace(0, 0.3, 15).tolist()
    num_layers = 1 + 5 + 1  # stem, dense stages, everything else
    bad = [
        dict(out_memory_format='channels'),
        dict(out_indices=(0, 4)),
        dict(frozen_stages=5),
        dict(drop_path_rate=1.0),
        dict(arch=None),
        dict(arch=dict(TINY, growth_rates=[[8], [], [8], [8]])),
        dict(arch=dict(TINY, layers=[1])),
    ]
    others = dict(
        arch='tiny',
        in_channels=4,
        drop_path_rate=0.2,
        layer_scale_init_value=0.1,
        norm_cfg=dict(type='LN2d', eps=1e-2),
        feature_norm_cfg=dict(type='GN', num_groups=1),
        out_indices=(0, 3),
        frozen_stages=1,
        norm_eval=True,
        with_cp=True,
        out_memory_format='preserve_format',
        init_cfg=dict(type='Constant', layer='Conv2d', val=0.25),
    )

    def stages(self, model):
        return list(model.dense_stages)

    @pytest.mark.parametrize('argument', inspect.signature(RDNet).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format', 'norm_eval', 'layer_scale_init_value'):
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    def test_drop_path_keeps_the_mean(self):
        """A sample loses the output of a block, or has it divided by the probability to keep it."""
        block = self.build(drop_path_rate=0.2).double().dense_stages[4][-1][2]
        x, keep = torch.randn(1, 80, 3, 4, dtype=torch.float64), 1 - block.drop_path.drop_prob
        with torch.no_grad():
            expected = block(x) / keep
            block.drop_path.train()
            found = block(x.repeat(500, 1, 1, 1))
        kept = found.flatten(1).any(1)
        torch.testing.assert_close(found[kept], expected.expand_as(found)[kept], rtol=1e-9, atol=1e-12)
        assert kept.double().mean() == pytest.approx(keep, abs=0.07)  # four standard deviations

    def test_layer_scale_init_value(self):
        for expected, arguments in ((1e-6, {}), (0.5, dict(layer_scale_init_value=0.5))):
            scales = [p for n, p in RDNet(TINY, **arguments).named_parameters() if n.endswith('gamma')]
            assert len(scales) == 15 and all((scale == expected).all() for scale in scales)

    def test_norms_of_the_features(self):
        """Those of the authors' detectors; the next stage sees the plain map."""
        plain, normed = self.build(), self.build(feature_norm_cfg=dict(type='GN', num_groups=1))
        missing, unexpected = normed.load_state_dict(plain.state_dict(), strict=False)
        assert unexpected == [] and set(missing) == {f'norm{i}.{p}' for i in range(4) for p in ('weight', 'bias')}
        for x, y in zip(plain(self.image()), normed(self.image()), strict=True):
            mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, unbiased=False)
            torch.testing.assert_close(y, (x - mean) / (var + 1e-5).sqrt(), rtol=1e-4, atol=1e-5)
        assert normed.get_layer_depth('norm2.weight') == normed.get_stage_depth('norm2.weight') == (6, 7)


def test_stage_by_hand():
    """A dense stage and its transition against the formulas of the paper, written with torch's functions only."""
    torch.manual_seed(0)
    model = RDNet(dict(stem_channels=8, growth_rates=[[8], [8], [16]]), out_indices=-1).double()
    stage = model.dense_stages[2]
    for p in stage.parameters():
        nn.init.normal_(p, 0.2, 0.5)
    x = torch.randn(2, 40, 10, 8, dtype=torch.float64)
    w = stage.state_dict()

    def norm(x, name):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (x - mean) / (var + 1e-6).sqrt() * w[f'{name}.weight'].view(-1, 1, 1) + w[f'{name}.bias'].view(-1, 1, 1)

    def conv(x, name, **kwargs):
        return F.conv2d(x, w[f'{name}.weight'], w[f'{name}.bias'], **kwargs)

    with torch.no_grad():
        expected = conv(norm(x, '0'), '1', stride=2)
        assert expected.shape == (2, 16, 5, 4)
        for k in range(3):
            name = f'2.dense_block{k}.layers.layers'
            out = norm(conv(expected, f'{name}.0', padding=3, groups=16 + 16 * k), f'{name}.1')
            out = conv(out, f'{name}.2')
            assert out.shape[1] == 4 * (16 + 16 * k)
            out = conv(0.5 * out * (1 + torch.erf(out / 2**0.5)), f'{name}.4')
            out = out * F.relu6(conv(out.mean((2, 3), keepdim=True), f'{name}.5.fc') + 3) / 6
            expected = torch.cat((expected, w[f'2.dense_block{k}.gamma'].view(-1, 1, 1) * out), 1)
        torch.testing.assert_close(stage(x), expected, rtol=1e-11, atol=1e-10)


@pytest.mark.parametrize('arch', ['tiny', 'small', 'large'])
def test_keys_and_shapes_of_the_authors(arch):
    with torch.device('meta'):
        model = RDNet(arch)
    lines = (FACTS / f'keys_rdnet_{arch}_official.txt').read_text().splitlines()
    assert [f'{key}\t{tuple(value.shape)}' for key, value in model.state_dict().items()] == lines


@pytest.mark.parametrize(
    ('arch', 'channels', 'layers'),
    [
        ('tiny', [256, 440, 744, 1040], 7),
        ('small', [264, 512, 760, 1264], 11),
        ('base', [408, 584, 1000, 1760], 11),
        ('large', [528, 840, 1528, 2000], 12),
    ],
)
def test_variants(arch, channels, layers):
    with torch.device('meta'):
        model = RDNet(arch)
    assert [info['num_chs'] for info in model.feature_info] == channels
    for name, _ in model.named_parameters():
        stage = re.match(r'dense_stages\.(\d+)\.', name)
        expected = int(stage[1]) + 1 if stage else 0
        assert model.get_layer_depth(name) == model.get_stage_depth(name) == (expected, layers + 2), name


def test_names_of_timms_wrapper_in_the_authors_files(tmp_path):
    model, other = RDNet(TINY), RDNet(TINY)
    model.init_weights()
    flat = {re.sub(r'^(dense_stages|stem)\.', r'\1_', key.replace('stem.stem.', 'stem.')): value
            for key, value in model.state_dict().items()}  # fmt: skip
    torch.save({'state_dict': {f'backbone.timm_model.{key}': v for key, v in flat.items()}}, tmp_path / 'a.pth')
    assert load_pretrained(other, tmp_path / 'a.pth').missing == []
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())
