"""RDNet: a DenseNet of ConvNeXt's layers, whose blocks append their outputs to the map.

"DenseNets Reloaded: Paradigm Shift Beyond ResNets and ViTs", Kim, Heo, Han, ECCV 2024, arXiv:2403.19588. Reimplemented
from the paper. Parameter names and shapes are those of the authors' code (Apache-2.0), so that their checkpoints load.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor

from replk_mm.backbones.catalogue import Weights, register_variants
from replk_mm.backbones.layers import Backbone, build_norm, run_checkpointed
from replk_mm.ops import DepthwiseConv2d
from replk_mm.registry import MODELS

#: Dense blocks of each dense stage.
BLOCKS = 3


class EffectiveSE(nn.Module):
    """Squeeze-and-excitation with one layer: scale each channel by a function of the means of all. arXiv:1911.06667.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class DenseBlock(nn.Module):
    """Depthwise convolution, norm, pointwise layer, GELU, pointwise layer, layer scale: the channels to append.

    Args:
        channels: Channels of the input.
        growth_rate: Channels of the output.
        use_se: Add :class:`EffectiveSE` after the last layer.
        drop_path: Drop path rate.
        norm_cfg: Normalization layer.
        layer_scale_init_value: Initial value of the layer scale.
    """

    def __init__(
        self,
        channels: int,
        growth_rate: int,
        use_se: bool,
        drop_path: float,
        norm_cfg: dict,
        layer_scale_init_value: float,
    ) -> None:
        super().__init__()
        width = channels // 2 * 8  # four times, down to a multiple of 8
        self.gamma = nn.Parameter(torch.full((growth_rate,), float(layer_scale_init_value)))
        layers = nn.Sequential(
            DepthwiseConv2d(channels, 7),
            build_norm(norm_cfg, channels),
            nn.Conv2d(channels, width, 1),
            nn.GELU(),
            nn.Conv2d(width, growth_rate, 1),
        )
        if use_se:
            layers.append(EffectiveSE(growth_rate))
        self.layers = nn.Sequential(OrderedDict(layers=layers))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop_path(self.layers(x) * self.gamma.view(-1, 1, 1))


class DenseStage(nn.Sequential):
    """Dense blocks, each of which sees the input and the outputs of the blocks before it.

    Args:
        *blocks: In the order of execution.
        with_cp: See :class:`Stage`.
    """

    def __init__(self, *blocks: nn.Module, with_cp: bool) -> None:
        super().__init__(OrderedDict((f'dense_block{i}', block) for i, block in enumerate(blocks)))
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = torch.cat((x, run_checkpointed(block, x, enabled=self.with_cp)), 1)
        return x


