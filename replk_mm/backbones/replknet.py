"""RepLKNet: depthwise convolutions of up to 31x31, each with a parallel small kernel that is merged after training.

"Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", Ding, Zhang, Zhou, Han, Ding, Sun, CVPR
2022, arXiv:2203.06717. Reimplemented from the paper. Parameter names are those of the authors' code (MIT licence) and
of mmpretrain, so that their checkpoints load.
"""

from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import Backbone, Stage, add_residual, build_activation, build_norm
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class ConvNorm(nn.Sequential):
    """Convolution without bias, normalization and an optional activation. Padding keeps the size of the map.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel in pixels; of a depthwise one also height and width.
        stride: Stride in pixels.
        depthwise: Use a depthwise convolution; requires ``in_channels == out_channels``.
        dilation: Dilation of the depthwise kernel in pixels.
        norm_cfg: Normalization layer.
        act_cfg: Activation layer, None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any = 1,
        stride: int = 1,
        depthwise: bool = False,
        dilation: int = 1,
        *,
        norm_cfg: dict,
        act_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        if depthwise:
            self.conv: nn.Conv2d = DepthwiseConv2d(out_channels, kernel_size, stride, dilation=dilation, bias=False)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = build_norm(norm_cfg, out_channels)
        if act_cfg is not None:
            self.nonlinear = build_activation(act_cfg)

    def forward(self, x: Tensor, activation: nn.Module | None = None, shortcut: Tensor | None = None) -> Tensor:
        """Apply the layers, then ``activation`` or the addition of ``shortcut``."""
        activation = activation or self._modules.get('nonlinear')
        if isinstance(self.bn, nn.Identity):  # folded
            return fused_conv2d(self.conv, x, activation, shortcut)
        x = self.bn(self.conv(x))
        x = x if activation is None else activation(x)
        return x if shortcut is None else shortcut + x


class ReparamLargeKernelConv(nn.Module):
    """Sum of a large and a small depthwise convolution, each with a norm. Section 3, guideline 3.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the large kernel in pixels, odd.
        small_kernel: Side of the parallel small kernel, odd; None for no parallel branch.
        dilation: Dilation of the large kernel in pixels; more than 1 requires ``small_kernel=None``.
        merged: Build the deployed form, a single convolution with bias.
        norm_cfg: Normalization layer of both branches.
        stride: Stride in pixels. Defaults to 1.
        atrous_rate: Factor on the dilation of both kernels. Defaults to 1.

    Raises:
        ValueError: If a kernel is even, the small one is the larger, or ``dilation`` does not fit.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        dilation: int,
        merged: bool,
        norm_cfg: dict,
        stride: int = 1,
        atrous_rate: int = 1,
    ) -> None:
        super().__init__()
        if small_kernel is not None and small_kernel > kernel_size:
            raise ValueError(f'RepLKNet: small_kernel={small_kernel} is larger than the large kernel of {kernel_size}')
        if kernel_size % 2 == 0 or (small_kernel is not None and small_kernel % 2 == 0):
            raise ValueError(f'RepLKNet: kernel sizes must be odd; found {kernel_size} and {small_kernel}')
        if dilation < 1 or (dilation > 1 and small_kernel is not None):
            # The taps of a dilated kernel do not coincide with those of a small one, so they could not be merged.
            raise ValueError(
                f'RepLKNet: dilation={dilation} with small_kernel={small_kernel}; dilation must be at least 1, '
                f'and small_kernel must be None if it is larger'
            )
        if merged:
            self.lkb_reparam = DepthwiseConv2d(channels, kernel_size, stride, dilation=dilation * atrous_rate)
            return
        depthwise = partial(ConvNorm, channels, channels, stride=stride, depthwise=True, norm_cfg=norm_cfg)
        self.lkb_origin = depthwise(kernel_size, dilation=dilation * atrous_rate)
        if small_kernel is not None:
            self.small_conv = depthwise(small_kernel, dilation=atrous_rate)

    @property
    def merged(self) -> bool:
        """Whether the branches are merged into one convolution."""
        return hasattr(self, 'lkb_reparam')

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        """Apply the merged convolution or sum the branches, then apply ``activation``."""
        if self.merged:
            return fused_conv2d(self.lkb_reparam, x, activation)
        if not hasattr(self, 'small_conv'):
            return self.lkb_origin(x, activation)
        out = self.lkb_origin(x) + self.small_conv(x)
        return out if activation is None else activation(out)


