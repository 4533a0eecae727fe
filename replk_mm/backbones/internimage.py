"""InternImage: blocks as in transformers, with a deformable convolution in place of attention.

"InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions", Wang, Dai, Chen, Huang, Li,
Zhu, Hu, Lu, Lu, Li, Wang, Qiao, CVPR 2023, arXiv:2211.05778. Reimplemented from the paper. Parameter names are those of
the authors' code (MIT licence), so that their checkpoints load.
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
from replk_mm.ops import DepthwiseConv2d
from replk_mm.ops.dcnv3 import dcnv3
from replk_mm.registry import MODELS


def _norm(norm_cfg: dict, channels: int) -> nn.Sequential:
    """A norm under the authors' name: their code permutes dimensions where the identity is."""
    return nn.Sequential(nn.Identity(), build_norm(norm_cfg, channels))


class DCNv3(nn.Module):
    """Deformable convolution whose offsets and weights depend on the input. Section 3.1.

    Args:
        channels: Channels of input and output.
        groups: Groups of channels; each has its own offsets and weights.
        offset_scale: Distance of the nine points in pixels.
        norm_cfg: Normalization layer.
    """

    def __init__(self, channels: int, groups: int, offset_scale: float, norm_cfg: dict) -> None:
        super().__init__()
        self.groups, self.offset_scale = groups, offset_scale
        self.dw_conv = nn.Sequential(DepthwiseConv2d(channels, 3), _norm(norm_cfg, channels), nn.GELU())
        self.offset = nn.Linear(channels, groups * 9 * 2)
        self.mask = nn.Linear(channels, groups * 9)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.offset, self.mask, self.input_proj, self.output_proj):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(N, C, H, W)`` to the same shape."""
        value = self.input_proj(x.permute(0, 2, 3, 1))
        hidden = self.dw_conv(x).permute(0, 2, 3, 1)
        mask = self.mask(hidden).unflatten(-1, (self.groups, 9)).softmax(-1).flatten(-2)
        out = dcnv3(value, self.offset(hidden), mask, self.offset_scale)
        return self.output_proj(out).permute(0, 3, 1, 2)


class InternImageBlock(nn.Module):
    """Deformable convolution and two linear layers, each with a norm, layer scale and shortcut. Section 3.2.

    Args:
        channels: Channels of input and output.
        groups: Groups of the deformable convolution.
        offset_scale: See :class:`DCNv3`.
        post_norm: Apply the norms after the layers instead of before them.
        drop_path: Drop path rate of both branches.
        norm_cfg: Normalization layers.
        layer_scale_init_value: Initial value of the layer scales.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        offset_scale: float,
        post_norm: bool,
        drop_path: float,
        norm_cfg: dict,
        layer_scale_init_value: float,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = nn.Sequential(build_norm(norm_cfg, channels))
        self.dcn = DCNv3(channels, groups, offset_scale, norm_cfg)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.Sequential(build_norm(norm_cfg, channels))
        fc1, fc2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.gamma1 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        self.gamma2 = nn.Parameter(torch.full((channels,), float(layer_scale_init_value)))
        for layer in (fc1, fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.mlp(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, gamma in ((self.dcn, self.norm1, self.gamma1), (self._mlp, self.norm2, self.gamma2)):
            branch = norm(layer(x)) if self.post_norm else layer(norm(x))
            x = add_residual(x, branch, self.drop_path, gamma)
        return x


class InternImageLevel(nn.Module):
    """Blocks of one resolution, the norm of their output or the identity, and the downsampling after it.

    It is all in one module because FSDP gathers the parameters of a module only while the module runs.
    """

    def __init__(self, blocks: Stage, norm: nn.Module, downsample: nn.Module) -> None:
        super().__init__()
        self.blocks, self.norm, self.downsample = blocks, norm, downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features and the input of the next level, for ``(N, C, H, W)``."""
        x = self.norm(self.blocks(x))
        return x, self.downsample(x)


@MODELS.register_module()
class InternImage(Backbone):
    """InternImage backbone.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys. ``post_norm`` is that of
            :class:`InternImageBlock`; without it, the features are normalized. Defaults to ``'tiny'``.
        in_channels: Channels of the image. Defaults to 3.
        norm_cfg: Normalization layers. Defaults to ``dict(type='LN2d', eps=1e-6)``.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scales. Defaults to 1.
        out_indices: Levels whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of levels to freeze, with the stem or downsampling layer before each. Defaults to 0.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. ``Pretrained`` loads the authors' and our checkpoints. Defaults to that of the
            authors: linear layers with a truncated normal with standard deviation 0.02, those of :class:`DCNv3` with
            zeros and Xavier's uniform distribution, zero biases.
    """

    arch_settings = {
        name: dict(
            depths=depths,
            channels=[width * 2**i for i in range(4)],
            groups=[width // 16 * 2**i for i in range(4)],
            offset_scale=offset_scale,
            post_norm=name != 'tiny',
        )
        for name, depths, width, offset_scale in (
            ('tiny', [4, 4, 18, 4], 64, 1.0),
            ('small', [4, 4, 21, 4], 80, 1.0),
            ('base', [4, 4, 21, 4], 112, 1.0),
            ('large', [5, 5, 22, 5], 160, 2.0),
            ('xlarge', [5, 5, 24, 5], 192, 2.0),
        )
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        norm_cfg: dict = dict(type='LN2d', eps=1e-6),  # noqa: B006 (as in RepLKNet)
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1.0,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        norm_eval: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, channels, groups = settings['depths'], settings['channels'], settings['groups']
        super().__init__(depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        if len(groups) != len(channels) or any(width % g for width, g in zip(channels, groups, strict=True)):
            raise ValueError(f'InternImage: groups={groups} must have one divisor for each of channels={channels}')
        if layer_scale_init_value <= 0:
            raise ValueError(f'InternImage: layer_scale_init_value={layer_scale_init_value} must be positive')
        for info in self.feature_info:  # of a level; the level itself returns a pair
            info['module'] = info['module'].replace('stages', 'levels') + '.norm'

        def halve(before: int, after: int, bias: bool = True) -> nn.Conv2d:
            return nn.Conv2d(before, after, 3, 2, 1, bias=bias)

        width = channels[0]
        self.patch_embed = nn.Sequential(
            OrderedDict(
                conv1=halve(in_channels, width // 2),
                norm1=_norm(norm_cfg, width // 2),
                act=nn.GELU(),
                conv2=halve(width // 2, width),
                norm2=_norm(norm_cfg, width),
            )
        )
        rates = self.drop_path_rates(drop_path_rate)
        shared = (settings['offset_scale'], settings['post_norm'])
        self.levels = nn.ModuleList()
        for i, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            blocks = (
                InternImageBlock(width, groups[i], *shared, next(rates), norm_cfg, layer_scale_init_value)
                for _ in range(depth)
            )
            norm = nn.Identity() if settings['post_norm'] else nn.Sequential(build_norm(norm_cfg, width))
            downsample: nn.Module = nn.Identity()
            if i + 1 < len(channels):
                following = channels[i + 1]
                layers = OrderedDict(conv=halve(width, following, bias=False), norm=_norm(norm_cfg, following))
                downsample = nn.Sequential(layers)
            self.levels.append(InternImageLevel(Stage(*blocks, with_cp=with_cp), norm, downsample))
        self._freeze()

    @property
    def stages(self) -> Any:
        """The levels, under the name that other backbones have for them."""
        return self.levels

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round up."""
        x = self.patch_embed(self._to_compute_format(x))
        features = []
        for level in self.levels:
            feature, x = level(x)
            features.append(feature)
        return self._to_output_format([features[i] for i in sorted(self.out_indices)])

    def _frozen_modules(self) -> list[nn.Module]:
        if not self.frozen_stages:
            return []
        levels: Any = self.levels[: self.frozen_stages]
        downsample = [level.downsample for level in levels[:-1]]
        return [self.patch_embed, *(part for level in levels for part in (level.blocks, level.norm)), *downsample]

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        match parts:
            case ['patch_embed', *_]:
                return 0, None
            case ['levels', level, 'blocks', block, *_]:
                return int(level), int(block)
            case ['levels', level, 'norm' | 'downsample', *_]:
                return (int(level) + 1, None) if int(level) + 1 < len(self.depths) else None
        raise ValueError(f'InternImage has no parameter {".".join(parts)!r}')

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer id of a parameter as in the authors' recipes: each block is a layer.

        Id 0 is the stem. The norm of a level and the downsampling after it belong to the first block of the next
        level, and the norm of the last level has the full rate. Arguments and errors are those of :class:`Backbone`.
        """
        count = sum(self.depths) + 2
        location = self._locate(name, prefix)
        if location is None:
            return count - 1, count
        stage, block = location
        if block is None and stage == 0:
            return 0, count
        return 1 + sum(self.depths[:stage]) + (block or 0), count


def _weights(short: str) -> Weights:
    large = short in ('l', 'xl')
    file = f'internimage_{short}_{"22k_192to384" if large else "1k_224"}.pth'
    tag, data = ('in22k-384', 'ImageNet-22K') if large else ('in1k', 'ImageNet-1K')
    return Weights(tag, data, f'https://huggingface.co/OpenGVLab/InternImage/resolve/main/{file}')


register_variants(
    InternImage,
    {
        f'internimage-{short}': dict(
            config=dict(arch=arch), paper_name=f'InternImage-{short.upper()}', weights=(_weights(short),)
        )
        for short, arch in zip(['t', 's', 'b', 'l', 'xl'], InternImage.arch_settings, strict=True)
    },
    source='arXiv:2211.05778, OpenGVLab/InternImage',
    licence='MIT',
)
