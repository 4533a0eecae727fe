"""InceptionNeXt: ConvNeXt with small and strip-shaped depthwise convolutions on a part of the channels.

"InceptionNeXt: When Inception Meets ConvNeXt", Yu, Zhou, Yan, Wang, CVPR 2024, arXiv:2303.16900. Reimplemented from the
paper. Parameter names are those of the authors' code (Apache-2.0) and of timm, so that their checkpoints load.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import Backbone, Stage, add_residual, build_norm
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class InceptionDWConv2d(nn.Module):
    """Identity, 3x3, horizontal and vertical depthwise convolution, each on its own channels. Section 3.2.

    Args:
        channels: Channels of input and output.
        branch_channels: Channels of each of the three convolutions; the first channels remain unchanged.
        band_kernel: Long side of the strips in pixels, odd.
    """

    def __init__(self, channels: int, branch_channels: int, band_kernel: int) -> None:
        super().__init__()
        self.dwconv_hw = DepthwiseConv2d(branch_channels, 3)
        self.dwconv_w = DepthwiseConv2d(branch_channels, (1, band_kernel))
        self.dwconv_h = DepthwiseConv2d(branch_channels, (band_kernel, 1))
        self.sizes = (channels - 3 * branch_channels, *[branch_channels] * 3)

    def forward(self, x: Tensor) -> Tensor:
        same, square, horizontal, vertical = x.split(self.sizes, 1)
        return torch.cat((same, self.dwconv_hw(square), self.dwconv_w(horizontal), self.dwconv_h(vertical)), 1)


class InceptionNeXtBlock(nn.Module):
    """Inception depthwise convolution, norm, two pointwise convolutions, layer scale, identity shortcut.

    Args:
        channels: Channels of input and output.
        branch_channels, band_kernel: See :class:`InceptionDWConv2d`.
        mlp_ratio: Hidden channels relative to ``channels``.
        norm_cfg: Normalization layer.
        drop_path: Drop path rate.
        layer_scale_init_value: Initial value of the layer scale.
    """

    def __init__(
        self,
        channels: int,
        branch_channels: int,
        band_kernel: int,
        mlp_ratio: int,
        norm_cfg: dict,
        drop_path: float,
        layer_scale_init_value: float,
    ) -> None:
        super().__init__()
        width = mlp_ratio * channels
        self.token_mixer = InceptionDWConv2d(channels, branch_channels, band_kernel)
        self.norm = build_norm(norm_cfg, channels)
        layers = OrderedDict(fc1=nn.Conv2d(channels, width, 1), act=nn.GELU(), fc2=nn.Conv2d(width, channels, 1))
        self.mlp = nn.Sequential(layers)
        self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        fc1, act, fc2 = self.mlp
        hidden = fused_conv2d(fc1, self.norm(self.token_mixer(x)), act)
        return add_residual(x, fc2(hidden), self.drop_path, self.gamma)


class InceptionNeXtStage(nn.Module):
    """Downsampling, then blocks."""

    def __init__(self, downsample: nn.Module, blocks: Stage) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


@MODELS.register_module()
class InceptionNeXt(Backbone):
    """InceptionNeXt backbone. It returns the outputs of the stages, without further norms.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys. ``branch_ratio`` is the share of
            the channels of each of the three convolutions. Defaults to ``'tiny'``.
        in_channels: Channels of the image. Defaults to 3.
        norm_cfg: Normalization layers. Defaults to ``dict(type='BN')``.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scale. Defaults to 1e-6.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of stages to freeze, the first with the stem. Defaults to 0.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. ``Pretrained`` loads the authors', timm's and our checkpoints. Defaults to a truncated
            normal with standard deviation 0.02 and zero biases.
    """

    arch_settings = {
        'atto': dict(depths=[2, 2, 6, 2], channels=[40, 80, 160, 320], band_kernel=9, branch_ratio=0.25),
        'tiny': dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768], band_kernel=11, branch_ratio=0.125),
        'small': dict(depths=[3, 3, 27, 3], channels=[96, 192, 384, 768], band_kernel=11, branch_ratio=0.125),
        'base': dict(depths=[3, 3, 27, 3], channels=[128, 256, 512, 1024], band_kernel=11, branch_ratio=0.125),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
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
        kernel, share = settings['band_kernel'], settings['branch_ratio']
        init_cfg = init_cfg or dict(type='TruncNormal', layer='Conv2d', std=0.02, bias=0.0)
        super().__init__(depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f'InceptionNeXt: band_kernel={kernel} must be odd')
        if not 1 <= min(channels) * share <= max(channels) * share <= max(channels) / 3:
            raise ValueError(f'InceptionNeXt: branch_ratio={share} must be at most 1/3 and leave each branch a channel')
        if layer_scale_init_value <= 0:
            raise ValueError(f'InceptionNeXt: layer_scale_init_value={layer_scale_init_value} must be positive')

        self.stem = nn.Sequential(nn.Conv2d(in_channels, channels[0], 4, 4), build_norm(norm_cfg, channels[0]))
        rates = self.drop_path_rates(drop_path_rate)
        self.stages: Any = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            before = channels[i - 1]
            halve = nn.Sequential(build_norm(norm_cfg, before), nn.Conv2d(before, width, 2, 2)) if i else nn.Identity()
            ratio = 3 if i == len(depths) - 1 else 4
            options = int(share * width), kernel, ratio, norm_cfg
            blocks = (InceptionNeXtBlock(width, *options, next(rates), layer_scale_init_value) for _ in range(depth))
            self.stages.append(InceptionNeXtStage(halve, Stage(*blocks, with_cp=with_cp)))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round down."""
        x, features = self.stem(self._to_compute_format(x)), []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                features.append(x)
        return self._to_output_format(features)

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        match parts:
            case ['stem', *_]:
                return 0, None
            case ['stages', stage, 'downsample', *_]:
                return int(stage), None
            case ['stages', stage, 'blocks', block, *_]:
                return int(stage), int(block)
        raise ValueError(f'InceptionNeXt has no parameter {".".join(parts)!r}')

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.stem, *self.stages[: self.frozen_stages]] if self.frozen_stages else []


_DOWNLOADS = 'https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext'

register_variants(
    InceptionNeXt,
    {
        f'inceptionnext-{arch}': dict(
            config=dict(arch=arch),
            paper_name=f'InceptionNeXt-{arch[0].upper()}',
            weights=tuple(
                Weights(f'in1k{tag}', 'ImageNet-1K', f'{_DOWNLOADS}_{arch}{tag.replace("-", "_")}.pth')
                for tag in (['', '-384'] if arch == 'base' else [''])
            ),
        )
        for arch in InceptionNeXt.arch_settings
    },
    dict(layer_scale_init_value=1.0),  # for short trainings from scratch; a checkpoint replaces the value
    source='arXiv:2303.16900, sail-sg/inceptionnext',
    licence='Apache-2.0',
)
