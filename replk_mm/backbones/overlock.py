"""OverLoCK: an overview of the image first, then convolutions whose kernels follow from it.

"OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", Lou, Yu, CVPR 2025,
arXiv:2502.20087. Reimplemented from the paper. Parameter names and shapes are those of the authors' code (Apache-2.0),
so that their checkpoints load. The authors' neighbourhood attention kernels are matrix products here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.convnext import GlobalResponseNorm
from replk_mm.backbones.layers import Backbone, LayerNorm2d, Stage, add_residual, build_norm
from replk_mm.backbones.unireplknet import DilatedReparamBlock
from replk_mm.ops import DepthwiseConv2d
from replk_mm.registry import MODELS

#: Sides and dilations of the branches beside a kernel of the given side.
DILATED_BRANCHES = {
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
#: Side of the smaller dynamic kernels, and side of the map of regions that kernels are mixed from, in pixels.
SMALL_KERNEL, REGIONS = 5, 7


#: The layer before each stage in the order of execution, and the stage: base, overview (the fourth), focus.
_STAGES = (
    *((f'patch_embed{i}', f'blocks{i}') for i in range(1, 5)),
    ('high_level_proj', 'sub_blocks3'),
    ('patch_embedx', 'sub_blocks4'),
)


class ResidualDepthwiseConv2d(DepthwiseConv2d, nn.Conv2d):  # mmengine's initialization looks at the direct bases
    """Depthwise 3x3 convolution with an identity shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LayerScale(nn.Module):
    """Scale and shift of each channel."""

    def __init__(self, channels: int, init_value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1, 1), init_value))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.squeeze(-1))


class SEModule(nn.Module):
    """Squeeze-and-excitation with GELU. arXiv:1709.01507."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(16, channels // 8)
        layers = nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        self.proj = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.proj(x)


def build_response_norm(channels: int) -> GlobalResponseNorm:
    """Response norm with parameters of the authors' shape."""
    return GlobalResponseNorm(channels, 1, shape=(1, channels, 1, 1))


def build_ffn(channels: int, width: int) -> list[nn.Module]:
    """Pointwise convolution, GELU, depthwise convolution, response norm, pointwise convolution."""
    first, last = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
    return [first, nn.GELU(), ResidualDepthwiseConv2d(width), build_response_norm(width), last]


