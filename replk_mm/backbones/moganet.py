"""MogaNet: gated depthwise convolutions of several dilations, and a feed-forward network that aggregates channels.

"MogaNet: Multi-order Gated Aggregation Network", Li, Wang, Liu, Tan, Lin, Wu, Chen, Zheng, Li, ICLR 2024,
arXiv:2211.03295. Reimplemented from the paper. Parameter names and shapes are those of the authors' code (Apache-2.0),
so that their checkpoints load.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import FAN_OUT_INIT, PatchEmbedBackbone, Stage, add_residual, build_norm
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class ElementScale(nn.Module):
    """Emphasize the difference of a map from a reference: ``x + scale * (x - reference)``.

    Args:
        channels: Channels of the map.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, channels, 1, 1), 1e-5))

    def forward(self, x: Tensor, reference: Tensor) -> Tensor:
        return torch.addcmul(x, self.scale, x - reference)


class MultiOrderDWConv(nn.Module):
    """Depthwise convolutions of three orders, one for each part of the channels, and a pointwise convolution.

    All channels have a 5x5 kernel. After it, three eighths of them have a 5x5 kernel of dilation 2, and the last half
    have a 7x7 kernel of dilation 3.

    Args:
        channels: Channels of input and output, at least 3.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        middle, high = channels * 3 // 8, channels // 2
        self.split = channels - middle - high, middle, high
        self.DW_conv0 = DepthwiseConv2d(channels, 5)
        self.DW_conv1 = DepthwiseConv2d(middle, 5, dilation=2)
        self.DW_conv2 = DepthwiseConv2d(high, 7, dilation=3)
        self.PW_conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        low, middle, high = self.DW_conv0(x).split(self.split, 1)
        return self.PW_conv(torch.cat((low, self.DW_conv1(middle), self.DW_conv2(high)), 1))


class MultiOrderGatedAggregation(nn.Module):
    """Spatial aggregation: multi-order convolutions, gated by a pointwise convolution of the same map.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.gate = nn.Conv2d(channels, channels, 1)
        self.value = MultiOrderDWConv(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)
        self.sigma = ElementScale(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.proj_1(x)
        out = F.silu(self.sigma(out, out.mean((2, 3), keepdim=True)))
        return fused_conv2d(self.proj_2, F.silu(self.gate(out)) * F.silu(self.value(out)), shortcut=x)


class ChannelAggregationFFN(nn.Module):
    """Feed-forward network with a depthwise convolution, which emphasizes what a single channel does not explain.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the pointwise convolutions.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = DepthwiseConv2d(hidden, 3)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.decompose = nn.Conv2d(hidden, 1, 1)
        self.sigma = ElementScale(hidden)

    def forward(self, x: Tensor) -> Tensor:
        out = fused_conv2d(self.dwconv, self.fc1(x), self.act)
        return self.fc2(self.sigma(out, self.act(self.decompose(out))))


class MogaBlock(nn.Module):
    """Spatial aggregation and channel aggregation, each with a norm, layer scale and identity shortcut.

    Args:
        channels: Channels of input and output.
        ffn_ratio: Hidden channels of the feed-forward network relative to ``channels``.
        drop_path: Drop path rate of both parts.
        norm_cfg: Normalization layers.
        layer_scale_init_value: Initial value of the layer scales.
    """

    def __init__(
        self, channels: int, ffn_ratio: int, drop_path: float, norm_cfg: dict, layer_scale_init_value: float
    ) -> None:
        super().__init__()
        self.layer_scale_1 = nn.Parameter(torch.full((1, channels, 1, 1), float(layer_scale_init_value)))
        self.layer_scale_2 = nn.Parameter(self.layer_scale_1.detach().clone())
        self.norm1 = build_norm(norm_cfg, channels)
        self.attn = MultiOrderGatedAggregation(channels)
        self.norm2 = build_norm(norm_cfg, channels)
        self.mlp = ChannelAggregationFFN(channels, ffn_ratio * channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = add_residual(x, self.attn(self.norm1(x)), self.drop_path, self.layer_scale_1)
        return add_residual(x, self.mlp(self.norm2(x)), self.drop_path, self.layer_scale_2)


@MODELS.register_module()
class MogaNet(PatchEmbedBackbone):
    """MogaNet backbone.

    The norm after each stage is in the trunk: the next stage sees its output, which is also the feature.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys and optionally those of
            :attr:`arch_options`. Four stages. Defaults to ``'tiny'``.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scales. Defaults to 1e-5.
        norm_cfg: Normalization layers. Defaults to ``dict(type='BN')``.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of stages to freeze, with the patch embedding before and the norm after each. Defaults
            to 0.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        with_cp: See :class:`Stage`. Defaults to False.
        init_cfg: Initialization. ``Pretrained`` loads the authors' and our checkpoints. By default, convolutions have
            normal weights of standard deviation ``sqrt(2 / fan_out)`` and zero biases.
    """

    blocks_name = 'blocks'
    arch_settings = {
        'xtiny': dict(depths=[3, 3, 10, 2], channels=[32, 64, 96, 192]),
        'tiny': dict(depths=[3, 3, 12, 2], channels=[32, 64, 128, 256]),
        'small': dict(depths=[2, 3, 12, 2], channels=[64, 128, 320, 512]),
        'base': dict(depths=[4, 6, 22, 3], channels=[64, 160, 320, 512]),
        'large': dict(depths=[4, 6, 44, 4], channels=[64, 160, 320, 640]),
        'xlarge': dict(depths=[6, 6, 44, 4], channels=[96, 192, 480, 960]),
    }
    #: Optional key of ``arch``: hidden channels of the feed-forward networks of each stage, relative to its channels.
    arch_options: dict = dict(ffn_ratios=[8, 8, 4, 4])

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-5,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (as in RepLKNet)
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, channels, ratios = settings['depths'], settings['channels'], settings['ffn_ratios']
        super().__init__(
            depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg or FAN_OUT_INIT
        )
        if not len(depths) == len(ratios) == 4:
            raise ValueError(f'MogaNet: depths={depths} and ffn_ratios={ratios} must have four entries')

        def halve(before: int, after: int) -> list[tuple[str, nn.Module]]:
            return [('projection', nn.Conv2d(before, after, 3, 2, 1)), ('norm', build_norm(norm_cfg, after))]

        def stem(width: int) -> nn.Module:
            layers = [*halve(in_channels, width // 2), ('act', nn.GELU()), *halve(width // 2, width)]
            return nn.Sequential(OrderedDict(projection=nn.Sequential(*(layer for _, layer in layers))))

        rates = self.drop_path_rates(drop_path_rate)
        for i, (depth, width, ratio) in enumerate(zip(depths, channels, ratios, strict=True), 1):
            embed = nn.Sequential(OrderedDict(halve(channels[i - 2], width))) if i > 1 else stem(width)
            blocks = (MogaBlock(width, ratio, next(rates), norm_cfg, layer_scale_init_value) for _ in range(depth))
            self.add_module(f'patch_embed{i}', embed)
            self.add_module(f'blocks{i}', Stage(*blocks, with_cp=with_cp))
            self.add_module(f'norm{i}', build_norm(norm_cfg, width))
        self._freeze()

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer id of a parameter, of 12 layers, as in the authors' detection code.

        Two blocks of the third stage share an id. The norms after the stages have the full learning rate. Arguments and
        errors are those of :meth:`Backbone.get_layer_depth`.
        """
        location = self._locate(name, prefix)
        if location is None or location[1] == self.depths[location[0]]:
            return 13, 14
        stage, block = location
        if block is None:
            return (0, 3, 4, 12)[stage], 14
        return (2, 3, min(3 + block // 2, 11), 12)[stage], 14


register_variants(
    MogaNet,
    {
        f'moganet-{arch}': dict(
            config=dict(arch=arch),
            paper_name=f'MogaNet-{paper}',
            weights=(
                Weights(
                    'in1k',
                    'ImageNet-1K',
                    'https://github.com/Westlake-AI/MogaNet/releases/download/moganet-in1k-weights/'
                    f'moganet_{arch}_sz224_8xbs{64 if arch in ("large", "xlarge") else 128}_ep300.pth.tar',
                ),
            ),
        )
        for arch, paper in zip(MogaNet.arch_settings, ('XT', 'T', 'S', 'B', 'L', 'XL'), strict=True)
    },
    source='arXiv:2211.03295, Westlake-AI/MogaNet',
    licence='Apache-2.0',
)
