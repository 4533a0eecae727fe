"""VAN: blocks whose attention is a map of large depthwise convolutions, multiplied with the features.

"Visual Attention Network", Guo, Lu, Liu, Cheng, Hu, CVMJ 2023, arXiv:2202.09741. Reimplemented from the paper.
Parameter names and shapes are those of the authors' code (Apache-2.0), so that their checkpoints load.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import FAN_OUT_INIT, LayerNorm2d, PatchEmbedBackbone, Stage, add_residual, build_norm
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class LargeKernelAttention(nn.Module):
    """Multiply the features with a map from two depthwise convolutions, which see 23x23 pixels. Section 3.1.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = DepthwiseConv2d(channels, 5)
        self.conv_spatial = DepthwiseConv2d(channels, 7, dilation=3)
        self.conv1 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return fused_conv2d(self.conv1, self.conv_spatial(self.conv0(x)), factor=x)


class GatedAttention(nn.Module):
    """Pointwise layer, GELU, gating unit, pointwise layer, identity shortcut.

    Args:
        channels: Channels of input and output.
        gating: Class of the gating unit; its argument is ``channels``.
    """

    def __init__(self, channels: int, gating: type[nn.Module]) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(channels, channels, 1)
        self.activation = nn.GELU()
        self.spatial_gating_unit = gating(channels)
        self.proj_2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.spatial_gating_unit(fused_conv2d(self.proj_1, x, self.activation))
        return fused_conv2d(self.proj_2, gated, shortcut=x)


class ConvMLP(nn.Module):
    """Pointwise layer, 3x3 depthwise convolution, GELU, pointwise layer.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the pointwise layers.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv: Any = nn.ModuleDict(dict(dwconv=DepthwiseConv2d(hidden, 3)))  # in a module in the authors' code
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = fused_conv2d(self.dwconv.dwconv, fused_conv2d(self.fc1, x), self.act)
        return fused_conv2d(self.fc2, hidden)


class VANBlock(nn.Module):
    """Attention and convolutional MLP, each with a norm before it, a layer scale, and an identity shortcut.

    Args:
        channels: Channels of input and output.
        mlp_ratio: Channels inside the MLP, as a multiple of ``channels``.
        gating: Class of the gating unit of the attention; its argument is ``channels``.
        drop_path: Drop path rate.
        norm_cfg: Normalization layers.
        layer_scale_init_value: Initial value of both layer scales.
    """

    def __init__(
        self,
        channels: int,
        mlp_ratio: float,
        gating: type[nn.Module],
        drop_path: float,
        norm_cfg: dict,
        layer_scale_init_value: float,
    ) -> None:
        super().__init__()
        self.norm1 = build_norm(norm_cfg, channels)
        self.attn = GatedAttention(channels, gating)
        self.drop_path = DropPath(drop_path)
        self.norm2 = build_norm(norm_cfg, channels)
        self.mlp = ConvMLP(channels, int(mlp_ratio * channels))
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))

    def forward(self, x: Tensor) -> Tensor:
        x = add_residual(x, self.attn(self.norm1(x)), self.drop_path, self.layer_scale_1)
        return add_residual(x, self.mlp(self.norm2(x)), self.drop_path, self.layer_scale_2)


class PatchEmbed(nn.Sequential):
    """Strided convolution and norm.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        kernel_size: Side of the kernel in pixels, odd.
        stride: Stride in pixels. Sides of the output round up.
        norm_cfg: Normalization layer.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int, stride: int, norm_cfg: dict) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2)
        self.norm = build_norm(norm_cfg, channels)


@MODELS.register_module()
class VAN(PatchEmbedBackbone):
    """Visual Attention Network, in the form of the authors' segmentation code.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys. A dict may also have
            ``mlp_ratios``, by default 8, 8, 4, 4.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scales. Defaults to 0.01.
        norm_cfg: Normalization layers of the blocks and patch embeddings. Each stage ends with a
            :class:`LayerNorm2d`, whose output is the feature and the input of the next stage. Defaults to
            ``dict(type='BN')``.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of stages to freeze, with the patch embedding before and the norm after each. Defaults
            to 0.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        with_cp: See :class:`Stage`. Defaults to False.
        init_cfg: Initialization. ``Pretrained`` loads the authors' checkpoints and those of other libraries. By
            default, weights of convolutions are normal with variance ``2 / fan_out``, and biases zero.
    """

    gating: type[nn.Module] = LargeKernelAttention
    arch_options = dict(mlp_ratios=(8, 8, 4, 4))
    arch_settings = {
        name: dict(depths=depths, channels=channels)
        for name, depths, channels in (
            ('b0', [3, 3, 5, 2], [32, 64, 160, 256]),
            ('b1', [2, 2, 4, 2], [64, 128, 320, 512]),
            ('b2', [3, 3, 12, 3], [64, 128, 320, 512]),
            ('b3', [3, 5, 27, 3], [64, 128, 320, 512]),
            ('b4', [3, 6, 40, 3], [64, 128, 320, 512]),
            ('b5', [3, 3, 24, 3], [96, 192, 480, 768]),
            ('b6', [6, 6, 90, 6], [96, 192, 384, 768]),
        )
    }

    def __init__(
        self,
        arch: str | dict,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-2,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (as in RepLKNet)
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings, family = self.resolve_arch(arch), type(self).__name__
        depths, channels, ratios = (settings[key] for key in ('depths', 'channels', 'mlp_ratios'))
        super().__init__(
            depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg or FAN_OUT_INIT
        )
        if len(ratios) != len(depths):
            raise ValueError(f'{family}: mlp_ratios={ratios} must have one number for each of {len(depths)} stages')
        if layer_scale_init_value <= 0:
            raise ValueError(f'{family}: layer_scale_init_value={layer_scale_init_value} must be positive')

        rates = self.drop_path_rates(drop_path_rate)
        for i, (width, depth, ratio) in enumerate(zip(channels, depths, ratios, strict=True), 1):
            if i == 1:
                self.patch_embed1 = self._build_stem(in_channels, width, norm_cfg)
            else:
                self.add_module(f'patch_embed{i}', PatchEmbed(channels[i - 2], width, 3, 2, norm_cfg))
            blocks = (
                VANBlock(width, ratio, self.gating, next(rates), norm_cfg, layer_scale_init_value) for _ in range(depth)
            )
            self.add_module(f'block{i}', Stage(*blocks, with_cp=with_cp))
            self.add_module(f'norm{i}', LayerNorm2d(width, eps=1e-5))
        self._freeze()

    @staticmethod
    def _build_stem(in_channels: int, channels: int, norm_cfg: dict) -> nn.Module:
        return PatchEmbed(in_channels, channels, 7, 4, norm_cfg)


_WEIGHTS = 'https://huggingface.co/Visual-Attention-Network/VAN-{}-original/resolve/main/van_{}.pth.tar'
_FILES = dict(
    b0=('Tiny', 'tiny_754'), b1=('Small', 'small_811'), b2=('Base', 'base_828'), b3=('Large', 'large_839')
)  # fmt: skip

register_variants(
    VAN,
    {
        f'van-{arch}': dict(
            config=dict(arch=arch),
            paper_name=f'VAN-{arch.upper()}',
            weights=(Weights('in1k', 'ImageNet-1K', _WEIGHTS.format(*_FILES[arch])),) if arch in _FILES else (),
        )
        for arch in VAN.arch_settings
    },
    source='arXiv:2202.09741, Visual-Attention-Network/VAN-Segmentation',
    licence='Apache-2.0',
)
