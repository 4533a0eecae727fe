"""Loading a backbone: out of any nest, under any prefix, by init_cfg too, and what does not fit."""

import collections

import pytest
import torch
from checkpoint_cases import CONV, DENSE, TINY, assert_same, tiny_backbone, write
from mmengine.registry import MODELS
from torch import nn

from replk_mm.backbones import ConvNeXt, RepLKNet
from replk_mm.checkpoints.loading import load_pretrained
from replk_mm.errors import UserError

NESTS = {
    'flat': lambda w: w,
    'model': lambda w: {'model': w, 'epoch': 3},
    'state_dict': lambda w: {'state_dict': w, 'meta': {}},
    'module': lambda w: {'module': w},
    'model_ema': lambda w: {'model_ema': w, 'epoch': 3},
    'two levels': lambda w: {'model': {'state_dict': w}},
    'ordered': lambda w: collections.OrderedDict(state_dict=w),
    'DistributedDataParallel': lambda w: {f'module.{k}': v for k, v in w.items()},
    'compiled': lambda w: {'model': {f'_orig_mod.{k}': v for k, v in w.items()}},
    'both wrappers': lambda w: {'model': {f'module._orig_mod.{k}': v for k, v in w.items()}},
    'backbone': lambda w: {'state_dict': {f'backbone.{k}': v for k, v in w.items()}},
    'wrapped backbone': lambda w: {'state_dict': {f'module.backbone.{k}': v for k, v in w.items()}},
    'beside a tensor': lambda w: {'best_accuracy': torch.tensor(83.5), 'model': w},
    'averaged': lambda w: {'model': {'n_averaged': torch.tensor(7), **{f'module.{k}': v for k, v in w.items()}}},
    'whole model': lambda w: {
        'state_dict': {
            **{f'backbone.{k}': v for k, v in w.items()},
            'decode_head.conv_seg.weight': torch.ones(2, 3, 1, 1),
        }
    },
    'parameters': lambda w: {'model': {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()}},
}


@pytest.mark.parametrize('nest', NESTS)
def test_nests_and_prefixes(nest, tmp_path):
    source = tiny_backbone().state_dict()
    path = write(tmp_path / 'a.pth', NESTS[nest](source))
    model = tiny_backbone(2)
    assert load_pretrained(model, path).matched == {'backbone': len(source)}
    assert_same(model, source)


@pytest.mark.parametrize('prefix', [None, 'backbone.', 'encoder.'])
def test_init_cfg(prefix, tmp_path):
    source = tiny_backbone().state_dict()
    weights = {f'{prefix or "backbone."}{k}': v for k, v in source.items()}
    path = write(tmp_path / 'a.pth', {'state_dict': {**weights, 'x.y': torch.ones(1)}})
    cfg = dict(type='Pretrained', checkpoint=path, **({'prefix': prefix} if prefix else {}))
    model = MODELS.build(dict(type='replk_mm.RepLKNet', arch=TINY, init_cfg=cfg))
    model.init_weights()
    assert_same(model, source)
    # As part of a larger model, after other initializations; and before them in the list.
    model = MODELS.build(
        dict(type='replk_mm.RepLKNet', arch=TINY, init_cfg=[cfg, dict(type='Constant', layer='Conv2d', val=0.0)])
    )
    model.init_weights()
    assert_same(model, source)


def test_init_cfg_that_does_not_fit(tmp_path):
    path = write(tmp_path / 'a.pth', tiny_backbone().state_dict())
    model = RepLKNet(dict(TINY, channels=[8, 12, 16, 32]), init_cfg=dict(type='Pretrained', checkpoint=path))
    with pytest.raises(UserError, match='RepLKNet: backbone .*/') as caught:
        model.init_weights()
    assert str(caught.value).startswith(path) and 'another size' in str(caught.value)


def test_strict_can_be_switched_off(tmp_path):
    source = tiny_backbone().state_dict()
    partial = {k: v for k, v in source.items() if not k.startswith('stages.3.')}
    path = write(tmp_path / 'a.pth', partial)
    with pytest.raises(UserError, match='missing'):
        load_pretrained(tiny_backbone(2), path)
    model = tiny_backbone(2)
    report = load_pretrained(model, path, strict=False)
    assert report.matched['backbone'] == len(partial) and all(k.startswith('stages.3.') for k in report.missing)
    assert_same(model, partial)
    with pytest.raises(UserError, match='another architecture'):
        load_pretrained(tiny_backbone(2), write(tmp_path / 'b.pth', {'fc1': torch.ones(2)}), strict=False)


def test_norms_of_stages_that_are_not_returned(tmp_path):
    source = ConvNeXt(CONV, **DENSE).state_dict()
    path = write(tmp_path / 'a.pth', source)
    model = ConvNeXt(CONV, out_indices=(1, 2))
    assert load_pretrained(model, path).unexpected == []
    assert_same(model, {k: v for k, v in source.items() if not k.startswith(('norm0', 'norm3'))})
    xl = RepLKNet(TINY, norm_intermediate_features=True).state_dict()
    path = write(tmp_path / 'b.pth', xl)
    load_pretrained(RepLKNet(TINY, norm_intermediate_features=True, out_indices=(3,)), path)
    with pytest.raises(UserError, match='norm_intermediate_features'):  # these would be lost
        load_pretrained(RepLKNet(TINY), path)
