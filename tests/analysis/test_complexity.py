"""Parameters and multiply-accumulates against closed forms; the command."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS
from tiny import CONFIG, ROOT

from replk_mm import published
from replk_mm.analysis import complexity
from replk_mm.analysis.complexity import (
    INFERENCE,
    NEVER,
    TRAINING,
    ConfigComplexity,
    config_complexity,
    count_complexity,
)
from replk_mm.backbones import RepLKNet
from replk_mm.commands import complexity as command
from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.errors import UserError

NANO = str(ROOT / 'configs' / 'upernet_replk-nano_ade20k.py')
MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
#: Positions in each level of a feature pyramid at 64x64 pixels, strides 4 to 64.
LEVELS = [16 * 16, 8 * 8, 4 * 4, 2 * 2, 1]


class Attention(nn.Module):
    """A matrix product of two outputs, a layer that is not called, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.linear = nn.Linear(8, 6)
        self.idle = nn.Linear(2, 2, bias=False)
        self.scale = nn.Parameter(torch.ones(7))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        tokens = self.linear(self.depthwise(self.conv(image)).relu().flatten(2).transpose(1, 2))
        return (tokens @ tokens.transpose(1, 2)).mean() * self.scale.sum()


def test_closed_forms_by_part() -> None:
    pixels = 16 * 24
    found = count_complexity(Attention(), (32, 48))
    assert {part.name: (part.parameters, part.macs, part.runs) for part in found.parts} == {
        '(model)': (7, pixels * pixels * 6, INFERENCE),
        'conv': (8 * 3 * 9 + 8, pixels * 8 * 3 * 9, INFERENCE),
        'depthwise': (8 * 25, pixels * 8 * 25, INFERENCE),
        'linear': (8 * 6 + 6, pixels * 8 * 6, INFERENCE),
        'idle': (4, 0, NEVER),
    }
    assert found.macs == sum(part.macs for part in found.parts)
    assert found.parameters == found.inference_parameters == sum(p.numel() for p in Attention().parameters())


def test_operators_without_a_formula_are_listed() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GELU(), nn.Upsample(scale_factor=2, mode='bilinear'), nn.Flatten()
    )
    uncounted = count_complexity(net, (5, 6)).uncounted
    assert [operator.elements for operator in uncounted] == [4 * 120, 4 * 30, 4 * 30], 'most elements first'
    found = {operator.name: (operator.calls, operator.elements) for operator in uncounted}
    norm = next(name for name in found if 'batch_norm' in name)
    assert found.pop(norm) == (1, 4 * 30)
    assert found == {'aten.gelu': (1, 4 * 30), 'aten.upsample_bilinear2d': (1, 4 * 120)}


def test_views_are_no_operators() -> None:
    class Reshaped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._unsafe_view(x.flatten(1), [x.shape[0], -1])

    assert not count_complexity(Reshaped(), (5, 6)).uncounted


def test_shared_weights_count_once() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False))
    net[2].weight = net[0].weight
    found = count_complexity(net, (2, 2))
    assert (found.parameters, found.macs) == (9, 2 * 9 * 4)


