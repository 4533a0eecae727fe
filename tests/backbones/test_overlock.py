"""OverLoCK: the contract of all backbones, the dynamic convolution by hand, the authors' outputs, and sizes."""

import inspect
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from backbone_contract import BackboneContract
from checkpoint_cases import write
from golden_fill import assert_golden, fill, image
from torch import nn

from replk_mm.analysis.complexity import count_parameters
from replk_mm.backbones import OverLoCK
from replk_mm.backbones.overlock import dynamic_conv2d, relative_bias
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.deploy.reparameterize import reparameterize

DATA = Path(__file__).parents[1] / 'data'
TINY = dict(depths=[1] * 4, focus_depths=[1, 1], channels=[8, 12, 16, 24], heads=[2, 4], kernel_sizes=[7] * 4)


def halves(side: int) -> list[int]:
    """Sides of the feature maps: every halving rounds up."""
    return [-(-side // stride) for stride in (4, 8, 16, 32)]


STAGES = (
    ('patch_embed1.', 'blocks1.'),
    ('patch_embed2.', 'blocks2.'),
    ('patch_embed3.', 'blocks3.', 'patch_embed4.', 'blocks4.', 'high_level_proj.', 'sub_blocks3.'),
    ('patch_embedx.', 'sub_blocks4.'),
)


class TestOverLoCK(BackboneContract):
    cls = OverLoCK
    tiny = dict(arch=TINY)
    channels = [8, 12, 16 + 6, 24 + 6]
    sides = staticmethod(halves)
    batch_norm = dict(type='BN')
    fixed_norms = r'blocks\d\.\d\.proj\.0|.*\.norm\d|extra_norm'
    frozen = {n: sum(STAGES[:n], ()) or ('-',) for n in range(5)}
    drop_paths = [0, 0.06, 0.12, 0.18, 0.24, 0.3]
    num_layers = 1 + 6 + 1  # stem, stages and focus stages, the rest
    output_layers = ('extra_norm', 'h_proj')
    sharded = [{}, dict(with_cp=True), dict(deploy=True)]
    bad = [
        dict(out_indices=(0, 4)),
        dict(frozen_stages=5),
        dict(drop_path_rate=1.0),
        dict(arch=None),
        dict(arch=dict(TINY, depths=[1, 1])),
        dict(arch=dict(TINY, heads=[1])),
        dict(arch=dict(TINY, heads=[2, 8])),
        dict(arch=dict(TINY, kernel_sizes=[7, 7, 9, 7])),
    ]
    others = dict(
        arch='xtiny',
        detection=True,
        in_channels=4,
        drop_path_rate=0.2,
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

    def test_drop_path_keeps_the_mean(self):
        pytest.skip('blocks have two branches and scale the shortcut')

    @pytest.mark.parametrize('argument', inspect.signature(OverLoCK).parameters)
    def test_every_argument_has_an_effect(self, argument):
        if argument not in ('with_cp', 'init_cfg', 'out_memory_format'):  # these have tests of their own
            self.check_argument(argument, self.others[argument])
        assert argument in self.others

    @pytest.mark.parametrize('dilated_branches', [True, False])
    @pytest.mark.parametrize('fold', [False, True])
    def test_merged(self, fold, dilated_branches):
        model = self.build(dilated_branches=dilated_branches)
        assert any('dil_conv' in name for name, _ in model.named_parameters()) == dilated_branches
        merged, changes = reparameterize(model, fold=fold)
        assert len(changes.merged) == 4 + 2 and (changes.left == []) == fold
        self.assert_equal(merged(self.image()), model(self.image()), 1e-5)
        if not fold:
            self.build(deploy=True).load_state_dict(merged.state_dict())

    def test_other_norms_are_not_merged(self):
        assert reparameterize(self.build(norm_cfg=dict(type='LN2d')))[1].merged == []


@pytest.mark.parametrize('height, width, kernel', [(7, 7, 7), (6, 11, 5), (11, 6, 5)])
def test_dynamic_convolution_by_hand(height, width, kernel):
    """Neighbourhoods never leave the map: at its borders they are shifted."""
    torch.manual_seed(0)
    values = torch.randn(2, 3, height, width, 4, dtype=torch.float64)
    kernels = torch.randn(2, 3, height, width, kernel, kernel, dtype=torch.float64)
    table = torch.randn(3, 2 * kernel - 1, 2 * kernel - 1, dtype=torch.float64)
    expected, bias = torch.zeros_like(values), torch.zeros(kernels.shape[1:], dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            top, left = (min(max(p - kernel // 2, 0), n - kernel) for p, n in ((i, height), (j, width)))
            for a in range(kernel):
                for b in range(kernel):
                    tap = kernels[:, :, i, j, a, b, None]
                    expected[:, :, i, j] += tap * values[:, :, top + a, left + b]
                    bias[:, i, j, a, b] = table[:, top + a - i + kernel - 1, left + b - j + kernel - 1]
    torch.testing.assert_close(dynamic_conv2d(values, kernels), expected)
    assert torch.equal(relative_bias(table, height, width), bias)


@cache
def listed(name: str) -> dict[str, torch.Tensor]:
    """Weights under the names and shapes of a published file, with the values of the golden outputs."""
    weights = {}
    for line in (DATA / 'facts' / f'keys_overlock_{name}.txt').read_text().splitlines():
        key, shape = line.split('\t')
        sides = [int(n) for n in shape.strip('()').split(',') if n.strip()]
        weights[key] = torch.zeros(sides, dtype=torch.float32 if sides else torch.int64)  # of counters
    return weights if name.startswith('b') else fill(weights)


FORMS = {
    'xt_official': {},
    'xt_official_detection': dict(detection=True),
    'xt_official_merged': dict(deploy=True),
    'b_official': dict(arch='base'),
}


@pytest.mark.parametrize('name', FORMS)
def test_keys_of_the_authors(name):
    with torch.device('meta'):
        model = OverLoCK(**{'arch': 'xtiny', **FORMS[name]})
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [(k, v.shape) for k, v in listed(name).items()]


@pytest.mark.parametrize('name', ['overlock_xt', 'overlock_xt_224x256', 'overlock_xt_odd', 'overlock_xt_detection'])
def test_files_and_outputs_of_the_authors(name, tmp_path):
    golden = json.loads((DATA / 'golden' / f'{name}.json').read_text())
    form = 'xt_official_detection' if name.endswith('detection') else 'xt_official'
    with torch.device('meta'):
        model = OverLoCK('xtiny', **FORMS[form]).eval()
    model.to_empty(device='cpu')
    load_pretrained(model, write(tmp_path / 'weights.pth', listed(form)))
    x = image(tuple(golden['input']), golden['image_seed'])
    with torch.no_grad():
        for network in (model, reparameterize(model)[0]):
            assert_golden(network(x), golden['features'])


def test_imagenet_weights_lack_the_layers_of_the_outputs(tmp_path):
    torch.manual_seed(0)
    weights = OverLoCK(TINY).state_dict()
    imagenet = {key: value for key, value in weights.items() if not key.startswith('extra_norm')}
    path = write(
        tmp_path / 'weights.pth', {**imagenet, 'head.0.weight': torch.ones(9), 'aux_head.0.bias': torch.ones(9)}
    )
    for detection in (False, True):
        report = load_pretrained(OverLoCK(TINY, detection=detection), path)
        assert report.matched['backbone'] == len(imagenet) and report.unexpected == []


#: Millions of parameters and 10^9 multiply-accumulates at 224x224 of the authors' classifiers of 1000 classes, without
#: the auxiliary one, counted from their code.
COUNTED = {'xtiny': (16.45, 2.70), 'tiny': (33.47, 5.64)}


@pytest.mark.parametrize('arch', COUNTED)
def test_parameters_and_macs(arch):
    """As the authors compute: affinity to all regions first, and as many products as a kernel has elements."""
    with torch.device('meta'):
        model = OverLoCK(arch, deploy=True).eval()
    macs = []

    def count(layer: nn.Module, _, out: torch.Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            macs.append(out.numel() * layer.weight[0].numel())
        elif hasattr(layer, 'weight_proj'):  # mixes kernels for each head and position
            elements, heads, area = len(layer.weight_proj.weight), len(layer.rpb1), out[0, 0].numel()
            channels = layer.channels // 2
            macs.append(area * (channels * 49 + heads * 49 * elements + channels * elements))

    for layer in model.modules():
        layer.register_forward_hook(count)
    model(torch.zeros(1, 3, 224, 224, device='meta'))
    width = model.feature_info[-1]['num_chs']  # the head: convolution to 1024 channels, BatchNorm, linear layer
    parameters = count_parameters(model) - count_parameters(model.extra_norm) + width * 1024 + 2 * 1024 + 1025 * 1000
    macs.append(width * 1024 * 49 + 1024 * 1000)
    # the facts have two decimals
    assert parameters / 1e6 == pytest.approx(COUNTED[arch][0], rel=1e-3, abs=5.1e-3)
    assert sum(macs) / 1e9 == pytest.approx(COUNTED[arch][1], rel=1e-3, abs=5.1e-3)


@pytest.mark.parametrize(
    ('arch', 'heads'), [('xtiny', (8, 12)), ('tiny', (8, 16)), ('small', (16, 32)), ('base', (12, 18))]
)
def test_heads_are_those_of_the_authors(arch, heads):
    """The paper's table lists half of these numbers."""
    with torch.device('meta'):
        net = OverLoCK(arch, detection=True)
    assert tuple(len(stage[0].rpb1) for stage in (net.sub_blocks3, net.sub_blocks4)) == heads


def test_the_overview_starts_small_in_detectors():
    assert (OverLoCK('xtiny', detection=True).h_proj[1].weight == 1e-5).all()
