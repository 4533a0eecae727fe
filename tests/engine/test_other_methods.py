"""The backbones in other methods of mmdet and mmseg: the libraries' configs, with ``backbone`` replaced, small."""

import copy
from collections.abc import Callable

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from norms import randomize_norms
from torch import nn

from replk_mm.deploy.reparameterize import reparameterize
from replk_mm.engine.config import load_config, replace_type

CHANNELS = [8, 12, 16, 24]
BACKBONES = {
    'RepLKNet': dict(
        type='replk_mm.RepLKNet',
        norm_cfg=dict(type='SyncBN'),
        arch=dict(large_kernel_sizes=[7, 5, 5, 3], small_kernel=3, layers=[1, 1, 1, 1], channels=CHANNELS, dw_ratio=1),
    ),
    'ConvNeXt': dict(
        type='replk_mm.ConvNeXt',
        arch=dict(depths=[1, 1, 1, 1], channels=CHANNELS),
        out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False,
        layer_scale_init_value=1.0,
    ),
}
KERNELS = dict(RepLKNet=4, ConvNeXt=0)  # those with a small one beside them
THREE_LEVELS = dict(
    backbone=dict(out_indices=(1, 2, 3)), neck=dict(in_channels=CHANNELS[1:]), test_cfg=dict(score_thr=0.0)
)
FPN_OF_THREE = {**THREE_LEVELS, 'neck': dict(in_channels=CHANNELS[1:], start_level=0)}
#: What each config needs for the backbone's levels and channels (and, for an untrained network, to predict anything).
DETECTORS = {
    'retinanet/retinanet_r50_fpn_1x_coco.py': FPN_OF_THREE,
    'atss/atss_r50_fpn_1x_coco.py': FPN_OF_THREE,
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py': dict(**THREE_LEVELS, bbox_head=dict(exp_on_reg=True)),
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': dict(
        data_preprocessor=dict(batch_augments=None), panoptic_head=dict(in_channels=CHANNELS)
    ),
}
SEGMENTORS = {
    'sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': dict(neck=dict(in_channels=CHANNELS)),
    'deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py': dict(
        backbone=dict(out_indices=(0, 2, 3)),
        auxiliary_head=dict(in_channels=CHANNELS[2], in_index=1),
        decode_head=dict(in_channels=CHANNELS[3], in_index=2, c1_in_channels=CHANNELS[0]),
    ),
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': dict(decode_head=dict(in_channels=CHANNELS)),
    'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py': dict(decode_head=dict(in_channels=CHANNELS)),
}
#: Widths and depths of necks and heads, whatever they are called.
SMALL = dict(
    out_channels=32,
    feat_channels=32,
    channels=32,
    embed_dims=32,
    feedforward_channels=32,
    num_feats=16,
    num_layers=1,
    stacked_convs=1,
    num_queries=6,
)


def shrink(node) -> None:
    """Make necks and heads small: widths of 32, one layer of each kind, few queries and points."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == 'in_channels':
            node[key] = 32 if isinstance(value, int) else [32] * len(value)
        elif isinstance(value, (dict, list, tuple)):
            shrink(value)
        elif key in SMALL:
            node[key] = SMALL[key]
        elif key == 'num_points' and value > 100:
            node[key] = 50


def build(scope: str, name: str, changes: dict, backbone: str) -> nn.Module:
    cfg = load_config(f'{scope}::{name}').model
    cfg.backbone = BACKBONES[backbone]
    cfg.pop('pretrained', None)
    cfg.data_preprocessor.pop('size', None)
    shrink({key: value for key, value in cfg.items() if key != 'backbone'})
    cfg = ConfigDict(copy.deepcopy(cfg.to_dict()))
    for part, values in changes.items():
        cfg[part].update(values)
    replace_type(cfg, {'SyncBN': 'BN'})
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(cfg)
    assert type(model.backbone).__module__.startswith('replk_mm.backbones.')
    return randomize_norms(model)


def tensors(node) -> list[torch.Tensor]:
    """All tensors in nested sequences, in order."""
    return [node] if isinstance(node, torch.Tensor) else [x for part in node for x in tensors(part)]


def assert_trains(model: nn.Module, data: dict) -> None:
    """One training step reaches the backbone's first layer."""
    losses = model.train()(**data, mode='loss')
    total = sum(x for name, value in losses.items() if 'loss' in name for x in tensors([value]))
    assert torch.isfinite(total) and total > 0
    total.backward()
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert next(model.backbone.parameters()).grad.abs().max() > 0


def assert_same_when_merged(model: nn.Module, data: dict, outputs: Callable, large_kernels: int) -> list:
    """``outputs(model, predictions)`` of both forms are equal; returns the merged form's predictions."""
    merged, changes = reparameterize(model.eval())
    assert len(changes.merged) == large_kernels
    results = []
    with torch.no_grad():
        for m in (model, merged):
            predictions = m(**copy.deepcopy(data), mode='predict')
            results.append(tensors(outputs(m, predictions)))
    assert len(results[0]) == len(results[1]) > 0 and len(predictions) == 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * max(1.0, a.abs().max().item()))
    return predictions


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('name', DETECTORS)
def test_detectors(name, backbone):
    from mmdet.testing import demo_mm_inputs

    model = build('mmdet', name, DETECTORS[name], backbone)
    data = demo_mm_inputs(2, (3, 96, 64), num_items=[3, 2], num_classes=80, with_mask='mask2former' in name)
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert_trains(model, model.data_preprocessor(copy.deepcopy(data), True))
        data = model.data_preprocessor(data, False)
        found = assert_same_when_merged(
            model, data, lambda m, _: m(**copy.deepcopy(data), mode='tensor'), KERNELS[backbone]
        )
    for sample in found:
        objects = sample.pred_instances
        assert len(objects) > 0 and torch.isfinite(objects.bboxes).all()
        assert ((objects.labels >= 0) & (objects.labels < 80)).all()
        if 'mask2former' in name:
            assert objects.masks.shape[1:] == (96, 64)


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentors(name, backbone):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = build('mmseg', name, SEGMENTORS[name], backbone)
    meta = dict(img_shape=(64, 96), ori_shape=(50, 77), pad_shape=(64, 96))
    samples = [
        SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=torch.randint(0, 9, (1, 64, 96)))) for _ in range(2)
    ]
    data = dict(inputs=torch.randn(2, 3, 64, 96), data_samples=samples)
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert_trains(model, copy.deepcopy(data))
        found = assert_same_when_merged(
            model, data, lambda _, samples: [s.seg_logits.data for s in samples], KERNELS[backbone]
        )
    for sample in found:
        labels = sample.pred_sem_seg.data
        assert labels.shape == (1, 50, 77) and ((labels >= 0) & (labels < 150)).all()