def test_merging_removes_parallel_kernels_and_norms() -> None:
    arch = dict(large_kernel_sizes=[9, 7], small_kernel=3, layers=[1, 2], channels=[8, 16], dw_ratio=1)
    net = RepLKNet(arch, out_indices=(0, 1))
    merged = reparameterize(net)[0]
    # Small kernels of 3x3 on maps of 1/4 and 1/8; norms count no multiply-accumulates.
    saved = 9 * (8 * 16 * 16 + 2 * 16 * 8 * 8)
    assert count_complexity(net, (64, 64)).macs - count_complexity(merged, (64, 64)).macs == saved
    norms = sum(2 * m.num_features for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    # Every convolution gets a bias; a merged one has one instead of one per branch.
    biases = sum(m.out_channels for m in merged.modules() if isinstance(m, nn.Conv2d))
    small = 9 * (8 + 2 * 16)
    assert complexity.count_parameters(net) - complexity.count_parameters(merged) == norms + small - biases


def test_auxiliary_heads_are_not_inference_parameters() -> None:
    net = nn.Module()
    net.decode_head, net.auxiliary_head, net.auxiliary_neck = nn.Linear(2, 3), nn.Linear(2, 50), nn.Linear(1, 1)
    assert complexity.count_inference_parameters(net) == 9 + 2


@pytest.fixture(scope='module')
def segmentor(tmp_path_factory: pytest.TempPathFactory) -> ConfigComplexity:
    path = tmp_path_factory.mktemp('complexity') / 'tiny.py'
    path.write_text(CONFIG)
    return config_complexity(str(path))


def test_parts_of_a_segmentor(segmentor: ConfigComplexity) -> None:
    found = segmentor
    assert found.shape == (64, 64) and 'crop' in found.shape_from
    before, after = ({part.name: part for part in form.parts} for form in (found.training, found.deployed))
    assert list(before) == list(after) == ['backbone', 'decode_head', 'auxiliary_head']
    assert [part.runs for part in before.values()] == [INFERENCE, INFERENCE, TRAINING]
    # Features of 32 channels at 1/16; a 3x3 convolution to 8 channels with BatchNorm, and 15 classes with biases.
    classes = (before['auxiliary_head'].parameters - 9 * 32 * 8 - 2 * 8) // 9
    assert before['auxiliary_head'].parameters == 9 * 32 * 8 + 2 * 8 + 9 * classes
    assert before['auxiliary_head'].macs == 16 * (9 * 32 * 8 + 8 * classes)
    # Merging removes the 3x3 kernels beside the 7x7 ones: a block per stage, maps of 16, 8, 4 and 2 pixels.
    assert before['backbone'].macs - after['backbone'].macs == 9 * sum(
        c * s * s for c, s in ((8, 16), (16, 8), (32, 4), (64, 2))
    )
    assert before['decode_head'].macs == after['decode_head'].macs
    for form in (found.training, found.deployed):
        assert form.macs == form.parts[0].macs + form.parts[1].macs
        assert form.parameters - form.inference_parameters == form.parts[2].parameters


def mask_head_macs(classes: int = 80) -> int:
    return 4 * 14 * 14 * 9 * 256 * 256 + 14 * 14 * 4 * 256 * 256 + 28 * 28 * 256 * classes


def test_parts_of_a_two_stage_detector() -> None:
    found = config_complexity(MASK_RCNN, (64, 64))
    parts = {part.name: part.macs for part in found.training.parts}
    # Published for ResNet-50 without its classifier: 4.09 G at 224x224.
    assert parts['backbone'] == pytest.approx(4.09e9 * 64 * 64 / 224**2, rel=0.01)
    assert parts['neck'] == sum(n * 256 * (c + 9 * 256) for n, c in zip(LEVELS, (256, 512, 1024, 2048), strict=False))
    assert parts['rpn_head'] == sum(LEVELS) * (9 * 256 * 256 + 256 * 3 * 5)
    assert parts['roi_head.bbox_head'] == 1000 * (49 * 256 * 1024 + 1024 * 1024 + 1024 * 81 + 1024 * 4 * 80)
    assert parts['roi_head.mask_head'] == 100 * mask_head_macs()
    assert found.training.macs == sum(parts.values()) and len(parts) == 5
    assert any(
        '1 x 1000 regions of 7x7' in note and '1 x 100 regions of 14x14' in note for note in found.training.notes
    )


def test_parts_of_a_cascade() -> None:
    config = str(ROOT / 'configs' / 'cascade-mask-rcnn_convnext-tiny_coco.py')
    parts = {part.name: part.macs for part in config_complexity(config, (64, 64)).training.parts}
    for stage in range(3):
        assert parts[f'roi_head.bbox_head.{stage}'] == 1000 * (
            4 * 49 * 9 * 256 * 256 + 49 * 256 * 1024 + 1024 * (81 + 320)
        )
        assert parts[f'roi_head.mask_head.{stage}'] == 100 * mask_head_macs()


def test_parts_of_a_dense_detector() -> None:
    found = config_complexity(str(ROOT / 'configs' / 'fcos_replk31b_coco.py'), (128, 128))
    parts = {part.name: part.macs for part in found.deployed.parts}
    assert parts['bbox_head'] == sum(LEVELS) * 9 * 256 * (8 * 256 + 80 + 4 + 1)
    assert len(found.changes) and found.training.macs > found.deployed.macs == sum(parts.values())


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """A config of a bare backbone."""
    path = tmp_path / 'backbone.py'
    path.write_text("model = dict(type='replk_mm.RepLKNet', arch='31B', out_indices=(3,))\n")
    return str(path)


def test_bare_backbone_needs_a_size(backbone: str) -> None:
    with pytest.raises(UserError, match='--shape'):
        config_complexity(backbone)
    found = config_complexity(backbone, (224, 224))
    # Published for the classifier, whose last layer is 1024 x 1000.
    row = next(row for row in published.table('kernel_size_study') if row['name'] == 'RepLKNet-31')
    assert (found.deployed.macs + 1024 * 1000) / 1e9 == pytest.approx(row['flops_g'], abs=0.1)
    assert (found.deployed.parameters + 1024 * 1000 + 1000) / 1e6 == pytest.approx(row['params_m'], abs=0.1)


@pytest.mark.parametrize(('crop', 'shape'), [((33, 64), (64, 64)), ((64, 96), (64, 96)), ((65, 1), (96, 32))])
def test_the_configs_size_is_padded_to_its_divisor(
    tmp_path: Path, crop: tuple[int, int], shape: tuple[int, int]
) -> None:
    path = tmp_path / 'padded.py'
    preprocessor = dict(size=crop, pad_size_divisor=32)
    path.write_text(f"model = dict(type='mmengine.ReadsValues', read='', data_preprocessor={preprocessor})\n")
    found, source = complexity._default_shape(Config.fromfile(str(path)), str(path))
    assert found == shape and ('padded' in source) == (crop != shape)


@MODELS.register_module()
class ReadsValues(nn.Module):
    """A network that reads the values of tensors, which meta tensors do not have."""

    def __init__(self, read: str) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 8, 3, padding=1), read
        if read == 'constructor':
            torch.ones(1).item()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.read == 'numpy':
            x.numpy()
        elif self.read == 'nonzero':
            x.flatten().nonzero()
        elif self.read == 'branch' and x.mean() > 1e9:
            return x
        return self.conv(x)


