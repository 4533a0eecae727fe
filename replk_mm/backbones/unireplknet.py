"""UniRepLKNet: large kernels with parallel dilated ones, which are merged after training.

"UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image
Recognition", Ding, Zhang, Ge, Zhao, Song, Yue, Shan, CVPR 2024, arXiv:2311.15599. Reimplemented from the paper.
Parameter names and shapes are those of the authors' code (Apache-2.0), so that their checkpoints load.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.convnext import GlobalResponseNorm
from replk_mm.backbones.layers import Backbone, LayerNorm2d, Stage, add_residual, build_norm
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS

#: Sides and dilations of the branches beside a kernel of the given side.
DILATED_BRANCHES = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


class Permute(nn.Module):
    """Permute the dimensions of a tensor."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class DilatedReparamBlock(nn.Module):
    """Sum of a large depthwise convolution and of dilated smaller ones, each with a norm. Section 3.1.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the large kernel in pixels.
        deploy: Build the deployed form, a single convolution with bias.
        norm_cfg: Normalization layer of every branch.
        branches: Sides and dilations of the other kernels. Defaults to those of :data:`DILATED_BRANCHES`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        deploy: bool,
        norm_cfg: dict,
        branches: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.lk_origin: Any = DepthwiseConv2d(channels, kernel_size, bias=deploy)
        if deploy:
            return
        self.origin_bn = build_norm(norm_cfg, channels)
        for side, dilation in DILATED_BRANCHES[kernel_size] if branches is None else branches:
            conv = DepthwiseConv2d(channels, side, dilation=dilation, bias=False)
            self.add_module(f'dil_conv_k{side}_{dilation}', conv)
            self.add_module(f'dil_bn_k{side}_{dilation}', build_norm(norm_cfg, channels))

    @property
    def merged(self) -> bool:
        """Whether the branches are merged into one convolution."""
        return len(self._modules) == 1

    def branches(self) -> list[tuple[Any, Any]]:
        """Return convolution and norm of each branch, the largest kernel first."""
        layers = list(self.children())
        return list(zip(layers[::2], layers[1::2], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return fused_conv2d(self.lk_origin, x)  # with a prepacked weight, if there is one
        (conv, norm), *others = self.branches()
        out = norm(conv(x))
        for conv, norm in others:
            out = out + norm(conv(x))
        return out


class SEBlock(nn.Module):
    """Squeeze-and-excitation: scale each channel by a function of the means of all. arXiv:1709.01507.

    Args:
        channels: Channels of input and output.
        hidden: Channels between the two layers.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, hidden, 1)
        self.up = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class UniRepLKNetBlock(nn.Module):
    """Depthwise convolution, norm, squeeze-and-excitation, two pointwise layers, norm, identity shortcut. Section 3.1.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the depthwise kernel in pixels: 3, 5 or a key of :data:`DILATED_BRANCHES`.
        drop_path: Drop path rate.
        deploy: Build the deployed form, without norms, layer scale, and shift of the response norm.
        norm_cfg: Normalization layers.
        layer_scale_init_value: Initial value of the layer scale; 0 for no layer scale.
        dilated_branches: Add the dilated kernels beside a large one.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        drop_path: float,
        deploy: bool,
        norm_cfg: dict,
        layer_scale_init_value: float,
        dilated_branches: bool = True,
    ) -> None:
        super().__init__()
        width = 4 * channels
        self.dwconv: Any = (
            DilatedReparamBlock(channels, kernel_size, deploy, norm_cfg, None if dilated_branches else ())
            if kernel_size in DILATED_BRANCHES
            else DepthwiseConv2d(channels, kernel_size, bias=deploy)
        )
        self.norm = nn.Identity() if deploy else build_norm(norm_cfg, channels)
        self.se = SEBlock(channels, channels // 4)
        self.pwconv1 = nn.Sequential(Permute(0, 2, 3, 1), nn.Linear(channels, width))
        grn = GlobalResponseNorm(width, -1, shape=(1, 1, 1, width))
        self.act = nn.Sequential(nn.GELU(), grn)
        self.pwconv2 = nn.Sequential(nn.Linear(width, channels, bias=deploy), Permute(0, 3, 1, 2))
        self.gamma: nn.Parameter | None = None
        if deploy:
            grn.beta = None
        else:
            self.pwconv2.append(build_norm(norm_cfg, channels))
            if layer_scale_init_value > 0:
                self.gamma = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.se(self.norm(self.dwconv(x)))
        out = self.pwconv2(self.act(self.pwconv1(out)))
        return add_residual(x, out, self.drop_path, self.gamma)


@MODELS.register_module()
class UniRepLKNet(Backbone):
    """UniRepLKNet backbone.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys. ``kernel_sizes`` has one side
            for each stage, or a list of sides that the blocks of the stage repeat. Defaults to ``'tiny'``.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scale; 0 for no layer scale. Defaults to 1e-6.
        dilated_branches: Train with dilated kernels beside each large one. Defaults to True.
        deploy: Build the deployed form: dilated kernels merged into the large ones, all norms of the blocks, layer
            scale and the shift of the response norm folded. Defaults to False.
        norm_cfg: Normalization layers of the blocks; stem, downsampling layers and outputs have
            :class:`LayerNorm2d`. Defaults to ``dict(type='BN')``.
        out_indices: Stages whose features are returned, each after its own norm. Defaults to all four.
        frozen_stages: Number of stages to freeze, with the stem or downsampling layer before each. Defaults to 0.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        with_cp: See :class:`Stage`. Defaults to False.
        init_cfg: Initialization. ``Pretrained`` loads the authors' and our checkpoints, into ``deploy=True`` the
            merged ones. Defaults to a truncated normal with standard deviation 0.02 and zero biases.
    """

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        dilated_branches: bool = True,
        deploy: bool = False,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (as in RepLKNet)
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, channels = settings['depths'], settings['channels']
        init_cfg = init_cfg or dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)
        super().__init__(depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        kernels = [[k] if isinstance(k, int) else list(k) for k in settings['kernel_sizes']]
        sides = (3, 5, *DILATED_BRANCHES)
        if len(kernels) != len(depths) or not all(stage and set(stage) <= set(sides) for stage in kernels):
            raise ValueError(
                f'UniRepLKNet: kernel_sizes={settings["kernel_sizes"]} must have one entry for each of {len(depths)} '
                f'stages: one of {", ".join(map(str, sides))}, or a list of them'
            )
        if layer_scale_init_value < 0:
            raise ValueError(f'UniRepLKNet: layer_scale_init_value={layer_scale_init_value} must not be negative')

        def halve(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, 2, 1), LayerNorm2d(after)]

        width = channels[0]
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(*halve(in_channels, width // 2), nn.GELU(), *halve(width // 2, width))]
        )
        self.downsample_layers.extend(
            nn.Sequential(*halve(*pair)) for pair in zip(channels, channels[1:], strict=False)
        )
        rates = self.drop_path_rates(drop_path_rate)
        block = partial(
            UniRepLKNetBlock,
            deploy=deploy,
            norm_cfg=norm_cfg,
            layer_scale_init_value=layer_scale_init_value,
            dilated_branches=dilated_branches,
        )
        self.stages: Any = nn.ModuleList(
            Stage(*(block(width, side, next(rates)) for side in islice(cycle(stage), depth)), with_cp=with_cp)
            for width, stage, depth in zip(channels, kernels, depths, strict=True)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(channels[i]))
        self._freeze()


_SMALL = dict(depths=[2, 2, 6, 2], kernel_sizes=[3, 13, 13, 13])
_LARGE = dict(depths=[3, 3, 27, 3], kernel_sizes=[3, 13, [13, 3, 3], 13])

UniRepLKNet.arch_settings = {
    'atto': dict(_SMALL, channels=[40, 80, 160, 320]),
    'femto': dict(_SMALL, channels=[48, 96, 192, 384]),
    'pico': dict(_SMALL, channels=[64, 128, 256, 512]),
    'nano': dict(_SMALL, depths=[2, 2, 8, 2], channels=[80, 160, 320, 640]),
    'tiny': dict(depths=[3, 3, 18, 3], kernel_sizes=[3, 13, [13, 3], 13], channels=[80, 160, 320, 640]),
    'small': dict(_LARGE, channels=[96, 192, 384, 768]),
    'base': dict(_LARGE, channels=[128, 256, 512, 1024]),
    'large': dict(_LARGE, channels=[192, 384, 768, 1536]),
    'xlarge': dict(_LARGE, channels=[256, 512, 1024, 2048]),
}


def _weights(arch: str) -> Iterator[Weights]:
    """ImageNet-1K for the variants up to S; ImageNet-22K and a fine-tuning at 384x384 from S on."""
    top1 = dict(a='77.03', f='78.58', p='80.23', n='81.64', t='83.21', s='83.91').get(arch)
    tuned = dict(s='86.44', b='87.40', l='87.88', xl='87.96').get(arch)
    start = f'https://huggingface.co/DingXiaoH/UniRepLKNet/resolve/main/unireplknet_{arch}'
    if top1:
        yield Weights('in1k', 'ImageNet-1K', f'{start}_in1k_224_acc{top1}.pth')
    if tuned:
        yield Weights('in22k-in1k-384', 'ImageNet-22K then 1K', f'{start}_in22k_to_in1k_384_acc{tuned}.pth')
        yield Weights('in22k', 'ImageNet-22K', f'{start}_in22k_pretrain.pth')


register_variants(
    UniRepLKNet,
    {
        f'unireplknet-{short}': dict(
            config=dict(arch=arch), paper_name=f'UniRepLKNet-{short.upper()}', weights=tuple(_weights(short))
        )
        for short, arch in zip(['a', 'f', 'p', 'n', 't', 's', 'b', 'l', 'xl'], UniRepLKNet.arch_settings, strict=True)
    },
    dict(layer_scale_init_value=1.0),  # for short trainings from scratch; a checkpoint replaces the value
    source='arXiv:2311.15599, AILab-CVC/UniRepLKNet',
    licence='Apache-2.0',
)
