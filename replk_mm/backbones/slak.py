"""SLaK: ConvNeXt with depthwise kernels of up to 51x51, each the sum of two strips and a small square.

"More ConvNets in the 2020s: Scaling up Kernels Beyond 51x51 using Sparsity", Liu, Chen, Chen, Chen, Xiao, Wu,
Karkkainen, Pechenizkiy, Mocanu, Wang, ICLR 2023, arXiv:2207.03620. Reimplemented from the paper. Parameter names are
those of the authors' code (MIT licence), so that their checkpoints load.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import Backbone, LayerNorm2d, Stage, add_residual
from replk_mm.backbones.replknet import ConvNorm, ReparamLargeKernelConv
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class DecomposedLargeKernelConv(nn.Module):
    """Sum of a vertical strip, a horizontal strip and a small square depthwise convolution, each with a norm.

    Section 3, "Decomposing a large kernel into two rectangular, parallel kernels". The deployed form, ``lkb_reparam``,
    is two strips; the square is added to the vertical one. Its single dense kernel would take five times as long.

    Args:
        channels: Channels of input and output.
        kernel_size: Long side of the strips in pixels, odd.
        small_kernel: Short side of the strips, and side of the square, in pixels; odd and smaller.
        merged: Build the deployed form.
        norm_cfg: Normalization layer of each branch.
        square: Add the square.
    """

    def __init__(
        self, channels: int, kernel_size: int, small_kernel: int, merged: bool, norm_cfg: dict, square: bool = True
    ) -> None:
        super().__init__()
        vertical, horizontal = (kernel_size, small_kernel), (small_kernel, kernel_size)
        if merged:
            strips = dict(LoRA1=DepthwiseConv2d(channels, vertical), LoRA2=DepthwiseConv2d(channels, horizontal))
            self.lkb_reparam: Any = nn.ModuleDict(strips)
            return
        depthwise = partial(ConvNorm, channels, channels, depthwise=True, norm_cfg=norm_cfg)
        self.LoRA1, self.LoRA2 = depthwise(vertical), depthwise(horizontal)
        self.small_conv = depthwise(small_kernel) if square else None

    @property
    def merged(self) -> bool:
        """Whether the branches are merged into two convolutions."""
        return hasattr(self, 'lkb_reparam')

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)`` to the same shape."""
        if self.merged:
            first, second = self.lkb_reparam.values()
            return fused_conv2d(second, x, shortcut=fused_conv2d(first, x))
        out = self.LoRA2(x, shortcut=self.LoRA1(x))
        return out if self.small_conv is None else self.small_conv(x, shortcut=out)


class SLaKBlock(nn.Module):
    """Large depthwise convolution, norm, linear layer, GELU, linear layer, layer scale, identity shortcut.

    Args:
        channels: Channels of input and output.
        large_kernel: The depthwise convolution.
        drop_path: Drop path rate.
        layer_scale_init_value: Initial value of the layer scale.
    """

    def __init__(self, channels: int, large_kernel: nn.Module, drop_path: float, layer_scale_init_value: float) -> None:
        super().__init__()
        self.large_kernel = large_kernel
        self.norm = LayerNorm2d(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.large_kernel(x)).permute(0, 2, 3, 1)
        out = self.pwconv2(self.act(self.pwconv1(out))).permute(0, 3, 1, 2)
        return add_residual(x, out, self.drop_path, self.gamma)