@MODELS.register_module()
class RDNet(Backbone):
    """RDNet backbone.

    The features are the plain maps before each halving of the resolution, and the last one.

    Args:
        arch: Name of a variant in :attr:`arch_settings`, or a dict with the same keys: channels of the stem, and for
            each resolution the growth rates of its dense stages. Defaults to ``'tiny'``.
        in_channels: Channels of the image. Defaults to 3.
        drop_path_rate: Drop path rate of the last block; it grows linearly from 0 at the first. Defaults to 0.
        layer_scale_init_value: Initial value of the layer scale. Defaults to 1e-6.
        norm_cfg: Normalization layers. Defaults to ``dict(type='LN2d', eps=1e-6)``.
        feature_norm_cfg: Normalization of each feature, ``norm0`` to ``norm3``; the authors have
            ``dict(type='GN', num_groups=1)`` in detectors. Defaults to None.
        out_indices: Resolutions whose features are returned, at strides 4, 8, 16 and 32. Defaults to all four.
        frozen_stages: Number of resolutions to freeze, with the stem before the first. Defaults to 0.
        norm_eval, out_memory_format: See :class:`Backbone`. Default to False and ``'contiguous_format'``.
        with_cp: See :class:`Stage`. Defaults to False.
        init_cfg: Initialization. ``Pretrained`` loads the authors', timm's and our checkpoints. Defaults to Kaiming
            normal and zero biases.
    """

    arch_settings = {
        'tiny': dict(stem_channels=64, growth_rates=[[64], [104], 4 * [128], [224]]),
        'small': dict(stem_channels=72, growth_rates=[[64], [128], 7 * [128], 2 * [240]]),
        'base': dict(stem_channels=120, growth_rates=[[96], [128], 7 * [168], 2 * [336]]),
        'large': dict(stem_channels=144, growth_rates=[[128], [192], 8 * [256], 2 * [360]]),
    }

    def __init__(
        self,
        arch: str | dict = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        norm_cfg: dict = dict(type='LN2d', eps=1e-6),  # noqa: B006 (as in RepLKNet)
        feature_norm_cfg: dict | None = None,
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        norm_eval: bool = False,
        with_cp: bool = False,
        out_memory_format: str = 'contiguous_format',
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        settings = self.resolve_arch(arch)
        width, growth_rates = settings['stem_channels'], settings['growth_rates']
        if not all(growth_rates):
            raise ValueError(f'RDNet: growth_rates={growth_rates} must have a dense stage for each resolution')
        # of each dense stage: channels before and after the transition, growth rate
        plan: list[tuple[int, int, int]] = []
        channels = []
        for growths in growth_rates:
            for growth in growths:
                inner = width // 16 * 8 if plan else width  # half, down to a multiple of 8
                plan.append((width, inner, growth))
                width = inner + BLOCKS * growth
            channels.append(width)
        depths = [BLOCKS * len(growths) for growths in growth_rates]
        init_cfg = init_cfg or dict(type='Kaiming', layer='Conv2d', mode='fan_in')
        super().__init__(depths, channels, out_indices, frozen_stages, norm_eval, out_memory_format, init_cfg)
        self.ends = list(accumulate(map(len, growth_rates)))  # number of dense stages down to each resolution
        for info, i in zip(self.feature_info, sorted(self.out_indices), strict=True):
            info['module'] = f'dense_stages.{self.ends[i] - 1}'

        stem = nn.Conv2d(in_channels, plan[0][0], 4, 4), build_norm(norm_cfg, plan[0][0])
        self.stem = nn.Sequential(OrderedDict(stem=nn.Sequential(*stem)))
        rates = self.drop_path_rates(drop_path_rate)
        self.dense_stages = nn.ModuleList()
        for i, (before, width, growth) in enumerate(plan):
            layers: list[nn.Module] = []
            if i > 0:
                stride = 2 if i in self.ends else 1
                layers = [build_norm(norm_cfg, before), nn.Conv2d(before, width, stride, stride)]
            blocks = (
                DenseBlock(width + j * growth, growth, i >= 2, next(rates), norm_cfg, layer_scale_init_value)
                for j in range(BLOCKS)
            )
            self.dense_stages.append(nn.Sequential(*layers, DenseStage(*blocks, with_cp=with_cp)))
        if feature_norm_cfg:
            for i in self.out_indices:
                self.add_module(f'norm{i}', build_norm(feature_norm_cfg, channels[i]))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of images as :meth:`Backbone.forward` does. Sides round down."""
        x = self.stem(self._to_compute_format(x))
        features = []
        for i, (start, end) in enumerate(pairwise([0, *self.ends])):
            for stage in self.dense_stages[start:end]:
                x = stage(x)
            if i in self.out_indices:
                features.append(getattr(self, f'norm{i}')(x) if hasattr(self, f'norm{i}') else x)
        return self._to_output_format(features)

    def _locate_parameter(self, parts: list[str]) -> tuple[int, int | None] | None:
        match parts:
            case ['stem', *_]:
                return 0, None
            case ['dense_stages', stage, *_]:
                return int(stage), 0
            case [norm, *_] if norm in {f'norm{i}' for i in self.out_indices}:
                return None
        raise ValueError(f'RDNet has no parameter {".".join(parts)!r}')

    def get_layer_depth(self, name: str, prefix: str = '') -> tuple[int, int]:
        """Return the layer id of a parameter. Each dense stage is a layer, as in the authors' code.

        Arguments and errors are those of :meth:`Backbone.get_layer_depth`.
        """
        location, count = self._locate(name, prefix), len(self.dense_stages) + 2
        if location is None:
            return count - 1, count
        stage, block = location
        return (0 if block is None else stage + 1), count

    get_stage_depth = get_layer_depth

    def _frozen_modules(self) -> list[Any]:
        return [self.stem, *self.dense_stages[: self.ends[self.frozen_stages - 1]]] if self.frozen_stages else []


def _weights(arch: str) -> Iterator[Weights]:
    yield Weights('in1k', 'ImageNet-1K', f'hf-hub:naver-ai/rdnet_{arch}.nv_in1k')
    if arch == 'large':
        yield Weights('in1k-384', 'ImageNet-1K', f'hf-hub:naver-ai/rdnet_{arch}.nv_in1k_ft_in1k_384')


register_variants(
    RDNet,
    {
        f'rdnet-{arch}': dict(
            config=dict(arch=arch), paper_name=f'RDNet-{arch[0].upper()}', weights=tuple(_weights(arch))
        )
        for arch in RDNet.arch_settings
    },
    detection=dict(feature_norm_cfg=dict(type='GN', num_groups=1)),
    source='arXiv:2403.19588, naver-ai/rdnet',
    licence='Apache-2.0',
)
