"""The roadmap from ResNet-50 to ConvNeXt-T, every step as one configurable network.

"A ConvNet for the 2020s", Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, CVPR 2022, arXiv:2201.03545, section 2 and tables
10 and 11. The authors published no code for the steps in between. This is a reading of the paper: it gives the printed
FLOPs of all steps but two, see docs/complexity.md. What FLOPs do not show is a choice: where few activations or norms
remain, projection shortcuts and the stem have none either; norms return with the separate downsampling.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import register_variants
from replk_mm.backbones.layers import FAN_OUT_INIT, Backbone, Stage, add_residual, build_activation, build_norm
from replk_mm.ops import DepthwiseConv2d
from replk_mm.registry import MODELS


def _conv_norm(
    in_channels: int, channels: int, kernel_size: int, stride: int, depthwise: bool, norm_cfg: dict | None
) -> list[nn.Module]:
    """A convolution and its norm, if any. The convolution has no bias before BatchNorm, which would remove it."""
    bias = norm_cfg is None or 'BN' not in norm_cfg['type']
    conv: nn.Module
    if depthwise:
        conv = DepthwiseConv2d(channels, kernel_size, stride, bias=bias)
    else:
        conv = nn.Conv2d(in_channels, channels, kernel_size, stride, kernel_size // 2, bias=bias)
    return [conv, build_norm(norm_cfg, channels)] if norm_cfg else [conv]


class RoadmapBlock(nn.Module):
    """Residual block of two pointwise convolutions and a spatial one: bottleneck, inverted bottleneck, ConvNeXt block.

    The shortcut is a pointwise convolution where channels or resolution change.

    Args:
        in_channels: Channels of the input.
        width: Width of the block: channels of a bottleneck, output channels of an inverted one.
        stride: Stride of the spatial convolution and of the shortcut in pixels.
        settings: Design choices, see :attr:`ConvNeXtRoadmap.arch_options`.
        drop_path: Drop path rate.
    """

    def __init__(self, in_channels: int, width: int, stride: int, settings: dict, drop_path: float) -> None:
        super().__init__()
        hidden, channels = (4 * width, width) if settings['inverted'] else (width, 4 * width)
        norm_cfg, place = settings['norm_cfg'], 0 if settings['depthwise_first'] else 1
        spatial = hidden if place else in_channels
        convs = [(in_channels, hidden, 1, 1, False), (hidden, channels, 1, 1, False)]
        convs.insert(place, (spatial, spatial, settings['kernel_size'], stride, settings['depthwise']))
        layers: list[nn.Module] = []
        for i, conv in enumerate(convs):
            # The one norm follows the spatial convolution; the one activation precedes the last pointwise convolution.
            layers += _conv_norm(*conv, None if settings['fewer_norms'] and i != place else norm_cfg)
            if i == 1 or (i == 0 and not settings['fewer_acts']):
                layers.append(build_activation(settings['act_cfg']))
        self.branch = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != channels:
            norm = None if settings['fewer_norms'] else norm_cfg
            self.shortcut = nn.Sequential(*_conv_norm(in_channels, channels, 1, stride, False, norm))
        self.drop_path = DropPath(drop_path)
        self.act = nn.Identity() if settings['fewer_acts'] else build_activation(settings['act_cfg'])

    def forward(self, x: Tensor) -> Tensor:
        return self.act(add_residual(self.shortcut(x), self.branch(x), self.drop_path))


@MODELS.register_module()
class ConvNeXtRoadmap(Backbone):
    """A step of the roadmap from ResNet to ConvNeXt.

    Args:
        arch: Regime and step: ``'50-...'`` from ResNet-50 to ConvNeXt-T, ``'200-...'`` from ResNet-200 to ConvNeXt-B,
            ``'nano-...'`` the same steps in a small network of ours. Or a dict with ``depths``, ``widths`` and changes
            of ResNet's design, which :attr:`arch_options` has. Defaults to ``'50-separate-downsampling'``, which is
            ConvNeXt-T without layer scale.
        norm_cfg, act_cfg: Normalization and activation layers instead of those of ``arch``. Default to None.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        out_indices: Stages whose features are returned. Defaults to all. With separate downsampling each has a norm, as
            in ConvNeXt; otherwise they are the outputs of the last block, as in ResNet.
        frozen_stages: Number of stages to freeze, with the stem or downsampling layer before each. Defaults to 0.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. Defaults to :data:`FAN_OUT_INIT` for every step.

    Raises:
        ValueError: As :class:`Backbone`, and if the kernel size is not odd.
    """

    #: Design choices, with those of ResNet as defaults.
    arch_options: dict = dict(
        patch_stem=False,  # a 4x4 convolution of stride 4 instead of a 7x7 one of stride 2 and max pooling
        depthwise=False,  # the spatial convolution of a block is depthwise
        inverted=False,  # blocks are four times wider inside than outside, instead of the reverse
        depthwise_first=False,  # the spatial convolution precedes both pointwise ones
        kernel_size=3,  # side of the spatial kernels in pixels
        act_cfg=dict(type='ReLU'),
        fewer_acts=False,  # one activation per block, before the last pointwise convolution
        fewer_norms=False,  # one norm per block, after the spatial convolution
        norm_cfg=dict(type='BN'),
        separate_downsampling=False,  # norm and 2x2 convolution between stages; norms after the stem and of the outputs
    )

    def __init__(
        self,
        arch: str | dict = '50-separate-downsampling',
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        norm_eval: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        settings |= {key: cfg for key, cfg in (('norm_cfg', norm_cfg), ('act_cfg', act_cfg)) if cfg}
        depths, widths, separate = settings['depths'], settings['widths'], settings['separate_downsampling']
        channels = [width if settings['inverted'] else 4 * width for width in widths]
        super().__init__(
            depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg or FAN_OUT_INIT
        )
        if settings['kernel_size'] < 1 or settings['kernel_size'] % 2 == 0:
            raise ValueError(f'ConvNeXtRoadmap: kernel_size={settings["kernel_size"]} of arch={arch} must be odd')
        norm = settings['norm_cfg']
        stem = _conv_norm(
            in_channels, widths[0], 7, 2, False, None if settings['fewer_norms'] and not separate else norm
        )
        if settings['patch_stem']:
            stem[0] = nn.Conv2d(in_channels, widths[0], 4, 4, bias=stem[0].bias is not None)
        if not settings['fewer_acts']:
            stem.append(build_activation(settings['act_cfg']))
        if not settings['patch_stem']:
            stem.append(nn.MaxPool2d(3, 2, 1))
        self.downsample_layers = nn.ModuleList([nn.Sequential(*stem)])
        self.stages: Any = nn.ModuleList()
        rates, before = self.drop_path_rates(drop_path_rate), widths[0]
        for i, (depth, width, after) in enumerate(zip(depths, widths, channels, strict=True)):
            stride = 2 if i else 1
            if separate and i:
                self.downsample_layers.append(nn.Sequential(build_norm(norm, before), nn.Conv2d(before, after, 2, 2)))
                stride, before = 1, after
            elif i:
                self.downsample_layers.append(nn.Identity())
            blocks = []
            for _ in range(depth):
                blocks.append(RoadmapBlock(before, width, stride, settings, next(rates)))
                stride, before = 1, after
            self.stages.append(Stage(*blocks, with_cp=with_cp))
        for i in self.out_indices:
            self.add_module(f'norm{i}', build_norm(norm, channels[i]) if separate else nn.Identity())
        self._freeze()


def _steps(resnet: tuple[list[int], int], ratio: tuple[list[int], int], width: int) -> dict[str, dict]:
    """Settings of all steps by name, in the order of the paper.

    Args:
        resnet, ratio: Depths and width of the first stage, of ResNet and after the change of the stage ratio.
        width: Of the first stage, as Swin Transformer has it.
    """

    def widths(first: int) -> list[int]:
        return [first * 2**i for i in range(4)]

    changes: dict[str, dict[str, Any]] = {
        'resnet': dict(depths=resnet[0], widths=widths(resnet[1])),
        'stage-ratio': dict(depths=ratio[0], widths=widths(ratio[1])),
        'patchify': dict(patch_stem=True),
        'depthwise': dict(depthwise=True),
        'width': dict(widths=widths(width)),
        'inverted': dict(inverted=True),
        'depthwise-first': dict(depthwise_first=True),
        'kernel-5': dict(kernel_size=5),
        'kernel-7': dict(kernel_size=7),
        'kernel-9': dict(kernel_size=9),
        'kernel-11': dict(kernel_size=11),
        'gelu': dict(kernel_size=7, act_cfg=dict(type='GELU')),  # the paper keeps 7x7
        'fewer-acts': dict(fewer_acts=True),
        'fewer-norms': dict(fewer_norms=True),
        'layernorm': dict(norm_cfg=dict(type='LN2d', eps=1e-6)),
        'separate-downsampling': dict(separate_downsampling=True),
    }
    settings: dict[str, Any] = {}
    return {name: (settings := settings | change) for name, change in changes.items()}


ConvNeXtRoadmap.arch_settings = {
    f'{regime}-{step}': settings
    for regime, steps in {
        'nano': _steps(([1, 2, 2, 1], 16), ([1, 1, 3, 1], 16), 24),
        '50': _steps(([3, 4, 6, 3], 64), ([3, 3, 9, 3], 64), 96),
        '200': _steps(([3, 24, 36, 3], 64), ([3, 3, 27, 3], 84), 128),
    }.items()
    for step, settings in steps.items()
}

register_variants(
    ConvNeXtRoadmap,
    {f'roadmap-{arch}': dict(config=dict(arch=arch)) for arch in ConvNeXtRoadmap.arch_settings if arch[:3] != '200'},
    source='arXiv:2201.03545',
    licence='Apache-2.0',  # written from the paper
)
