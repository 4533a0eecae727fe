"""MSCAN, the backbone of SegNeXt: VAN with an attention of parallel strips, and a stem of two convolutions.

"SegNeXt: Rethinking Convolutional Attention Design for Semantic Segmentation", Guo, Lu, Hou, Liu, Cheng, Hu,
NeurIPS 2022, arXiv:2209.08575. Reimplemented from the paper. Parameter names and shapes are those of the authors' code
(Apache-2.0), so that their checkpoints load.
"""

from collections import OrderedDict

import torch.nn as nn
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import build_norm
from replk_mm.backbones.van import VAN
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class MultiScaleAttention(nn.Module):
    """Multiply the features with a map from depthwise convolutions of several sizes. Section 3.1.

    After a 5x5 convolution, each larger kernel is a horizontal strip and then a vertical one.

    Args:
        channels: Channels of input and output.
    """

    strips = (7, 11, 21)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = DepthwiseConv2d(channels, 5)
        for i, length in enumerate(self.strips):
            self.add_module(f'conv{i}_1', DepthwiseConv2d(channels, (1, length)))
            self.add_module(f'conv{i}_2', DepthwiseConv2d(channels, (length, 1)))
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        local = total = self.conv0(x)
        for i in range(len(self.strips)):
            horizontal, vertical = getattr(self, f'conv{i}_1'), getattr(self, f'conv{i}_2')
            total = total + vertical(horizontal(local))
        return fused_conv2d(self.conv3, total, factor=x)


@MODELS.register_module()
class MSCAN(VAN):
    """Multi-scale convolutional attention network; arguments and methods are those of :class:`VAN`.

    ``init_cfg`` of type ``Pretrained`` loads the authors' checkpoints and mmsegmentation's.
    """

    gating = MultiScaleAttention
    arch_settings = {
        't': dict(depths=[3, 3, 5, 2], channels=[32, 64, 160, 256]),
        's': dict(depths=[2, 2, 4, 2], channels=[64, 128, 320, 512]),
        'b': dict(depths=[3, 3, 12, 3], channels=[64, 128, 320, 512]),
        'l': dict(depths=[3, 5, 27, 3], channels=[64, 128, 320, 512]),
    }

    @staticmethod
    def _build_stem(in_channels: int, channels: int, norm_cfg: dict) -> nn.Module:
        def halve(before: int, after: int) -> tuple[nn.Module, nn.Module]:
            return nn.Conv2d(before, after, 3, 2, 1), build_norm(norm_cfg, after)

        layers = (*halve(in_channels, channels // 2), nn.GELU(), *halve(channels // 2, channels))
        return nn.Sequential(OrderedDict(proj=nn.Sequential(*layers)))


_FOLDER = 'https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segnext'

register_variants(
    MSCAN,
    {
        f'mscan-{arch}': dict(
            config=dict(arch=arch),
            paper_name=f'MSCAN-{arch.upper()}',
            weights=(Weights('in1k', 'ImageNet-1K', f'{_FOLDER}/mscan_{arch}_20230227-{digits}.pth'),),
        )
        for arch, digits in dict(t='119e8c9f', s='f33ccdf2', b='3ab7d230', l='cef260d4').items()
    },
    source='arXiv:2209.08575, Visual-Attention-Network/SegNeXt',
    licence='Apache-2.0',
)
