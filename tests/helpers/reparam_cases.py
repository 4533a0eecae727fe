"""What tests of reparameterization share."""

import copy

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from norms import randomize_norms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from replk_mm.backbones import RepLKNet, UniRepLKNet

TINY = dict(
    large_kernel_sizes=[13, 11, 9, 7], small_kernel=5, layers=[1, 1, 2, 1], channels=[8, 12, 16, 24], dw_ratio=1
)
CHANNELS = TINY['channels']
BN = dict(type='BN')
FCN_HEAD = dict(
    type='FCNHead',
    in_channels=16,
    in_index=2,
    channels=8,
    num_convs=1,
    concat_input=False,
    num_classes=5,
    norm_cfg=BN,
    align_corners=False,
)


def backbone(**kwargs) -> RepLKNet:
    return randomize_norms(RepLKNet(TINY, **kwargs))


UNIREPLKNET = dict(depths=[2] * 4, channels=[4, 8, 12, 16], kernel_sizes=[[3, 5], [7, 9], [11, 13], [15, 17]])


def unireplknet(**kwargs) -> UniRepLKNet:
    """With BatchNorm statistics, response norm and layer scale far from the identity."""
    model = randomize_norms(UniRepLKNet(UNIREPLKNET, **kwargs)).eval()
    for name, value in model.named_parameters():
        if name.endswith(('gamma', 'beta')):
            nn.init.normal_(value, 0.5, 0.5)
    return model


def norms(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]


def largest_gap(a, b) -> float:
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in zip(a, b, strict=True))


def randomized(model):
    for m in model.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is None:
            nn.init.normal_(m.weight)
        elif isinstance(m, _BatchNorm):
            randomize_norms(m)
    return model


def build(cfg, scope):
    with DefaultScope.overwrite_default_scope(scope):
        torch.manual_seed(0)
        model = randomize_norms(MODELS.build(ConfigDict(copy.deepcopy(cfg))))
        model.eval()  # the backbones of mmseg and mmdet return None
        return model


REPLK = dict(type='replk_mm.RepLKNet', arch=TINY)
SEGMENTOR = dict(
    type='EncoderDecoder',
    backbone=REPLK,
    decode_head=dict(
        type='UPerHead',
        in_channels=CHANNELS,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2),
        channels=8,
        num_classes=5,
        norm_cfg=BN,
        align_corners=False,
    ),
    auxiliary_head=FCN_HEAD,
)