@pytest.mark.parametrize('read', ['branch', 'numpy', 'nonzero', 'constructor'])
def test_networks_that_read_values_are_counted(tmp_path: Path, read: str) -> None:
    path = tmp_path / 'reads.py'
    path.write_text(f"model = dict(type='mmengine.ReadsValues', read={read!r})\n")
    found = config_complexity(str(path), (16, 24))
    assert found.training.macs == found.deployed.macs == 16 * 24 * 8 * 3 * 9
    assert found.training.parameters == 8 * 3 * 9 + 8
    assert bool(found.training.notes) == (read != 'constructor')


def test_counts_on_the_cpu_are_those_on_the_meta_device() -> None:
    model = RepLKNet('nano')
    assert count_complexity(model, (32, 64), 'cpu').parts == count_complexity(model, (32, 64)).parts


def test_size_that_the_network_cannot_take() -> None:
    with pytest.raises(UserError, match='1x3x2x2'):
        config_complexity(NANO, (2, 2), {'model.backbone.norm_cfg': dict(type='IN')})


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command in this process."""

    def call(*args: object) -> int:
        monkeypatch.setattr(sys, 'argv', ['complexity.py', *map(str, args)])
        return command.main()

    return call


def test_json_has_the_documented_fields(run: Callable[..., int], capsys: pytest.CaptureFixture, backbone: str) -> None:
    assert run(backbone, '--shape', 64, 96, '--json', '--cfg-options', 'model.arch=nano') == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    described = ' '.join(command.FIELDS.split())
    assert all(
        re.search(rf'\b{key}\b', described)
        for form in ('training', 'reparameterized')
        for key in [*found, *found[form], *found[form]['parts'][0], *found[form]['uncounted'][0]]
    )
    assert found['shape'] == [64, 96] and 'torch' in found['versions']
    assert ('mmcv' in found['versions']) != ('mmcv-lite' in found['versions'])
    for form in ('training', 'reparameterized'):
        record = found[form]
        assert record['macs'] == sum(part['macs'] for part in record['parts'] if part['runs'] == 'inference')
        assert record['parameters'] == sum(part['parameters'] for part in record['parts'])