class RepConvBlock(nn.Module):
    """Block of the base and overview stages: dilated re-parameterization block, SE and FFN in one residual branch.

    Args:
        channels: Channels of input and output.
        kernel_size: Side of the large kernel in pixels, a key of :data:`DILATED_BRANCHES`.
        layer_scale: Scale the shortcut.
        deploy: Build the deployed form, see :class:`DilatedReparamBlock`.
        norm_cfg: Normalization layers, apart from one :class:`LayerNorm2d`.
        branches: Sides and dilations of the kernels beside the large one.
        drop_path: Drop path rate.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        layer_scale: bool,
        deploy: bool,
        norm_cfg: dict,
        branches: Sequence[tuple[int, int]],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.dwconv = ResidualDepthwiseConv2d(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels),
            DilatedReparamBlock(channels, kernel_size, deploy, norm_cfg, branches),
            build_norm(norm_cfg, channels),
            SEModule(channels),
            *build_ffn(channels, 4 * channels),
        )
        self.ls = LayerScale(channels) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return add_residual(self.ls(x), self.proj(x), self.drop_path)


@torch.fx.wrap  # opaque when traced, since it looks at the size
def enlarge(x: Tensor, side: int) -> Tensor:
    """Resize ``(N, C, H, W)``, if a side is less than ``side``, so that the shorter one has this length."""
    short = min(x.shape[2:])
    if short >= side:
        return x
    return F.interpolate(x, [side if n == short else int(side / short * n) for n in x.shape[2:]], mode='bilinear')


def neighbours(length: int, kernel_size: int, device: torch.device) -> Tensor:
    """Indices of the neighbours of each position on an axis, ``(length, kernel_size)``; they never leave the axis."""
    starts = (torch.arange(length, device=device) - kernel_size // 2).clamp(0, length - kernel_size)
    return starts[:, None] + torch.arange(kernel_size, device=device)


def relative_bias(table: Tensor, height: int, width: int) -> Tensor:
    """Look up the bias of each position and neighbour: ``(heads, 2k - 1, 2k - 1)`` to ``(heads, H, W, k, k)``."""
    kernel = (table.shape[-1] + 1) // 2
    for dim, length in ((1, height), (2, width)):
        own = torch.arange(length, device=table.device)[:, None]
        table = table.index_select(dim, (neighbours(length, kernel, table.device) - own + kernel - 1).flatten())
    return table.unflatten(1, (height, kernel)).unflatten(3, (width, kernel)).transpose(2, 3)


def dynamic_conv2d(values: Tensor, kernels: Tensor) -> Tensor:
    """Convolve each position with a kernel of its own.

    The columns of a kernel are spread over the map, which is then one matrix product for each row: several times as
    many multiply-accumulates as needed, but no copy of the values for each position and neighbour.

    Args:
        values: ``(N, heads, H, W, D)``.
        kernels: ``(N, heads, H, W, k, k)``, of the neighbours in :func:`neighbours`.

    Returns:
        ``(N, heads, H, W, D)``.
    """
    height, width, kernel_size = kernels.shape[2:5]
    if width > height:  # the shorter side is cheaper to spread over
        out = dynamic_conv2d(values.transpose(2, 3), kernels.transpose(2, 3).transpose(4, 5))
        return out.transpose(2, 3)
    rows, columns = (neighbours(length, kernel_size, values.device) for length in (height, width))
    spread = kernels.new_zeros(*kernels.shape[:-1], width)
    spread = spread.scatter(-1, columns[:, None].expand(kernels.shape), kernels).flatten(-2)  # (N, heads, H, W, k * W)
    windows = values.index_select(2, rows.flatten()).unflatten(2, (height, kernel_size)).flatten(3, 4)
    return spread @ windows


@torch.fx.wrap
def mix_context(
    x: Tensor, query: Tensor, key: Tensor, weight: Tensor, bias: Tensor, tables: Sequence[Tensor], size: Any
) -> Tensor:
    """Convolve with kernels that are mixed from the context, a small one and a large one for each head. Section 3.3.

    Args:
        x: ``(N, C, H, W)``; the small kernels are for its first half of the channels.
        query: ``(N, C / 2, H, W)``, scaled.
        key: Regions of the context, ``(N, C / 2, 7, 7)``.
        weight: Kernels of each region, ``(K, 49)``, where ``K`` counts the elements of a small and a large kernel.
        bias: Of the kernels, ``(K,)``.
        tables: Relative position bias of the small and of the large kernels, ``(heads, 2k - 1, 2k - 1)``.
        size: Height and width of the output, which is pooled to them.

    Returns:
        ``(N, C, *size)``.
    """
    heads, (height, width) = len(tables[0]), x.shape[2:]
    query = query.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)
    # The kernels are linear in the affinity: weight @ (key @ query) = (weight @ key) @ query, with a third of the work.
    logits = query @ F.linear(key.flatten(2).unflatten(1, (heads, -1)), weight)  # (N, heads, H * W, K)
    logits = (logits + bias).unflatten(2, (height, width))
    values = x.permute(0, 2, 3, 1).unflatten(3, (2, heads, -1)).permute(3, 0, 4, 1, 2, 5)
    sides = [(table.shape[-1] + 1) // 2 for table in tables]
    outs = []
    for part, table, side, half in zip(logits.split([k * k for k in sides], -1), tables, sides, values, strict=True):
        part = part.unflatten(-1, (side, side)) + relative_bias(table, height, width)
        outs.append(dynamic_conv2d(half, part.flatten(-2).softmax(-1).unflatten(-1, (side, side))))
    out = torch.stack(outs).permute(1, 3, 4, 0, 2, 5).flatten(3).permute(0, 3, 1, 2)
    return out if out.shape[2:] == size else F.adaptive_avg_pool2d(out, size)


class DynamicConvBlock(nn.Module):
    """Block of the focus stages: context-mixing dynamic convolution, then FFN. Section 3.3.

    Args:
        channels: Channels of the features, which come first in input and output.
        context_channels: Channels of the context, which follow.
        kernel_size: Side of the large kernels in pixels, a key of :data:`DILATED_BRANCHES`.
        heads: Heads of each half of the channels.
        first: Build the first block, which gets the initial context as its own.
        deploy: Build the deployed form, see :class:`DilatedReparamBlock`.
        norm_cfg: Normalization layers, apart from two :class:`LayerNorm2d`.
        branches: Sides and dilations of the kernels beside the large one.
        drop_path: Drop path rate.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        kernel_size: int,
        heads: int,
        first: bool,
        deploy: bool,
        norm_cfg: dict,
        branches: Sequence[tuple[int, int]],
        drop_path: float,
    ) -> None:
        super().__init__()
        both, half = channels + context_channels, channels // 2
        norm = partial(build_norm, norm_cfg)
        conv = partial(nn.Conv2d, kernel_size=1, bias=False)
        self.channels, self.kernel_size, self.scale = channels, kernel_size, (channels // heads) ** -0.5
        self.rpb1 = nn.Parameter(torch.zeros(heads, 2 * SMALL_KERNEL - 1, 2 * SMALL_KERNEL - 1))
        self.rpb2 = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.x_scale = None if first else LayerScale(context_channels)
        self.h_scale = None if first else LayerScale(context_channels)
        self.dwconv1 = ResidualDepthwiseConv2d(both)
        self.norm1 = LayerNorm2d(both)
        layers = DepthwiseConv2d(both, 3), norm(both), nn.GELU(), nn.Conv2d(both, channels, 1)
        self.fusion = nn.Sequential(*layers, build_response_norm(channels))
        self.weight_query = nn.Sequential(conv(channels, half), norm(half))
        self.weight_key = nn.Sequential(nn.AdaptiveAvgPool2d(REGIONS), conv(context_channels, half), norm(half))
        self.weight_proj: Any = nn.Conv2d(REGIONS**2, SMALL_KERNEL**2 + kernel_size**2, 1)
        self.dyconv_proj = nn.Sequential(conv(channels, channels), norm(channels))
        reparam = DilatedReparamBlock(channels, kernel_size, deploy, norm_cfg, branches)
        self.lepe = nn.Sequential(reparam, norm(channels))
        self.se_layer = SEModule(channels)
        self.gate = nn.Sequential(conv(channels, channels), norm(channels), nn.SiLU())
        self.proj = nn.Sequential(norm(channels), nn.Conv2d(channels, both, 1))
        self.dwconv2 = ResidualDepthwiseConv2d(both)
        self.norm2 = LayerNorm2d(both)
        self.mlp = nn.Sequential(*build_ffn(both, 3 * channels))
        self.ls1, self.ls2 = LayerScale(both), LayerScale(both)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, initial_context: Tensor) -> Tensor:
        """Compute features and context, ``(N, C + D, H, W)``, from those and the initial context, ``(N, D, H, W)``."""
        features = self.channels
        if self.x_scale is not None and self.h_scale is not None:
            context = self.x_scale(x[:, features:]) + self.h_scale(initial_context)
            x = torch.cat((x[:, :features], context), 1)
        x = self.dwconv1(x)
        normed = self.norm1(x)
        fused = self.fusion(normed)
        whole, source = enlarge(fused, self.kernel_size), enlarge(normed, self.kernel_size)
        query, key = self.weight_query(source[:, :features]) * self.scale, self.weight_key(source[:, features:])
        weight, bias, tables = self.weight_proj.weight.flatten(1), self.weight_proj.bias, (self.rpb1, self.rpb2)
        mixed = mix_context(whole, query, key, weight, bias, tables, fused.shape[2:])
        mixed = self.dyconv_proj(mixed) + self.lepe(fused)
        x = add_residual(self.ls1(x), self.proj(self.se_layer(mixed) * self.gate(fused)), self.drop_path)
        x = self.dwconv2(x)
        return add_residual(self.ls2(x), self.mlp(self.norm2(x)), self.drop_path)


