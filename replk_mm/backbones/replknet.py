"""RepLKNet: 31x31 depthwise convolutions, with a parallel small kernel that is merged after training.

"Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs", Ding, Zhang, Zhou, Han, Ding, Sun, CVPR
2022, arXiv:2203.06717. Written anew from the paper; the names of parameters are those of the authors' code (MIT
licence), so that their checkpoints load, and mmpretrain's, which are the same.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.layers import (
    Backbone,
    build_activation,
    build_norm,
    drop_path_rates,
    resolve_arch,
    run_checkpointed,
)
from replk_mm.ops import DepthwiseConv2d, fused_conv2d
from replk_mm.registry import MODELS


class ConvNorm(nn.Sequential):
    """Convolution without bias, normalization, and an activation if one is given. Padding keeps the map's size.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel in pixels.
        stride: Step in pixels.
        depthwise: Convolve each channel by itself; needs ``in_channels == out_channels``.
        dilation: Distance of a depthwise kernel's taps in pixels.
        norm_cfg: Normalization layer.
        act_cfg: Activation layer, None for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
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
        """The layers one after the other, then ``activation``, or the sum with ``shortcut``."""
        activation = activation or self._modules.get('nonlinear')
        if isinstance(self.bn, nn.Identity):
            return fused_conv2d(self.conv, x, activation, shortcut)
        x = self.bn(self.conv(x))
        x = x if activation is None else activation(x)
        return x if shortcut is None else shortcut + x


