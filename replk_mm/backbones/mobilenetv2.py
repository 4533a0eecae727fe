"""MobileNetV2, with depthwise kernels of any size, a parallel small kernel that is merged after training, or dilation.

"MobileNetV2: Inverted Residuals and Linear Bottlenecks", Sandler, Howard, Zhu, Zhmoginov, Chen, CVPR 2018,
arXiv:1801.04381. The changes to its depthwise kernels are those of the RepLKNet paper (arXiv:2203.06717, section 3,
guidelines 2 to 5), for which no code was published. Reimplemented from the papers. Parameter names are those of
mmpretrain and mmsegmentation.
"""

from collections.abc import Sequence

import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import FAN_OUT_INIT, Backbone, Stage, build_activation
from replk_mm.backbones.replknet import ConvNorm, ReparamLargeKernelConv, add_shortcut
from replk_mm.registry import MODELS


class InvertedResidual(nn.Module):
    """1x1 convolution that expands, depthwise convolution, 1x1 convolution without activation, identity shortcut.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        expand_ratio: Channels of the depthwise convolution relative to ``in_channels``; 1 omits the first convolution.
        kernel_size: Side of the depthwise kernel in pixels, odd.
        small_kernel: Side of the parallel kernel, in blocks whose kernel is larger; None for no parallel branch.
        stride: Stride of the depthwise convolution in pixels.
        dilation: Dilation of the depthwise kernel in pixels.
        atrous_rate: Factor on the dilation of both kernels, which replaces the stride of earlier blocks.
        shortcut: Add the input to the output, where both have the same shape.
        drop_path: Drop path rate.
        norm_cfg: Normalization layer.
        act_cfg: Activation after the first two convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        expand_ratio: int,
        kernel_size: int,
        small_kernel: int | None,
        stride: int,
        dilation: int,
        atrous_rate: int,
        shortcut: bool,
        drop_path: float,
        norm_cfg: dict,
        act_cfg: dict,
    ) -> None:
        super().__init__()
        width = in_channels * expand_ratio
        self.conv = nn.ModuleList()
        if expand_ratio > 1:
            self.conv.append(ConvNorm(in_channels, width, norm_cfg=norm_cfg))
        if small_kernel is not None and small_kernel < kernel_size:
            depthwise: nn.Module = ReparamLargeKernelConv(
                width, kernel_size, small_kernel, dilation, False, norm_cfg, stride, atrous_rate
            )
        else:
            depthwise = ConvNorm(width, width, kernel_size, stride, True, dilation * atrous_rate, norm_cfg=norm_cfg)
        self.conv += [depthwise, ConvNorm(width, out_channels, norm_cfg=norm_cfg)]
        self.nonlinear = build_activation(act_cfg)
        self.shortcut = shortcut and stride == 1 and in_channels == out_channels
        if self.shortcut:
            self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        *layers, project = self.conv
        out = x
        for layer in layers:
            out = layer(out, self.nonlinear)
        return add_shortcut(project, out, x, self.drop_path) if self.shortcut else project(out)


@MODELS.register_module()
class MobileNetV2(Backbone):
    """MobileNetV2 backbone. It returns the outputs of the last layer of each stage.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys. ``depths`` and ``channels`` have
            a list for each stage: blocks and channels of its layers, ``layer1``, ``layer2`` and so on. The first stage
            has two layers, of which the second halves the resolution; each later stage halves it in its first block.
            Defaults to ``'100'``.
        kernel_size: Side of the depthwise kernels in pixels, or one for each stage. Defaults to 3.
        small_kernel: Side of a parallel depthwise kernel wherever ``kernel_size`` is larger (guideline 3). Defaults to
            None, no parallel kernel.
        dilation: Dilation of all depthwise kernels in pixels. Defaults to 1.
        shortcut: Use identity shortcuts. False is for ablations (guideline 2). Defaults to True.
        output_stride: Largest stride, 8, 16 or 32. Later strides become dilations, as in DeepLab: of the features, the
            pixels at multiples of the original stride stay the same. Defaults to 32.
        last_channels: Channels of a 1x1 convolution after the last layer; classifiers have one of 1280. Defaults to
            None, no such convolution.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        norm_cfg: Normalization layers. Defaults to ``dict(type='BN')``.
        act_cfg: Activation. Defaults to ``dict(type='ReLU6')``.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of stages to freeze, the first with the stem. Defaults to 0.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. ``Pretrained`` loads mmpretrain's, torchvision's, timm's and our checkpoints. Defaults
            to weights of variance ``2 / fan_out``.
    """

    arch_options: dict = dict(expand_ratio=6)  #: optional keys of ``arch``
    arch_settings = {
        '100': dict(
            stem_channels=32, depths=[[1, 2], [3], [4, 3], [3, 1]], channels=[[16, 24], [32], [64, 96], [160, 320]]
        ),
        # Not from the papers: a small variant for CPUs.
        'nano': dict(stem_channels=8, depths=[[1, 1], [2], [3], [2]], channels=[[8, 16], [24], [32], [48]]),
    }

    def __init__(
        self,
        arch: str | dict = '100',
        kernel_size: int | Sequence[int] = 3,
        small_kernel: int | None = None,
        dilation: int = 1,
        shortcut: bool = True,
        output_stride: int = 32,
        last_channels: int | None = None,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (as in RepLKNet)
        act_cfg: dict = dict(type='ReLU6'),  # noqa: B006
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        norm_eval: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, widths = settings['depths'], settings['channels']
        channels = [stage[-1] for stage in widths[:-1]] + [last_channels or widths[-1][-1]]
        counts, init_cfg = [sum(stage) for stage in depths], init_cfg or FAN_OUT_INIT
        super().__init__(counts, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        kernels = [kernel_size] * len(depths) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernels) != len(depths) or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f'MobileNetV2: kernel_size={kernel_size} must be odd; one, or one for each stage')
        if dilation < 1:
            raise ValueError(f'MobileNetV2: dilation={dilation} must be at least 1')
        if small_kernel is not None and (dilation > 1 or small_kernel not in range(1, max(kernels), 2)):
            raise ValueError(
                f'MobileNetV2: small_kernel={small_kernel} must be odd and smaller than a kernel of {kernels}, '
                f'without dilation; found dilation={dilation}'
            )
        if output_stride not in (8, 16, 32):
            raise ValueError(f'MobileNetV2: output_stride={output_stride} must be 8, 16 or 32')
        if drop_path_rate > 0 and not shortcut:
            raise ValueError(f'MobileNetV2: drop_path_rate={drop_path_rate} requires shortcut=True')

        width = settings['stem_channels']
        self.conv1 = ConvNorm(in_channels, width, 3, 2, norm_cfg=norm_cfg, act_cfg=act_cfg)
        rates = self.drop_path_rates(drop_path_rate)
        self.layers: list[list[str]] = []  #: names of the layers of each stage
        current_stride, atrous_rate, number = 2, 1, 0
        for i, stage in enumerate(zip(depths, widths, strict=True)):
            self.layers.append([])
            for j, (depth, out_channels) in enumerate(zip(*stage, strict=True)):
                blocks: list[nn.Module] = []
                number += 1
                for block in range(depth):
                    halves = block == 0 and j == (i == 0)
                    stride = 2 if halves and current_stride < output_stride else 1
                    blocks.append(
                        InvertedResidual(
                            width,
                            out_channels,
                            settings['expand_ratio'] if number > 1 else 1,
                            kernels[i],
                            small_kernel,
                            stride,
                            dilation,
                            atrous_rate,
                            shortcut,
                            next(rates),
                            norm_cfg,
                            act_cfg,
                        )
                    )
                    # A block without its stride still reads the pixels of the resolution before it.
                    current_stride *= stride
                    atrous_rate *= 2 if halves and stride == 1 else 1
                    width = out_channels
                self.layers[i].append(f'layer{number}')
                self.add_module(f'layer{number}', Stage(*blocks, with_cp=with_cp))
        if last_channels:
            self.layers[-1].append('conv2')
            self.conv2 = ConvNorm(width, last_channels, norm_cfg=norm_cfg, act_cfg=act_cfg)
        for i, info in zip(sorted(self.out_indices), self.feature_info, strict=True):
            info.update(module=self.layers[i][-1], reduction=min(info['reduction'], output_stride))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round up."""
        x, features = self.conv1(self._to_compute_format(x)), []
        for i, names in enumerate(self.layers):
            for name in names:
                x = getattr(self, name)(x)
            if i in self.out_indices:
                features.append(x)
        return self._to_output_format(features)

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        if parts[0] == 'conv1':
            return 0, None
        for stage, names in enumerate(self.layers):
            if parts[0] in names:
                before = sum(len(getattr(self, name)) for name in names[: names.index(parts[0])])
                return stage, self.depths[stage] - 1 if parts[0] == 'conv2' else before + int(parts[1])
        raise ValueError(f'MobileNetV2 has no parameter {".".join(parts)!r}')

    def _frozen_modules(self) -> list[nn.Module]:
        names = [name for stage in self.layers[: self.frozen_stages] for name in stage]
        return [getattr(self, name) for name in (['conv1', *names] if names else [])]


_MMPRETRAIN = 'https://download.openmmlab.com/mmclassification/v0/mobilenet_v2/mobilenet_v2_batch256_imagenet'
_WEIGHTS = (
    Weights('in1k', 'ImageNet-1K', f'{_MMPRETRAIN}_20200708-3b2dc3af.pth'),
    Weights('tv2-in1k', 'ImageNet-1K', 'https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth'),
)

register_variants(
    MobileNetV2,
    {
        'mobilenetv2-nano': dict(config=dict(arch='nano')),
        'mobilenetv2-100': dict(config=dict(arch='100'), weights=_WEIGHTS),
        **{
            f'mobilenetv2-100-k{kernel}': dict(config=dict(arch='100', kernel_size=kernel, small_kernel=3))
            for kernel in (9, 13)
        },
    },
    source='arXiv:1801.04381, open-mmlab/mmpretrain',
    licence='Apache-2.0',
)
