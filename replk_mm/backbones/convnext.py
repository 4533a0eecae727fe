"""ConvNeXt, versions 1 and 2.

"A ConvNet for the 2020s", Liu, Mao, Wu, Feichtenhofer, Darrell, Xie, CVPR 2022, arXiv:2201.03545; global response
normalization from "ConvNeXt V2", Woo et al., CVPR 2023, arXiv:2301.00808. Reimplemented from the papers. Arguments and
parameter names are mmpretrain's (Apache-2.0), so that its configs and checkpoints work unchanged. Checkpoints of the
authors and of timm are converted when they are loaded.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import Backbone, Stage, build_activation, build_norm
from replk_mm.ops import DepthwiseConv2d
from replk_mm.registry import MODELS


class GlobalResponseNorm(nn.Module):
    """Global response normalization (GRN). ConvNeXt V2, section 3.2.

    Args:
        num_channels: Channels of the input.
        channel_dim: Channel dimension: -1 for ``(N, H, W, C)``, 1 for ``(N, C, H, W)``.
        eps: Added to the mean norm. Defaults to 1e-6.
        shape: Shape of scale and shift. Defaults to ``(num_channels,)``.
    """

    beta: nn.Parameter | None  # None where it is merged into the next layer

    def __init__(
        self, num_channels: int, channel_dim: int, eps: float = 1e-6, shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(shape or num_channels))
        self.beta = nn.Parameter(torch.zeros(shape or num_channels))
        self.channel_dim, self.eps = channel_dim, eps

    def forward(self, x: Tensor) -> Tensor:
        last = self.channel_dim == -1
        energy = x.norm(p=2, dim=(1, 2) if last else (2, 3), keepdim=True)
        share = energy / (energy.mean(dim=self.channel_dim, keepdim=True) + self.eps)
        shape = (-1,) if last else (-1, 1, 1)
        scale = 1 + self.gamma.view(shape) * share  # one pass over the map, instead of one for each operation
        return x * scale if self.beta is None else torch.addcmul(self.beta.view(shape), x, scale)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, pointwise layer, activation, pointwise layer, layer scale, identity shortcut.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the depthwise kernel in pixels.
        mlp_ratio: Hidden channels relative to ``channels``.
        norm_cfg: Normalization layer.
        act_cfg: Activation layer.
        linear_pw_conv: Use ``nn.Linear`` on channels-last data instead of 1x1 convolutions.
        use_grn: Add :class:`GlobalResponseNorm` after the activation.
        drop_path: Drop path rate.
        layer_scale_init_value: Initial value of the layer scale; 0 for no layer scale.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        mlp_ratio: float,
        norm_cfg: dict,
        act_cfg: dict,
        linear_pw_conv: bool,
        use_grn: bool,
        drop_path: float,
        layer_scale_init_value: float,
    ) -> None:
        super().__init__()
        self.linear_pw_conv = linear_pw_conv
        width = int(mlp_ratio * channels)
        self.depthwise_conv = DepthwiseConv2d(channels, kernel_size)
        self.norm = build_norm(norm_cfg, channels)
        self.pointwise_conv1 = nn.Linear(channels, width) if linear_pw_conv else nn.Conv2d(channels, width, 1)
        self.act = build_activation(act_cfg)
        self.grn = GlobalResponseNorm(width, -1 if linear_pw_conv else 1) if use_grn else None
        self.pointwise_conv2 = nn.Linear(width, channels) if linear_pw_conv else nn.Conv2d(width, channels, 1)
        self.gamma = (
            nn.Parameter(torch.full((channels,), float(layer_scale_init_value))) if layer_scale_init_value > 0 else None
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise_conv(x))
        if self.linear_pw_conv:
            out = out.permute(0, 2, 3, 1)
        out = self.act(self.pointwise_conv1(out))
        if self.grn is not None:
            out = self.grn(out)
        out = self.pointwise_conv2(out)
        if self.linear_pw_conv:
            out = out.permute(0, 3, 1, 2)
        if self.gamma is not None:
            out = out * self.gamma.view(-1, 1, 1)
        return x + self.drop_path(out)


@MODELS.register_module()
class ConvNeXt(Backbone):
    """ConvNeXt backbone. A config of ``mmpretrain.ConvNeXt`` works after changing only the type.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys and optionally those of
            :attr:`arch_options`. Defaults to ``'tiny'``.
        kernel_size: Side of the depthwise kernels, odd; one number, or one for each stage. Defaults to 7.
        in_channels: Channels of the image. Defaults to 3.
        stem_patch_size: Kernel size and stride of the stem in pixels. Defaults to 4.
        norm_cfg: Normalization layers. Defaults to ``dict(type='LN2d', eps=1e-6)``.
        act_cfg: Activation between the pointwise layers. Defaults to ``dict(type='GELU')``.
        linear_pw_conv: Use ``nn.Linear`` for pointwise layers, as the authors do. Defaults to True.
        use_grn: Add global response normalization (version 2). Defaults to False.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scale; 0 for no layer scale. Defaults to 1e-6.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32. Defaults to -1, the last.
        frozen_stages: Number of stages to freeze, with the stem or downsampling layer before each. Defaults to 0.
        gap_before_final_norm: Apply global average pooling before the output norm, for classification; features
            are then ``(N, C)``. Defaults to True, as in mmpretrain. Dense prediction requires False.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. ``Pretrained`` loads the authors', mmpretrain's, timm's and our checkpoints. Defaults
            to a truncated normal with standard deviation 0.02 and zero biases.
    """

    #: Optional key of ``arch``: hidden channels of a block relative to its channels.
    arch_options: dict = dict(ffn_ratio=4)

    def __init__(
        self,
        arch: str | dict = 'tiny',
        kernel_size: int | Sequence[int] = 7,
        in_channels: int = 3,
        stem_patch_size: int = 4,
        norm_cfg: dict = dict(type='LN2d', eps=1e-6),  # noqa: B006 (as in RepLKNet)
        act_cfg: dict = dict(type='GELU'),  # noqa: B006
        linear_pw_conv: bool = True,
        use_grn: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: int | Sequence[int] = -1,
        frozen_stages: int = 0,
        gap_before_final_norm: bool = True,
        with_cp: bool = False,
        norm_eval: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, channels = settings['depths'], settings['channels']
        init_cfg = init_cfg or dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02, bias=0.0)
        super().__init__(
            depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg, stem_patch_size
        )
        self.gap_before_final_norm = gap_before_final_norm
        kernels = [kernel_size] * len(depths) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernels) != len(depths) or any(k < 1 or k % 2 == 0 for k in kernels):
            raise ValueError(f'ConvNeXt: kernel_size={kernel_size} must be one odd number, or one for each stage')
        if layer_scale_init_value < 0:
            raise ValueError(f'ConvNeXt: layer_scale_init_value={layer_scale_init_value} must not be negative')

        stem = nn.Conv2d(in_channels, channels[0], stem_patch_size, stem_patch_size)
        self.downsample_layers = nn.ModuleList([nn.Sequential(stem, build_norm(norm_cfg, channels[0]))])
        for width, following in zip(channels, channels[1:], strict=False):
            self.downsample_layers.append(nn.Sequential(build_norm(norm_cfg, width), nn.Conv2d(width, following, 2, 2)))
        block = partial(
            ConvNeXtBlock,
            mlp_ratio=settings['ffn_ratio'],
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            linear_pw_conv=linear_pw_conv,
            use_grn=use_grn,
            layer_scale_init_value=layer_scale_init_value,
        )
        rates = self.drop_path_rates(drop_path_rate)
        self.stages: Any = nn.ModuleList(
            Stage(*(block(width, kernel, drop_path=next(rates)) for _ in range(depth)), with_cp=with_cp)
            for depth, width, kernel in zip(depths, channels, kernels, strict=True)
        )
        for i in self.out_indices:
            self.add_module(f'norm{i}', build_norm(norm_cfg, channels[i]))
        self._freeze()

    def _normalize(self, i: int, x: Tensor) -> Tensor:
        if not self.gap_before_final_norm:
            return super()._normalize(i, x)
        return super()._normalize(i, x.mean((2, 3), keepdim=True)).flatten(1)


ConvNeXt.arch_settings = {
    # version 1: tiny to xlarge; version 2 (use_grn=True, layer_scale_init_value=0): all but small and xlarge
    'atto': dict(depths=[2, 2, 6, 2], channels=[40, 80, 160, 320]),
    'femto': dict(depths=[2, 2, 6, 2], channels=[48, 96, 192, 384]),
    'pico': dict(depths=[2, 2, 6, 2], channels=[64, 128, 256, 512]),
    'nano': dict(depths=[2, 2, 8, 2], channels=[80, 160, 320, 640]),
    'tiny': dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768]),
    'small': dict(depths=[3, 3, 27, 3], channels=[96, 192, 384, 768]),
    'base': dict(depths=[3, 3, 27, 3], channels=[128, 256, 512, 1024]),
    'large': dict(depths=[3, 3, 27, 3], channels=[192, 384, 768, 1536]),
    'xlarge': dict(depths=[3, 3, 27, 3], channels=[256, 512, 1024, 2048]),
    'huge': dict(depths=[3, 3, 27, 3], channels=[352, 704, 1408, 2816]),
}

# layer scale: recipes of dense prediction start at 1 instead of the 1e-6 of pretraining; a checkpoint replaces both
_DENSE: dict = dict(gap_before_final_norm=False, out_indices=(0, 1, 2, 3), layer_scale_init_value=1.0)
_DOWNLOADS = 'https://dl.fbaipublicfiles.com/convnext'
_PRETRAINING = dict(tiny=['1k'], small=['1k'], base=['1k', '22k'], large=['22k'], xlarge=['22k'])

register_variants(
    ConvNeXt,
    {
        f'convnext-{arch}': dict(
            config=dict(arch=arch),
            paper_name=paper and f'ConvNeXt-{paper}',
            weights=tuple(
                Weights(f'in{data}', f'ImageNet-{data.upper()}', f'{_DOWNLOADS}/convnext_{arch}_{data}_224.pth')
                for data in _PRETRAINING.get(arch, [])
            ),
        )
        for arch, paper in dict(atto=None, nano=None, tiny='T', small='S', base='B', large='L', xlarge='XL').items()
    },
    _DENSE,
    source='arXiv:2201.03545, facebookresearch/ConvNeXt',
    licence='Apache-2.0',  # mmpretrain, whose arguments and key names these are
)


def _weights_v2(arch: str) -> Iterator[Weights]:
    files = [('in1k', '1K', f'im1k/convnextv2_{arch}_1k_224_ema.pt')]
    for side in dict(nano=(224, 384), tiny=(224, 384), base=(224, 384), large=(224, 384), huge=(384, 512)).get(
        arch, ()
    ):
        tag = 'in22k-in1k' if side == 224 else f'in22k-in1k-{side}'
        files.append((tag, '22K', f'im22k/convnextv2_{arch}_22k_{side}_ema.pt'))
    for tag, data, file in files:
        then = ', then 1K' if data == '22K' else ''
        pretraining = f'FCMAE then ImageNet-{data} fine-tuning{then}'
        yield Weights(f'fcmae-{tag}', pretraining, f'{_DOWNLOADS}/convnextv2/{file}', 'CC-BY-NC-4.0')


register_variants(
    ConvNeXt,
    {
        f'convnextv2-{arch}': dict(
            config=dict(arch=arch), paper_name=f'ConvNeXtV2-{arch[0].upper()}', weights=tuple(_weights_v2(arch))
        )
        for arch in ('atto', 'femto', 'pico', 'nano', 'tiny', 'base', 'large', 'huge')
    },
    dict(_DENSE, use_grn=True, layer_scale_init_value=0.0),
    source='arXiv:2301.00808, facebookresearch/ConvNeXt-V2',
    licence='Apache-2.0',  # mmpretrain, whose arguments and key names these are
)