def add_shortcut(layer: nn.Module, x: Tensor, shortcut: Tensor, drop_path: DropPath) -> Tensor:
    """Compute ``shortcut + drop_path(layer(x))``."""
    if not drop_path.training or drop_path.drop_prob == 0:
        return layer(x, shortcut=shortcut)
    return add_residual(shortcut, layer(x), drop_path)


class RepLKBlock(nn.Module):
    """Norm, 1x1 convolution, large depthwise convolution, 1x1 convolution, identity shortcut. Section 4.1.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the large kernel in pixels.
        small_kernel: Side of the parallel small kernel, None for no parallel branch.
        dilation: Dilation of the large kernel in pixels.
        dw_ratio: Channels of the large convolution relative to ``channels``.
        shortcut: Add the input to the output. False is for ablations (section 3, guideline 2).
        drop_path: Drop path rate.
        merged: See :class:`ReparamLargeKernelConv`.
        norm_cfg: Normalization layer.
        act_cfg: Activation after the first 1x1 and after the large convolution.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        small_kernel: int | None,
        dilation: int,
        dw_ratio: float,
        shortcut: bool,
        drop_path: float,
        merged: bool,
        norm_cfg: dict,
        act_cfg: dict,
    ) -> None:
        super().__init__()
        width = int(channels * dw_ratio)
        self.prelkb_bn = build_norm(norm_cfg, channels)
        self.pw1 = ConvNorm(channels, width, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.large_kernel = ReparamLargeKernelConv(width, kernel_size, small_kernel, dilation, merged, norm_cfg)
        self.lk_nonlinear = build_activation(act_cfg)
        self.pw2 = ConvNorm(width, channels, norm_cfg=norm_cfg)
        self.shortcut = shortcut
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw1(self.prelkb_bn(x))
        out = self.large_kernel(out, self.lk_nonlinear)
        return add_shortcut(self.pw2, out, x, self.drop_path) if self.shortcut else self.pw2(out)


class ConvFFN(nn.Module):
    """Norm, 1x1 convolution, GELU, 1x1 convolution, identity shortcut. Section 4.1.

    Args:
        channels: Channels of input and output.
        ffn_ratio: Hidden channels relative to ``channels``.
        drop_path: Drop path rate.
        norm_cfg: Normalization layer.
    """

    def __init__(self, channels: int, ffn_ratio: float, drop_path: float, norm_cfg: dict) -> None:
        super().__init__()
        width = int(channels * ffn_ratio)
        self.preffn_bn = build_norm(norm_cfg, channels)
        self.pw1 = ConvNorm(channels, width, norm_cfg=norm_cfg)
        self.nonlinear = nn.GELU()
        self.pw2 = ConvNorm(width, channels, norm_cfg=norm_cfg)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.pw1(self.preffn_bn(x), self.nonlinear)
        return add_shortcut(self.pw2, out, x, self.drop_path)


class RepLKNetStage(nn.Module):
    """Pairs of :class:`RepLKBlock` and :class:`ConvFFN`, and the norm of the returned features or the identity."""

    def __init__(self, blocks: Stage, norm: nn.Module) -> None:
        super().__init__()
        self.blocks, self.norm = blocks, norm

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the features; with a norm a pair, the features and the normalized ones."""
        x = self.blocks(x)
        # The norm runs here, because FSDP gathers a stage's parameters only while the stage runs.
        return x if isinstance(self.norm, nn.Identity) else (x, self.norm(x))