@MODELS.register_module()
class OverLoCK(Backbone):
    """OverLoCK backbone. The third and fourth feature map have the context in their last channels.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys: blocks of the base and overview
            stages and of the two focus stages, channels and kernel sizes of the stages, heads of the focus stages for
            each half of the channels. Defaults to ``'tiny'``.
        detection: Add the overview to the last feature map, as the authors do for detection. Defaults to False.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        dilated_branches: Train with dilated kernels beside each large one. Defaults to True.
        deploy: Build the deployed form, with dilated kernels merged into the large ones. Defaults to False.
        norm_cfg: Normalization layers where the authors have BatchNorm. Defaults to ``dict(type='BN')``.
        out_indices: Stages whose features are returned, at strides 4, 8, 16 and 32, each after its own norm. Defaults
            to all four.
        frozen_stages: Number of stages to freeze; the third includes the overview. Defaults to 0.
        with_cp: See :class:`Stage`. Defaults to False.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        init_cfg: Initialization. ``Pretrained`` loads the authors' and our checkpoints, into ``deploy=True`` the merged
            ones. Defaults to a truncated normal with standard deviation 0.02 and zero biases.
    """

    arch_settings = {
        'xtiny': dict(depths=[2, 2, 3, 2], focus_depths=[6, 2], channels=[56, 112, 256, 336], heads=[8, 12]),
        'tiny': dict(depths=[4, 4, 6, 2], focus_depths=[12, 2], channels=[64, 128, 256, 512], heads=[8, 16]),
        'small': dict(depths=[6, 6, 8, 3], focus_depths=[16, 3], channels=[64, 128, 320, 512], heads=[16, 32]),
        'base': dict(depths=[8, 8, 10, 4], focus_depths=[20, 4], channels=[80, 160, 384, 576], heads=[12, 18]),
    }
    arch_options = dict(kernel_sizes=[17, 15, 13, 7])

    def __init__(
        self,
        arch: str | dict = 'tiny',
        detection: bool = False,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        dilated_branches: bool = True,
        deploy: bool = False,
        norm_cfg: dict = dict(type='BN'),  # noqa: B006 (as in RepLKNet)
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        with_cp: bool = False,
        norm_eval: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        depths, focus_depths, channels = settings['depths'], settings['focus_depths'], settings['channels']
        kernels, heads = settings['kernel_sizes'], settings['heads']
        if [len(part) for part in (channels, kernels, focus_depths, heads)] != [4, 4, 2, 2]:
            raise ValueError('OverLoCK: arch must have four channels and kernel_sizes, two focus_depths and heads')
        if not set(kernels) <= set(DILATED_BRANCHES):
            raise ValueError(f'OverLoCK: kernel_sizes={kernels} must be in {", ".join(map(str, DILATED_BRANCHES))}')
        if channels[3] % 4 or channels[2] % (2 * heads[0]) or channels[3] % (2 * heads[1]):
            raise ValueError(f'OverLoCK: channels={channels} must be multiples of 4 and of twice the heads {heads}')
        context = channels[3] // 4
        outputs = [*channels[:2], channels[2] + context, channels[3] + context]
        init_cfg = init_cfg or dict(type='TruncNormal', layer='Conv2d', std=0.02, bias=0.0)
        super().__init__(depths, outputs, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        for info in self.feature_info:
            info['module'] = info['module'].replace('stages', 'extra_norm')
        self.depths = [*depths, *focus_depths]
        norm = partial(build_norm, norm_cfg)

        def halve(before: int, after: int) -> list[nn.Module]:
            return [nn.Conv2d(before, after, 3, 2, 1, bias=False), norm(after)]

        def keep(width: int) -> list[nn.Module]:
            return [nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)]

        width, gelu = channels[0], nn.GELU
        stem = [*halve(in_channels, width // 2), gelu(), *keep(width // 2), gelu(), *halve(width // 2, width), gelu()]
        self.patch_embed1 = nn.Sequential(*stem, *keep(width))
        for i in range(3):
            self.add_module(f'patch_embed{i + 2}', nn.Sequential(*halve(*channels[i : i + 2])))
        self.high_level_proj = nn.Conv2d(channels[3], context, 1)
        x_proj, h_proj = nn.Sequential(*halve(*channels[2:])), nn.Sequential(*halve(context, context))
        self.patch_embedx = nn.ModuleDict(dict(x_proj=x_proj, h_proj=h_proj))
        rates = self.drop_path_rates(drop_path_rate)
        options = [(deploy, norm_cfg, DILATED_BRANCHES[kernel] if dilated_branches else ()) for kernel in kernels]
        for i, (width, kernel, depth) in enumerate(zip(channels, kernels, depths, strict=True)):
            base = [RepConvBlock(width, kernel, i > 1, *options[i], next(rates)) for _ in range(depth)]
            self.add_module(f'blocks{i + 1}', Stage(*base, with_cp=with_cp))
        for i in range(2):
            sizes = channels[i + 2], context, kernels[i + 2], heads[i]
            first = [i == 0 and j == 0 for j in range(focus_depths[i])]
            focus = [DynamicConvBlock(*sizes, is_first, *options[i + 2], next(rates)) for is_first in first]
            self.add_module(f'sub_blocks{i + 3}', Stage(*focus, with_cp=with_cp))
        norms = {str(i): LayerNorm2d(outputs[i]) for i in sorted({1, *self.out_indices})}  # the second is in the trunk
        self.h_proj = None
        if detection and 3 in self.out_indices:
            self.h_proj = nn.Sequential(nn.Conv2d(channels[3], outputs[3], 1), LayerScale(outputs[3], 1e-5))
            norms['4'] = LayerNorm2d(channels[3])
        self.extra_norm = nn.ModuleDict(norms)
        self._freeze()

    @property
    def stages(self) -> list[Any]:
        """Base and overview stages, then focus stages."""
        return [getattr(self, blocks) for _, blocks in _STAGES]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round up."""
        blocks1, blocks2, blocks3, blocks4, focus3, focus4 = self.stages
        embed1, embed2, embed3, embed4 = (getattr(self, f'patch_embed{i}') for i in range(1, 5))
        first = blocks1(embed1(self._to_compute_format(x)))
        second = self.extra_norm['1'](blocks2(embed2(first)))
        x = blocks3(embed3(second))
        overview = blocks4(embed4(x))
        coarse = self.high_level_proj(overview)
        context = F.interpolate(coarse, x.shape[2:], mode='bilinear')
        third = focus3(torch.cat((x, context), 1), context)
        width = x.shape[1]
        x = self.patch_embedx['x_proj'](third[:, :width])
        context = self.patch_embedx['h_proj'](third[:, width:])
        fourth = focus4(torch.cat((x, context), 1), coarse)
        maps = (first, second, third, fourth)
        features = [maps[i] if i == 1 else self.extra_norm[str(i)](maps[i]) for i in sorted(self.out_indices)]
        if self.h_proj is not None:
            features[-1] = features[-1] + self.h_proj(self.extra_norm['4'](overview))
        return self._to_output_format(features)

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        if parts[0] in ('extra_norm', 'h_proj'):
            return None
        for stage, (before, blocks) in enumerate(_STAGES):
            if parts[0] in (before, blocks):
                return stage, int(parts[1]) if parts[0] == blocks else None
        raise ValueError(f'OverLoCK has no parameter {".".join(parts)!r}')

    def _frozen_modules(self) -> list[nn.Module]:
        stages = _STAGES[: (0, 1, 2, 5, 6)[self.frozen_stages]]
        return [getattr(self, name) for names in stages for name in names]


register_variants(
    OverLoCK,
    {
        f'overlock-{short}': dict(
            config=dict(arch=arch),
            paper_name=f'OverLoCK-{short.upper()}',
            weights=(
                Weights(
                    'in1k',
                    'ImageNet-1K',
                    f'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_{short}_in1k_224.pth',
                ),
            ),
        )
        for short, arch in zip(['xt', 't', 's', 'b'], OverLoCK.arch_settings, strict=True)
    },
    detection=dict(detection=True),
    source='arXiv:2502.20087, LMMMEng/OverLoCK',
    licence='Apache-2.0',
)
