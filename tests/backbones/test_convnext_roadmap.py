"""The roadmap from ResNet to ConvNeXt: its ends against mmseg's ResNet and our ConvNeXt, its steps by closed forms."""

import inspect

import pytest
import torch
from backbone_contract import BackboneContract
from mmcv.cnn.bricks import DropPath
from mmseg.models.backbones import ResNet
from norms import randomize_norms
from torch import nn

from replk_mm.backbones import ConvNeXt, ConvNeXtRoadmap
from replk_mm.backbones.convnext_roadmap import RoadmapBlock
from replk_mm.backbones.layers import LayerNorm2d
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.ops import DepthwiseConv2d

ARCHS = ConvNeXtRoadmap.arch_settings
CONVNEXT = dict(ARCHS['nano-separate-downsampling'], depths=[1, 1, 4, 1], widths=[8, 12, 16, 24])
RESNET = dict(depths=[1, 1, 4, 1], widths=[2, 4, 6, 8])


class TestConvNeXtRoadmap(BackboneContract):
    cls = ConvNeXtRoadmap
    tiny = dict(arch=CONVNEXT)
    channels = [8, 12, 16, 24]
    sides = staticmethod(lambda side: [side // 4, side // 8, side // 16, side // 32])
    batch_norm = dict(type='BN')
    frozen = {
        n: tuple(f'{part}.{i}.' for part in ('downsample_layers', 'stages') for i in range(n)) or ('-',)
        for n in range(5)
    }
    drop_paths = [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    num_layers = 1 + (1 + 1 + 2 + 1) + 1  # stem, stages (four blocks in the third are two layers), the rest
    bad = [
        dict(out_indices=(0, 4)),
        dict(frozen_stages=5),
        dict(drop_path_rate=1.0),
        dict(arch=dict(CONVNEXT, kernel_size=6)),
        dict(arch=dict(CONVNEXT, widths=[8, 12])),
        dict(arch=dict(CONVNEXT, channels=[8])),
    ]
    others = dict(
        arch=dict(CONVNEXT, kernel_size=9),
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='ReLU'),
        in_channels=4,
        drop_path_rate=0.2,
        out_indices=(0, 3),
        frozen_stages=1,
    )

    @pytest.mark.parametrize('argument', others)
    def test_every_argument_has_an_effect(self, argument):
        self.check_argument(argument, self.others[argument])
        tested = {*self.others, 'with_cp', 'init_cfg', 'norm_eval', 'out_memory_format'}  # by tests of their own
        assert tested == set(inspect.signature(self.cls).parameters)


class TestResNet(TestConvNeXtRoadmap):
    """Blocks that downsample, with activations after the sums."""

    tiny = dict(arch=RESNET)
    channels = [8, 16, 24, 32]
    sides = staticmethod(lambda side: [-(-side // stride) for stride in (4, 8, 16, 32)])
    others = dict(TestConvNeXtRoadmap.others, norm_cfg=dict(type='GN', num_groups=2), act_cfg=dict(type='GELU'))
    test_drop_path_keeps_the_mean = None  # an activation follows the sum
    test_fully_shard_of_the_stages = None  # a feature has three uses, whose gradients it sums in another order


def set_random(model: nn.Module) -> nn.Module:
    """Weights that let every branch count."""
    randomize_norms(model, 1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
    model.eval()  # mmseg's returns None
    return model


def assert_same(found, expected) -> None:
    for a, b in zip(found, expected, strict=True):
        assert b.std() > 1e-3
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * b.abs().max().item())


def test_the_first_step_is_resnet_50():
    theirs = set_random(ResNet(50)).double()
    names = {}
    for name in theirs.state_dict():
        match name.split('.'):
            case ['conv1', rest]:
                names[name] = f'downsample_layers.0.0.{rest}'
            case ['bn1', rest]:
                names[name] = f'downsample_layers.0.1.{rest}'
            case [layer, block, 'downsample', index, rest]:
                names[name] = f'stages.{int(layer[-1]) - 1}.{block}.shortcut.{index}.{rest}'
            case [layer, block, part, rest]:  # a convolution, a norm and a ReLU, three times
                index = 3 * (int(part[-1]) - 1) + part.startswith('bn')
                names[name] = f'stages.{int(layer[-1]) - 1}.{block}.branch.{index}.{rest}'
    ours = ConvNeXtRoadmap('50-resnet').double().eval()
    ours.load_state_dict({names[key]: value for key, value in theirs.state_dict().items()})
    image = torch.randn(1, 3, 96, 70, dtype=torch.float64)
    with torch.no_grad():
        assert_same(ours(image), theirs(image))


def test_the_last_step_is_convnext():
    theirs = set_random(ConvNeXt(gap_before_final_norm=False, out_indices=(0, 1, 2, 3), layer_scale_init_value=0.0))
    parts = dict(depthwise_conv=0, norm=1, pointwise_conv1=2, pointwise_conv2=4)
    ours = ConvNeXtRoadmap().double().eval()
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    weights = {}
    for name, value in theirs.double().state_dict().items():
        words = name.split('.')
        if words[0] == 'stages':
            name = '.'.join([*words[:3], 'branch', str(parts[words[3]]), words[4]])
        weights[name] = value.reshape(shapes[name])  # of a linear layer: a pointwise convolution
    ours.load_state_dict(weights)
    image = torch.randn(1, 3, 96, 70, dtype=torch.float64)
    with torch.no_grad():
        assert_same(ours(image), theirs(image))


@pytest.mark.parametrize('arch', [a for a in ARCHS if a.startswith('nano')])
def test_folded_norms_change_nothing(arch):
    model = set_random(ConvNeXtRoadmap(arch)).double()
    merged, changes = reparameterize(model)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert len(changes.folded) == norms and (norms > 0) == ('layernorm' not in arch and 'separate' not in arch)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_same(merged(image), model(image))


def layers(arch: str) -> dict[str, int]:
    """Counts of the layers of stages 1 and 2 in their first blocks, and in the stem."""
    model = ConvNeXtRoadmap(arch)
    kinds = dict(norm=(nn.BatchNorm2d, LayerNorm2d), act=(nn.ReLU, nn.GELU), conv=nn.Conv2d, depthwise=DepthwiseConv2d)
    places = dict(stem=model.downsample_layers[0], block=model.stages[0][0].branch, strided=model.stages[1][0])
    return {
        f'{place} {kind}': sum(isinstance(m, classes) for m in module.modules())
        for place, module in places.items()
        for kind, classes in kinds.items()
    }


def test_a_step_changes_what_it_names():
    """Counted by hand from section 2 of the paper; the strided block includes its shortcut and the last activation."""
    expected = {
        'resnet': ((1, 1, 1, 0), (3, 2, 3, 0), (4, 3, 4, 0)),
        'depthwise': ((1, 1, 1, 0), (3, 2, 3, 1), (4, 3, 4, 1)),
        'kernel-7': ((1, 1, 1, 0), (3, 2, 3, 1), (4, 3, 4, 1)),
        'fewer-acts': ((1, 0, 1, 0), (3, 1, 3, 1), (4, 1, 4, 1)),
        'fewer-norms': ((0, 0, 1, 0), (1, 1, 3, 1), (1, 1, 4, 1)),
        'layernorm': ((0, 0, 1, 0), (1, 1, 3, 1), (1, 1, 4, 1)),
        'separate-downsampling': ((1, 0, 1, 0), (1, 1, 3, 1), (1, 1, 3, 1)),
    }
    for step, counts in expected.items():
        assert list(layers(f'nano-{step}').values()) == [count for place in counts for count in place], step


@pytest.mark.parametrize('step', ['patchify', 'inverted', 'depthwise-first', 'gelu', 'layernorm'])
def test_order_of_layers(step):
    conv, depthwise, norm, act = 'Conv2d', 'DepthwiseConv2d', 'BatchNorm2d', 'ReLU'
    expected = {
        'patchify': [conv, norm, act, conv, norm, act, conv, norm],
        'inverted': [conv, norm, act, depthwise, norm, act, conv, norm],
        'depthwise-first': [depthwise, norm, act, conv, norm, act, conv, norm],
        'gelu': [depthwise, norm, 'GELU', conv, norm, 'GELU', conv, norm],
        'layernorm': [depthwise, 'LayerNorm2d', conv, 'GELU', conv],
    }[step]
    branch = ConvNeXtRoadmap(f'nano-{step}').stages[1][0].branch
    assert [type(layer).__name__ for layer in branch] == expected


def test_one_block_by_hand():
    """Norm, shortcut and activation of a strided block of the step before the activations change."""
    settings = {**ConvNeXtRoadmap.arch_options, **ARCHS['nano-depthwise-first']}
    block = set_random(RoadmapBlock(4, 6, 2, settings, 0.0)).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)

    def norm(x, layer):
        mean, var = layer.running_mean.view(-1, 1, 1), layer.running_var.view(-1, 1, 1)
        return (x - mean) / (var + 1e-5).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    branch, shortcut = block.branch, block.shortcut
    assert all(layer.bias is None for layer in block.modules() if isinstance(layer, nn.Conv2d))
    with torch.no_grad():
        out = norm(nn.functional.conv2d(x, branch[0].weight, stride=2, padding=1, groups=4), branch[1]).clamp(min=0)
        out = norm(torch.einsum('nchw,dc->ndhw', out, branch[3].weight[..., 0, 0]), branch[4]).clamp(min=0)
        out = norm(torch.einsum('nchw,dc->ndhw', out, branch[6].weight[..., 0, 0]), branch[7])
        skip = norm(torch.einsum('nchw,dc->ndhw', x[..., ::2, ::2], shortcut[0].weight[..., 0, 0]), shortcut[1])
        torch.testing.assert_close(block(x), (out + skip).clamp(min=0), rtol=0, atol=1e-12)


def test_names():
    steps = [a.removeprefix('50-') for a in ARCHS if a.startswith('50-')]
    assert len(steps) == 16
    assert list(ARCHS) == [f'{regime}-{step}' for regime in ('nano', '50', '200') for step in steps]
    assert ARCHS['50-gelu']['kernel_size'] == 7
    model = ConvNeXtRoadmap('nano-gelu')
    assert sum(isinstance(m, DropPath) for m in model.modules()) == 6
