"""Backbones, one file for each family, and their catalogue."""

import replk_mm.backbones.efficientnet_lite  # noqa: F401 (variants of the catalogue)
from replk_mm.backbones.adapters import HFBackbone, TimmBackbone
from replk_mm.backbones.catalogue import build_backbone, list_backbones
from replk_mm.backbones.convnext import ConvNeXt
from replk_mm.backbones.convnext_roadmap import ConvNeXtRoadmap
from replk_mm.backbones.inceptionnext import InceptionNeXt
from replk_mm.backbones.internimage import InternImage
from replk_mm.backbones.layers import LayerNorm2d
from replk_mm.backbones.mobilenetv2 import MobileNetV2
from replk_mm.backbones.moganet import MogaNet
from replk_mm.backbones.mscan import MSCAN
from replk_mm.backbones.overlock import OverLoCK
from replk_mm.backbones.rdnet import RDNet
from replk_mm.backbones.replknet import RepLKNet
from replk_mm.backbones.slak import SLaK
from replk_mm.backbones.sync_norm import SyncBatchNorm
from replk_mm.backbones.unireplknet import UniRepLKNet
from replk_mm.backbones.van import VAN

__all__ = [
    'ConvNeXt',
    'ConvNeXtRoadmap',
    'HFBackbone',
    'InceptionNeXt',
    'InternImage',
    'LayerNorm2d',
    'MSCAN',
    'MobileNetV2',
    'MogaNet',
    'RDNet',
    'OverLoCK',
    'RepLKNet',
    'SLaK',
    'SyncBatchNorm',
    'TimmBackbone',
    'UniRepLKNet',
    'VAN',
    'build_backbone',
    'list_backbones',
]