class ReparamLargeKernelConv(nn.Module):
    """Large depthwise convolution beside a small one, each with its normalization; their sum. Section 3, guideline 3.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the large kernel in pixels.
        small_kernel: Side of the parallel small kernel, None for no branch.
        dilation: Distance of the large kernel's taps in pixels; more than 1 needs ``small_kernel=None``.
        merged: Build the deployed form at once: a single convolution with bias.
        norm_cfg: Normalization layer of both branches.

    Raises:
        ValueError: If the small kernel is larger than the large one or beside a dilated one, or one side is even.
    """

    def __init__(
        self, channels: int, kernel_size: int, small_kernel: int | None, dilation: int, merged: bool, norm_cfg: dict
    ) -> None:
        super().__init__()
        if small_kernel is not None and small_kernel > kernel_size:
            raise ValueError(f'RepLKNet: small_kernel={small_kernel} is larger than the large kernel of {kernel_size}')
        if kernel_size % 2 == 0 or (small_kernel is not None and small_kernel % 2 == 0):
            raise ValueError(
                f'RepLKNet: kernel sizes must be odd to keep the map centred; found {kernel_size} and {small_kernel}'
            )
        if dilation < 1 or (dilation > 1 and small_kernel is not None):
            # Taps of the two kernels would not fall on each other, so that nothing could be merged.
            raise ValueError(
                f'RepLKNet: dilation={dilation} with small_kernel={small_kernel}; dilation must be 1 or '
                f'more, and above 1 small_kernel must be None'
            )
        if merged:
            self.lkb_reparam = DepthwiseConv2d(channels, kernel_size, dilation=dilation)
            return
        depthwise = partial(ConvNorm, channels, channels, depthwise=True, norm_cfg=norm_cfg)
        self.lkb_origin = depthwise(kernel_size, dilation=dilation)
        if small_kernel is not None:
            self.small_conv = depthwise(small_kernel)

    @property
    def merged(self) -> bool:
        """Whether the branches are one convolution."""
        return hasattr(self, 'lkb_reparam')

    def forward(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        """The convolution or the sum of its branches, then ``activation``."""
        if self.merged:
            return fused_conv2d(self.lkb_reparam, x, activation)
        if not hasattr(self, 'small_conv'):
            return self.lkb_origin(x, activation)
        out = self.lkb_origin(x) + self.small_conv(x)
        return out if activation is None else activation(out)


def _with_shortcut(layer: ConvNorm, x: Tensor, shortcut: Tensor, drop_path: DropPath) -> Tensor:
    if not drop_path.training or drop_path.drop_prob == 0:
        return layer(x, shortcut=shortcut)
    # As mmcv's DropPath draws and scales, with one pass over the map instead of three.
    kept = 1 - drop_path.drop_prob
    y = layer(x)
    scale = (kept + torch.rand(len(y), 1, 1, 1, dtype=y.dtype, device=y.device)).floor_().div_(kept)
    return torch.addcmul(shortcut, y, scale)


class RepLKBlock(nn.Module):
    """Pre-norm, 1x1 convolution, large depthwise convolution, 1x1 convolution, identity shortcut. Section 4.1.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the large kernel in pixels.
        small_kernel: Side of the parallel small kernel, None for no branch.
        dilation: See :class:`ReparamLargeKernelConv`.
        dw_ratio: Channels of the large convolution relative to ``channels``.
        shortcut: Add the input to the output; False only to study what the shortcut does (section 3, guideline 2).
        drop_path: Probability of dropping the branch for a sample.
        merged: See :class:`ReparamLargeKernelConv`.
        norm_cfg: Normalization layer.
        act_cfg: Activation after the first 1x1 and the large convolution.
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
        return _with_shortcut(self.pw2, out, x, self.drop_path) if self.shortcut else self.pw2(out)


class ConvFFN(nn.Module):
    """Pre-norm, two 1x1 convolutions with a GELU between them, identity shortcut. Section 4.1.

    Args:
        channels: Channels of input and output.
        ffn_ratio: Inner channels relative to ``channels``.
        drop_path: Probability of dropping the branch for a sample.
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
        return _with_shortcut(self.pw2, out, x, self.drop_path)


class RepLKNetStage(nn.Module):
    """Alternating :class:`RepLKBlock` and :class:`ConvFFN` on maps of one size.

    Args:
        channels: Channels of input and output.
        drop_path: One probability for each pair of blocks; its length is the number of pairs.
        kernel_size: Side of the large kernels in pixels.
        small_kernel: Side of the parallel small kernels, None for no branch.
        dw_ratio: See :class:`RepLKBlock`.
        ffn_ratio: See :class:`ConvFFN`.
        merged: See :class:`ReparamLargeKernelConv`.
        with_cp: Recompute each block in the backward pass instead of keeping its activations.
        norm_output: Add a normalization that :class:`RepLKNet` applies to the features it returns.
        norm_cfg: Normalization layer.
        act_cfg: Activation around the large kernels.
    """

    def __init__(
        self,
        channels: int,
        drop_path: Sequence[float],
        kernel_size: int,
        settings: dict,
        merged: bool,
        with_cp: bool,
        norm_output: bool,
        norm_cfg: dict,
        act_cfg: dict,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.blocks = nn.ModuleList()
        for p in drop_path:
            self.blocks.append(
                RepLKBlock(
                    channels,
                    kernel_size,
                    settings['small_kernel'],
                    settings['dilation'],
                    settings['dw_ratio'],
                    settings['shortcut'],
                    p,
                    merged,
                    norm_cfg,
                    act_cfg,
                )
            )
            self.blocks.append(ConvFFN(channels, settings['ffn_ratio'], p, norm_cfg))
        self.norm = build_norm(norm_cfg, channels) if norm_output else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = run_checkpointed(block, x, self.with_cp)
        return x


@MODELS.register_module()
class RepLKNet(Backbone):
    """RepLKNet backbone.

    Args:
        arch: A row of :attr:`arch_settings` by its name, or a dict with the keys of a row and, for studies of the
            design, any of :attr:`arch_options`. Defaults to ``'31B'``.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Stochastic depth of the last block; block ``i`` of ``n`` has ``i / (n - 1)`` of it, and an FFN
            that of the large-kernel block before it. Defaults to 0.
        small_kernel_merged: Build the deployed form, the parallel kernels merged into the large ones.
        norm_cfg: Normalization layer everywhere. Defaults to ``dict(type='BN')``.
        act_cfg: Activation of the stem, the transitions and around the large kernels; the feed-forward blocks have the
            GELU of the paper. Defaults to ``dict(type='ReLU')``.
        out_indices: Stages whose features are returned, strides ``[1/4, 1/8, 1/16, 1/32]``. Defaults to all four.
        frozen_stages: -1 freezes nothing, 0 the stem, ``n`` the stem, the first ``n`` stages and the transitions
            between them. Defaults to -1.
        norm_eval: Keep BatchNorm layers in evaluation mode while training. Defaults to False.
        with_cp: Recompute each block in the backward pass: less memory, about a third more time. Defaults to False.
        norm_intermediate_features: Normalize the returned features, as the authors do for XL. Defaults to False.
        out_memory_format: Layout of the returned features: ``'contiguous_format'`` (default), which every operator
            reads, or ``'preserve_format'``, which copies nothing: on CPUs channels-last memory, faster for heads of
            convolutions, misread by mmcv's compiled operators (RoIAlign, deformable convolutions).
        init_cfg: Initialization; ``Pretrained`` takes the authors', mmpretrain's and our checkpoints, merged or not,
            but not folded ones. Defaults to torch's own initialization, as in the authors' code.

    Raises:
        ValueError: If a value is out of its range, or ``arch`` is unknown or incomplete.
    """

    arch_settings: dict[str, dict] = {
        # name:  kernels of the stages, small kernel, pairs of blocks, channels,     dw_ratio
        '31B': dict(
            large_kernel_sizes=[31, 29, 27, 13],
            small_kernel=5,
            layers=[2, 2, 18, 2],
            channels=[128, 256, 512, 1024],
            dw_ratio=1,
        ),
        '31L': dict(
            large_kernel_sizes=[31, 29, 27, 13],
            small_kernel=5,
            layers=[2, 2, 18, 2],
            channels=[192, 384, 768, 1536],
            dw_ratio=1,
        ),
        'XL': dict(
            large_kernel_sizes=[27, 27, 27, 13],
            small_kernel=None,
            layers=[2, 2, 18, 2],
            channels=[256, 512, 1024, 2048],
            dw_ratio=1.5,
        ),
        # The kernel size study, table 5 of the paper; 31B is its last row.
        '3': dict(
            large_kernel_sizes=[3, 3, 3, 3],
            small_kernel=None,
            layers=[2, 2, 18, 2],
            channels=[128, 256, 512, 1024],
            dw_ratio=1,
        ),
        '7': dict(
            large_kernel_sizes=[7, 7, 7, 7],
            small_kernel=5,
            layers=[2, 2, 18, 2],
            channels=[128, 256, 512, 1024],
            dw_ratio=1,
        ),
        '13': dict(
            large_kernel_sizes=[13, 13, 13, 13],
            small_kernel=5,
            layers=[2, 2, 18, 2],
            channels=[128, 256, 512, 1024],
            dw_ratio=1,
        ),
        '25': dict(
            large_kernel_sizes=[25, 25, 25, 13],
            small_kernel=5,
            layers=[2, 2, 18, 2],
            channels=[128, 256, 512, 1024],
            dw_ratio=1,
        ),
        # Ours, for work on a CPU: the same design, small. Not from the paper.
        'nano': dict(
            large_kernel_sizes=[31, 29, 27, 13],
            small_kernel=5,
            layers=[2, 2, 4, 2],
            channels=[32, 64, 128, 256],
            dw_ratio=1,
        ),
    }
    #: What a row may also say: inner channels of the feed-forward blocks, whether the large-kernel blocks have an
    #: identity shortcut, and the distance of their kernels' taps in pixels.
    arch_options: dict = dict(ffn_ratio=4, shortcut=True, dilation=1)

    def __init__(
        self,
        arch: str | dict = '31B',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        small_kernel_merged: bool = False,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (configs never mutate it; the house form of OpenMMLab)
        act_cfg: dict = dict(type='ReLU'),  # noqa: B006
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        norm_intermediate_features: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = resolve_arch(arch, self.arch_settings, self.arch_options, 'RepLKNet')
        kernels, layers, channels = (settings[k] for k in ('large_kernel_sizes', 'layers', 'channels'))
        if type(settings['shortcut']) is not bool or type(settings['dilation']) is not int:
            raise ValueError(
                f'RepLKNet: in arch, shortcut must be True or False and dilation a whole number; found '
                f'{settings["shortcut"]!r} and {settings["dilation"]!r}'
            )
        if not len(kernels) == len(layers) == len(channels):
            raise ValueError(
                f'RepLKNet: large_kernel_sizes={kernels}, layers={layers} and channels={channels} must '
                f'have one entry a stage'
            )
        if not -1 <= frozen_stages <= len(layers):
            raise ValueError(f'RepLKNet: frozen_stages={frozen_stages} must be in -1..{len(layers)}')
        if drop_path_rate > 0 and not settings['shortcut']:
            raise ValueError(
                f'RepLKNet: drop_path_rate={drop_path_rate} drops the branch beside a shortcut, and arch '
                f'has shortcut=False'
            )
        super().__init__(out_indices, len(layers), norm_eval, init_cfg, out_memory_format)
        self.frozen_stages = frozen_stages

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
        drop_path = iter(drop_path_rates(drop_path_rate, sum(layers), 'RepLKNet'))
        self.stages: Any = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i, width in enumerate(channels):
            norm_output = norm_intermediate_features and i in self.out_indices
            self.stages.append(
                RepLKNetStage(
                    width,
                    [next(drop_path) for _ in range(layers[i])],
                    kernels[i],
                    settings,
                    small_kernel_merged,
                    with_cp,
                    norm_output,
                    norm_cfg,
                    act_cfg,
                )
            )
            for following in channels[i + 1 : i + 2]:
                self.transitions.append(
                    nn.Sequential(layer(width, following), layer(following, following, 3, 2, depthwise=True))
                )
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features of an image batch.

        Args:
            x: ``(N, in_channels, H, W)``; any height and width, multiples of 32 lose nothing at the borders.

        Returns:
            One ``(N, C_i, H / s_i, W / s_i)`` for each of ``out_indices``, ``s = 4, 8, 16, 32``, rounded up.
        """
        x = self._enter(x)
        for layer in self.stem:
            x = layer(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outs.append(stage.norm(x))
            if i < len(self.transitions):
                x = self.transitions[i](x)
        return self._leave(outs)

    def _blocks_of_stages(self) -> list[int]:
        # A large-kernel block and the feed-forward block after it do what a block of ConvNeXt does.
        return [len(stage.blocks) // 2 for stage in self.stages]

    def _place(self, parts: list[str]) -> tuple[int, int | None] | None:
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