@MODELS.register_module()
class RepLKNet(Backbone):
    """RepLKNet backbone.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys and optionally those of
            :attr:`arch_options`. Defaults to ``'31B'``.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block. The rate grows linearly from 0 at the first block; a ConvFFN
            has the rate of the RepLKBlock before it. Defaults to 0.
        small_kernel_merged: Build the deployed form, with the small kernels merged into the large ones. Defaults to
            False.
        norm_cfg: Normalization layers. Defaults to ``dict(type='BN')``.
        act_cfg: Activation of stem, transitions and RepLKBlocks; ConvFFN always uses GELU, as in the paper. Defaults to
            ``dict(type='ReLU')``.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: -1 freezes nothing, 0 the stem, ``n`` the stem, the first ``n`` stages and the transitions
            between them. Defaults to -1.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_intermediate_features: Normalize the returned features, as the authors do for XL. Each of ``stages`` then
            returns a pair, its features and the normalized ones. Defaults to False.
        init_cfg: Initialization. ``Pretrained`` loads the authors', mmpretrain's and our checkpoints, merged or not,
            but not folded ones. Defaults to torch's initialization, as in the authors' code.
    """

    min_frozen_stages = -1
    #: Optional keys of ``arch`` for ablations: hidden channels of ConvFFN, shortcut and dilation of RepLKBlock.
    arch_options: dict = dict(ffn_ratio=4, shortcut=True, dilation=1)

    def __init__(
        self,
        arch: str | dict = '31B',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        small_kernel_merged: bool = False,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (configs never mutate it, as everywhere in OpenMMLab)
        act_cfg: dict = dict(type='ReLU'),  # noqa: B006
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_intermediate_features: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        kernels, layers, channels = (settings[k] for k in ('large_kernel_sizes', 'layers', 'channels'))
        if type(settings['shortcut']) is not bool or type(settings['dilation']) is not int:
            raise ValueError(
                f'RepLKNet: in arch, shortcut must be a bool and dilation an int; found '
                f'{settings["shortcut"]!r} and {settings["dilation"]!r}'
            )
        # A RepLKBlock and the ConvFFN after it correspond to one block of ConvNeXt.
        super().__init__(layers, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        if len(kernels) != len(layers):
            raise ValueError(
                f'RepLKNet: large_kernel_sizes={kernels} must have one entry for each of {len(layers)} stages'
            )
        if drop_path_rate > 0 and not settings['shortcut']:
            raise ValueError(f'RepLKNet: drop_path_rate={drop_path_rate} requires shortcut=True in arch')

        width = channels[0]
        layer = partial(ConvNorm, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.stem = nn.ModuleList(
            [
                layer(in_channels, width, 3, 2),
                layer(width, width, 3, depthwise=True),
                layer(width, width),
                layer(width, width, 3, 2, depthwise=True),
            ]
        )
        block = partial(
            RepLKBlock,
            **{key: settings[key] for key in ('small_kernel', 'dilation', 'dw_ratio', 'shortcut')},
            merged=small_kernel_merged,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
        )
        rates = self.drop_path_rates(drop_path_rate)
        self.stages: Any = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i, width in enumerate(channels):
            blocks: list[nn.Module] = []
            for rate in islice(rates, layers[i]):
                blocks += [
                    block(channels=width, kernel_size=kernels[i], drop_path=rate),
                    ConvFFN(width, settings['ffn_ratio'], rate, norm_cfg),
                ]
            normalized = norm_intermediate_features and i in self.out_indices
            norm = build_norm(norm_cfg, width) if normalized else nn.Identity()
            self.stages.append(RepLKNetStage(Stage(*blocks, with_cp=with_cp), norm))
            if i + 1 < len(channels):
                following = channels[i + 1]
                self.transitions.append(
                    nn.Sequential(layer(width, following), layer(following, following, 3, 2, depthwise=True))
                )
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round up."""
        x = self._to_compute_format(x)
        for layer in self.stem:
            x = layer(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            x, feature = x if isinstance(x, tuple) else (x, x)
            if i in self.out_indices:
                outs.append(feature)
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return self._to_output_format(outs)

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        match parts:
            case ['stem', *_]:
                return 0, None
            case ['transitions', stage, *_]:
                return int(stage) + 1, None
            case ['stages', stage, 'blocks', block, *_]:
                return int(stage), int(block) // 2
            case ['stages', _, 'norm', *_]:
                return None
        raise ValueError(f'RepLKNet has no parameter {".".join(parts)!r}')

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, *self.stages[: self.frozen_stages], *self.transitions[: max(self.frozen_stages - 1, 0)]]


_BASE = dict(layers=[2, 2, 18, 2], channels=[128, 256, 512, 1024], small_kernel=5, dw_ratio=1)
_LARGE = dict(_BASE, channels=[192, 384, 768, 1536])
_XL = dict(_BASE, channels=[256, 512, 1024, 2048], small_kernel=None, dw_ratio=1.5)

RepLKNet.arch_settings = {
    '31B': dict(_BASE, large_kernel_sizes=[31, 29, 27, 13]),
    '31L': dict(_LARGE, large_kernel_sizes=[31, 29, 27, 13]),
    'XL': dict(_XL, large_kernel_sizes=[27, 27, 27, 13]),
    # Table 5 of the paper varies the kernel size; 31B is its last row.
    '3': dict(_BASE, large_kernel_sizes=[3, 3, 3, 3], small_kernel=None),
    '7': dict(_BASE, large_kernel_sizes=[7, 7, 7, 7]),
    '13': dict(_BASE, large_kernel_sizes=[13, 13, 13, 13]),
    '25': dict(_BASE, large_kernel_sizes=[25, 25, 25, 13]),
    # Not from the paper: a small variant of the same design for CPUs.
    'nano': dict(_BASE, large_kernel_sizes=[31, 29, 27, 13], layers=[2, 2, 4, 2], channels=[32, 64, 128, 256]),
}


def _weights(tag: str, pretraining: str, file: str) -> Weights:
    return Weights(tag, pretraining, f'https://download.openmmlab.com/mmclassification/v0/replknet/replknet-{file}.pth')


register_variants(
    RepLKNet,
    {
        'replknet-nano': dict(config=dict(arch='nano')),
        'replknet-31b': dict(
            config=dict(arch='31B'),
            paper_name='RepLKNet-31B',
            weights=(
                _weights('in1k', 'ImageNet-1K', '31B_3rdparty_in1k_20221118-fd08e268'),
                _weights('in1k-384', 'ImageNet-1K', '31B_3rdparty_in1k-384px_20221118-03a170ce'),
                _weights('in22k-in1k', 'ImageNet-22K then 1K', '31B_in21k-pre_3rdparty_in1k_20221118-54ed5c46'),
                _weights(
                    'in22k-in1k-384', 'ImageNet-22K then 1K', '31B_in21k-pre_3rdparty_in1k-384px_20221118-76c92b24'
                ),
            ),
        ),
        'replknet-31l': dict(
            config=dict(arch='31L'),
            paper_name='RepLKNet-31L',
            weights=(
                _weights(
                    'in22k-in1k-384', 'ImageNet-22K then 1K', '31L_in21k-pre_3rdparty_in1k-384px_20221118-dc3fc07c'
                ),
            ),
        ),
        'replknet-xl': dict(
            config=dict(arch='XL', norm_intermediate_features=True),
            paper_name='RepLKNet-XL',
            # fine-tuned on ImageNet-1K at 320x320 after MegData73M
            weights=(_weights('meg73m', 'MegData73M then 1K', 'XL_meg73m-pre_3rdparty_in1k-320px_20221118-88259b1d'),),
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
        ),
    },
    source='arXiv:2203.06717, DingXiaoH/RepLKNet-pytorch',
    licence='MIT',
)
