"""Backbones, one family a file."""

from replk_mm.models.convnext import ConvNeXt
from replk_mm.models.layers import LayerNorm2d
from replk_mm.models.replknet import RepLKNet
from replk_mm.models.sync_norm import SyncBatchNorm

__all__ = ['ConvNeXt', 'LayerNorm2d', 'RepLKNet', 'SyncBatchNorm']