@MODELS.register_module()
class SLaK(Backbone):
    """SLaK backbone.

    The released weights are sparse: 40 % of them are zero. :class:`replk_mm.engine.hooks.SparsityHook` keeps them so.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys. Defaults to ``'tiny'``.
        kernel_size: Side of the large kernels in pixels, odd; one number, or one for each stage. Defaults to
            ``(51, 49, 47, 13)``.
        small_kernel: Short side of the strips, and side of the parallel square kernel, odd. Defaults to 5.
        decomposed: Decompose each large kernel into two strips. Otherwise it is dense, as in RepLKNet. Defaults to
            True.
        square: Add the parallel square kernel. Defaults to True.
        small_kernel_merged: Build the deployed form, with the small kernels merged into the large ones. Defaults to
            False.
        in_channels: Channels of the image. Defaults to 3.
        norm_cfg: Normalization after each depthwise convolution; all other norms are layer norms. Defaults to
            ``dict(type='BN')``.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scale. The authors use 1e-6 for ImageNet and 1 for dense
            prediction. Defaults to 1e-6.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of stages to freeze, with the stem or downsampling layer before each. Defaults to 0.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. ``Pretrained`` loads the authors' and our checkpoints. Defaults to a truncated normal
            with standard deviation 0.02 and zero biases.
    """

    arch_settings = {
        name: dict(depths=[3, 3, blocks, 3], channels=[int(1.3 * width * 2**i) for i in range(4)])
        for name, blocks, width in (('tiny', 9, 96), ('small', 27, 96), ('base', 27, 128), ('large', 27, 192))
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_size: int | Sequence[int] = (51, 49, 47, 13),
        small_kernel: int = 5,
        decomposed: bool = True,
        square: bool = True,
        small_kernel_merged: bool = False,
        in_channels: int = 3,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (as in RepLKNet)
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        norm_eval: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, channels = settings['depths'], settings['channels']
        init_cfg = init_cfg or dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)
        super().__init__(depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        kernels = [kernel_size] * len(depths) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernels) != len(depths) or any(k % 2 == 0 for k in kernels):
            raise ValueError(f'SLaK: kernel_size={kernel_size} must be one odd number, or one for each stage')
        if layer_scale_init_value <= 0:
            raise ValueError(f'SLaK: layer_scale_init_value={layer_scale_init_value} must be positive')
        if not 0 < small_kernel < min(kernels) or small_kernel % 2 == 0:
            raise ValueError(f'SLaK: small_kernel={small_kernel} must be odd and less than kernel_size={kernel_size}')

        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(in_channels, channels[0], 4, 4), LayerNorm2d(channels[0]))]
        )
        for width, following in zip(channels, channels[1:], strict=False):
            self.downsample_layers.append(nn.Sequential(LayerNorm2d(width), nn.Conv2d(width, following, 2, 2)))
        large_kernel = (
            partial(DecomposedLargeKernelConv, small_kernel=small_kernel, square=square)
            if decomposed
            else partial(ReparamLargeKernelConv, small_kernel=small_kernel if square else None, dilation=1)
        )
        rates = self.drop_path_rates(drop_path_rate)
        self.stages: Any = nn.ModuleList()
        for depth, width, kernel in zip(depths, channels, kernels, strict=True):
            build = partial(large_kernel, width, kernel, merged=small_kernel_merged, norm_cfg=norm_cfg)
            blocks = (SLaKBlock(width, build(), next(rates), layer_scale_init_value) for _ in range(depth))
            self.stages.append(Stage(*blocks, with_cp=with_cp))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(channels[i]))
        self._freeze()


register_variants(
    SLaK,
    {
        f'slak-{arch}': dict(
            config=dict(arch=arch),
            paper_name=f'SLaK-{arch[0].upper()}',
            weights=(Weights('in1k', 'ImageNet-1K (300 epochs)', f'https://drive.google.com/file/d/{file}'),),
        )
        for arch, file in dict(
            tiny='1Iut2f5FMS_77jGPYoUJDQzDIXOsax1u4',
            small='1etM6KQbnlsgDAZ37adsQJ3UI8Bbv2AVe',
            base='1duUxUD3RSblQ6eDHd0n-u0aulwGypf1j',
        ).items()
    },
    dict(layer_scale_init_value=1.0),  # as the authors' recipes of dense prediction; a checkpoint replaces the value
    source='arXiv:2207.03620, VITA-Group/SLaK',
    licence='MIT',
)
